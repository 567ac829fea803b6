"""The class x step matrix of an incremental run, and every number derived from it (paper.md 1.6, E1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DENOMINATORS = ("old", "all")


class ResultMatrix:
    """Metrics of every class after every step: ``values(metric)[step, class]``, NaN where not yet learned.

    ``steps`` groups the classes by the step that learns them: ``[("a", "b"), ("c",)]``. Derived numbers are
    in the unit of the recorded metrics, higher being better; a NaN among the values they need makes them NaN.
    """

    def __init__(self, steps: Sequence[Sequence[str]]) -> None:
        self.steps = tuple(tuple(step) for step in steps)
        self.classes = tuple(cls for step in self.steps for cls in step)
        if not self.steps or not all(self.steps):
            raise ValueError(f"steps are {self.steps}, expected steps of at least one class each")
        repeated = sorted({cls for cls in self.classes if self.classes.count(cls) > 1})
        if repeated:
            raise ValueError(f"steps name {', '.join(repeated)} more than once, expected once each")
        self._learned_in = {cls: t for t, step in enumerate(self.steps) for cls in step}
        self._values: dict[str, NDArray[np.float64]] = {}
        self._recorded: set[int] = set()

    def record(self, step: int, cls: str, metrics: dict[str, float]) -> None:
        """Store the metrics of a class measured after a step; the class must have been learned by then."""
        if cls not in self._learned_in:
            raise ValueError(f"cls is {cls!r}, expected one of {', '.join(self.classes)}")
        if not self._learned_in[cls] <= step < len(self.steps):
            raise ValueError(
                f"step is {step}, but {cls!r} is learned in step {self._learned_in[cls]} "
                f"of {len(self.steps)} steps"
            )
        for name, value in metrics.items():
            empty = np.full((len(self.steps), len(self.classes)), np.nan)
            self._values.setdefault(name, empty)[step, self.classes.index(cls)] = value
        self._recorded.add(step)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics recorded so far."""
        return tuple(self._values)

    @property
    def last_step(self) -> int:
        """Index of the last step with a recorded value; -1 before the first."""
        return max(self._recorded, default=-1)

    def values(self, metric: str) -> NDArray[np.float64]:
        """Copy of the matrix of one metric, shape (steps, classes)."""
        if metric not in self._values:
            raise ValueError(
                f"metric is {metric!r}, expected one of {', '.join(self.metrics) or '(none recorded)'}"
            )
        return self._values[metric].copy()

    def final_mean(self, metric: str, *, after: int | None = None) -> float:
        """Mean over the classes seen by step ``after`` (default: the last recorded), as of that step."""
        last = self._check_step(after)
        return float(self.values(metric)[last, self._seen(last)].mean())

    def average_incremental(self, metric: str, *, after: int | None = None) -> float:
        """Mean over the steps up to ``after`` of the mean over the classes seen by then."""
        last = self._check_step(after)
        return float(np.mean([self.final_mean(metric, after=step) for step in range(last + 1)]))

    def forgetting_measure(self, metric: str, *, after: int | None = None, over: str = "old") -> float:
        """FM of Chaudhry et al. 2018, as in the paper (E1): best earlier value minus the last; may be
        negative.

        Mean over the classes learned before the last step (``over="old"``) or, with the newest counted as 0,
        over all seen (``over="all"``, paper.md A18). NaN while there is no old class.
        """
        return self._mean_drop(metric, after, over, lambda earlier: earlier.max())

    def first_minus_last(self, metric: str, *, after: int | None = None, over: str = "old") -> float:
        """Avalanche's forgetting: the value in the step that learned the class, minus the last."""
        return self._mean_drop(metric, after, over, lambda earlier: earlier[0])

    def backward_transfer(self, metric: str, *, after: int | None = None, over: str = "old") -> float:
        """BWT: minus `first_minus_last`."""
        return -self.first_minus_last(metric, after=after, over=over)

    def summary(self, metric: str, *, after: int | None = None) -> dict[str, float]:
        """All derived numbers of one metric, each under its own name."""
        return {
            "final_mean": self.final_mean(metric, after=after),
            "average_incremental": self.average_incremental(metric, after=after),
            "forgetting_measure": self.forgetting_measure(metric, after=after),
            "first_minus_last": self.first_minus_last(metric, after=after),
            "backward_transfer": self.backward_transfer(metric, after=after),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content; missing values are None."""
        return {
            "steps": [list(step) for step in self.steps],
            "metrics": {
                name: [[None if np.isnan(value) else float(value) for value in row] for row in matrix]
                for name, matrix in self._values.items()
            },
            "recorded_steps": sorted(self._recorded),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ResultMatrix:
        """Inverse of `to_dict`."""
        matrix = cls(content["steps"])
        shape = (len(matrix.steps), len(matrix.classes))
        for name, rows in content["metrics"].items():
            values = np.array(
                [[np.nan if value is None else value for value in row] for row in rows], dtype=float
            )
            if values.shape != shape:
                raise ValueError(
                    f"metrics[{name!r}] has shape {values.shape}, expected (steps, classes) = {shape}"
                )
            matrix._values[name] = values
        matrix._recorded = set(content["recorded_steps"])
        return matrix

    def _check_step(self, after: int | None) -> int:
        last = self.last_step if after is None else after
        if not 0 <= last <= self.last_step:
            raise ValueError(
                f"after is {after}, expected a recorded step (the last recorded is {self.last_step})"
            )
        return last

    def _seen(self, step: int) -> NDArray[np.bool_]:
        return np.array([self._learned_in[cls] <= step for cls in self.classes])

    def _mean_drop(self, metric: str, after: int | None, over: str, best_of: Any) -> float:
        if over not in DENOMINATORS:
            raise ValueError(f"over is {over!r}, expected one of {', '.join(DENOMINATORS)}")
        last = self._check_step(after)
        values = self.values(metric)
        drops = [
            best_of(values[self._learned_in[cls] : last, column]) - values[last, column]
            for column, cls in enumerate(self.classes)
            if self._learned_in[cls] < last
        ]
        if not drops:
            return float("nan")
        return float(np.sum(drops) / (len(drops) if over == "old" else self._seen(last).sum()))
