"""The class x step matrix as text: rows are classes in learning order, columns are steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from iumad.metrics.forgetting import ResultMatrix

# What is printed and in which order; every metric of a run is in results.json.
METRICS = {
    "i_auroc": "Image AUROC",
    "p_auroc": "Pixel AUROC",
    "aupro_30": "AUPRO (FPR 0.3)",
    "p_ap": "Pixel AP",
    "aupro_05": "AUPRO (FPR 0.05)",
    "p_f1max": "Pixel F1 max",
}
DERIVED = {
    "final_mean": "mean after the last step",
    "average_incremental": "mean over all steps",
    "forgetting_measure": "FM (best earlier - last)",
    "first_minus_last": "first - last (Avalanche)",
    "backward_transfer": "BWT",
}


@dataclass(frozen=True)
class Row:
    """One class: its step, its value after each step (None before it is learned), best, final and drop."""

    name: str
    step: int
    values: tuple[float | None, ...]

    @property
    def known(self) -> list[float]:
        """The values that exist."""
        return [value for value in self.values if value is not None]

    @property
    def best(self) -> float | None:
        """The largest value so far."""
        return max(self.known, default=None)

    @property
    def final(self) -> float | None:
        """The last value."""
        return self.known[-1] if self.known else None

    @property
    def drop(self) -> float | None:
        """Best earlier value minus the last; None for a class of the last step."""
        return max(self.known[:-1]) - self.known[-1] if len(self.known) > 1 else None


def rows(matrix: ResultMatrix, metric: str) -> list[Row]:
    """The matrix of one metric, class by class."""
    values = matrix.values(metric)
    found = []
    for step, names in enumerate(matrix.steps):
        for name in names:
            column = values[:, matrix.classes.index(name)]
            cells = tuple(None if math.isnan(value) else float(value) for value in column)
            found.append(Row(name, step, cells))
    return found


def means(matrix: ResultMatrix, metric: str) -> Row:
    """The last row of the table: the mean over the classes seen after each step."""
    done = range(matrix.last_step + 1)
    values = [matrix.final_mean(metric, after=step) for step in done]
    padded = [None if math.isnan(value) else value for value in values] + [None] * (
        len(matrix.steps) - len(values)
    )
    return Row("mean", -1, tuple(padded))


def percent(value: float | None) -> str:
    """A share in per cent with one decimal; a dash for what does not exist.

    >>> percent(0.9312), percent(None)
    ('93.1', '-')
    """
    if value is None or math.isnan(value):
        return "-"
    text = f"{100 * value:.1f}"
    return "0.0" if text == "-0.0" else text


def aligned(head: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> str:
    """A plain table: the first ``left`` columns left-aligned, the others right-aligned."""
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = []
    for line in (head, *body):
        padded = zip(line, widths, strict=True)
        cells = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(padded)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def matrix_text(matrix: ResultMatrix, metric: str) -> str:
    """The table of one metric for a terminal, in per cent."""
    head = [
        METRICS.get(metric, metric),
        *(f"step {t + 1}" for t in range(len(matrix.steps))),
        "best",
        "final",
        "drop",
    ]
    body = []
    for row in (*rows(matrix, metric), means(matrix, metric)):
        last = [row.best, row.final, row.drop if row.name != "mean" else None]
        body.append([row.name, *map(percent, row.values), *map(percent, last)])
    return aligned(head, body)


def forgetting_text(matrix: ResultMatrix) -> str:
    """The derived numbers of the printed metrics, in points of per cent."""
    names = [name for name in METRICS if name in matrix.metrics]
    summaries = {name: matrix.summary(name) for name in names}
    body = [[title, *(percent(summaries[name][key]) for name in names)] for key, title in DERIVED.items()]
    return aligned(["derived", *(METRICS[name] for name in names)], body)
