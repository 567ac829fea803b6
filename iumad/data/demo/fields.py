"""Scalar fields over the plane, in millimetres: noise, photographed textures, and soft shapes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

Field = NDArray[np.floating[Any]]
Generator = np.random.Generator


@cache
def _texture(name: str) -> Field:
    """A texture photograph that ships inside scikit-image, as zero-mean, unit-variance float32 (512, 512)."""
    import skimage.data

    image = getattr(skimage.data, name)().astype(np.float32)
    return np.asarray((image - image.mean()) / image.std(), dtype=np.float32)


def photo(
    name: str, x: Field, y: Field, millimetres_per_pixel: float, rng: Generator, *, reach: float = 0
) -> Field:
    """The texture ``brick``, ``grass`` or ``gravel`` at (x, y), from a random place of the photograph.

    Up to ``reach`` millimetres from the origin it is not mirrored at the photograph's edge.
    """
    margin = reach / millimetres_per_pixel
    row, column = rng.uniform(margin, 512 - margin, size=2)
    scale = np.float32(1 / millimetres_per_pixel)
    at = np.stack([y * scale + np.float32(row), x * scale + np.float32(column)])
    return map_coordinates(_texture(name), at, order=1, mode="mirror")


def noise(x: Field, y: Field, millimetres: float, rng: Generator) -> Field:
    """Smooth noise of about unit variance whose bumps are ``millimetres`` wide."""
    lattice = rng.standard_normal((64, 64)).astype(np.float32)
    at = np.stack([y, x]) / np.float32(millimetres) + 32
    cell = np.floor(at)
    part = at - cell
    at = cell + part * part * (3 - 2 * part)  # smooth slopes at the lattice points
    return map_coordinates(lattice, at, order=1, mode="grid-wrap") * np.float32(1.5)


def step(distance: Any, softness: float = 0.35) -> Field:
    """0 below -softness, 1 above softness, smooth between: an edge at distance 0 (millimetres)."""
    t = np.clip(np.asarray(distance, dtype=np.float32) / np.float32(2 * softness) + np.float32(0.5), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)


def box(x: Field, y: Field, half_width: float, half_height: float, radius: float) -> Field:
    """Signed distance into a rectangle with rounded corners: positive inside, millimetres."""
    dx, dy = np.abs(x) - (half_width - radius), np.abs(y) - (half_height - radius)
    outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
    return np.asarray(radius - outside - np.minimum(np.maximum(dx, dy), 0), dtype=np.float32)


def rim(distance: Field, radius: float) -> Field:
    """Profile of a rounded edge: 0 at the border, 1 from ``radius`` millimetres inside on."""
    t = np.clip(distance / np.float32(radius), 0, 1)
    return np.sqrt(np.clip(1 - (1 - t) ** 2, 0, 1), dtype=np.float32)


def hill(distance: Field, radius: float) -> Field:
    """Smooth hill of height 1 with the compact support ``distance < radius``."""
    return np.asarray(0.5 + 0.5 * np.cos(np.pi * np.clip(distance / radius, 0, 1)), dtype=np.float32)


def wobble(angle: Field, rng: Generator, orders: int) -> Field:
    """Irregularity of a closed curve: ``orders`` sines of the angle of falling amplitude."""
    total = np.zeros_like(angle)
    for order in range(2, orders + 2):
        amplitude, phase = rng.normal() / order, rng.uniform(0, 2 * np.pi)
        total += np.float32(amplitude) * np.sin(order * angle + np.float32(phase))
    return total


def colour(*rgb: float) -> Field:
    """A linear-light colour to broadcast over (H, W, 3)."""
    return np.array(rgb, dtype=np.float32)
