"""Numbers over several runs: mean and standard deviation over seeds and orders, bounds beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

from iumad.report.load import RunView
from iumad.report.tables import METRICS, aligned, percent

SHOWN = ("i_auroc", "p_auroc", "aupro_30")
COLUMNS = tuple((metric, key) for key in ("final_mean", "forgetting_measure") for metric in SHOWN)


def column_titles() -> list[str]:
    """Titles of the columns of :func:`summary_rows`."""
    return [METRICS[metric] if key == "final_mean" else f"FM {METRICS[metric]}" for metric, key in COLUMNS]


def summary_rows(runs: Sequence[RunView]) -> list[list[str]]:
    """One row a run, then mean +- standard deviation of the main runs if there are several; in per cent."""
    rows, main = [], []
    for run in runs:
        summaries = {metric: run.matrix.summary(metric) for metric in SHOWN}
        values = [summaries[metric][key] for metric, key in COLUMNS]
        if run.role == "main":
            main.append(values)
        title = {
            "main": run.label,
            "joint": "joint (upper bound)",
            "finetune": "finetune (lower bound)",
            "memory": "memory (no training)",
        }[run.role]
        rows.append([title, *map(percent, values)])
    if len(main) > 1:
        columns = [[value for value in column if not math.isnan(value)] for column in zip(*main, strict=True)]
        cells = [f"{percent(mean(c))} ± {percent(stdev(c))}" if len(c) > 1 else "-" for c in columns]
        rows.insert(len(main), [f"mean ± std of {len(main)}", *cells])
    return rows


def summary_text(runs: Sequence[RunView]) -> str:
    """The same as a plain table."""
    return aligned(["run", *column_titles()], summary_rows(runs))
