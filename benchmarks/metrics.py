"""Time and peak memory of the pixel metrics beside anomalib, adeval and scikit-learn, on one CPU.

    python benchmarks/metrics.py [--images 128] [--repeats 15] [--peer-python PYTHON] [--json FILE]

128 images of 256 x 256 are 8.4 Mpx; 1197 are the 78.4 Mpx of the MVTec 3D-AD test set. Every run is a process of its
own (``--peer-python`` names an interpreter that has the peers); tools take turns, round by round. Time is that of
handing over all maps and computing, without imports and without making the data; CPU time is printed too, as it does
not count waiting on a busy machine. Memory is the peak above what the process held, data included, just before. On a
small set every tool's values are compared with float64 references first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from benchmarks.harness import Case

ROOT = Path(__file__).resolve().parents[1]
PEERS = {
    "iumad": "AUROC, AP, F1max, AUPRO at 4 limits, AUPRO-100",
    "iumad_aupro": "AUPRO at 0.3",
    "anomalib": "AUPRO at 0.3",
    "adeval": "AUROC, AP, AUPRO at 0.3 from 1000 bins",
    "sklearn_auroc": "AUROC",
    "sklearn_ap": "AP",
}
SMALL = (12, 64)
# As much as the hungriest peer needs.
PRETOUCHED_BYTES = 64


def make_data(images: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Score maps (float32) and masks (uint8): noise, three quarters of the images with one to three raised discs."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((images, size, size), dtype=np.float32)
    masks = np.zeros((images, size, size), dtype=np.uint8)
    axis = np.arange(size)
    for i in range(images):
        for _ in range(0 if i % 4 == 0 else int(rng.integers(1, 4))):
            row, column, radius = *rng.integers(0, size, 2), rng.integers(3, max(4, size // 16))
            disc = (axis[:, None] - row) ** 2 + (axis[None] - column) ** 2 < radius**2
            masks[i][disc] = 1
            scores[i][disc] += np.float32(rng.uniform(1, 3))
    return scores, masks


def run_iumad(scores: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    from iumad.metrics import PixelMetrics

    metrics = PixelMetrics()
    for start in range(0, len(scores), 32):
        metrics.update(scores[start : start + 32], masks[start : start + 32])
    return metrics.compute()


def run_iumad_aupro(scores: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    from iumad.metrics import aupro

    return {"aupro_30": aupro(scores, masks, 0.3)}


def run_anomalib(scores: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    import torch

    metric = anomalib_aupro()(fpr_limit=0.3)
    for start in range(0, len(scores), 32):
        metric.update(
            torch.from_numpy(scores[start : start + 32]), torch.from_numpy(masks[start : start + 32])
        )
    return {"aupro_30": float(metric.compute())}


def anomalib_aupro() -> type:
    """anomalib's metric class. Its package also imports its data sets, hence torchvision, which AUPRO does not use."""
    try:
        import anomalib.data  # noqa: F401
    except (ImportError, RuntimeError):
        sys.modules["anomalib.data"] = types.ModuleType("anomalib.data")
        sys.modules["anomalib.data"].Batch = object
        sys.modules["anomalib.data"].ImageBatch = object
    from anomalib.metrics.aupro import _AUPRO

    return _AUPRO


def run_adeval(scores: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    if not hasattr(np, "trapz"):
        np.trapz = np.trapezoid  # noqa: NPY201  (adeval 1.1.0 predates NumPy 2.4)
    from adeval import EvalAccumulator

    low, high = float(scores.min()), float(scores.max())
    accumulator = EvalAccumulator(low, high, low, high)
    accumulator.add_anomap_batch(scores, masks)
    accumulator.add_image([low, high], [0, 1])  # its summary insists on image scores
    accumulator.add_sample([low, high], [0, 1])
    result = accumulator.summary()
    return {"p_auroc": result["p_auroc"], "p_ap": result["p_aupr"], "aupro_30": result["p_aupro"]}


def run_sklearn_auroc(scores: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    return {"p_auroc": float(roc_auc_score(masks.ravel(), scores.ravel()))}


def run_sklearn_ap(scores: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import average_precision_score

    return {"p_ap": float(average_precision_score(masks.ravel(), scores.ravel()))}


RUNNERS: dict[str, Callable[[np.ndarray, np.ndarray], dict[str, float]]] = {
    "iumad": run_iumad,
    "iumad_aupro": run_iumad_aupro,
    "anomalib": run_anomalib,
    "adeval": run_adeval,
    "sklearn_auroc": run_sklearn_auroc,
    "sklearn_ap": run_sklearn_ap,
}


def reference(scores: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """AUROC, AP and AUPRO at 0.3 in float64 from one full sort of all pixels; SciPy labels the regions."""
    from scipy.ndimage import label

    weight = np.zeros(masks.shape)
    regions = 0
    for i, mask in enumerate(masks):
        ids, count = label(mask, structure=np.ones((3, 3)))
        sizes = np.bincount(ids.ravel())
        weight[i] = np.where(ids > 0, 1 / sizes[ids], 0)
        regions += count
    order = np.argsort(-scores.ravel(), kind="stable")
    ordered, positive = scores.ravel()[order], masks.ravel()[order] > 0
    last = np.append(ordered[1:] != ordered[:-1], True)  # one point for each distinct score
    hits, alarms = np.cumsum(positive)[last], np.cumsum(~positive)[last]
    recall, fpr = np.append(0, hits / hits[-1]), np.append(0, alarms / alarms[-1])
    overlap = np.append(0, np.cumsum(weight.ravel()[order])[last] / regions)
    x = np.append(fpr[fpr < 0.3], 0.3)
    y = np.append(overlap[fpr < 0.3], np.interp(0.3, fpr, overlap))
    return {
        "p_auroc": float(np.trapezoid(recall, fpr)),
        "p_ap": float(np.sum(np.diff(recall) * hits / (hits + alarms))),
        "aupro_30": float(np.trapezoid(y, x) / 0.3),
    }


def cases() -> list[Case]:
    """For ``pytest --benchmark``: AUPRO of 32 images, beside the tools that this environment has."""
    from benchmarks.harness import OURS, Case

    data = make_data(32, 256)
    peers = {name: run for name, run in RUNNERS.items() if name in ("anomalib", "adeval") and find_spec(name)}

    def build() -> dict[str, Callable[[], object]]:
        tools = {OURS: run_iumad_aupro, **peers}
        return {name: partial(aupro_of, run, *data) for name, run in tools.items()}

    def aupro_of(run: Callable[..., dict[str, float]], scores: np.ndarray, masks: np.ndarray) -> np.ndarray:
        return np.array([run(scores, masks)["aupro_30"]])

    def expected() -> list[torch.Tensor]:
        import torch

        return [torch.tensor([reference(*data)["aupro_30"]], dtype=torch.float64)]

    # adeval counts in 1000 bins
    return [Case("AUPRO at 0.3, 32 images of 256 x 256", build, expected, tolerance=1e-2)]


def measure(tool: str, images: int, size: int) -> dict[str, object]:
    """Run in a process of its own: values on the small set, then seconds and peak MiB on the large one."""
    small = RUNNERS[tool](*make_data(*SMALL))
    scores, masks = make_data(images, size)
    # A virtual machine gets memory from its host on first touch, slower than any metric runs: get it beforehand.
    np.ones(PRETOUCHED_BYTES * scores.size, dtype=np.uint8)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    held = peak_mib()
    start, cpu_start = time.perf_counter(), time.process_time()
    values = RUNNERS[tool](scores, masks)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return {"small": small, "values": values, "seconds": seconds, "cpu": cpu, "mib": peak_mib() - held}


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def run_process(python: str, tool: str, images: int, size: int, threads: int) -> dict | str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [
        python,
        str(Path(__file__).resolve()),
        "--tool",
        tool,
        "--images",
        str(images),
        "--size",
        str(size),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tools", default=",".join(PEERS))
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tool", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tool:
        print(json.dumps(measure(arguments.tool, arguments.images, arguments.size)))
        return
    results = compare(arguments)
    print_table(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def compare(arguments: argparse.Namespace) -> dict:
    expected = reference(*make_data(*SMALL))
    runs: dict[str, list[dict]] = {tool: [] for tool in arguments.tools.split(",")}
    notes: dict[str, str] = {}
    for _ in range(arguments.repeats):
        for tool in runs:
            if tool in notes:
                continue
            python = sys.executable if tool.startswith("iumad") else arguments.peer_python
            outcome = run_process(python, tool, arguments.images, arguments.size, arguments.threads)
            if isinstance(outcome, str):
                notes[tool] = f"not measured: {outcome}"
            else:
                runs[tool].append(outcome)
    tools = {}
    for tool, outcomes in runs.items():
        if not outcomes:
            continue
        seconds = [outcome["seconds"] for outcome in outcomes]
        small, values = outcomes[0]["small"], outcomes[0]["values"]
        tools[tool] = {
            "computes": PEERS[tool],
            "median_s": float(np.median(seconds)),
            "q20_s": float(np.quantile(seconds, 0.2)),
            "q80_s": float(np.quantile(seconds, 0.8)),
            "median_cpu_s": float(np.median([outcome["cpu"] for outcome in outcomes])),
            "peak_extra_mib": max(outcome["mib"] for outcome in outcomes),
            "max_error_small_set": max(abs(small[key] - expected[key]) for key in small if key in expected),
            "values": values,
            "runs": len(seconds),
        }
    return {
        "pixels": arguments.images * arguments.size**2,
        "images": arguments.images,
        "size": arguments.size,
        "threads": arguments.threads,
        "machine": machine(),
        "tools": tools,
        "notes": notes,
    }


def machine() -> dict[str, object]:
    cpu = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        cpu.setdefault(key.strip(), value.strip())
    wanted = ("avx2", "avx512f", "avx512vl", "amx_tile")
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "flags": [flag for flag in wanted if flag in cpu.get("flags", "").split()],
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def print_table(results: dict) -> None:
    print(f"{results['pixels'] / 1e6:.1f} Mpx, {results['threads']} thread(s), {results['machine']}")
    tools = results["tools"]
    ours = tools.get("iumad")
    print(
        f"{'':14}{'median s':>9}{'q20-q80':>15}{'x ours':>7}{'CPU s':>8}{'x ours':>7}{'MiB':>7}{'x ours':>7}"
        f"{'max error':>10}  computes"
    )
    for tool, row in tools.items():
        wall, cpu, memory = (
            row[key] / ours[key] if ours else float("nan")
            for key in ("median_s", "median_cpu_s", "peak_extra_mib")
        )
        print(
            f"{tool:14}{row['median_s']:9.2f}{row['q20_s']:8.2f}-{row['q80_s']:6.2f}{wall:7.1f}"
            f"{row['median_cpu_s']:8.2f}{cpu:7.1f}{row['peak_extra_mib']:7.0f}{memory:7.1f}"
            f"{row['max_error_small_set']:10.0e}  {row['computes']}"
        )
    for tool, note in results["notes"].items():
        print(f"{tool:14}{note}")


if __name__ == "__main__":
    main()
