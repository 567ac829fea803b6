"""What a report is made from: the files of one or several runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iumad.engine.files import read_json
from iumad.engine.log import read_log
from iumad.engine.rundir import RunDirectory
from iumad.metrics.forgetting import ResultMatrix


@dataclass(frozen=True)
class RunView:
    """A run as its files describe it; ``label`` and ``role`` tell the runs of a group apart."""

    directory: RunDirectory
    label: str
    role: str  # "main", "joint" (upper bound), "finetune" (lower bound) or "memory" (no training)
    settings: dict[str, Any]
    results: dict[str, Any]
    log: list[dict[str, Any]]

    @property
    def matrix(self) -> ResultMatrix:
        """Class x step matrix of every metric."""
        return ResultMatrix.from_dict(self.results["matrix"])

    @property
    def is_complete(self) -> bool:
        """Whether every step has been evaluated."""
        return self.matrix.last_step == len(self.settings["steps"]) - 1

    @property
    def modality(self) -> str:
        """``rgb``, ``depth`` or ``both``."""
        return str(self.settings["config"]["model"]["modality"])


def load_run(root: str | Path, label: str = "", role: str = "main") -> RunView:
    """Read one run directory.

    Raises:
        FileNotFoundError: if it is no run directory, or no step of it has been evaluated yet.
    """
    directory = RunDirectory(Path(root))
    settings = directory.settings()
    if not directory.results.exists():
        raise FileNotFoundError(2, "no results.json: no step of this run has been evaluated yet", str(root))
    log = read_log(directory.log) if directory.log.exists() else []
    return RunView(directory, label or directory.root.name, role, settings, read_json(directory.results), log)


def load_runs(root: str | Path) -> list[RunView]:
    """Read a run directory, or all runs of a group (``runs.json``) that have results.

    Raises:
        FileNotFoundError: if there is nothing to report.
    """
    root = Path(root)
    group = root / "runs.json"
    if not group.exists():
        return [load_run(root)]
    entries = read_json(group)["runs"]
    views = [
        load_run(root / entry["directory"], entry["directory"], entry["role"])
        for entry in entries
        if (root / entry["directory"] / "results.json").exists()
    ]
    if not views:
        raise FileNotFoundError(2, "no run of this group has been evaluated yet", str(root))
    return views
