"""Readers of the on-disk layouts: each walks a tree and returns a Catalogue and the problems it met."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from iumad.data.catalogue import GOOD, SPLITS, Catalogue, DataError, Sample

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
DEPTH_SUFFIXES = (".png", ".tif", ".tiff")
# Folders of a class that hold no images: MVTec 3D-AD's camera parameters.
_NOT_SPLITS = ("calibration",)
FOLDER_LAYOUT = "CLASS/{train,validation,test}/KIND/{rgb,depth,xyz,gt}/"
MANIFEST_COLUMNS = ("class", "split", "kind", "rgb", "depth", "mask")


class Listing(NamedTuple):
    """A catalogue, what is wrong with the tree it was read from, and which folders of it were ignored."""

    catalogue: Catalogue
    problems: tuple[str, ...]
    ignored: tuple[str, ...] = ()


def item_key(stem: str) -> str:
    """Key under which the files of an item meet: numbers lose their zero padding (its width varies)."""
    return str(int(stem)) if stem.isascii() and stem.isdigit() else stem


def item_order(key: str) -> tuple[int, int, str]:
    """Sort key: numbers first, numerically; then names."""
    return (0, int(key), key) if key.isascii() and key.isdigit() else (1, 0, key)


def subfolders(path: Path) -> list[Path]:
    """Visible subfolders in alphabetical order."""
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def require_folder(path: Path, looked_for: str) -> None:
    """Raise DataError unless ``path`` is a folder."""
    if not path.is_dir():
        state = "is not a folder" if path.exists() else "does not exist"
        raise DataError(f"{path} {state}; looked for {looked_for}")


def files_by_item(folder: Path, suffixes: tuple[str, ...], problems: list[str]) -> dict[str, Path]:
    """Files of a folder with one of the suffixes, by item key; two files of one item are a problem."""
    found: dict[str, Path] = {}
    if not folder.is_dir():
        return found
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        key = item_key(path.stem)
        if key in found:
            problems.append(f"{path}: same item as {found[key].name} in that folder")
        else:
            found[key] = path
    return found


def read_folder(root: Path, name: str = "folder") -> Listing:
    """Layout ``CLASS/{train,validation,test}/KIND/{rgb,depth,xyz,gt}/ITEM``.

    Serves plain folders, MVTec 3D-AD and the M3DM conversion of Eyecandies. Where ``depth`` and ``xyz``
    both exist, ``xyz`` is taken: it contains the depth.
    """
    require_folder(root, FOLDER_LAYOUT)
    problems: list[str] = []
    samples: list[Sample] = []
    classes = [
        folder.name for folder in subfolders(root) if any((folder / split).is_dir() for split in SPLITS)
    ]
    if not classes:
        raise DataError(f"{root}: no class found; looked for {FOLDER_LAYOUT}")
    for cls in classes:
        for split in SPLITS:
            split_folder = root / cls / split
            kinds = subfolders(split_folder) if split_folder.is_dir() else []
            for folder in sorted(kinds, key=lambda kind: (kind.name != GOOD, kind.name)):
                samples += _read_kind(folder, cls, split, problems)
    ignored = [str(folder) for folder in subfolders(root) if folder.name not in classes]
    for cls in classes:
        ignored += [str(f) for f in subfolders(root / cls) if f.name not in (*SPLITS, *_NOT_SPLITS)]
    return Listing(Catalogue(name, tuple(classes), tuple(samples)), tuple(problems), tuple(ignored))


def _read_kind(folder: Path, cls: str, split: str, problems: list[str]) -> list[Sample]:
    rgb = files_by_item(folder / "rgb", IMAGE_SUFFIXES, problems)
    xyz = files_by_item(folder / "xyz", DEPTH_SUFFIXES, problems)
    depth = xyz or files_by_item(folder / "depth", DEPTH_SUFFIXES, problems)
    masks = files_by_item(folder / "gt", IMAGE_SUFFIXES, problems)
    if not rgb and not depth:
        problems.append(
            f"{folder}: no images; looked for rgb/*{{{','.join(IMAGE_SUFFIXES)}}}, depth/* and xyz/*"
        )
    samples = []
    for key in sorted(rgb.keys() | depth.keys() | masks.keys(), key=item_order):
        have = {"rgb": rgb.get(key), "depth or xyz": depth.get(key)}
        expected = {"rgb": bool(rgb), "depth or xyz": bool(depth)}
        for role in have:
            if expected[role] and have[role] is None:
                problems.append(f"{folder}: item {key} has no {role} file, its neighbours have one")
        if folder.name != GOOD and key not in masks:
            problems.append(f"{folder}: item {key} has no mask; looked for gt/{key}.png")
        if any(have.values()):
            samples.append(
                Sample(
                    id=f"{cls}/{split}/{folder.name}/{key}",
                    cls=cls,
                    split=split,
                    kind=folder.name,
                    rgb=rgb.get(key),
                    depth=depth.get(key),
                    mask=masks.get(key),
                )
            )
    return samples


def read_mvtec3d(root: Path) -> Listing:
    """MVTec 3D-AD: the folder layout with ``rgb`` and ``xyz`` in every class."""
    listing = read_folder(root, "mvtec3d")
    lacking = sorted(
        {s.cls for s in listing.catalogue.samples if s.depth is None or s.depth.parent.name != "xyz"}
    )
    problems = [f"{root / cls}: no xyz folder beside rgb, which MVTec 3D-AD has" for cls in lacking]
    return listing._replace(problems=listing.problems + tuple(problems))


def read_manifest(path: Path) -> Listing:
    """CSV with the columns class, split, kind, rgb, depth, mask; paths are relative to the CSV's folder.

    Empty cells mean "none". Classes keep the order of their first appearance.
    """
    if not path.is_file():
        raise DataError(
            f"{path} is not a file; looked for a CSV with the columns {', '.join(MANIFEST_COLUMNS)}"
        )
    problems: list[str] = []
    samples: list[Sample] = []
    counts: dict[tuple[str, str, str], int] = defaultdict(int)
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = tuple(reader.fieldnames or ())
            missing = [column for column in ("class", "split", "kind") if column not in columns]
            unknown = [column for column in columns if column not in MANIFEST_COLUMNS]
            if missing or unknown:
                raise DataError(
                    f"{path}: columns are {', '.join(columns) or 'none'}; "
                    f"expected {', '.join(MANIFEST_COLUMNS)} "
                    f"(missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'})"
                )
            rows = list(enumerate(reader, start=2))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from error
    for line, row in rows:
        where = f"{path}, line {line}"
        cells = {column: (row.get(column) or "").strip() for column in MANIFEST_COLUMNS}
        files = {
            role: path.parent / cells[role] if cells[role] else None for role in ("rgb", "depth", "mask")
        }
        gone = [str(file) for file in files.values() if file is not None and not file.is_file()]
        if not cells["class"] or not cells["kind"]:
            problems.append(f"{where}: class and kind must not be empty")
        elif cells["split"] not in SPLITS:
            problems.append(f"{where}: split is {cells['split']!r}, expected one of {', '.join(SPLITS)}")
        elif files["rgb"] is None and files["depth"] is None:
            problems.append(f"{where}: neither rgb nor depth is given")
        elif gone:
            problems.append(f"{where}: {', '.join(gone)} does not exist")
        else:
            if cells["kind"] != GOOD and files["mask"] is None:
                problems.append(f"{where}: a defect without mask")
            place = (cells["class"], cells["split"], cells["kind"])
            samples.append(
                Sample(
                    id="/".join((*place, str(counts[place]))),
                    cls=cells["class"],
                    split=cells["split"],
                    kind=cells["kind"],
                    rgb=files["rgb"],
                    depth=files["depth"],
                    mask=files["mask"],
                )
            )
            counts[place] += 1
    if not samples:
        raise DataError(f"{path}: no usable row" + (f"; first problem: {problems[0]}" if problems else ""))
    classes = tuple(dict.fromkeys(sample.cls for sample in samples))
    return Listing(Catalogue(path.stem, classes, tuple(samples)), tuple(problems))
