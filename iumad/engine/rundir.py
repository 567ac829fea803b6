"""The files of a run.

config.json            resolved configuration, data spec, classes in learning order, steps
log.jsonl              what happened, one JSON object a line
state.safetensors      what a killed run needs to go on; removed when the run is complete
step_1.safetensors     the model after each step, ready for `iumad predict`
results.json           class x step matrix of every metric, thresholds, scores of every test image
cases/                 pictures of the best and worst cases after the last step
report.html            all of it on one page
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iumad.engine.files import read_json


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside one run's directory."""

    root: Path

    @property
    def config(self) -> Path:
        """Everything that was decided before training."""
        return self.root / "config.json"

    @property
    def log(self) -> Path:
        """JSON lines."""
        return self.root / "log.jsonl"

    @property
    def state(self) -> Path:
        """Training state."""
        return self.root / "state.safetensors"

    @property
    def results(self) -> Path:
        """Metrics."""
        return self.root / "results.json"

    @property
    def cases(self) -> Path:
        """Folder of pictures."""
        return self.root / "cases"

    @property
    def report(self) -> Path:
        """The HTML page."""
        return self.root / "report.html"

    def checkpoint(self, step: int) -> Path:
        """The model after ``step`` (counted from 0; files count from 1, as reports do)."""
        return self.root / f"step_{step + 1}.safetensors"

    def last_checkpoint(self) -> Path:
        """The model after the last finished step.

        Raises:
            FileNotFoundError: if no step is finished.
        """
        steps = read_json(self.config)["steps"] if self.config.exists() else []
        for step in reversed(range(len(steps))):
            if self.checkpoint(step).exists():
                return self.checkpoint(step)
        raise FileNotFoundError(2, "no finished step of a run in this directory", str(self.root))

    def settings(self) -> dict[str, Any]:
        """The content of ``config.json``.

        Raises:
            FileNotFoundError: if this is no run directory.
        """
        if not self.config.exists():
            raise FileNotFoundError(2, "no config.json: not a run directory", str(self.root))
        return read_json(self.config)


def new_directory(root: Path, *, overwrite: bool) -> None:
    """Make sure that ``root`` is an empty folder.

    With ``overwrite`` an earlier run in it is deleted; anything that is not a run is never deleted.

    Raises:
        ValueError: if it holds something else.
    """
    if root.is_dir() and any(root.iterdir()):
        is_run = (root / "config.json").exists() or (root / "runs.json").exists()
        if not is_run:
            raise ValueError(f"{root} is not empty and not a run directory; choose another --out")
        if not overwrite:
            raise ValueError(
                f"{root} holds a run; `iumad resume {root}` goes on with it, --overwrite replaces it"
            )
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)


def checkpoint_path(path: str | Path) -> Path:
    """A checkpoint file, or the last one of a run directory."""
    path = Path(path)
    return RunDirectory(path).last_checkpoint() if path.is_dir() else path
