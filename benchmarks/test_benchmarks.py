"""`pytest --benchmark`: every case of every benchmark file through pytest-benchmark, the peers' ratios in its extra info."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks import harness

MODULES = [
    p.stem
    for p in sorted(Path(__file__).parent.glob("*.py"))
    if "harness import" in p.read_text() and p != Path(__file__)
]
CASES = [
    pytest.param(case, id=f"{module}: {case.name}")
    for module in MODULES
    if hasattr(imported := importlib.import_module(f"benchmarks.{module}"), "cases")
    for case in imported.cases()
]


@pytest.mark.parametrize("case", CASES)
def test_case(case: harness.Case, benchmark) -> None:
    import torch

    torch.set_num_threads(1)
    row = harness.measure(case, rounds=15)
    with_print = {
        name: f"{t['ours_is_faster_by']:.2f}x"
        for name, t in row["contenders"].items()
        if name != harness.OURS
    }
    benchmark.extra_info.update({"ours is faster by": with_print, "notes": row["notes"]})
    harness.print_row(row)
    benchmark.pedantic(case.build()[harness.OURS], rounds=15, warmup_rounds=3)
