"""How many of a multiprocessor's threads a kernel can keep resident, from what it uses. For the two budget scripts."""

from __future__ import annotations

# Per multiprocessor: threads, blocks, registers, shared memory in bytes (CUDA programming guide, compute capabilities).
MULTIPROCESSOR = {
    80: (2048, 32, 65536, 167936),
    86: (1536, 16, 65536, 102400),
    89: (1536, 24, 65536, 102400),
    90: (2048, 32, 65536, 233472),
}
RESERVED = 1024  # bytes of shared memory the system takes per block


def occupancy(capability: int, threads: int, registers: int, shared: int) -> int:
    """Percent of the most resident threads, for blocks of so many threads and so much shared memory (without the reserve)."""
    most, blocks, register_file, memory = MULTIPROCESSOR[capability]
    per_warp = -(-registers * 32 // 256) * 256
    warps = -(-threads // 32)
    resident = min(
        blocks, most // threads, register_file // max(per_warp * warps, 1), memory // (shared + RESERVED)
    )
    return 100 * resident * threads // most
