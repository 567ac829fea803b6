"""``iumad train``: the whole protocol, for one or several seeds and class orders."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from iumad.cli.options import config_from, machine_from
from iumad.config import Config, apply_overrides
from iumad.data import open_dataset
from iumad.engine import group
from iumad.engine.distributed import leave
from iumad.incremental.protocol import order_classes
from iumad.report.load import RunView
from iumad.report.summary import summary_text
from iumad.report.tables import METRICS, forgetting_text, matrix_text


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plan the runs, execute them, write the report."""
    config = config_from(args, preset="recommended")
    return train(config, args)


def train(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """The part that ``iumad demo`` shares."""
    machine = machine_from(args)
    if config.train.shards == 0:  # recorded, so that the run can be repeated with another number of processes
        config = apply_overrides(config, [f"train.shards={machine.world.size}"])
    out = Path(args.out)
    seeds = _seeds(args.seeds)
    classes = open_dataset(config.data.dataset).classes if args.order else ()
    orders = [order_classes(classes, order) for order in args.order]
    runs = group.plan_runs(config, seeds, orders, bounds=args.bounds)
    try:
        if machine.world.is_main:
            group.start(out, runs, overwrite=args.overwrite)
            print(f"run directory: {out}", file=sys.stderr)
        machine.world.barrier()
        return result_of(group.execute(out, machine), out)
    finally:
        leave()


def result_of(views: list[RunView], out: Path) -> dict[str, Any]:
    """What ``train``, ``resume`` and ``report`` print."""
    return {
        "run": str(out),
        "report": str(out / "report.html"),
        "runs": [
            {
                "directory": str(view.directory.root),
                "role": view.role,
                "steps": view.settings["steps"],
                "matrix": view.results["matrix"]["metrics"],
                "summary": view.results["summary"],
                "thresholds": view.results["thresholds"],
            }
            for view in views
        ],
        "text": "\n\n".join(_tables(views)),
    }


def show(result: dict[str, Any]) -> str:
    """The tables and where the report is."""
    return f"{result['text']}\n\nreport: {result['report']}"


def _tables(views: list[RunView]) -> list[str]:
    texts = []
    for view in [view for view in views if view.role == "main"][:1]:
        matrix = view.matrix
        texts += [matrix_text(matrix, name) for name in ("i_auroc", "aupro_30") if name in METRICS]
        texts += [forgetting_text(matrix)] if len(matrix.steps) > 1 else []
    return [*texts, summary_text(views)] if len(views) > 1 else texts


def _seeds(text: str | None) -> list[int]:
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or len(set(parts)) != len(parts):
        raise ValueError(f"--seeds is {text!r}, expected different whole numbers separated by commas")
    return [int(part) for part in parts]
