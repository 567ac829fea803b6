"""What every benchmark shares: interleaved timing of contenders on the same inputs, outputs checked first, a table, JSON.

A benchmark file lists `Case`s and calls `main(op, cases, __file__)`. Rules (design contract): one process, 3 warm-ups, at
least 15 rounds, in every round each contender once (A B A B), median and the 0.2 / 0.8 quantiles, ratios within the run,
losses printed beside wins.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import iumad_kernels

OURS = "iumad"
_cpu_time = False


def now() -> float:
    """Seconds on the clock in use: wall time, or with --cpu-time what this process has run."""
    return time.process_time() if _cpu_time else time.perf_counter()


Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One shape of one op.

    `build` returns the contenders by name, ours under "iumad"; calling one computes and returns its outputs (a tensor or
    a sequence of arrays). `expected` returns the float64 outputs they are compared with before anything is timed (RMS
    ratio <= `tolerance`).
    """

    name: str
    build: Callable[[], dict[str, Run]]
    expected: Callable[[], Sequence[torch.Tensor]]
    tolerance: float = 1e-4
    floor: Callable[[], float] | None = (
        None  # milliseconds that no implementation of the same arithmetic can beat
    )
    back_to_back: bool = False  # also time each contender alone, its data still in the caches
    work: float | None = None  # floating-point operations counted for the rate that is printed
    memory: Sequence[str] = ()  # contenders whose peak memory is measured, each in a process of its own
    notes: list[str] = field(default_factory=list)


def as_tensors(outputs: Any) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if hasattr(outputs, "__array__"):
        import numpy

        return [torch.from_numpy(numpy.array(outputs))]
    return [t for part in outputs for t in as_tensors(part)]


def rms_error(outputs: Any, expected: Sequence[torch.Tensor]) -> float:
    """Largest RMS ratio |out - expected| / |expected| over the outputs."""
    got = as_tensors(outputs)
    if len(got) != len(expected):
        raise ValueError(f"{len(got)} outputs, expected {len(expected)}")
    errors = [((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(got, expected)]
    return max(errors)


def wait_until_idle() -> None:
    """Returns when no other thread of the process is working. A peer's threads may still give memory back after its call has
    returned (JAX's do for milliseconds), which would be charged to the contender that comes next on the core. Gives up after a
    second: threads may also wait actively for work."""

    def others() -> float:
        return time.process_time() - time.thread_time()

    idle, deadline = False, time.perf_counter() + 1
    while not idle and time.perf_counter() < deadline:
        before, until = others(), time.perf_counter() + 5e-4
        while time.perf_counter() < until:
            os.sched_yield()
        idle = others() - before < 2e-5


def time_interleaved(
    contenders: dict[str, Run], rounds: int = 15, budget_s: float = 20.0
) -> dict[str, dict[str, float]]:
    """Milliseconds per call. A contender that would exceed the budget takes part in fewer rounds, never under 3."""
    limits = {}
    for name, run in contenders.items():
        start = now()
        run()
        once = now() - start
        limits[name] = max(3, min(rounds, int(budget_s / max(once, 1e-9))))
        for _ in range(2 if once < 1 else 0):
            run()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for r in range(rounds):
        for name, run in contenders.items():
            if r < limits[name]:
                wait_until_idle()
                start = now()
                run()
                samples[name].append(1e3 * (now() - start))
    result = {}
    for name, values in samples.items():
        quantiles = statistics.quantiles(values, n=5)
        result[name] = {
            "median_ms": statistics.median(values),
            "q20_ms": quantiles[0],
            "q80_ms": quantiles[3],
            "rounds": len(values),
        }
    return result


def time_back_to_back(run: Run, rounds: int = 15, budget_s: float = 10.0) -> float:
    """Median milliseconds of one call after another; the interleaved times have every call find the caches emptied."""
    samples: list[float] = []
    while len(samples) < 3 or (len(samples) < rounds and sum(samples) < 1e3 * budget_s):
        start = now()
        run()
        samples.append(1e3 * (now() - start))
    return statistics.median(samples)


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = [f for f in fields.get("flags", "").split() if f.startswith(("avx", "amx", "fma"))]
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "iumad": iumad_kernels.__version__,
    }
    for package in ("jax", "mambapy", "triton"):
        try:
            from importlib.metadata import version

            versions[package] = version(package)
        except Exception:
            versions[package] = "not installed"
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cpu_flags": flags,
        "cores": os.cpu_count(),
        "affinity": sorted(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "versions": versions,
        "build": iumad_kernels.build_info(),
    }


def measure(case: Case, rounds: int) -> dict[str, Any]:
    contenders = case.build()
    expected = [t.double() for t in case.expected()]
    errors = {name: rms_error(run(), expected) for name, run in contenders.items()}
    for name, error in errors.items():
        if not error <= case.tolerance:
            if name == OURS:
                raise AssertionError(
                    f"{case.name}: our output is off by {error:.1e} (allowed {case.tolerance:.0e})"
                )
            case.notes.append(f"{name} is off by {error:.1e}")
    timing = time_interleaved(contenders, rounds)
    for name in timing:
        timing[name]["rms_error"] = errors[name]
        timing[name]["ours_is_faster_by"] = timing[name]["median_ms"] / timing[OURS]["median_ms"]
    if case.back_to_back:
        for name, run in contenders.items():
            timing[name]["back_to_back_ms"] = time_back_to_back(run, rounds)
    row: dict[str, Any] = {"case": case.name, "contenders": timing, "notes": case.notes}
    if case.floor is not None:
        row["floor_ms"] = case.floor()
        row["ratio_to_floor"] = timing[OURS]["median_ms"] / row["floor_ms"]
        if case.back_to_back:
            row["ratio_to_floor_back_to_back"] = timing[OURS]["back_to_back_ms"] / row["floor_ms"]
    if case.work is not None:
        row["gflops"] = 1e-6 * case.work / timing[OURS]["median_ms"]
    return row


def peak_memory(script: str, case: int, contender: str) -> float | None:
    """Peak MiB a contender adds to its process over the inputs, measured in a fresh process."""
    command = [sys.executable, script, "--peak-memory-of", contender, "--case", str(case), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def resident_peak_mib() -> float:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def print_row(row: dict[str, Any]) -> None:
    print(f"\n{row['case']}")
    for name, t in row["contenders"].items():
        times = f"{t['median_ms']:10.3f} ms  [{t['q20_ms']:.3f}, {t['q80_ms']:.3f}]"
        verdict = (
            ""
            if name == OURS
            else f"ours {t['ours_is_faster_by']:.2f}x"
            + ("" if t["ours_is_faster_by"] >= 1 else "  <- slower")
        )
        if "back_to_back_ms" in t:
            alone = row["contenders"][OURS]["back_to_back_ms"]
            verdict += f"  back to back {t['back_to_back_ms']:.3f} ms" + (
                "" if name == OURS else f", ours {t['back_to_back_ms'] / alone:.2f}x"
            )
        memory = f"  peak +{t['peak_mib']:.0f} MiB" if t.get("peak_mib") is not None else ""
        print(f"  {name:28s}{times}  error {t['rms_error']:.1e}  {verdict}{memory}")
    if "floor_ms" in row:
        alone = row.get("ratio_to_floor_back_to_back")
        print(
            f"  {'floor':28s}{row['floor_ms']:10.3f} ms  ours is {row['ratio_to_floor']:.2f} times the floor"
            + (f", back to back {alone:.2f}" if alone else "")
        )
    if "gflops" in row:
        print(f"  {'rate':28s}{row['gflops']:10.0f} GFLOP/s")
    for note in row["notes"]:
        print(f"  note: {note}")


def main(
    op: str, cases: Callable[[], Sequence[Case]], script: str, argv: Sequence[str] | None = None
) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=f"Benchmark of {op} and its peers.")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument(
        "--rounds", type=int, default=15, help="timed rounds, each contender once per round (default 15)"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU time instead of wall time, for a machine busy with other work; one thread only",
    )
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--case", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--peak-memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time adds up the time of all threads: use it with --threads 1")
    global _cpu_time
    _cpu_time = options.cpu_time
    torch.set_num_threads(options.threads)
    if options.peak_memory_of:
        run = cases()[options.case].build()[options.peak_memory_of]
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # Linux: start the high-water mark at what is resident now
        before = resident_peak_mib()
        run()
        print(resident_peak_mib() - before)
        return {}
    clock = "cpu" if options.cpu_time else "wall"
    result: dict[str, Any] = {"op": op, "machine": machine(), "clock": clock, "rows": []}
    print(
        f"{op}: {result['machine']['cpu']}, {options.threads} thread(s), {result['machine']['build']['cpu_isa']}"
    )
    for index, case in enumerate(cases()):
        if options.filter not in case.name:
            continue
        row = measure(case, options.rounds)
        for name in case.memory:
            if name in row["contenders"]:
                row["contenders"][name]["peak_mib"] = peak_memory(script, index, name)
        print_row(row)
        result["rows"].append(row)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result
