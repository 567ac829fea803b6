"""The CUDA kernels without a GPU: the emulator finds planted mistakes, and finds none in the kernels, whose results are right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the emulator needs Linux with g++ and its sanitizers"
)
SANITIZERS = {
    # Python and torch leak at exit, and a kernel given up in the middle leaves what was on its threads' stacks.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


@pytest.fixture(scope="module")
def cases() -> Path:
    sys.path.insert(0, str(HERE))
    from build import build_cases

    return build_cases()


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("right", "fine"),
        ("exact_conversions", "fine"),
        ("missing_barrier", "read before it is written"),
        ("write_after_read", "race: written while another thread"),
        ("two_writers", "race: written by this and another thread"),
        ("race_in_warp", "race: read while another thread"),
        ("syncwarp_across_warps", "read before it is written"),
        ("uninitialised", "read before it is written: element 5"),
        ("kept_from_the_block_before", "block 1"),
        ("shared_out_of_bounds", "out of bounds: element 95"),
        ("misaligned", "not aligned"),
        ("divergent_barrier", "divergent barrier"),
        ("ended_before_barrier", "for threads that have ended"),
        ("mask_lacks_caller", "lacks the calling lane"),
        ("mask_too_wide", "deadlock"),
        ("masks_differ", "deadlock"),
        ("collectives_differ", "different collectives"),
        ("source_outside_mask", "which its mask lacks"),
        ("barrier_against_shuffle", "deadlock"),
        ("global_out_of_bounds", "heap-buffer-overflow"),
    ],
)
def test_emulator(cases: Path, case: str, found: str) -> None:
    done = subprocess.run([cases, case], capture_output=True, text=True, env={**os.environ, **SANITIZERS})
    assert found in done.stdout + done.stderr
    assert (done.returncode == 0) == (found == "fine")


def test_kernels_under_emulation() -> None:
    """scan_cases.py, in a process with the sanitizers' run-time library."""
    preload = " ".join(
        _library(name) for name in ("libasan.so", "libstdc++.so.6")
    )  # in this order, for exceptions
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "scan_cases.py")],
        capture_output=True,
        text=True,
        env={**os.environ, **SANITIZERS, "LD_PRELOAD": preload, "PYTHONPATH": _python_path()},
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]


def _library(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def _python_path() -> str:
    return os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
