"""Times every op's GPU kernels beside the model of docs/gpu.md.

    python benchmarks/gpu.py [--json FILE] [--filter TEXT]   # on a GPU: measure, print the table, write it
    python benchmarks/gpu.py --all                           # on a GPU, first: build with CUDA and run the GPU tests
    python benchmarks/gpu.py --model                         # the table without measurements; needs no GPU

Device events, median of 50 after 10 warm-ups. What is measured is checked first against the float64 definition on the first
images. Peers (mamba-ssm, causal-conv1d, flash-attn, Liger) are timed where they are installed. Backward is timed alone,
but where an op makes its gradients with the value: there both together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import gpu_model as model
except ImportError:  # collected by pytest
    from benchmarks import gpu_model as model

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/gpu.json"
NO_GPU = "benchmarks/gpu.py: torch finds no GPU here"
Run = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op at one shape: its inputs, how it is called, its passes and the model's work for each, peers by name."""

    op: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[], dict[str, Tensor]]
    flags: dict[str, Any] = field(default_factory=dict)
    passes: tuple[str, ...] = ("forward", "backward")  # what is timed, see time_passes
    work: tuple[model.Work, ...]
    peers: dict[str, Callable[[dict[str, Tensor]], Run]] = field(default_factory=dict)


def _noise(dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def _scan(dtype: torch.dtype, batch: int, dim: int, *pixels: int) -> dict[str, Tensor]:
    grid = _noise(dtype, u=(batch, dim, *pixels), delta=(batch, dim, *pixels))
    projections = _noise(torch.float32, B=(batch, 16, *pixels), C=(batch, 16, *pixels), D=(dim,))
    A = _noise(torch.float32, A=(dim, 16))["A"]
    return {"u": grid["u"], "delta": grid["delta"].abs(), "A": -A.abs(), **projections}


def _bottleneck(dtype: torch.dtype) -> dict[str, Tensor]:
    given = _noise(dtype, fused_logits=(64, 32000), bottleneck_logits=(64, 32000))
    return {**given, "labels": torch.zeros(given["fused_logits"].shape[0], dtype=torch.int64)}


def _step(dtype: torch.dtype, batch: int, dim: int) -> dict[str, Tensor]:
    """One token of a Mamba layer: states, parameters, B and C in float32."""
    tokens = _noise(dtype, x=(batch, dim), dt=(batch, dim), z=(batch, dim))
    layer = _noise(torch.float32, A=(dim, 16), B=(batch, 16), C=(batch, 16), D=(dim,), dt_bias=(dim,))
    return {**_noise(torch.float32, state=(batch, dim, 16)), **tokens, **layer, "A": -layer["A"].abs()}


def _heads(dtype: torch.dtype, rows: int, dim: int, classes: int) -> dict[str, Tensor]:
    """Two linear heads whose logits have a variance of 1."""
    given = _noise(
        torch.float32,
        features_t=(rows, dim),
        weight_t=(classes, dim),
        features_s=(rows, dim),
        weight_s=(classes, dim),
    )
    return {name: (t * t.shape[1] ** -0.25).to(dtype) for name, t in given.items()}


def _mamba(given: dict[str, Tensor]) -> Run:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return partial(selective_scan_fn, *(given[name] for name in ("u", "delta", "A", "B", "C", "D")))


def _mamba_step(given: dict[str, Tensor]) -> Run:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    return partial(selective_state_update, **given, dt_softplus=True)


def _package_conv(given: dict[str, Tensor]) -> Run:
    from causal_conv1d import causal_conv1d_fn

    return partial(causal_conv1d_fn, given["x"], given["weight"], given["bias"], activation="silu")


def _flash(given: dict[str, Tensor]) -> Run:
    from flash_attn import flash_attn_func

    if given["query"].dtype == torch.float32:
        raise ImportError("flash-attn has no float32")
    q, k, v = (given[name].transpose(1, 2) for name in ("query", "key", "value"))
    return partial(flash_attn_func, q, k, v)


def _liger(given: dict[str, Tensor]) -> Run:
    from liger_kernel.transformers import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    q, p = given["student_logits"], given["teacher_logits"]
    return lambda: loss(q.log_softmax(-1), p.log_softmax(-1))


def _liger_heads(given: dict[str, Tensor]) -> Run:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0)
    return partial(loss, *(given[name] for name in ("features_s", "weight_s", "features_t", "weight_t")))


def cases() -> Iterator[Case]:
    """The shapes of the model: the project's, and larger ones that fill a GPU."""
    for dtype in (torch.float32, torch.bfloat16):
        size = dtype.itemsize
        for batch, dim, *pixels in ((6, 512, 14, 14), (32, 192, 56, 56), (8, 1024, 2048)):
            yield Case(
                op="selective_scan_2d" if len(pixels) == 2 else "selective_scan",
                shape=f"{(batch, dim, *pixels)} N 16", dtype=dtype, inputs=partial(_scan, dtype, batch, dim, *pixels),
                work=model.selective_scan(batch, dim, torch.Size(pixels).numel(), 16, size),
                peers={} if len(pixels) == 2 else {"mamba-ssm": _mamba},
            )  # fmt: skip
        yield Case(
            op="selective_state_update", shape="(64, 5120) N 16", dtype=dtype, inputs=partial(_step, dtype, 64, 5120),
            flags={"dt_softplus": True}, passes=("forward",), work=model.selective_state_update(64, 5120, 16, size),
            peers={"mamba-ssm": _mamba_step},
        )  # fmt: skip
        for batch, heads, tokens, dim in ((6, 8, 196, 32), (8, 16, 2048, 64)):
            shape = (batch, heads, tokens, dim)
            yield Case(
                op="cross_attention", shape=f"{shape}", dtype=dtype,
                inputs=partial(_noise, dtype, query=shape, key=shape, value=shape),
                work=model.cross_attention(batch, heads, tokens, tokens, dim, size), peers={"flash-attn": _flash},
            )  # fmt: skip
        yield Case(
            op="kl_divergence", shape="(64, 32000)", dtype=dtype,
            inputs=partial(_noise, dtype, student_logits=(64, 32000), teacher_logits=(64, 32000)),
            work=model.kl_bottleneck(64, 32000, size, labels=False), peers={"Liger": _liger},
        )  # fmt: skip
        yield Case(
            op="kl_bottleneck", shape="(64, 32000), labels", dtype=dtype, inputs=partial(_bottleneck, dtype),
            work=model.kl_bottleneck(64, 32000, size, labels=True),
        )  # fmt: skip
        yield Case(
            op="fused_linear_kl", shape="(4096, 1024) to 32000 classes", dtype=dtype,
            inputs=partial(_heads, dtype, 4096, 1024, 32000),
            flags={"detach_teacher": True}, passes=("forward", "forward + backward"),
            work=model.fused_linear_kl(4096, 1024, 32000, size), peers={"Liger": _liger_heads},
        )  # fmt: skip
        yield Case(
            op="gaussian_bottleneck", shape="(4096, 768)", dtype=dtype, flags={"seed": 7},
            inputs=partial(_noise, dtype, mu=(4096, 768), logvar=(4096, 768)),
            work=model.gaussian_bottleneck(4096, 768, size),
        )  # fmt: skip
        for batch, channels, side, kernel in ((6, 1024, 14, 3), (32, 192, 56, 3), (32, 192, 56, 5)):
            shape = (batch, side, side, channels)
            yield Case(
                op="depthwise_conv2d", shape=f"{(batch, channels, side, side)} {kernel}x{kernel}", dtype=dtype,
                inputs=partial(_channels_last, dtype, "weight", x=shape, weight=(channels, 1, kernel, kernel), bias=(channels,)),
                flags={"activation": "silu"},
                work=model.depthwise_conv2d(batch * channels * side * side, kernel * kernel, size),
            )  # fmt: skip
        yield Case(
            op="causal_conv1d", shape="(8, 1024, 2048) width 4", dtype=dtype, flags={"activation": "silu"},
            inputs=partial(_noise, dtype, x=(8, 1024, 2048), weight=(1024, 4), bias=(1024,)),
            work=model.depthwise_conv2d(8 * 1024 * 2048, 4, size), peers={"causal-conv1d": _package_conv},
        )  # fmt: skip
        yield Case(
            op="anomaly_map", shape="(6, 272, 14, 14) to 224", dtype=dtype, flags={"size": 224, "sigma": 4.0},
            inputs=partial(_channels_last, dtype, "", features=(6, 14, 14, 272), reference=(6, 14, 14, 272)),
            work=model.anomaly_map(6, 272, 196, 224 * 224, size),
        )  # fmt: skip


def _channels_last(dtype: torch.dtype, plain: str, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Images given as (batch, rows, columns, channels), seen as (batch, channels, rows, columns); ``plain`` stays as it is."""
    return {
        name: t.permute(0, 3, 1, 2) if t.dim() == 4 and name != plain else t
        for name, t in _noise(dtype, **shapes).items()
    }


def median_us(function: Run) -> float:
    """Of a call, by device events."""
    times = []
    for repeat in range(60):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        if repeat >= 10:
            times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def time_passes(
    passes: tuple[str, ...], function: Run, leaves: list[Tensor], clock: Callable[[Run], float]
) -> list[float]:
    """Microseconds of a forward without gradients; of the backward alone, or (gradients made with the value) of both together."""
    with torch.no_grad():
        times = [clock(function)]
    if "backward" in passes:
        outputs = function()
        outputs = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t.requires_grad]
        grads = [torch.randn_like(t) for t in outputs]
        times.append(
            clock(lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True))
        )
    elif "forward + backward" in passes:
        times.append(clock(lambda: torch.autograd.grad(function(), leaves, allow_unused=True)))
    return times


def error(case: Case, given: dict[str, Tensor], function: Run) -> float:
    """RMS ratio to the float64 definition, on the first two rows: of the first output, and of a state updated in place."""
    from iumad_kernels import reference

    few = {name: t.detach()[:2] if name in _BATCHED else t.detach() for name, t in given.items()}
    wide = {name: t.double() if t.is_floating_point() else t for name, t in few.items()}
    results = getattr(reference, case.op)(**wide, **case.flags), function(**few, **case.flags)
    want, got = (t[0] if isinstance(t, tuple) else t for t in results)
    pairs = [(got, want)] + [(few[name], wide[name]) for name in few if name == "state"]
    return max(((got.double() - want).norm() / want.norm()).item() for got, want in pairs)


_BATCHED = {
    *("u", "delta", "B", "C", "state", "x", "dt", "z", "query", "key", "value", "labels", "mu", "logvar"),
    *("features", "reference", "features_t", "features_s"),
    *("student_logits", "teacher_logits", "fused_logits", "bottleneck_logits"),
}  # fmt: skip


def measure(case: Case, device: str, clock: Callable[[Run], float]) -> list[dict[str, Any]]:
    """A row of the table for each pass."""
    import iumad_kernels

    function = getattr(iumad_kernels, case.op)
    given = {name: t.to(device) for name, t in case.inputs().items()}
    leaves = [t.requires_grad_() for t in given.values() if t.is_floating_point()]
    found = error(case, given, function)
    allowed = 1e-5 if case.dtype == torch.float32 else 1e-2
    if not found <= allowed:
        raise AssertionError(
            f"{case.op} {case.shape} {case.dtype}: off by {found:.1e}, allowed {allowed:.0e}"
        )
    backend = iumad_kernels.backend_for(case.op, device).backend
    # Forced, so that causal_conv1d does not hand over to the package it is compared with.
    with iumad_kernels.backend(backend):
        ours = time_passes(case.passes, partial(function, **given, **case.flags), leaves, clock)
    peers: dict[str, list[float] | str] = {}
    for name, build in case.peers.items():
        try:
            peers[name] = time_passes(case.passes, build(given), leaves, clock)
        except ImportError as reason:
            peers[name] = f"not timed: {reason}"
    rows = model_rows(case)
    for i, row in enumerate(rows):
        row |= {"backend": backend, "error": found, "measured_us": ours[i]}
        row["peers_us"] = {name: t if isinstance(t, str) else t[i] for name, t in peers.items()}
    return rows


def model_rows(case: Case) -> list[dict[str, Any]]:
    """What the model says of a case, on every GPU it knows."""
    rows = []
    for name_of_pass, work in zip(case.passes, case.work):
        row: dict[str, Any] = {"op": case.op, "direction": name_of_pass, "shape": case.shape}
        row |= {"dtype": str(case.dtype).removeprefix("torch."), "megabytes": work.bytes / 1e6}
        row["operations"] = work.operations()
        for name, gpu in model.GPUS.items():
            floor, predicted = work.floor_us(gpu), work.predicted_us(gpu)
            row[name] = {
                "floor_us": floor,
                "predicted_us": predicted,
                "predicted_fraction": floor / predicted,
            }
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], gpu: str | None) -> str:
    """Markdown: the model, and beside it what was measured on ``gpu`` (None: nothing was)."""
    header = [
        "kernel",
        "shape",
        "MB",
        "operations",
        "floor H100 / A100, us",
        "predicted H100 / A100, us",
        "of the floor, %",
    ]
    if gpu:
        header += ["measured, us", f"of the floor ({gpu}), %", "peers, us"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        h100, a100 = row["H100"], row["A100"]
        cells = [
            f"{row['op']} {row['direction']}, {row['dtype']}", row["shape"], f"{row['megabytes']:.3g}", row["operations"],
            f"{h100['floor_us']:.3g} / {a100['floor_us']:.3g}", f"{h100['predicted_us']:.3g} / {a100['predicted_us']:.3g}",
            f"{100 * h100['predicted_fraction']:.0f} / {100 * a100['predicted_fraction']:.0f}",
        ]  # fmt: skip
        if gpu:
            peers = (
                f"{name} {t if isinstance(t, str) else f'{t:.3g}'}" for name, t in row["peers_us"].items()
            )
            measured = row["measured_us"]
            cells += [f"{measured:.3g}", f"{100 * row[gpu]['floor_us'] / measured:.0f}", "; ".join(peers)]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def everything() -> list[list[str]]:
    """The commands of the day a GPU is at hand, in order."""
    python = sys.executable
    tests = ["tests/kernels/test_gpu.py", "tests/kernels/test_gpu_dispatch.py"]
    tests += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests/kernels").glob("test_triton_*.py"))
    return [
        [str(ROOT / "scripts/dev_build"), "-DIUMAD_CUDA=on"],
        [python, str(ROOT / "scripts/cuda_budget")],
        [python, "-m", "pytest", "-q", *tests],
        [python, str(Path(__file__)), "--json", str(RESULT)],
    ]


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print; 1 where there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--filter", default="", help="only ops whose name contains this")
    parser.add_argument(
        "--all", action="store_true", help="build with CUDA, run the GPU tests, measure, write " + RESULT.name
    )
    parser.add_argument("--model", action="store_true", help="print the model's table only; needs no GPU")
    options = parser.parse_args(argv)
    chosen = [case for case in cases() if options.filter in case.op]
    if options.model:
        print(table([row for case in chosen for row in model_rows(case)], None))
        return 0
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 1
    if options.all:
        for command in everything():
            print("$", *command, flush=True)
            if code := subprocess.run(command, cwd=ROOT).returncode:
                return code
        return 0
    device = torch.cuda.get_device_name()
    known = next((name for name in model.GPUS if name in device), None)
    if known is None:
        print(f"floors are those of an A100: no data sheet for {device} here")
    rows = [row for case in chosen for row in measure(case, "cuda", median_us)]
    print(table(rows, known or "A100"))
    if options.json:
        result = {"gpu": device, "torch": torch.__version__, "cuda": torch.version.cuda, "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
