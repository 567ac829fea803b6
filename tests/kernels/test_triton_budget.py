"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU and stays within its budget."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/triton_budget.py"


def test_kernels_stay_within_their_budget():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    if run.returncode == 2:
        pytest.skip(run.stdout.splitlines()[-1])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


@pytest.mark.parametrize("budget", ["scripts/triton_budget.json", "csrc/cuda/budget.json"])
def test_no_budget_allows_spills(budget):
    kernels = json.loads((ROOT / budget).read_text())
    assert {name: k["stack"] for name, k in kernels.get("kernels", kernels).items() if k["stack"]} == {}


def test_a_broken_budget_names_the_kernel(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("triton_budget", SCRIPT)
    budget = importlib.util.module_from_spec(spec)
    interpret = os.environ.get("TRITON_INTERPRET")
    spec.loader.exec_module(budget)
    if interpret is not None:
        os.environ["TRITON_INTERPRET"] = interpret
    limit = {
        "registers": 64,
        "stack": 0,
        "shared": 512,
        "occupancy": 50,
        "loads_16_bytes": 2,
        "tensor_core": 4,
    }
    assert budget.compare("scan", limit, limit) == []
    assert budget.compare("scan", limit | {"stack": 8}, limit) == ["scan: stack 8, limit 0"]
    assert budget.compare("scan", limit | {"tensor_core": 0}, limit) == ["scan: no tensor_core left, was 4"]
    assert budget.compare("scan", limit | {"occupancy": 25}, limit) == [
        "scan: occupancy 25 %, designed for 50 %"
    ]
    assert "scan" in budget.compare("scan", limit, None)[0]
