"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU and stays within its budget."""

from __future__ import annotations

import importlib.machinery
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


@pytest.mark.parametrize(
    ("used", "code", "said"),
    [
        ({}, "LDG.E.128 STG.E.128 LDS.128", None),
        ({"stack": 8}, "LDG.E.128 STG.E.128 LDS.128", "uses 8 of stack, more than 0"),
        ({"registers": 200}, "LDG.E.128 STG.E.128 LDS.128", "reaches an occupancy of 12 %, less than 33 %"),
        ({}, "LDG.E.128 LDS.128", "has no STG.E.128"),
    ],
)
def test_a_cuda_kernel_over_budget_is_named(used, code, said, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    loader = importlib.machinery.SourceFileLoader("cuda_budget", str(SCRIPT.with_name("cuda_budget")))
    script = importlib.util.module_from_spec(importlib.util.spec_from_loader("cuda_budget", loader))
    loader.exec_module(script)
    kernel = ("selective_scan_forward float 8", "80")
    usage = {"registers": 80, "stack": 0, "shared": 39000} | used
    monkeypatch.setattr(script, "_usage", lambda library: {kernel: usage})
    monkeypatch.setattr(script, "_vector_instructions", lambda library: {kernel: code})
    monkeypatch.setattr(sys, "argv", ["cuda_budget"])
    if said is None:
        script._main()
        assert "occupancy 37 %" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match=rf"selective_scan_forward float 8 on sm_80 {said}"):
            script._main()
