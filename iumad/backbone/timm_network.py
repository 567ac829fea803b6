"""Any convolutional network of timm as a feature extractor with taps at strides 2, 4, 8 and 16."""

from __future__ import annotations

from typing import Any

from torch import nn


def timm_network(name: str, weights_path: str | None) -> tuple[nn.Module, tuple[int, ...], dict[str, Any]]:
    """The network, its tap channels, and its pixel scaling (`mean`, `std`).

    Without `weights_path` timm loads its pretrained weights, from its own cache or the network.
    Raises ValueError if timm is missing, the name unknown, or the network has no stride-16 features.
    """
    try:
        import timm
    except ImportError:
        raise ValueError(
            f"backbone.name = 'timm:{name}': timm is not installed; run: pip install timm"
        ) from None
    overlay = {"file": weights_path} if weights_path else None
    try:
        untrained: Any = timm.create_model(name, features_only=True, pretrained=False)
        strides = untrained.feature_info.reduction()
        taps = [i for i, stride in enumerate(strides) if stride <= 16]
        network: Any = timm.create_model(
            name, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay, out_indices=taps
        )
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"backbone.name = 'timm:{name}': {error}") from error
    if strides[taps[-1]] != 16:
        raise ValueError(f"backbone.name = 'timm:{name}': no features at stride 16 (strides {strides})")
    scale = {key: tuple(network.pretrained_cfg[key]) for key in ("mean", "std")}
    return network, tuple(network.feature_info.channels()), scale
