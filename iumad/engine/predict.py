"""Scores, decisions and heat maps of new images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from iumad.data import DataError, Sample
from iumad.data.catalogue import UNLABELLED
from iumad.data.layouts import DEPTH_SUFFIXES, IMAGE_SUFFIXES
from iumad.engine.artefact import Artefact
from iumad.engine.cache import LiveFeatures
from iumad.engine.evaluate import Scored, score_batches
from iumad.engine.files import write_bytes
from iumad.report.pictures import panel, png

SUFFIXES = tuple(dict.fromkeys((*IMAGE_SUFFIXES, *DEPTH_SUFFIXES)))


def find_samples(images: Sequence[Path], depth: Path | None, modalities: Sequence[str]) -> list[Sample]:
    """The samples that ``images`` (files, or folders of them) name.

    Args:
        images: colour images; depth images for a model of depth alone.
        depth: a depth file for a single image, or a folder that has a file of the same name (but for the
        suffix) for
            every image.
        modalities: what the model takes.

    Raises:
        ValueError, FileNotFoundError: if an image or its depth file is missing.
    """
    files: list[Path] = []
    for path in images:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not found:
                raise ValueError(f"{path} holds no image ({', '.join(SUFFIXES)})")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(2, "no such file or folder", str(path))
    if tuple(modalities) == ("depth",):
        return [Sample(id=str(file), cls="", split="test", kind=UNLABELLED, depth=file) for file in files]
    return [
        Sample(
            id=str(file),
            cls="",
            split="test",
            kind=UNLABELLED,
            rgb=file,
            depth=_depth_of(file, depth, len(files)),
        )
        for file in files
    ]


def _depth_of(image: Path, depth: Path | None, count: int) -> Path | None:
    if depth is None:
        return None
    if depth.is_file() and count == 1:
        return depth
    if not depth.is_dir():
        raise ValueError(
            f"--depth is {depth}, expected a folder" + (", as there are several images" if count > 1 else "")
        )
    for suffix in DEPTH_SUFFIXES:
        if (depth / f"{image.stem}{suffix}").is_file():
            return depth / f"{image.stem}{suffix}"
    raise ValueError(f"{depth} has no depth image {image.stem}({'|'.join(DEPTH_SUFFIXES)}) for {image}")


def predict(
    artefact: Artefact,
    samples: Sequence[Sample],
    *,
    cls: str | None = None,
    out: Path | None = None,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """One result per sample, in order: ``path, score, threshold, is_anomalous, predicted_class, map``.

    ``threshold`` and ``is_anomalous`` are None where the class (``cls`` if given, else the predicted one) has
    no threshold. An image that cannot be read gives ``path`` and ``error``, and the others go on. ``map`` is
    the heat-map picture in ``out``.

    Raises:
        ValueError: if ``cls`` is not a class that the model has learned.
    """
    if cls is not None and cls not in artefact.seen:
        raise ValueError(f"--class is {cls!r}, but the model has learned {', '.join(artefact.seen)}")
    source = LiveFeatures(artefact.pipeline)
    for number, sample in enumerate(samples):
        try:
            scored = next(score_batches(artefact.model, source, [sample], device))
        except DataError as error:
            yield {"path": sample.id, "error": str(error)}
            continue
        name = _class_name(artefact, scored, cls)
        limit = artefact.thresholds.get(name or "")
        value = limit["value"] if limit else None
        result: dict[str, Any] = {
            "path": sample.id,
            "score": scored.score,
            "threshold": value,
            "is_anomalous": None if value is None else scored.score > value,
            "predicted_class": name,
            "map": None,
        }
        if out is not None:
            path = out / f"{number:05d}_{Path(sample.id).stem}.png"
            write_bytes(path, png(_picture(scored, value)))
            result["map"] = str(path)
        yield result


def _class_name(artefact: Artefact, scored: Scored, cls: str | None) -> str | None:
    if cls is not None:
        return cls
    if scored.predicted is not None:
        return artefact.classes[scored.predicted]
    return artefact.seen[0] if len(artefact.seen) == 1 else None


def _picture(scored: Scored, threshold: float | None) -> Any:
    """Colours run up to twice the threshold; without one, over the range of the map."""
    heat = scored.anomaly_map
    low, high = (0.0, 2 * threshold) if threshold is not None else (float(heat.min()), float(heat.max()))
    images = {name: image.numpy() for name, image in scored.images.items()}
    return panel(images, heat, None, low=low, high=high)
