"""Several runs of one experiment: seeds, class orders, and yardsticks.

    OUT/runs.json          which runs there are, and their part: main, joint (upper bound), finetune (lower
                           bound), memory (nearest neighbours of frozen features, no training)
    OUT/seed_0/ ...        one run directory each
    OUT/report.html        all of them on one page

A single run has no group: its files lie in OUT itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from iumad.config import Config
from iumad.engine.files import read_json, write_json
from iumad.engine.memory import run_memory
from iumad.engine.rundir import RunDirectory, new_directory
from iumad.engine.runner import Machine, Run, run_settings
from iumad.report.html import write_report
from iumad.report.load import RunView, load_runs


@dataclass(frozen=True)
class Planned:
    """One run of a group."""

    name: str
    role: str
    config: Config


def plan_runs(
    config: Config, seeds: Sequence[int], orders: Sequence[tuple[str, ...]], *, bounds: bool
) -> list[Planned]:
    """Every seed with every class order; the bounds and the untrained memory with the first of each.

    Empty ``seeds`` and ``orders`` mean those of ``config``.
    """
    runs = []
    for number, order in enumerate(orders or [config.protocol.class_order], 1):
        for seed in seeds or [config.train.seed]:
            parts = [f"seed_{seed}"] if len(seeds) > 1 else []
            parts += [f"order_{number}"] if len(orders) > 1 else []
            runs.append(Planned("_".join(parts) or "main", "main", _vary(config, seed=seed, order=order)))
    if bounds:
        first = runs[0].config
        steps = first.protocol.name.removeprefix("finetune:")
        runs.append(Planned("joint", "joint", _vary(first, protocol="joint")))
        runs.append(Planned("finetune", "finetune", _vary(first, protocol=f"finetune:{steps}")))
        runs.append(Planned("memory", "memory", first))
    return runs


def start(root: Path, runs: Sequence[Planned], *, overwrite: bool) -> None:
    """Make the directories of new runs; a single run lies in ``root`` itself.

    Raises:
        ValueError: before anything is made or deleted, if a configuration does not fit the data.
    """
    settings = [run_settings(run.config) for run in runs]
    new_directory(root, overwrite=overwrite)
    if len(runs) == 1:
        write_json(RunDirectory(root).config, settings[0])
        return
    for run, content in zip(runs, settings, strict=True):
        write_json(RunDirectory(root / run.name).config, content)
    write_json(root / "runs.json", {"runs": [{"directory": run.name, "role": run.role} for run in runs]})


def execute(root: Path, machine: Machine) -> list[RunView]:
    """Bring every unfinished run under ``root`` to its end, then write the report."""
    group = root / "runs.json"
    entries = read_json(group)["runs"] if group.exists() else [{"directory": ".", "role": "main"}]
    for entry in entries:
        directory = root / entry["directory"]
        if is_finished(directory):
            continue
        if entry["role"] == "memory":
            run_memory(directory, machine)
        else:
            Run(directory, machine).execute()
    machine.world.barrier()
    if not machine.world.is_main:
        return []
    views = load_runs(root)
    write_report(views, root / "report.html")
    return views


def is_finished(directory: Path) -> bool:
    """Whether every step of a run has been evaluated."""
    results = directory / "results.json"
    if not results.exists() or (directory / "state.safetensors").exists():
        return False
    return len(read_json(results)["steps"]) == len(read_json(directory / "config.json")["steps"])


def _vary(
    config: Config,
    *,
    seed: int | None = None,
    order: tuple[str, ...] | None = None,
    protocol: str | None = None,
) -> Config:
    train, steps = config.train, config.protocol
    if seed is not None:
        train = dataclasses.replace(train, seed=seed)
    if order is not None:
        steps = dataclasses.replace(steps, class_order=order)
    if protocol is not None:
        steps = dataclasses.replace(steps, name=protocol)
    return dataclasses.replace(config, train=train, protocol=steps)
