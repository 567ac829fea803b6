"""Times the selective scan on a GPU beside the model of docs/cuda.md: ``python benchmarks/gpu.py [--json FILE]``.

Device events, median of 50 after 10 warm-ups, results checked against float64 first. mamba-ssm is timed where it is installed.
The floors are those of the model: bytes over the bandwidth and instructions over the issue rate of the GPU found.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import iumad_kernels
from iumad_kernels import reference

# name -> bandwidth in bytes/s, multiprocessors * clock (data sheets)
GPUS = {"H100": (3.35e12, 132 * 1.7e9), "A100": (2.0e12, 108 * 1.41e9)}
N = 16
# name: batch, channels, rows, columns; None: a sequence
SHAPES = {
    "project, es2d 14x14": (6, 512, 14, 14),
    "es2d 56x56": (32, 192, 56, 56),
    "sequence 2048": (8, 1024, None, 2048),
}


def median(function: Callable[[], object]) -> float:
    """Microseconds."""
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


def inputs(shape: tuple[int, int, int | None, int], dtype: torch.dtype) -> dict[str, Tensor]:
    batch, dim, rows, columns = shape
    pixels = (columns,) if rows is None else (rows, columns)
    arguments = {
        "u": torch.randn(batch, dim, *pixels, dtype=dtype),
        "delta": torch.rand(batch, dim, *pixels, dtype=dtype),
        "A": -torch.rand(dim, N),
        "B": torch.randn(batch, N, *pixels),
        "C": torch.randn(batch, N, *pixels),
        "D": torch.randn(dim),
    }
    return {name: t.cuda().requires_grad_() for name, t in arguments.items()}


def measure(name: str, dtype: torch.dtype, bandwidth: float, clock: float) -> dict[str, object]:
    shape = SHAPES[name]
    op = "selective_scan" if shape[2] is None else "selective_scan_2d"
    function, arguments = getattr(iumad_kernels, op), inputs(shape, dtype)
    few = {
        k: t.detach()[:1].double() if k in ["u", "delta", "B", "C"] else t.detach().double()
        for k, t in arguments.items()
    }
    expected, got = getattr(reference, op)(**few), function(**arguments).detach()[:1]
    error = ((got.double() - expected).norm() / expected.norm()).item()
    assert error < (2e-6 if dtype == torch.float32 else 5e-3), f"{name}: wrong by {error}"

    tokens, size = arguments["u"].numel(), arguments["u"].element_size()
    grad, leaves = torch.randn_like(arguments["u"]), list(arguments.values())

    def both(forward: Callable[[], Tensor]) -> float:
        return median(lambda: torch.autograd.grad(forward(), leaves, grad))

    row: dict[str, object] = {
        "shape": name,
        "dtype": str(dtype),
        "backend": iumad_kernels.backend_for(op, "cuda").backend,
        "error": error,
        "forward floor us": 1e6 * tokens * max((3 * size + 5) / bandwidth, N * 10 / 128 / clock),
        "forward us": median(lambda: function(**{k: t.detach() for k, t in arguments.items()})),
        "backward floor us": 1e6 * tokens * max((5 * size + 9) / bandwidth, N * 27 / 128 / clock),
        "forward + backward us": both(lambda: function(**arguments)),
    }
    if shape[2] is None:
        try:
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        except ImportError:
            row["mamba-ssm"] = "not installed"
        else:
            with torch.no_grad():
                row["mamba-ssm forward us"] = median(lambda: selective_scan_fn(*leaves))
            row["mamba-ssm forward + backward us"] = both(lambda: selective_scan_fn(*leaves))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: torch finds no GPU here")
    device = torch.cuda.get_device_name()
    known = next((name for name in GPUS if name in device), None)
    if known is None:
        print(f"floors are those of an A100: no data sheet for {device} here")
    bandwidth, clock = GPUS[known or "A100"]
    rows = [
        measure(name, dtype, bandwidth, clock) for name in SHAPES for dtype in (torch.float32, torch.bfloat16)
    ]
    for row in rows:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if options.json:
        result = {"gpu": device, "torch": torch.__version__, "cuda": torch.version.cuda, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
