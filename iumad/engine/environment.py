"""Where and with what a run was made."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch


def environment(device: torch.device | None = None) -> dict[str, str]:
    """Versions, processor and device, as short texts."""
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }
    for name in ("iumad", "numpy", "safetensors", "scikit-image"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed (run from a source tree)" if name == "iumad" else "missing"
    if device is not None:
        is_gpu = device.type == "cuda"
        facts["device"] = f"{device}: {torch.cuda.get_device_name(device)}" if is_gpu else "cpu"
    return facts


def _processor() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
