"""Compile every Triton kernel ahead of time for sm_80 and sm_90, without a GPU, and hold the result against a budget.

    python scripts/triton_budget.py            # check; exit 1: kernels over budget, named; 2: another Triton than its
    python scripts/triton_budget.py --update   # write what was found into the budget file

The launchers run on meta tensors at the project's shapes, so what is compiled is what runs. Recorded per kernel: registers
per thread, bytes of stack (spills), bytes of shared memory, occupancy in percent, 16-byte loads, tensor-core instructions. The
budget holds the limits: registers, stack and shared memory may not grow, occupancy not fall; 16-byte loads and tensor-core
instructions may not vanish.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from occupancy import occupancy
from torch import Tensor
from triton.backends.compiler import GPUTarget

from iumad_kernels.triton import LAUNCHERS

BUDGET = Path(__file__).with_suffix(".json")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"  # comes with Triton
MODULES = sorted({module for module, _ in LAUNCHERS.values()})


class NoGpu:
    """Stands in for Triton's driver: it only has to say for which GPU to compile."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """The GPU to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Key of Triton's cache in memory: one per target."""
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        """Unused."""
        return 0


def cases() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Op, name and launch of what is compiled: the shapes of the model, and the largest attention."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    def scan(dtype: torch.dtype) -> None:
        from iumad_kernels.triton import selective_scan, selective_scan_backward

        u = new(6, 14, 14, 512, dtype=dtype).permute(0, 3, 1, 2)
        delta = new(6, 4, 14, 14, 512, dtype=dtype).permute(0, 1, 4, 2, 3)
        projection = new(6, 4, 1, 14, 14, 16)
        inputs = (u, delta, new(4, 512, 16), projection, projection, new(4, 512), None, new(4, 512))
        out, _, states = selective_scan.forward(*inputs, None, 4, 2, True, True)
        selective_scan_backward.backward(out, None, *inputs, states, 4, 2, True, False)

    def attention(
        dtype: torch.dtype, dim: int, dropout: float, weights: bool = False, masked: bool = False
    ) -> None:
        from iumad_kernels.triton import cross_attention, cross_attention_backward

        q = new(6, 196, 8, dim, dtype=dtype).transpose(1, 2)
        seed = new(dtype=torch.int64) if dropout else None
        flags = (dropout, False, dim**-0.5)
        mask = new(6, 8, 196, 196) if masked else None
        out, average, lse = cross_attention.forward(q, q, q, mask, seed, *flags, True)
        dweights = average if weights else None
        cross_attention_backward.backward(out, dweights, q, q, q, mask, seed, out, lse, *flags, masked)

    def divergence() -> None:
        from iumad_kernels.triton import kl_bottleneck

        p, labels = new(64, 32000), new(64, dtype=torch.int64)
        total, *_, stats = kl_bottleneck.bottleneck(p, p, labels, None, 1.0, 1.0, 1.0, True, True)
        none = (None, None, None)
        kl_bottleneck.backward(
            total, *none, p, p, labels, None, stats, 1.0, 0.0, 3, 1.0, 1.0, False, True, True
        )

    def gaussian(dtype: torch.dtype) -> None:
        from iumad_kernels.triton import gaussian_bottleneck

        mu, seed = new(1176, 256, dtype=dtype), new(dtype=torch.int64)
        sample, kl = gaussian_bottleneck.forward(mu, mu, seed, 0.0, 1.0)
        gaussian_bottleneck.backward(sample, kl, mu, mu, seed, 0.0, 1.0)

    def convolution(dtype: torch.dtype, kernel: int) -> None:
        from iumad_kernels.triton import depthwise_conv2d

        x = new(6, 14, 14, 1024, dtype=dtype).permute(0, 3, 1, 2)
        inputs = (x, new(1024, 1, kernel, kernel), new(1024), None, None, 1, kernel // 2, kernel // 2, True)
        depthwise_conv2d.backward(depthwise_conv2d.forward(*inputs), *inputs)

    def causal(dtype: torch.dtype) -> None:
        from iumad_kernels.triton import depthwise_conv2d

        x = new(8, 1024, 1, 2048, dtype=dtype)
        inputs = (x, new(1024, 1, 1, 4), new(1024), None, None, 1, 0, 3, True)
        depthwise_conv2d.backward(depthwise_conv2d.forward(*inputs), *inputs)

    def anomaly(dtype: torch.dtype) -> None:
        from iumad_kernels.triton import anomaly_map

        grid = new(6, 14, 14, 272, dtype=dtype).permute(0, 3, 1, 2)
        full, score, *saved = anomaly_map.forward(grid, grid, 224, 224, 16, 4.0)
        anomaly_map.backward(full, score, grid, grid, *saved, 224, 224, 16, 4.0, True, True)

    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield "selective_scan", name, lambda dtype=dtype: scan(dtype)
        yield "gaussian_bottleneck", name, lambda dtype=dtype: gaussian(dtype)
        yield "depthwise_conv2d", f"{name} 3x3", lambda dtype=dtype: convolution(dtype, 3)
        yield "cross_attention", f"{name} E32", lambda dtype=dtype: attention(dtype, 32, 0.0)
        for dim in (32, 64, 128):
            yield (
                "cross_attention",
                f"{name} E{dim} mask",
                lambda dtype=dtype, dim=dim: attention(dtype, dim, 0.0, masked=True),
            )
    yield "cross_attention", "float32 E32 dropout", lambda: attention(torch.float32, 32, 0.1)
    yield "cross_attention", "float32 E64 dropout", lambda: attention(torch.float32, 64, 0.1)
    yield "cross_attention", "float32 E128 dropout", lambda: attention(torch.float32, 128, 0.1)
    yield "cross_attention", "float32 E32 weights", lambda: attention(torch.float32, 32, 0.1, weights=True)
    yield "cross_attention", "float32 E128 weights", lambda: attention(torch.float32, 128, 0.1, weights=True)
    yield "cross_attention", "bfloat16 E32 dropout", lambda: attention(torch.bfloat16, 32, 0.1)
    yield "cross_attention", "bfloat16 E64 dropout", lambda: attention(torch.bfloat16, 64, 0.1)
    yield "cross_attention", "bfloat16 E128 dropout", lambda: attention(torch.bfloat16, 128, 0.1)
    yield "cross_attention", "bfloat16 E32 weights", lambda: attention(torch.bfloat16, 32, 0.1, weights=True)
    yield "depthwise_conv2d", "float32 5x5", lambda: convolution(torch.float32, 5)
    yield "depthwise_conv2d", "float32 causal", lambda: causal(torch.float32)
    yield "anomaly_map", "float32", lambda: anomaly(torch.float32)
    yield "kl_bottleneck", "float32", divergence


@contextmanager
def compiling(capability: int, found: Callable[[str, Any], None]) -> Iterator[None]:
    """Inside, launches compile for the capability and go to ``found(kernel name, compiled kernel)`` instead of a GPU."""
    triton.runtime.driver.set_active(NoGpu(capability))

    def compile_only(
        kernel: Any, programs: int, device_of: Tensor, *args: Any, num_warps: int = 4, **constants: Any
    ) -> None:
        compiled = kernel.warmup(
            *args, grid=(programs,), num_warps=num_warps, enable_fp_fusion=True, **constants
        )
        found(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__.lstrip('_')}", compiled)

    modules = [import_module(f"iumad_kernels.triton.{name}") for name in MODULES]
    originals = [module.launch for module in modules]
    for module in modules:
        module.launch = compile_only
    try:
        yield
    finally:
        for module, original in zip(modules, originals):
            module.launch = original


def measure(compiled: Any, capability: int) -> dict[str, int]:
    """What the machine code of a kernel uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert resources, usage
    registers, shared = int(resources[1]), compiled.metadata.shared
    return {
        "registers": registers,
        "stack": int(resources[2]),
        "shared": shared,
        "occupancy": occupancy(capability, 32 * compiled.metadata.num_warps, registers, shared),
        "loads_16_bytes": len(re.findall(r"\b(?:LDG|LDGSTS)\.\S*128", code)),
        "tensor_core": len(re.findall(r"\bHG?MMA\.", code)),
    }


def compare(name: str, found: dict[str, int], limit: dict[str, int] | None) -> list[str]:
    """How a kernel breaks its budget, in words."""
    if limit is None:
        return [
            f"{name}: not in {BUDGET.name}; run scripts/triton_budget.py --update and look at what it wrote"
        ]
    over = [
        f"{name}: {key} {found[key]}, limit {limit[key]}"
        for key in ("registers", "stack", "shared")
        if found[key] > limit[key]
    ]
    if found["occupancy"] < limit["occupancy"]:
        over.append(f"{name}: occupancy {found['occupancy']} %, designed for {limit['occupancy']} %")
    gone = [
        f"{name}: no {key} left, was {limit[key]}"
        for key in ("loads_16_bytes", "tensor_core")
        if limit[key] and not found[key]
    ]
    return over + gone


def compile_all(capability: int, only: str | None) -> dict[str, dict[str, int]]:
    """What every kernel (those of one op) uses on a capability."""
    results: dict[str, dict[str, int]] = {}
    for op, case, run in cases():
        if only not in (None, op):
            continue

        def record(kernel: str, compiled: Any, case: str = case) -> None:
            results[f"sm_{capability} {kernel} {case}"] = measure(compiled, capability)

        with compiling(capability, record):
            run()
    return results


def main() -> int:
    """Compile, print a table, compare with the budget or write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the budget instead of checking it")
    parser.add_argument(
        "--only", metavar="OP", help="compile and print the kernels of one op; nothing is compared"
    )
    options = parser.parse_args()
    with ProcessPoolExecutor(2) as pool:
        parts = pool.map(compile_all, (80, 90), (options.only, options.only))
        results = {name: found for part in parts for name, found in part.items()}
    for name, found in results.items():
        print(f"{name:66}", *(f"{key} {value:<6}" for key, value in found.items()))
    if options.only:
        return 0
    if options.update:
        BUDGET.write_text(json.dumps({"triton": triton.__version__, "kernels": results}, indent=1) + "\n")
        return 0
    written = json.loads(BUDGET.read_text())
    if written["triton"] != triton.__version__:
        print(
            f"the budget is for Triton {written['triton']}, this is {triton.__version__}: nothing was compared"
        )
        return 2
    budget = written["kernels"]
    broken = [line for name, found in results.items() for line in compare(name, found, budget.get(name))]
    broken += [f"{name}: in {BUDGET.name}, but no longer compiled" for name in budget if name not in results]
    print(*broken, sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
