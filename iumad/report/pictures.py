"""Pictures of results: heat maps and RGB | depth | map | mask panels, with numpy and Pillow only."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # (H, W, 3)

# Lightness grows steadily from left to right, so that the map also reads in grey.
_ANCHORS = np.array(
    [
        (13, 12, 38),
        (58, 20, 100),
        (123, 33, 118),
        (189, 52, 102),
        (236, 93, 66),
        (250, 154, 51),
        (252, 240, 170),
    ],
    dtype=np.float64,
)
_GAP = 6  # pixels between the tiles of a panel


def colour(values: NDArray[Any], low: float, high: float) -> Pixels:
    """Map numbers (H, W) to colours: ``low`` and below dark, ``high`` and above bright."""
    scaled = np.clip((values.astype(np.float64) - low) / max(high - low, 1e-12), 0, 1) * (len(_ANCHORS) - 1)
    left = np.minimum(scaled.astype(int), len(_ANCHORS) - 2)
    part = (scaled - left)[..., None]
    return np.rint(_ANCHORS[left] * (1 - part) + _ANCHORS[left + 1] * part).astype(np.uint8)


def grey(values: NDArray[Any]) -> Pixels:
    """Show numbers in [0, 1] (H, W) in grey."""
    pixels = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=2)


def outline(
    picture: Pixels, region: NDArray[np.bool_], paint: tuple[int, int, int] = (255, 255, 255)
) -> Pixels:
    """Draw the inner border of a region (H, W) on a copy of ``picture``."""
    padded = np.pad(region, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    copy = picture.copy()
    copy[region & ~inside] = paint
    return copy


def panel(
    images: dict[str, NDArray[np.float32]],
    score_map: NDArray[Any],
    mask: NDArray[np.bool_] | None,
    *,
    low: float,
    high: float,
) -> Pixels:
    """RGB | depth | map with the mask's outline | mask side by side; what is missing is left out.

    Args:
        images: prepared images by modality, (3, S, S) in [0, 1].
        score_map: (S, S).
        mask: (S, S), or None where no ground truth exists.
        low: the score shown darkest.
        high: the score shown brightest; share both within a class.
    """
    tiles = []
    if "rgb" in images:
        tiles.append(np.rint(images["rgb"].transpose(1, 2, 0) * 255).astype(np.uint8))
    if "depth" in images:
        tiles.append(grey(images["depth"].mean(axis=0)))
    heat = colour(score_map, low, high)
    tiles.append(heat if mask is None else outline(heat, mask))
    if mask is not None:
        tiles.append(grey(mask.astype(np.float64)))
    gap = np.full((score_map.shape[0], _GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([part for tile in tiles for part in (gap, tile)][1:], axis=1)


def png(picture: Pixels) -> bytes:
    """Encode a picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
