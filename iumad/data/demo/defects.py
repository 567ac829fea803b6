"""The defects of the demo set: each changes the surface around one point of the object.

Colour only: stain. Mainly colour: scratch. Mainly depth: dent, bump (wide and smooth, hardly
shaded under soft light). Both: foreign object and missing part; the latter is made by the objects themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from iumad.data.demo.fields import Field, Generator, box, colour, hill, noise, rim, step
from iumad.data.demo.objects import Surface

MISSING_PART = "missing_part"


def scratch(surface: Surface, x: Field, y: Field, rng: Generator) -> None:
    """A slightly bent line, 14 to 30 mm long and about 1 mm wide, that lays bare paler material."""
    angle, bend = rng.uniform(0, np.pi), rng.normal(scale=0.012)
    half, width = rng.uniform(7, 15), rng.uniform(0.45, 0.75)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    line = step(width - np.abs(across - bend * along * along), 0.4) * step(half - np.abs(along), 1.5)
    line *= surface.cover
    surface.height -= 0.35 * line
    surface.albedo += (0.6 * line)[..., None] * (1.5 * surface.albedo + 0.10 - surface.albedo)


def stain(surface: Surface, x: Field, y: Field, rng: Generator) -> None:
    """A flat blot of oil, ink or rust, 4 to 8 mm in radius."""
    tint = (colour(0.50, 0.48, 0.42), colour(0.42, 0.50, 0.80), colour(0.95, 0.62, 0.38))[
        int(rng.integers(3))
    ]
    radius = rng.uniform(4, 8)
    blot = step(radius - np.hypot(x, y) + 1.3 * noise(x, y, 4, rng), 0.8) * surface.cover
    surface.albedo *= 1 - blot[..., None] * (1 - tint)


def dent(surface: Surface, x: Field, y: Field, rng: Generator) -> None:
    """A smooth hollow, 7 to 10 mm in radius, 1.5 to 2.6 mm deep."""
    stretch = rng.uniform(0.8, 1.25)
    hollow = rng.uniform(1.5, 2.6) * hill(np.hypot(x * stretch, y / stretch), rng.uniform(7, 10))
    surface.height -= hollow * surface.cover


def bump(surface: Surface, x: Field, y: Field, rng: Generator) -> None:
    """A smooth swelling, 7 to 10 mm in radius, 1.5 to 2.6 mm high."""
    stretch = rng.uniform(0.8, 1.25)
    swelling = rng.uniform(1.5, 2.6) * hill(np.hypot(x * stretch, y / stretch), rng.uniform(7, 10))
    surface.height += swelling * surface.cover


def foreign_object(surface: Surface, x: Field, y: Field, rng: Generator) -> None:
    """A pebble, a plastic chip or a metal nut lying on the object."""
    angle = rng.uniform(0, np.pi)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    which = int(rng.integers(3))
    if which == 0:
        size = rng.uniform(2.6, 4.2)
        inside = size - np.hypot(u, 1.3 * v) + 0.35 * noise(x, y, 2, rng)
        thickness, material = 0.8 * size * rim(inside, size), colour(0.30, 0.28, 0.26)
        material = material * (1 + 0.15 * noise(x, y, 0.9, rng))[..., None]
        gloss = 0.05
    elif which == 1:
        inside = box(u, v, rng.uniform(3, 5), rng.uniform(1.8, 2.8), 0.6)
        thickness = rng.uniform(1.2, 2.0) * rim(inside, 0.6)
        material = (colour(0.60, 0.06, 0.05), colour(0.75, 0.75, 0.72), colour(0.05, 0.18, 0.50))[
            int(rng.integers(3))
        ]
        gloss = 0.3
    else:
        size = rng.uniform(3.2, 4.4)
        sides = np.stack([np.abs(u), np.abs(u / 2 + v * 0.866), np.abs(u / 2 - v * 0.866)])
        inside = np.minimum(size - sides.max(axis=0), np.hypot(u, v) - 0.5 * size).astype(np.float32)
        thickness, material, gloss = 2.6 * rim(inside, 0.5), colour(0.42, 0.40, 0.36), 0.4
    there = step(inside)
    # It rests on what lies under its middle, table included.
    rest = float(np.median(surface.height[inside > 0])) if (inside > 0).any() else 0.0
    surface.height += there * (np.maximum(rest, surface.height) + thickness - surface.height)
    surface.albedo += there[..., None] * (material - surface.albedo)
    surface.gloss += there * (gloss - surface.gloss)
    surface.cover = np.maximum(surface.cover, there)


DEFECTS: dict[str, Callable[[Surface, Field, Field, Generator], None]] = {
    "bump": bump,
    "dent": dent,
    "foreign_object": foreign_object,
    "scratch": scratch,
    "stain": stain,
}
DEFECT_KINDS = tuple(sorted([*DEFECTS, MISSING_PART]))
