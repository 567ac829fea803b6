"""The demo set on disk: the plain folder layout, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from iumad.data.catalogue import GOOD, DataError
from iumad.data.demo.defects import DEFECT_KINDS
from iumad.data.demo.objects import OBJECTS
from iumad.data.demo.scene import render

# Part of the cache key: raise it when a picture changes.
RENDERER_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What to render: numbers of images a class; ``good`` and ``per_defect`` (a kind) are test images."""

    seed: int = 0
    train: int = 24
    validation: int = 6
    good: int = 8
    per_defect: int = 3
    size: int = 256
    classes: tuple[str, ...] = tuple(OBJECTS)

    def __post_init__(self) -> None:
        unknown = [cls for cls in self.classes if cls not in OBJECTS]
        if unknown or not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError(
                f"demo: classes are {self.classes}, expected distinct ones of {', '.join(OBJECTS)}"
            )
        least = {"seed": 0, "train": 1, "validation": 0, "good": 0, "per_defect": 0, "size": 32}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"demo: {name} is {getattr(self, name)}, expected at least {lowest}")

    @classmethod
    def parse(cls, text: str) -> DemoConfig:
        """Config from ``seed=3,train=24,classes=gear+rope``; keys are the fields of this class."""
        chosen: dict[str, Any] = {}
        known = [field.name for field in fields(cls)]
        for item in filter(None, text.split(",")):
            key, _, value = (part.strip() for part in item.partition("="))
            if key not in known:
                raise ValueError(f"demo: unknown option {key!r}, expected one of {', '.join(known)}")
            if key == "classes":
                chosen[key] = tuple(value.split("+"))
            elif value.isdecimal():
                chosen[key] = int(value)
            else:
                raise ValueError(f"demo: {key} is {value!r}, expected a whole number")
        return cls(**chosen)

    def items(self) -> Iterator[tuple[str, str, str, int]]:
        """(class, split, kind, index) of every picture."""
        for cls in self.classes:
            counts = [("train", GOOD, self.train), ("validation", GOOD, self.validation)]
            counts += [("test", GOOD, self.good)]
            counts += [("test", kind, self.per_defect) for kind in DEFECT_KINDS]
            for split, kind, count in counts:
                for index in range(count):
                    yield cls, split, kind, index


def write_demo(path: Path, config: DemoConfig | None = None) -> Path:
    """Render the demo set into ``path`` (``CLASS/{train,validation,test}/KIND/{rgb,depth,gt}/NNN.png``).

    The folder appears under its name only when it is complete.
    Errors: DataError if it exists already, or if the disk refuses.
    """
    config = config or DemoConfig()
    if path.exists():
        raise DataError(f"{path} exists already; give the name of a new folder")
    unfinished = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"cannot create {path}: {error.strerror}") from error
    try:
        _write_pictures(unfinished, config)
        os.replace(unfinished, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def cached_demo(config: DemoConfig, cache_dir: Path | None = None) -> Path:
    """The rendered set below ``cache_dir`` (default: the user's cache folder), rendered on first use."""
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iumad"
    key = hashlib.sha256(json.dumps([RENDERER_VERSION, asdict(config)], sort_keys=True).encode()).hexdigest()[
        :12
    ]
    path = cache_dir / f"demo-{key}"
    if not path.is_dir():
        try:
            write_demo(path, config)
        except DataError:
            if not path.is_dir():  # else another process finished the same set first
                raise
    return path


def _write_pictures(root: Path, config: DemoConfig) -> None:
    items = list(config.items())
    # disable=None: a bar on terminals only.
    for cls, split, kind, index in tqdm(
        items, desc="rendering demo data", unit="image", disable=None, leave=False
    ):
        picture = render(cls, kind, index, seed=config.seed, split=split, size=config.size)
        images: dict[str, np.ndarray] = {"rgb": picture.rgb, "depth": picture.depth}
        if split == "test":
            images["gt"] = picture.mask.astype(np.uint8) * 255
        for role, pixels in images.items():
            folder = root / cls / split / kind / role
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{index:03d}.png", compress_level=1)
    (root / "demo.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
