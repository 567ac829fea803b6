"""From arrays of any size to square tensors in [0, 1]: deterministic, before the backbone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from iumad.data.catalogue import DataError
from iumad.data.reading import RawSample

DEPTH_MODES = ("z", "xyz_raw")

# A resized depth pixel counts as measured if at least half of what it covers was.
_MIN_COVERAGE = 0.5
# Percentiles that bound the bulk of an image's depth, and the room left beyond them for defects to show.
_BULK = (1.0, 99.0)
_HEADROOM = 0.1
# A range this small beside the values is float32 rounding.
_FLAT = 1e-6


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A sample as the network takes it: rgb, depth float32 (3, S, S) in [0, 1]; valid, mask bool (S, S)."""

    rgb: Tensor | None
    depth: Tensor | None
    valid: Tensor | None
    mask: Tensor | None


def prepare(raw: RawSample, size: int, *, depth_mode: str = "z") -> Prepared:
    """Resize and scale one sample to ``size`` x ``size`` (aspect ratio not kept, paper.md 1.5).

    rgb: antialiased bilinear, / 255. mask: nearest pixel, after ``> 0``. depth: mean over the valid pixels
    an output pixel covers, the rest filled from the nearest valid pixel, then the image's own robust range
    mapped into [0, 1]. ``depth_mode="z"`` replicates the depth to three channels; ``"xyz_raw"`` gives x, y,
    z, each on its own range, and needs an xyz file.
    """
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1")
    if depth_mode not in DEPTH_MODES:
        raise ValueError(f"depth_mode is {depth_mode!r}, expected one of {', '.join(DEPTH_MODES)}")
    rgb = depth = valid = mask = None
    if raw.rgb is not None:
        pixels = torch.from_numpy(raw.rgb).permute(2, 0, 1).float()
        rgb = _resize(pixels, size).div_(255).clamp_(0, 1)
    if raw.depth is not None:
        assert raw.valid is not None
        if depth_mode == "xyz_raw" and raw.xyz is None:
            raise DataError(
                "depth_mode 'xyz_raw' needs an xyz TIFF, but this sample's depth file has one channel"
            )
        channels = raw.depth[None] if depth_mode == "z" else np.moveaxis(np.asarray(raw.xyz), 2, 0)
        depth, valid = _prepare_depth(channels, raw.valid, size)
        depth = depth.expand(3, size, size).contiguous()
    if raw.mask is not None:
        mask = (
            F.interpolate(torch.from_numpy(raw.mask)[None, None].float(), (size, size), mode="nearest-exact")[
                0, 0
            ]
            > 0
        )
    return Prepared(rgb=rgb, depth=depth, valid=valid, mask=mask)


def _resize(image_CHW: Tensor, size: int) -> Tensor:
    return F.interpolate(image_CHW[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[
        0
    ]


def _prepare_depth(
    channels: NDArray[np.float32], valid: NDArray[np.bool_], size: int
) -> tuple[Tensor, Tensor]:
    """Channels (C, H, W) to filled, scaled (C, S, S) and the validity (S, S) of the resized pixels."""
    if not valid.any():
        return torch.zeros(len(channels), size, size), torch.zeros(size, size, dtype=torch.bool)
    # float64: sums of millimetres beside metres must not depend on the order a resize adds them up in.
    values = torch.from_numpy(np.where(valid, channels, 0).astype(np.float64))
    weight = torch.from_numpy(valid.astype(np.float64))[None]
    coverage = _resize(weight, size)
    resized = _resize(values, size) / coverage.clamp_min(1e-12)
    measured = coverage[0] >= _MIN_COVERAGE
    if not measured.any():  # scattered points: keep whatever was touched
        measured = coverage[0] > 0
    filled = _fill_from_nearest(resized.numpy(), measured.numpy())
    scaled = np.stack([_scale_by_bulk(channel, measured.numpy()) for channel in filled])
    return torch.from_numpy(scaled.astype(np.float32)), measured


def _fill_from_nearest(values_CHW: NDArray[np.float64], measured: NDArray[np.bool_]) -> NDArray[np.float64]:
    if measured.all():
        return values_CHW
    from scipy.ndimage import distance_transform_edt

    rows, columns = distance_transform_edt(~measured, return_distances=False, return_indices=True)
    return values_CHW[:, rows, columns]


def _scale_by_bulk(values: NDArray[np.float64], measured: NDArray[np.bool_]) -> NDArray[np.float64]:
    low, high = np.percentile(values[measured], _BULK)
    if high - low <= _FLAT * max(abs(low), abs(high)):  # no shape, only rounding
        return np.full_like(values, 0.5)
    margin = _HEADROOM * (high - low)
    low, high = low - margin, high + margin
    return np.clip((values - low) / (high - low), 0, 1)
