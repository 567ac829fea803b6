"""One picture of the demo set: an object posed on a table, perhaps defective, and the defect's exact mask."""

from __future__ import annotations

from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from iumad.data.demo.camera import FIELD_MM, measure_depth, photograph
from iumad.data.demo.defects import DEFECTS, MISSING_PART
from iumad.data.demo.fields import Field, Generator, colour, noise, photo
from iumad.data.demo.objects import FREE_ROTATION, OBJECTS, Surface

# A pixel is defective where the surface differs from the sound one by more than this.
_HEIGHT_MM = 0.2
_ALBEDO = 0.02
_MIN_DEFECT_PIXELS = 40


class Picture(NamedTuple):
    """rgb uint8 (S, S, 3), depth uint16 (S, S) with 0 = no measurement, mask bool (S, S)."""

    rgb: NDArray[np.uint8]
    depth: NDArray[np.uint16]
    mask: NDArray[np.bool_]


def render(cls: str, kind: str, index: int, *, seed: int, split: str, size: int) -> Picture:
    """Render one sample; equal arguments give equal pictures."""
    identity = [seed, *(crc32(word.encode()) for word in (cls, split, kind)), index]
    streams = np.random.SeedSequence(identity).spawn(4)
    x, y = _pose(cls, size, np.random.default_rng(streams[0]))
    sound = _scene(cls, x, y, np.random.default_rng(streams[1]), None)
    surface, mask = sound, np.zeros((size, size), dtype=bool)
    damage = np.random.default_rng(streams[2])
    while kind != "good" and mask.sum() < _MIN_DEFECT_PIXELS * (size / 256) ** 2:
        surface = _scene(
            cls, x, y, np.random.default_rng(streams[1]), damage if kind == MISSING_PART else None
        )
        if kind != MISSING_PART:
            at = damage.choice(np.flatnonzero(_core(sound, x, y, size)))
            DEFECTS[kind](surface, x - x.flat[at], y - y.flat[at], damage)
        mask = np.abs(surface.height - sound.height) > _HEIGHT_MM
        mask |= np.abs(surface.albedo - sound.albedo).max(axis=2) > _ALBEDO
    sensor = np.random.default_rng(streams[3])
    return Picture(photograph(surface, sensor), measure_depth(surface, sensor), mask)


def _pose(cls: str, size: int, rng: Generator) -> tuple[Field, Field]:
    """Object coordinates (millimetres) of every pixel: the object turned, shifted and slightly scaled."""
    axis = (np.arange(size) + 0.5) / size * FIELD_MM - FIELD_MM / 2
    x, y = np.meshgrid(axis, axis)
    turn = rng.uniform(-np.pi, np.pi) if cls in FREE_ROTATION else rng.normal(scale=0.05)
    shift, scale = rng.normal(scale=1.8, size=2), rng.uniform(0.97, 1.03)
    x, y = (x - shift[0]) / scale, (y - shift[1]) / scale
    turned = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    return turned[0].astype(np.float32), turned[1].astype(np.float32)


def _scene(cls: str, x: Field, y: Field, rng: Generator, damage: Generator | None) -> Surface:
    """The object on its table, as one surface."""
    surface = OBJECTS[cls](x, y, rng, damage)
    felt, cloud = photo("gravel", x, y, 0.07, rng), noise(x, y, 30, rng)
    table = (1 + 0.05 * felt + 0.04 * cloud)[..., None] * colour(0.16, 0.17, 0.18)
    cover = surface.cover
    height = np.clip(surface.height, 0, None) * cover + 0.03 * felt * (1 - cover)
    albedo = np.clip(surface.albedo, 0.01, 1) * cover[..., None] + table * (1 - cover[..., None])
    return Surface(height, albedo, cover, surface.gloss * cover)


def _core(sound: Surface, x: Field, y: Field, size: int) -> NDArray[np.bool_]:
    """Pixels where a defect may be centred: on the object, within the picture's middle."""
    margin = size // 10
    core = sound.cover > 0.99
    core[:margin] = core[-margin:] = False
    core[:, :margin] = core[:, -margin:] = False
    return core
