"""`iumad data check`: read every file of a data set and report what would spoil training or evaluation."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from iumad.data.catalogue import GOOD, SPLITS, Catalogue, DataError, Sample
from iumad.data.layouts import Listing
from iumad.data.opening import detect_spec, list_dataset
from iumad.data.reading import read_depth, read_mask, read_rgb

ERROR, WARNING = "error", "warning"
_MOSTLY_INVALID = 0.5
_SHOWN_PER_CODE = 8


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (``error``) or odd (``warning``); ``code`` groups findings of one sort."""

    level: str
    code: str
    message: str


@dataclass
class ClassSummary:
    """What one class holds: images by split and kind, image sizes, mean and worst share of invalid depth."""

    counts: dict[str, dict[str, int]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    sizes: dict[str, int] = field(default_factory=dict)
    invalid_depth_mean: float | None = None
    invalid_depth_max: float | None = None


@dataclass
class CheckReport:
    """Result of `check_dataset`. ``ok`` means: no error; warnings may remain."""

    name: str
    modalities: list[str]
    classes: dict[str, ClassSummary]
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether the data set can be used as it is."""
        return not any(finding.level == ERROR for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {len(self.classes)} classes, {' + '.join(self.modalities) or 'no images'}",
            "",
        ]
        header = (
            "class",
            "train",
            "val.",
            "test good",
            "test defects",
            "size (w x h)",
            "invalid depth",
            "kinds",
        )
        rows = [header, *(_table_row(name, summary) for name, summary in self.classes.items())]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        by_code: dict[tuple[str, str], list[str]] = defaultdict(list)
        for finding in self.findings:
            by_code[finding.level, finding.code].append(finding.message)
        for (level, code), messages in sorted(by_code.items()):
            lines += ["", f"{level}: {code} ({len(messages)})"]
            lines += [f"  {message}" for message in messages[:_SHOWN_PER_CODE]]
            if len(messages) > _SHOWN_PER_CODE:
                lines.append(f"  and {len(messages) - _SHOWN_PER_CODE} more (--json lists all)")
        lines += ["", "ok" if self.ok else "not ok: fix the errors above"]
        return "\n".join(lines)


def run(path_or_spec: str, *, as_json: bool = False, cache_dir: Path | None = None) -> int:
    """Check and print. Exit code 0: usable; 1: errors in the data; 2: there is no data set to check."""
    try:
        report = check_dataset(path_or_spec, cache_dir=cache_dir)
    except ValueError as error:
        if as_json:
            print(json.dumps({"ok": False, "error": str(error)}))
        else:
            print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.to_dict(), indent=1) if as_json else report)
    return 0 if report.ok else 1


def check_dataset(source: str | Path | Catalogue, *, cache_dir: Path | None = None) -> CheckReport:
    """Read every image of a catalogue, a data spec, or a bare path whose layout is then detected.

    Errors: DataError or ValueError only if no data set is found; what is wrong inside one is in the report.
    """
    if isinstance(source, Catalogue):
        listing, name = Listing(source, ()), source.name
    else:
        name = detect_spec(str(source))
        listing = list_dataset(name, cache_dir=cache_dir)
    checker = _Checker(listing.catalogue)
    for problem in listing.problems:
        checker.error("layout", problem)
    for folder in listing.ignored:
        checker.warn("ignored folder", f"{folder}: not part of the layout")
    for sample in tqdm(checker.catalogue.samples, desc="checking", unit="image", disable=None, leave=False):
        checker.check_sample(sample)
    checker.check_duplicates()
    checker.check_classes()
    modalities = [
        role for role in ("rgb", "depth") if any(getattr(s, role) for s in listing.catalogue.samples)
    ]
    return CheckReport(name, modalities, checker.summaries(), checker.findings)


class _Checker:
    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.findings: list[Finding] = []
        self._sizes: dict[str, Counter[str]] = {cls: Counter() for cls in catalogue.classes}
        self._invalid: dict[str, list[float]] = {cls: [] for cls in catalogue.classes}
        self._by_content: dict[str, list[Sample]] = defaultdict(list)

    def error(self, code: str, message: str) -> None:
        self.findings.append(Finding(ERROR, code, message))

    def warn(self, code: str, message: str) -> None:
        self.findings.append(Finding(WARNING, code, message))

    def check_sample(self, sample: Sample) -> None:
        shapes: dict[Path, tuple[int, ...]] = {}
        rgb = self._read(read_rgb, sample.rgb)
        if sample.rgb is not None and rgb is not None:
            shapes[sample.rgb] = rgb.shape[:2]
        depth = self._read(lambda path: read_depth(path, sample.depth_range), sample.depth)
        if sample.depth is not None and depth is not None:
            shapes[sample.depth] = depth[0].shape
            self._check_validity(sample, depth[1])
        mask = self._read(read_mask, sample.mask)
        if sample.mask is not None and mask is not None:
            shapes[sample.mask] = mask.shape
            self._check_mask(sample, sample.mask, mask)
        if len(set(shapes.values())) > 1:
            sizes = ", ".join(f"{path} is {_size(shape)}" for path, shape in shapes.items())
            self.error("size mismatch", sizes)
        if shapes:
            self._sizes[sample.cls][_size(next(iter(shapes.values())))] += 1
        # Pixels, not file bytes: a copy that was saved again is still the same image.
        content = rgb if rgb is not None else depth[0] if depth is not None else None
        if content is not None:
            key = hashlib.sha256(f"{content.shape}{content.dtype}".encode() + content.tobytes()).hexdigest()
            self._by_content[key].append(sample)

    def _read(self, reader: Callable[[Path], Any], path: Path | None) -> Any:
        if path is None:
            return None
        try:
            return reader(path)
        except DataError as error:
            self.error("unreadable file", str(error))
            return None

    def _check_validity(self, sample: Sample, valid: np.ndarray) -> None:
        invalid = 1 - float(valid.mean())
        self._invalid[sample.cls].append(invalid)
        if invalid == 1:
            self.error("no depth", f"{sample.depth}: not one valid pixel")
        elif invalid > _MOSTLY_INVALID:
            self.warn("little depth", f"{sample.depth}: {invalid:.0%} of the pixels have no measurement")

    def _check_mask(self, sample: Sample, path: Path, mask: np.ndarray) -> None:
        if sample.is_good and mask.any():
            self.error("odd mask", f"{path}: {int(mask.sum())} defect pixels, but the image counts as good")
        elif not sample.is_good and not mask.any():
            self.error("odd mask", f"{path}: no defect pixel, but the image is of kind {sample.kind!r}")
        elif mask.all():
            self.warn("odd mask", f"{path}: every pixel is a defect")

    def check_duplicates(self) -> None:
        for samples in self._by_content.values():
            if len(samples) < 2:
                continue
            names = ", ".join(sample.id for sample in samples)
            learned = any(sample.split != "test" for sample in samples)
            if learned and any(sample.split == "test" for sample in samples):
                self.error("same image in train and test", names)
            else:
                self.warn("same image twice", names)

    def check_classes(self) -> None:
        for cls in self.catalogue.classes:
            if not self.catalogue.select(cls=cls):
                self.error("empty class", f"{cls}: no images")
                continue
            if not self.catalogue.select(cls=cls, split="train", good=True):
                self.error("no training images", f"{cls}: no good image in train")
            spoiled = self.catalogue.select(cls=cls, split="train", good=False)
            if spoiled:
                self.warn(
                    "defects in train", f"{cls}: {len(spoiled)} images that are not good; never trained on"
                )
            good, bad = (
                self.catalogue.select(cls=cls, split="test", good=wanted) for wanted in (True, False)
            )
            if not good:
                self.warn("no good test images", f"{cls}: image AUROC is undefined (NaN)")
            if not bad:
                self.warn(
                    "no defects", f"{cls}: no defective test image; all test metrics are undefined (NaN)"
                )
        for role in ("rgb", "depth"):
            without = {s.cls for s in self.catalogue.samples if getattr(s, role) is None}
            if without and any(getattr(s, role) for s in self.catalogue.samples):
                self.warn("modality not everywhere", f"{role} is lacking in {', '.join(sorted(without))}")

    def summaries(self) -> dict[str, ClassSummary]:
        result = {}
        for cls in self.catalogue.classes:
            summary = ClassSummary(sizes=dict(self._sizes[cls].most_common()))
            for sample in self.catalogue.select(cls=cls):
                kinds = summary.counts[sample.split]
                kinds[sample.kind] = kinds.get(sample.kind, 0) + 1
            if self._invalid[cls]:
                summary.invalid_depth_mean = float(np.mean(self._invalid[cls]))
                summary.invalid_depth_max = max(self._invalid[cls])
            result[cls] = summary
        return result


def _table_row(name: str, summary: ClassSummary) -> tuple[str, ...]:
    test = summary.counts["test"]
    invalid = "-"
    if summary.invalid_depth_mean is not None:
        invalid = f"{summary.invalid_depth_mean:.1%} (max {summary.invalid_depth_max:.1%})"
    return (
        name,
        str(sum(summary.counts["train"].values())),
        str(sum(summary.counts["validation"].values())),
        str(test.get(GOOD, 0)),
        str(sum(test.values()) - test.get(GOOD, 0)),
        ", ".join(summary.sizes) or "-",
        invalid,
        ", ".join(f"{kind} {count}" for kind, count in test.items() if kind != GOOD) or "-",
    )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
