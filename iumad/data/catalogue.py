"""What a data set is to the rest of the program: an ordered list of samples, each a few paths and labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "validation", "test")
GOOD = "good"
UNLABELLED = "unlabelled"


class DataError(ValueError):
    """A file or folder of a data set is missing, unreadable or inconsistent; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image of one object: where its files are and what is known about it.

    ``kind`` is ``"good"``, the name of the defect, or ``"unlabelled"`` (no ground truth exists). ``depth``
    is a 16-bit PNG, a single-channel TIFF, or an xyz TIFF (H x W x 3, depth in channel 2). ``depth_range``
    is set when the PNG encodes ``min + value / 65535 * (max - min)`` metres (Eyecandies); otherwise raw
    zeros mean "no measurement".
    """

    id: str
    cls: str
    split: str
    kind: str = GOOD
    rgb: Path | None = None
    depth: Path | None = None
    depth_range: tuple[float, float] | None = None
    mask: Path | None = None

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"Sample {self.id!r}: split is {self.split!r}, expected one of {SPLITS}")
        if self.rgb is None and self.depth is None:
            raise ValueError(
                f"Sample {self.id!r}: neither rgb nor depth is given, expected at least one of them"
            )

    @property
    def is_good(self) -> bool:
        """Whether the object is known to be without defect."""
        return self.kind == GOOD

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that exist for this sample: rgb, depth, mask, in this order."""
        return tuple(path for path in (self.rgb, self.depth, self.mask) if path is not None)

    def digest(self) -> str:
        """SHA-256 (hex) of the bytes of rgb and depth: equal for equal images, wherever they lie."""
        sha = hashlib.sha256(repr(self.depth_range).encode())
        for role, path in (("rgb", self.rgb), ("depth", self.depth)):
            if path is not None:
                try:
                    content = path.read_bytes()
                except OSError as error:
                    raise DataError(f"cannot read {path}: {error.strerror or error}") from error
                sha.update(f"{role}:{len(content)}:".encode())
                sha.update(content)
        return sha.hexdigest()


@dataclass(frozen=True)
class Catalogue:
    """The samples of one data set. ``classes`` fixes the class order, hence the class indices."""

    name: str
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]

    def select(
        self, *, cls: str | None = None, split: str | None = None, good: bool | None = None
    ) -> list[Sample]:
        """Samples of one class, split and goodness (None: any), in catalogue order."""
        if cls is not None and cls not in self.classes:
            raise ValueError(f"cls is {cls!r}, expected one of {', '.join(self.classes)}")
        if split is not None and split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
        return [
            sample
            for sample in self.samples
            if cls in (None, sample.cls) and split in (None, sample.split) and good in (None, sample.is_good)
        ]

    def training(self, cls: str, *, include_validation: bool) -> list[Sample]:
        """Normal training images of a class; the paper trains on train plus validation (paper.md 1.3)."""
        splits = ("train", "validation") if include_validation else ("train",)
        return [sample for split in splits for sample in self.select(cls=cls, split=split, good=True)]

    @property
    def has_rgb(self) -> bool:
        """Whether every sample has a colour image."""
        return all(sample.rgb is not None for sample in self.samples)

    @property
    def has_depth(self) -> bool:
        """Whether every sample has a depth image."""
        return all(sample.depth is not None for sample in self.samples)
