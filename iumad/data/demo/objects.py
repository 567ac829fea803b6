"""The objects of the demo set: six classes, each a function from coordinates to shape and material.

Coordinates are millimetres in the object's own frame. ``damage`` is None, or a generator that chooses
which part is missing; all else is drawn from ``rng`` in the same order, so the rest stays the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from iumad.data.demo.fields import Field, Generator, box, colour, hill, noise, photo, rim, step, wobble


@dataclass
class Surface:
    """What the camera sees: height (H, W) in mm; albedo (H, W, 3), cover and gloss (H, W) in [0, 1]."""

    height: Field
    albedo: Field
    cover: Field
    gloss: Field


ObjectMaker = Callable[[Field, Field, Generator, "Generator | None"], Surface]


def biscuit(x: Field, y: Field, rng: Generator, damage: Generator | None) -> Surface:
    """A round biscuit with chocolate chips; a bite is missing."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    inside = 35 + 0.9 * wobble(angle, rng, 6) - radius
    crumb = photo("gravel", x, y, 0.16, rng)
    baked = noise(x, y, 14, rng)
    height = 8.0 * rim(inside, 7) + 0.5 * baked + 0.22 * crumb
    albedo = (1 + 0.10 * crumb + 0.07 * baked)[..., None] * colour(0.56, 0.34, 0.15)
    albedo *= (0.62 + 0.38 * step(inside - 3, 4))[..., None]
    for _ in range(int(rng.integers(11, 16))):
        distance, bearing = 28 * np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
        size, stretch = rng.uniform(2.3, 3.8), rng.uniform(0.75, 1.25)
        dx, dy = x - distance * np.cos(bearing), y - distance * np.sin(bearing)
        from_chip = size - np.hypot(dx * stretch, dy / stretch)
        height += 1.7 * rim(from_chip, size)
        albedo += step(from_chip)[..., None] * (colour(0.075, 0.035, 0.018) - albedo)
    if damage is not None:
        bearing, bite = damage.uniform(0, 2 * np.pi), damage.uniform(7, 11)
        jaw = np.hypot(x - 36 * np.cos(bearing), y - 36 * np.sin(bearing)) + 0.6 * wobble(
            angle * 5, damage, 3
        )
        inside = np.minimum(inside, jaw - bite)
    return Surface(height, albedo, step(inside), 0.03 * np.ones_like(x))


def tile(x: Field, y: Field, rng: Generator, damage: Generator | None) -> Surface:
    """A square plate with a brick relief, cut from a random place of a wall; a corner is broken off."""
    inside = box(x, y, 37, 37, 2.5)
    wall = photo("brick", x, y, 0.22, rng, reach=38)
    grain = noise(x, y, 1.1, rng)
    height = 6.5 * rim(inside, 2) + 0.45 * np.clip(wall, -2.2, 1.2) + 0.08 * grain
    tone = noise(x, y, 17, rng)
    albedo = (0.95 + 0.20 * np.clip(wall, -2.2, 2) + 0.06 * tone + 0.04 * grain)[..., None] * colour(
        0.42, 0.19, 0.13
    )
    if damage is not None:
        sx, sy = damage.choice([-1, 1], size=2)
        slope, size = damage.uniform(0.6, 1.6), damage.uniform(11, 17)
        crack = 0.9 * noise(x, y, 4, damage)
        inside = np.minimum(
            inside, ((37 - sx * x) + slope * (37 - sy * y)) / np.hypot(1, slope) - size * 0.7 + crack
        )
    return Surface(height, np.clip(albedo, 0.01, 1), step(inside), 0.02 * np.ones_like(x))


def gear(x: Field, y: Field, rng: Generator, damage: Generator | None) -> Surface:
    """A machined steel gear with fourteen teeth and five holes; a tooth is missing."""
    teeth = 14
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    flank = np.clip(0.5 + 1.7 * np.cos(teeth * angle), 0, 1)
    if damage is not None:
        lost = 2 * np.pi * damage.integers(teeth) / teeth
        away = np.abs(np.angle(np.exp(1j * (angle - lost))))
        flank = flank * (away > np.pi / teeth) + damage.uniform(0, 0.25) * (away <= np.pi / teeth)
    inside = (30.5 + 6.0 * flank - radius).astype(np.float32)
    web = step(radius - 13, 0.8) * step(25.5 - radius, 0.8)
    height = 10 * rim(inside, 1.0) - 3.2 * web
    turned = noise(radius * 3, angle / 20, 1.0, rng)
    patina = noise(x, y, 12, rng)
    albedo = (1 + 0.10 * turned + 0.06 * patina)[..., None] * colour(0.33, 0.34, 0.36)
    albedo *= (1 - 0.35 * web)[..., None]
    open_holes = step(5.5 - radius)
    for spoke in range(5):
        bearing = 2 * np.pi * spoke / 5
        open_holes = np.maximum(
            open_holes, step(3.9 - np.hypot(x - 19 * np.cos(bearing), y - 19 * np.sin(bearing)))
        )
    return Surface(height, albedo, step(inside) * (1 - open_holes), 0.35 + 0.05 * turned)


def rope(x: Field, y: Field, rng: Generator, damage: Generator | None) -> Surface:
    """Three twisted strands, one of them blue, running out of the picture; part of a strand is missing."""
    pitch, phase = 52.0, rng.uniform(0, 2 * np.pi)
    y = y + np.float32(2.0) * noise(x, np.zeros_like(x), 45, rng)
    lost, lost_at, lost_length = -1, 0.0, 1.0
    if damage is not None:
        lost, lost_length = int(damage.integers(3)), damage.uniform(0.22, 0.3) * pitch
        # Middle of the gap: where this strand lies on top, in one of the turns near the centre.
        lost_at = pitch * (0.25 - lost / 3 - phase / (2 * np.pi))
        lost_at += pitch * round(-lost_at / pitch) + damage.uniform(-4, 4)
    top = np.full_like(x, -50)
    strand = np.zeros(x.shape, dtype=np.int8)
    lateral = np.zeros_like(x)
    for k in range(3):
        turn = 2 * np.pi * (x / pitch + k / 3) + phase
        offset = y - 8.0 * np.cos(turn)
        height = 9 + 7.0 * np.sin(turn) + np.sqrt(np.clip(81 - offset * offset, 0, None))
        present = np.abs(offset) < 9
        if k == lost:
            present &= np.abs(x - lost_at) > lost_length
        higher = present & (height > top)
        top, strand, lateral = (
            np.where(higher, height, top),
            np.where(higher, k, strand),
            np.where(higher, offset, lateral),
        )
    fibre = photo("grass", x * 0.35 + lateral * 0.9, lateral - x * 0.25, 0.12, rng)
    dust = noise(x, y, 9, rng)
    albedo = np.where((strand == 0)[..., None], colour(0.10, 0.20, 0.40), colour(0.50, 0.40, 0.25))
    albedo = albedo * (1 + 0.22 * np.clip(fibre, -2, 2) + 0.07 * dust)[..., None]
    cover = (top > 0).astype(np.float32)
    shape = np.where(top > 0, top + 0.18 * fibre, 0)
    return Surface(shape.astype(np.float32), albedo.astype(np.float32), cover, 0.02 * np.ones_like(x))


def potato(x: Field, y: Field, rng: Generator, damage: Generator | None) -> Surface:
    """A potato of irregular outline with a few eyes; a slice is cut off."""
    long, short = rng.uniform(35, 39), rng.uniform(24, 28)
    angle = np.arctan2(y / short, x / long)
    reach = 1 + 0.05 * wobble(angle, rng, 3)
    q = np.hypot(x / long, y / short) / reach
    skin, blotch = photo("gravel", x, y, 0.11, rng), noise(x, y, 10, rng)
    height = 21 * np.sqrt(np.clip(1 - q * q, 0, 1)) + 0.9 * blotch * np.clip(1 - q, 0, 1) + 0.10 * skin
    albedo = (1 + 0.07 * skin + 0.11 * blotch)[..., None] * colour(0.47, 0.33, 0.16)
    for _ in range(int(rng.integers(4, 8))):
        at, bearing, size = np.sqrt(rng.uniform()) * 0.75, rng.uniform(0, 2 * np.pi), rng.uniform(1.4, 2.4)
        eye = hill(np.hypot(x - at * long * np.cos(bearing), (y - at * short * np.sin(bearing)) * 1.6), size)
        height -= 0.7 * eye
        albedo *= (1 - 0.45 * eye)[..., None]
    inside = (1 - q) * short
    if damage is not None:
        side, where = damage.choice([-1, 1]), damage.uniform(0.58, 0.72)
        tilt = damage.uniform(-0.4, 0.4)
        beyond = (side * x - where * long + tilt * y) / np.float32(np.hypot(1, tilt))
        # The knife leaves a steep, pale, smooth face.
        face = np.clip(21 - 2.6 * (beyond + 3), 0, None)
        cut = beyond > -3
        bare = cut & (face < height)
        height = np.where(bare, face, height)
        albedo = np.where(bare[..., None], colour(0.70, 0.62, 0.38), albedo)
        inside = np.minimum(inside, np.where(cut, face, 30))
    return Surface(height.astype(np.float32), albedo.astype(np.float32), step(inside), 0.04 * np.ones_like(x))


def socket(x: Field, y: Field, rng: Generator, damage: Generator | None) -> Surface:
    """A moulded connector with two rows of five metal pins; a pin is missing."""
    inside = box(x, y, 38, 21, 3)
    inside = np.minimum(inside, -box(x, y + 21, 5, 4, 1))  # the key notch
    grain, flow = noise(x, y, 0.9, rng), noise(x, y, 20, rng)
    height = 13 * rim(inside, 1.6) + 0.04 * grain
    albedo = (1 + 0.025 * grain + 0.05 * flow)[..., None] * colour(0.06, 0.24, 0.25)
    gloss = 0.12 * np.ones_like(x)
    lost = -1 if damage is None else int(damage.integers(10))
    for index in range(10):
        column, row = index % 5 - 2, index // 5 * 2 - 1
        dx, dy = x - 13.0 * column, y - 8.0 * row
        cavity = step(box(dx, dy, 4.6, 4.6, 0.8))
        height -= 7 * cavity
        albedo *= (1 - 0.35 * cavity)[..., None]
        lean = rng.normal(scale=0.25, size=2)
        pin = step(1.9 - np.hypot(dx - lean[0], dy - lean[1]))
        if index != lost:
            height += 9 * pin
            albedo += pin[..., None] * (colour(0.60, 0.50, 0.24) - albedo)
            gloss += 0.3 * pin
    return Surface(height, albedo, step(inside), gloss)


OBJECTS: dict[str, ObjectMaker] = {
    "biscuit": biscuit,
    "gear": gear,
    "potato": potato,
    "rope": rope,
    "socket": socket,
    "tile": tile,
}
# Rotation of the object on the table: any angle for round or loose things, a few degrees for oriented ones.
FREE_ROTATION = frozenset({"biscuit", "gear", "potato"})
