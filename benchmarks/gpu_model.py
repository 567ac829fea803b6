"""What each GPU kernel has to move and compute, and the time that follows: the model of docs/gpu.md as functions. No torch.

The floor of a kernel is the longest of what its bytes, exponentials, other instructions and matrix products take at the GPU's
peak rates. The prediction adds what is known to be lost: 15 % of the bandwidth, 40 % of the arithmetic rates (latency, addresses,
tails), and 2 us for every launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peak rates per second: bytes, multiprocessor clocks, floating-point operations of matrix products."""

    bandwidth: float
    clocks: float
    tf32: float
    bf16: float


# Data sheets: H100 SXM, A100 80 GB SXM.
GPUS = {
    "H100": Gpu(bandwidth=3.35e12, clocks=132 * 1.755e9, tf32=495e12, bf16=989e12),
    "A100": Gpu(bandwidth=2.04e12, clocks=108 * 1.41e9, tf32=156e12, bf16=312e12),
}
EXPONENTIALS, INSTRUCTIONS = 16, 128  # per clock and multiprocessor
LAUNCH_US = 2.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of one call: bytes to and from memory, exponentials, other instructions, operations of matrix products, launches."""

    bytes: float
    exponentials: float = 0
    instructions: float = 0
    tf32: float = 0
    bf16: float = 0
    launches: int = 1

    def floor_us(self, gpu: Gpu) -> float:
        """No implementation of this arithmetic is faster."""
        return max(self._memory_us(gpu), self._arithmetic_us(gpu))

    def predicted_us(self, gpu: Gpu) -> float:
        """What these kernels should take."""
        return max(self._memory_us(gpu) / 0.85, self._arithmetic_us(gpu) / 0.6) + LAUNCH_US * self.launches

    def operations(self) -> str:
        """In words, in millions: exponentials, other instructions; matrix products in GFLOP."""
        counts = {"exp": self.exponentials, "instr": self.instructions}
        words = [f"{n / 1e6:.3g} M {name}" for name, n in counts.items() if n]
        products = {"TF32": self.tf32, "bf16": self.bf16}
        return ", ".join(words + [f"{n / 1e9:.3g} GFLOP {name}" for name, n in products.items() if n])

    def _memory_us(self, gpu: Gpu) -> float:
        return 1e6 * self.bytes / gpu.bandwidth

    def _arithmetic_us(self, gpu: Gpu) -> float:
        vector = max(self.exponentials / EXPONENTIALS, self.instructions / INSTRUCTIONS) / gpu.clocks
        return 1e6 * max(vector, self.tf32 / gpu.tf32 + self.bf16 / gpu.bf16)


def selective_scan(batch: int, dim: int, tokens: int, states: int, size: int) -> tuple[Work, Work]:
    """CUDA C++ kernels, states saved, no gate: docs/cuda.md. ``tokens``: of all directions; ``size``: bytes of an element."""
    n = batch * dim * tokens
    forward = Work(
        bytes=n * (3 * size + states / 16 + 8 * states / 32),
        exponentials=n * states,
        instructions=10 * n * states,
    )
    backward = Work(
        bytes=n * (5 * size + states / 16 + 16 * states / 32), exponentials=n * states, instructions=27 * n * states,
        launches=5,
    )  # fmt: skip
    return forward, backward


def selective_state_update(batch: int, dim: int, states: int, size: int) -> tuple[Work]:
    """States in float32 read and written; x, dt, z and out once; parameters, B and C (float32) once.

    Each of the four threads of a channel does its addresses and its softplus again: 200 instructions.
    """
    n = batch * dim
    return (
        Work(
            bytes=8 * n * states + 4 * n * size + 4 * dim * (states + 2) + 8 * batch * states,
            exponentials=n * states,
            instructions=n * (20 * states + 4 * 200),
        ),
    )


def cross_attention(
    batch: int, heads: int, queries: int, keys: int, dim: int, size: int
) -> tuple[Work, Work]:
    """Forward: two products. Backward: seven, and the inputs twice. Float32 takes three TF32 products for one."""
    q, k, scores = (batch * heads * n for n in (queries * dim, keys * dim, queries * keys))
    product = 2 * scores * dim

    def matrix(count: int) -> dict[str, float]:
        return {"bf16": count * product} if size == 2 else {"tf32": 3 * count * product}

    forward = Work(bytes=size * (2 * q + 2 * k), exponentials=scores, **matrix(2))
    # Row sums of out * dout (4 q); query gradient (3 q, 2 k); key gradient (2 q, 4 k).
    backward = Work(bytes=size * (9 * q + 6 * k), exponentials=2 * scores, launches=4, **matrix(7))
    return forward, backward


def kl_bottleneck(rows: int, classes: int, size: int, labels: bool) -> tuple[Work, Work]:
    """Both logits once (what is read again comes from the caches), and their gradients; labels double the exponentials."""
    n, exponentials = rows * classes, (4 if labels else 2) * rows * classes
    forward = Work(bytes=2 * n * size, exponentials=exponentials, instructions=40 * n, launches=2)
    return forward, Work(bytes=4 * n * size, exponentials=exponentials, instructions=30 * n)


def fused_linear_kl(rows: int, dim: int, classes: int, size: int) -> tuple[Work, Work]:
    """Distillation (no gradient to the teacher) in chunks of 16 million logits, each of which reads the weights again.

    Value alone, and value with gradients, which come out of the same chunks. Products are torch's: bfloat16 on tensor cores,
    float32 as it is, one instruction for two operations. Per chunk and head: weights read, logits written and read. With
    gradients: both logits read again, those of the student's logits written and read twice, its weights read again, the sum of
    its weight gradients (float32) read and written, in 16 bits through a product of its own; at the end scaled.
    """
    chunks = math.ceil(rows / (2**24 // classes))
    logits, features, weights = rows * classes, rows * dim, classes * dim

    def matrix(count: int) -> dict[str, float]:
        operations = 2 * count * rows * dim * classes
        return {"bf16": operations} if size == 2 else {"instructions": operations / 2}

    value_bytes = size * (2 * chunks * weights + 2 * features + 4 * logits)
    sums = 8 * weights + (2 * size * weights if size == 2 else 0)
    gradient_bytes = chunks * (size * weights + sums) + size * (5 * logits + 4 * features + 2 * weights)
    value = Work(bytes=value_bytes, exponentials=2 * logits, launches=5 * chunks, **matrix(2))
    both = Work(
        bytes=value_bytes + gradient_bytes, exponentials=4 * logits, launches=(9 if size > 2 else 10) * chunks + 4, **matrix(4)
    )  # fmt: skip
    return value, both


def gaussian_bottleneck(rows: int, columns: int, size: int) -> tuple[Work, Work]:
    """Philox is about 25 instructions an element, Box-Muller about 35: both passes draw the noise."""
    n = rows * columns
    return (
        Work(bytes=3 * n * size, exponentials=3 * n, instructions=70 * n),
        Work(bytes=5 * n * size, exponentials=3 * n, instructions=70 * n),
    )


def depthwise_conv2d(elements: int, taps: int, size: int) -> tuple[Work, Work]:
    """Stride 1 with SiLU. Backward: three kernels around the gradient before the SiLU (float32), and two sums of parts."""
    forward = Work(bytes=2 * elements * size, exponentials=elements, instructions=elements * (3 * taps + 10))
    backward = Work(
        bytes=elements * (2 * size + 4) + elements * (size + 4) + elements * (size + 4),
        exponentials=elements, instructions=elements * (8 * taps + 20), launches=5,
    )  # fmt: skip
    return forward, backward


def anomaly_map(batch: int, channels: int, pixels: int, map_pixels: int, size: int) -> tuple[Work, Work]:
    """Forward reads both features and writes the map; backward reads the map's gradient and both, and writes both gradients."""
    features, full = batch * channels * pixels * size, 4 * batch * map_pixels
    return (
        Work(bytes=2 * features + full, instructions=60 * batch * map_pixels, launches=4),
        Work(bytes=4 * features + full, instructions=40 * batch * map_pixels, launches=2),
    )
