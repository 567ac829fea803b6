"""Light and sensors of the demo set: from a surface to the colour picture and the depth picture.

The camera looks straight down from ``CAMERA_MM`` on a field of ``FIELD_MM``; the light is a soft dome and a
lamp. The depth sensor has a projector at its left, noise that grows with slope, and gaps where it sees
nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from iumad.data.demo.fields import Field, Generator
from iumad.data.demo.objects import Surface

FIELD_MM = 100.0
CAMERA_MM = 400.0
DEPTH_UNITS_PER_MM = 100.0


def photograph(surface: Surface, rng: Generator) -> NDArray[np.uint8]:
    """Colour picture, uint8 (H, W, 3): shading, cast shadows, highlights, exposure, lens and sensor noise."""
    height, pixel = surface.height, FIELD_MM / surface.height.shape[1]
    bearing, elevation = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 0.95)
    lamp = np.array(
        [np.cos(bearing) * np.cos(elevation), np.sin(bearing) * np.cos(elevation), np.sin(elevation)]
    )
    slope_y, slope_x = np.gradient(gaussian_filter(height, 0.6), pixel)
    length = np.sqrt(slope_x**2 + slope_y**2 + 1)
    facing = np.clip((-slope_x * lamp[0] - slope_y * lamp[1] + lamp[2]) / length, 0, None)
    lit = 1 - _shadow(height, lamp, pixel)
    hollow = sum(np.clip(gaussian_filter(height, s / pixel) - height, 0, None) / s for s in (1.5, 5.0))
    dome = (0.55 + 0.45 / length) * np.exp(-0.9 * hollow)
    half_way = lamp + [0, 0, 1]
    half_way /= np.linalg.norm(half_way)
    mirror = np.clip((-slope_x * half_way[0] - slope_y * half_way[1] + half_way[2]) / length, 0, 1)
    highlight = surface.gloss * mirror**40 * lit
    diffuse = surface.albedo * (0.62 * dome + 0.50 * facing * lit)[..., None]
    light = diffuse + (0.45 * highlight)[..., None]

    white = 1 + rng.normal(scale=0.02, size=3)
    rows, columns = np.mgrid[-1 : 1 : height.shape[0] * 1j, -1 : 1 : height.shape[1] * 1j]
    vignette = 1 - 0.10 * (rows**2 + columns**2)
    light = light * (rng.uniform(0.92, 1.08) * white) * vignette[..., None]
    light = gaussian_filter(light, (0.55, 0.55, 0))
    electrons = 4500 * np.clip(light, 0, 1.5)
    electrons = electrons + np.sqrt(electrons + 30) * rng.standard_normal(light.shape)
    display = np.clip(electrons / 4500, 0, 1) ** (1 / 2.2)
    return np.round(255 * display).astype(np.uint8)


def measure_depth(surface: Surface, rng: Generator) -> NDArray[np.uint16]:
    """Depth picture, uint16 (H, W) in 1/100 mm from the camera; 0 where the sensor has no measurement."""
    height, pixel = surface.height, FIELD_MM / surface.height.shape[1]
    rows, columns = np.mgrid[-0.5 : 0.5 : height.shape[0] * 1j, -0.5 : 0.5 : height.shape[1] * 1j] * FIELD_MM
    tilt = rng.normal(scale=0.012, size=2)
    distance = CAMERA_MM + rng.normal(scale=1.0) - height + tilt[0] * columns + tilt[1] * rows
    slope_y, slope_x = np.gradient(height, pixel)
    steep = np.hypot(slope_x, slope_y)
    coarse = gaussian_filter(rng.standard_normal(height.shape), 1.5) * 4
    sigma = 0.06 * (1 + np.clip(steep, 0, 4))
    distance = gaussian_filter(distance, 0.5) + sigma * (
        0.6 * rng.standard_normal(height.shape) + 0.6 * coarse
    )
    projector = np.array([-np.cos(1.15), 0, np.sin(1.15)])
    blind = _shadow(height, projector, pixel) > 0.5
    blind |= steep > 3.5 * rng.uniform(0.6, 1.4, size=height.shape)
    glare = gaussian_filter(rng.standard_normal(height.shape), 1.2) * 4.25  # unit variance again
    blind |= glare > 2.8 - 3.5 * surface.gloss
    blind |= rng.uniform(size=height.shape) < 0.002
    units = np.clip(np.round(distance * DEPTH_UNITS_PER_MM), 1, 65535)
    return np.where(blind, 0, units).astype(np.uint16)


def _shadow(height: Field, lamp: NDArray[np.float64], pixel: float) -> Field:
    """How much of each point is hidden from a light in direction ``lamp``: 0 lit, 1 dark, with a penumbra."""
    horizontal = float(np.hypot(lamp[0], lamp[1]))
    rise = float(lamp[2]) / horizontal
    reach = int(float(height.max() - height.min()) / (rise * pixel)) + 1
    padded = np.pad(height, reach, mode="edge")
    rows, columns = height.shape
    hidden = np.zeros_like(height)
    for distance in range(1, reach + 1):
        row = reach + round(distance * lamp[1] / horizontal)
        column = reach + round(distance * lamp[0] / horizontal)
        blocker = padded[row : row + rows, column : column + columns]
        excess = blocker - height - np.float32(distance * rise * pixel)
        hidden = np.maximum(hidden, np.clip(excess / np.float32(0.3 + 0.08 * distance), 0, 1))
    return hidden
