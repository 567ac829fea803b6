"""Content hashes of samples, remembered so that unchanged files are not read again."""

import json
from pathlib import Path
from typing import Any

from iumad.data.catalogue import Sample


class DigestMemo:
    """Content hashes by path, size and time of change (nanoseconds): what git's index does.

    One JSON list and one hash a line in the file ``path``, appended; the last line for a key counts.
    """

    def __init__(self, path: Path):
        self._path = path
        self._known: dict[str, str] = {}
        self._samples: dict[Sample, str] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                key, _, digest = line.rpartition(" ")
                self._known[key] = digest

    def __call__(self, sample: Sample) -> str:
        """The content hash of ``sample``."""
        if sample not in self._samples:
            self._samples[sample] = self._look_up(sample)
        return self._samples[sample]

    def _look_up(self, sample: Sample) -> str:
        parts: list[Any] = [sample.depth_range]
        for path in (sample.rgb, sample.depth):
            if path is not None and path.exists():
                stat = path.stat()
                parts.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
            else:
                parts.append(None)
        key = json.dumps(parts)
        digest = self._known.get(key, "")
        if len(digest) != 64:  # unknown, or a line cut short by a crash
            digest = sample.digest()
            self._known[key] = digest
            with open(self._path, "a") as file:
                file.write(f"{key} {digest}\n")
        return digest
