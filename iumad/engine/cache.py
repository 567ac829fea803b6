"""Backbone features, computed once per image and memory-mapped afterwards.

The backbone is frozen and preparing an image is deterministic, so features are a function of the image. A
cache folder belongs to one way of preparing (size, depth mode) and one backbone (its weights' hash); inside
it, records of one fixed size are found by the content hash of the image:

    about.json      what the folder belongs to
    records.bin     one record per image: prepared images (float16) and features (float32), appended
    index.txt       line i = content hash of record i; appended after the record is on disk
    digests.jsonl   (beside the folders) content hashes by path, size and time of change of a file

A crash can leave an unindexed tail in records.bin; the next writer overwrites it. Writers hold a lock, so
that several processes (and the ranks of a distributed run) can share a folder: the first computes, the others
find the records.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iumad.data.catalogue import Sample
from iumad.engine.digests import DigestMemo
from iumad.engine.inputs import InputPipeline
from iumad.engine.progress import Progress

CHUNK = 8  # images between two appends


@dataclass
class Batch:
    """Model inputs of B images: by modality, images (B, 3, S, S) in [0, 1] and features (B, C, g, g)."""

    images: Mapping[str, Tensor]
    features: Mapping[str, Tensor]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        images, features = (
            {name: tensor.to(device) for name, tensor in tensors.items()}
            for tensors in (self.images, self.features)
        )
        return Batch(images, features)


class LiveFeatures:
    """The same interface without a cache: every batch runs the backbone."""

    def __init__(self, pipeline: InputPipeline):
        self.pipeline = pipeline
        self._known: dict[Sample, str] = {}
        self.computed = 0
        self.seconds = 0.0

    def digest(self, sample: Sample) -> str:
        """Content hash of a sample."""
        if sample not in self._known:
            self._known[sample] = sample.digest()
        return self._known[sample]

    def ensure(self, samples: Sequence[Sample], title: str, *, quiet: bool = False) -> None:
        """Make sure that :meth:`batch` can serve ``samples``."""

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """The model inputs of ``samples``."""
        began = time.perf_counter()
        images = self.pipeline.images(samples)
        features = self.pipeline.features(images)
        self.computed += len(samples)
        self.seconds += time.perf_counter() - began
        return Batch({name: self.pipeline.widen(image) for name, image in images.items()}, features)


class FeatureCache(LiveFeatures):
    """Features of a pipeline, kept in a folder under ``root``."""

    def __init__(self, root: str | Path, pipeline: InputPipeline):
        super().__init__(pipeline)
        key = hashlib.sha256(pipeline.identity.encode()).hexdigest()[:16]
        self.folder = Path(root) / key
        self.folder.mkdir(parents=True, exist_ok=True)
        self._record = np.dtype(pipeline.record_fields())
        self._rows: dict[str, int] = {}
        self._records: Any = None
        self._digests = DigestMemo(Path(root) / "digests.jsonl")
        with self._locked():
            about = self.folder / "about.json"
            if not about.exists():
                about.write_text(
                    json.dumps({"identity": pipeline.identity, "bytes": self._record.itemsize}) + "\n"
                )
            self._read_index()

    def digest(self, sample: Sample) -> str:
        """Content hash of a sample, read from the memo if its files did not change."""
        return self._digests(sample)

    def ensure(self, samples: Sequence[Sample], title: str, *, quiet: bool = False) -> None:
        """Compute what is missing, with progress under ``title``.

        Raises:
            OSError: naming the file, if the disk is full; what was finished before is kept.
        """
        if not self._missing(samples):
            return
        with self._locked():
            self._read_index()
            missing = self._missing(samples)
            with Progress(title, len(missing), quiet=quiet) as progress:
                for start in range(0, len(missing), CHUNK):
                    chunk = missing[start : start + CHUNK]
                    self._append(chunk)
                    progress.advance(len(chunk))
            self._read_index()

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """The model inputs of ``samples``, which must have been ensured."""
        records = self._records[[self._rows[self.digest(sample)] for sample in samples]]
        images: dict[str, Tensor] = {}
        features: dict[str, Tensor] = {}
        for name in self.pipeline.modalities:
            images[name] = self.pipeline.widen(torch.from_numpy(records[name]))
            features[name] = torch.from_numpy(np.ascontiguousarray(records[f"{name}_features"]))
        return Batch(images, features)

    def _missing(self, samples: Sequence[Sample]) -> list[Sample]:
        found = {self.digest(sample): sample for sample in samples}
        return [sample for digest, sample in found.items() if digest not in self._rows]

    def _append(self, samples: list[Sample]) -> None:
        began = time.perf_counter()
        images = self.pipeline.images(samples)
        features = self.pipeline.features(images)
        self.seconds += time.perf_counter() - began
        self.computed += len(samples)
        records = np.empty(len(samples), self._record)
        for name in self.pipeline.modalities:
            records[name] = images[name].numpy()
            records[f"{name}_features"] = features[name].numpy()
        lines = "".join(self.digest(sample) + "\n" for sample in samples)
        row = len(self._rows)
        self._write(self.folder / "records.bin", records.tobytes(), row * self._record.itemsize)
        self._write(self.folder / "index.txt", lines.encode(), row * 65)
        for sample in samples:
            self._rows[self.digest(sample)] = len(self._rows)

    @staticmethod
    def _write(path: Path, data: bytes, offset: int) -> None:
        """Write through the file, not the map: a full disk is then an error, not a deadly signal."""
        try:
            with open(path, "r+b" if path.exists() else "w+b") as file:
                file.truncate(offset)
                file.seek(offset)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, f"cannot write ({error.strerror})", str(path)) from error

    def _read_index(self) -> None:
        index, records = self.folder / "index.txt", self.folder / "records.bin"
        if not index.exists():
            return
        text = index.read_text()
        whole = min(len(text) // 65, records.stat().st_size // self._record.itemsize)
        self._rows = {digest: row for row, digest in enumerate(text.split("\n")[:whole])}
        if whole:
            self._records = np.memmap(records, self._record, "r", shape=(whole,))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def default_cache_root() -> Path:
    """``$IUMAD_CACHE``, else ``iumad`` in the user's cache folder."""
    if "IUMAD_CACHE" in os.environ:
        return Path(os.environ["IUMAD_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iumad"
