"""Eyecandies as published: ``CLASS/{train,val,test_public}/data/NNN_{image_4,depth,mask,...}``."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from iumad.data.catalogue import GOOD, Catalogue, DataError, Sample
from iumad.data.layouts import Listing, item_key, item_order, read_folder, require_folder, subfolders

# test_private has no ground truth and is left out.
_SPLIT_FOLDERS = {"train": "train", "validation": "val", "test": "test_public"}
# Lit from the left: the picture M3DM and, after it, the paper use (data-formats.md 2.2).
_IMAGE = "image_4.png"
_ITEMS = (_IMAGE, "depth.png", "info_depth.yaml", "mask.png")
_ITEM = re.compile(r"(?P<number>\d+)_image_4\.png")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def read_eyecandies(root: Path) -> Listing:
    """Native files or the M3DM conversion (which is the folder layout), told apart by their folders."""
    require_folder(root, "CLASS/train/data/ (native) or CLASS/train/good/{rgb,xyz}/ (converted by M3DM)")
    if not is_native(root):
        return read_folder(root, "eyecandies")
    problems: list[str] = []
    samples: list[Sample] = []
    classes = [cls for cls in subfolders(root) if (cls / "train" / "data").is_dir()]
    for cls in classes:
        for split, folder_name in _SPLIT_FOLDERS.items():
            folder = cls / folder_name / "data"
            if folder.is_dir():
                samples += _read_split(folder, cls.name, split, problems)
            else:
                problems.append(f"{folder} does not exist")
    names = tuple(cls.name for cls in classes)
    return Listing(Catalogue("eyecandies", names, tuple(samples)), tuple(problems))


def is_native(root: Path) -> bool:
    """Whether the tree has the published layout."""
    return any((folder / "train" / "data").is_dir() for folder in subfolders(root))


def _read_split(folder: Path, cls: str, split: str, problems: list[str]) -> list[Sample]:
    # Zero padding follows the size of the split: order by number, keep the text for the file names.
    prefixes = {
        item_key(m["number"]): m["number"] for p in folder.iterdir() if (m := _ITEM.fullmatch(p.name))
    }
    if not prefixes:
        problems.append(f"{folder}: no images; looked for NNN_{_IMAGE}")
    samples = []
    for key in sorted(prefixes, key=item_order):
        files = {item: folder / f"{prefixes[key]}_{item}" for item in _ITEMS}
        absent = [path.name for path in files.values() if not path.is_file()]
        if split == "train" and absent == [files["mask.png"].name]:
            absent = []  # training images are good, with or without a mask to say so
        if absent:
            problems.append(f"{folder}: item {key} lacks {', '.join(absent)}")
            continue
        try:
            depth_range = read_depth_range(files["info_depth.yaml"])
            kind = "bad" if split == "test" and _has_defect(files["mask.png"]) else GOOD
        except DataError as error:
            problems.append(str(error))
            continue
        samples.append(
            Sample(
                id=f"{cls}/{split}/{kind}/{key}",
                cls=cls,
                split=split,
                kind=kind,
                rgb=files[_IMAGE],
                depth=files["depth.png"],
                depth_range=depth_range,
                mask=files["mask.png"] if split == "test" else None,
            )
        )
    return samples


def read_depth_range(path: Path) -> tuple[float, float]:
    """``normalization.min`` and ``.max`` (metres) of an ``info_depth.yaml``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    bounds = {}
    for name in ("min", "max"):
        found = re.search(rf"^\s*['\"]?{name}['\"]?\s*:\s*({_NUMBER})\s*(?:#.*)?$", text, flags=re.MULTILINE)
        if found is None:
            raise DataError(
                f"{path}: no line '{name}: NUMBER'; looked for normalization.min and normalization.max"
            )
        bounds[name] = float(found[1])
    if not bounds["min"] < bounds["max"]:
        raise DataError(f"{path}: min {bounds['min']} is not below max {bounds['max']}")
    return bounds["min"], bounds["max"]


def _has_defect(mask: Path) -> bool:
    """Label by non-empty mask, as the published lists do; ``metadata.anomalous`` differs for some images."""
    try:
        with Image.open(mask) as image:
            extrema = image.getextrema()
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read {mask}: {error}") from error
    highest = max(band[1] for band in extrema) if isinstance(extrema[0], tuple) else extrema[1]
    return bool(highest > 0)
