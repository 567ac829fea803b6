"""The JSON-lines log of a run."""

import json
import os
import time
from pathlib import Path
from typing import Any


class RunLog:
    """Append-only JSON lines: ``{"time": seconds since 1970, "event": ..., fields...}``.

    ``offset`` is where a resumed run goes on: what a killed run logged after its last training state is cut
    off, because the resumed run repeats it. ``path=None`` logs nothing (the ranks other than 0 of a
    distributed run).
    """

    def __init__(self, path: str | Path | None, offset: int | None = None):
        self._file = None
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab")  # noqa: SIM115  (closed by close)
            if offset is not None:
                self._file.truncate(offset)

    def write(self, event: str, **fields: Any) -> None:
        """Append one line and hand it to the operating system."""
        if self._file is not None:
            line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    def sync(self) -> int:
        """Make everything written so far durable; return the length of the file in bytes."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Return the complete lines of a log; a last line cut short by a crash is left out."""
    text = Path(path).read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
