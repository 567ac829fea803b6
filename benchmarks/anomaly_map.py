"""anomaly_map against the same computation composed of torch's operators.

taskset -c 1 python benchmarks/anomaly_map.py            # one thread
python benchmarks/anomaly_map.py --threads 2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iumad_kernels import anomaly_map, reference

try:
    from harness import OURS, Case, Run, main
except ImportError:  # collected by pytest
    from benchmarks.harness import OURS, Case, Run, main

# batch, channels, side, size, sigma, layout
SHAPES = [
    (8, 272, 14, 224, 0.0, "contiguous"),
    (8, 272, 14, 224, 4.0, "contiguous"),
    (8, 272, 14, 224, 0.0, "channels-last"),
    (1, 272, 14, 224, 0.0, "contiguous"),
    (1, 1024, 28, 512, 4.0, "contiguous"),
]


def case(shape: tuple[int, int, int, int, float, str], backward: bool) -> Case:
    batch, channels, side, size, sigma, layout = shape
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    features, other = (
        torch.randn(batch, channels, side, side, generator=generator).contiguous(memory_format=memory_format)
        for _ in range(2)
    )
    grads = torch.randn(batch, size, size, generator=generator), torch.randn(batch, generator=generator)

    def run(f: Any, dtype: torch.dtype = torch.float32) -> Any:
        leaves = [t.to(dtype) for t in (features, other)]
        if not backward:
            with torch.no_grad():
                return f(*leaves, size, sigma=sigma)
        leaves[0] = leaves[0].detach().requires_grad_()
        outputs = f(*leaves, size, sigma=sigma)
        found = torch.autograd.grad(outputs, leaves[0], [g.to(dtype) for g in grads])
        return [o.detach() for o in outputs] + list(found)

    def build() -> dict[str, Run]:
        return {OURS: lambda: run(anomaly_map), "torch composed": lambda: run(reference.anomaly_map)}

    def expected() -> list[Tensor]:
        return list(run(reference.anomaly_map, torch.float64))

    name = f"{(batch, channels, side, side)} -> {size} sigma {sigma:g} {layout}"
    return Case(f"{name} {'forward + backward' if backward else 'forward'}", build, expected, 1e-5)


def cases() -> list[Case]:
    return [case(shape, backward) for shape in SHAPES for backward in (False, True)]


if __name__ == "__main__":
    main("anomaly_map", cases, __file__)
