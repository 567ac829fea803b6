"""What of benchmarks/gpu.py needs no GPU: every case runs (small, on the CPU), the model's numbers, the table, the arguments."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import gpu, gpu_model  # noqa: E402
from iumad_kernels import reference  # noqa: E402

CASES = list(gpu.cases())


def once(function: Callable[[], object]) -> float:
    function()
    return 5.0


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.shape}-{case.dtype}")
def test_cases_run(case: gpu.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 20 of everything; results are checked, forward and backward timed, missing peers named."""
    noise = gpu._noise
    small = lambda n: n if n <= 16 else 20  # noqa: E731
    monkeypatch.setattr(
        gpu,
        "_noise",
        lambda dtype, **shapes: noise(dtype, **{k: tuple(map(small, s)) for k, s in shapes.items()}),
    )
    case = next(c for c in gpu.cases() if (c.op, c.shape, c.dtype) == (case.op, case.shape, case.dtype))
    rows = gpu.measure(case, "cpu", once)
    assert [row["direction"] for row in rows] == list(case.passes)
    assert all(row["measured_us"] == 5.0 and set(row["peers_us"]) == set(case.peers) for row in rows)
    assert json.loads(json.dumps(rows)) == rows
    assert f"| {case.shape} |" in gpu.table(rows, "H100")


def test_every_op_with_a_definition_has_a_case() -> None:
    assert {case.op for case in CASES} == set(reference.__all__)


def test_a_wrong_state_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's result may be right while the state it leaves is not."""
    case = next(case for case in CASES if case.op == "selective_state_update")

    def forgetful(state: Tensor, **rest: Tensor) -> Tensor:
        return reference.selective_state_update(state.clone(), **rest)

    given = {
        name: t[:2, :20] if name in ("state", "x", "dt", "z") else t[:20] for name, t in case.inputs().items()
    }
    given |= {name: given[name][:2] for name in ("B", "C")}
    assert gpu.error(case, {k: t.clone() for k, t in given.items()}, reference.selective_state_update) < 1e-6
    assert gpu.error(case, given, forgetful) > 0.1


def test_gradients_made_with_the_value_are_timed_with_it() -> None:
    x, calls = torch.ones(3, requires_grad=True), []

    def loss() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return (x * x).sum()

    assert gpu.time_passes(("forward", "forward + backward"), loss, [x], once) == [5.0, 5.0]
    assert calls == [False, True]


def test_the_model_by_hand() -> None:
    chip = gpu_model.Gpu(bandwidth=1e9, clocks=1e6, tf32=1e12, bf16=2e12)
    memory = gpu_model.Work(bytes=1e6, instructions=128)
    assert memory.floor_us(chip) == pytest.approx(1000)
    assert memory.predicted_us(chip) == pytest.approx(1000 / 0.85 + 2)
    assert gpu_model.Work(bytes=0, exponentials=16e6, launches=3).predicted_us(chip) == pytest.approx(
        1e6 / 0.6 + 6
    )
    assert gpu_model.Work(bytes=0, tf32=1e6, bf16=2e6).floor_us(chip) == pytest.approx(2)


def test_the_model_of_attention_by_hand() -> None:
    forward, backward = gpu_model.cross_attention(6, 8, 196, 196, 32, 2)
    assert forward.bytes == 4 * 6 * 8 * 196 * 32 * 2
    assert forward.bf16 == 4 * 6 * 8 * 196 * 196 * 32
    assert backward.bf16 == 3.5 * forward.bf16
    assert gpu_model.cross_attention(6, 8, 196, 196, 32, 4)[0].tf32 == 3 * forward.bf16


def test_the_model_of_a_step_by_hand() -> None:
    (step,) = gpu_model.selective_state_update(64, 5120, 16, 2)
    states, tokens = 64 * 5120 * 16, 64 * 5120
    assert step.bytes == 2 * 4 * states + 4 * 2 * tokens + 4 * (16 + 2) * 5120 + 2 * 4 * 64 * 16
    assert step.exponentials == states


def test_the_model_of_linear_heads_by_hand() -> None:
    value, both = gpu_model.fused_linear_kl(4096, 1024, 32000, 2)
    chunks = 8  # of 524 rows
    weights, logits, features = 2 * 32000 * 1024, 2 * 4096 * 32000, 2 * 4096 * 1024
    assert value.bf16 == 2 * 2 * 4096 * 1024 * 32000
    assert both.bf16 == 2 * value.bf16
    assert value.bytes == chunks * 2 * weights + 2 * features + 4 * logits
    sums = 2 * 4 * 32000 * 1024 + 2 * weights
    assert both.bytes - value.bytes == chunks * (weights + sums) + 5 * logits + 4 * features + 2 * weights
    assert value.launches == 5 * chunks
    assert gpu_model.fused_linear_kl(4096, 1024, 32000, 4)[0].instructions == value.bf16 / 2


def test_the_documented_table_is_the_models() -> None:
    table = gpu.table([row for case in CASES for row in gpu.model_rows(case)], None).splitlines()
    documented = [line for line in (ROOT / "docs/gpu.md").read_text().splitlines() if line.count("|") == 8]
    assert set(documented) <= set(table)
    assert {line for line in table if "float32" in line} <= set(documented)


def test_no_floor_is_above_its_prediction() -> None:
    for case in CASES:
        for row in gpu.model_rows(case):
            assert all(0 < row[name]["predicted_fraction"] < 1 for name in gpu_model.GPUS)


def test_table_of_measurements() -> None:
    (row,) = gpu.model_rows(CASES[0])[:1]
    row |= {
        "measured_us": 2 * row["A100"]["floor_us"],
        "peers_us": {"mamba-ssm": 12.345, "other": "not timed: why"},
    }
    assert gpu.table([row], "A100").splitlines()[-1].endswith("| 50 | mamba-ssm 12.3; other not timed: why |")
    assert "measured" not in gpu.table([row], None)


@pytest.mark.parametrize("arguments", [[], ["--all"], ["--json", "never_written.json"]])
def test_without_a_gpu_one_sentence(arguments, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: pytest.fail("nothing may be started"))
    assert gpu.main(arguments) == 1
    assert capsys.readouterr().err.splitlines() == [gpu.NO_GPU]


def test_all_stops_at_what_fails(monkeypatch, capsys) -> None:
    started = []

    def run(command, cwd):
        started.append(command)
        return gpu.subprocess.CompletedProcess(command, 3 if "pytest" in command else 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.main(["--all"]) == 3
    assert started == gpu.everything()[:3]
    assert all(Path(part).exists() for command in gpu.everything() for part in command[:1])
    assert started[2][-1].startswith("tests/kernels/test_triton_")


def test_the_model_alone(capsys) -> None:
    assert gpu.main(["--model", "--filter", "anomaly"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4
