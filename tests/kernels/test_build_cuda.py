"""What CMake decides about the CUDA half, beside the torch of this environment, which need not have CUDA. Nothing is compiled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(
    not shutil.which("cmake") or not shutil.which("ninja"), reason="cmake and ninja are not installed"
)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")


def configure(folder: Path, *options: str, path: str = os.environ["PATH"]) -> tuple[str, str]:
    """The build plan (empty where there is none), and what CMake said."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_PATH")} | {"PATH": path}
    command = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        folder,
        "-G",
        "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
        *options,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    plan = folder / "build.ninja"
    return plan.read_text() if done.returncode == 0 and plan.exists() else "", done.stdout + done.stderr


@needs_nvcc
def test_nvcc_on_the_path_is_enough(tmp_path: Path) -> None:
    """As pip calls it: no option set. Machine code for the usual GPUs, PTX for those to come."""
    plan, said = configure(tmp_path)
    assert re.search(r"build \S*_cuda\.so", plan), said
    flags = next(line for line in plan.splitlines() if "compute_80" in line)
    assert sorted(set(re.findall(r"sm_(\d+)", flags))) == ["80", "86", "89", "90"]
    assert re.search(r"code=\[?compute_90", flags)
    assert re.search(r"IUMAD_CUDA_ARCHITECTURES=\S*80 86 89 90", plan)


@needs_nvcc
def test_off_skips_it(tmp_path: Path) -> None:
    plan, said = configure(tmp_path, "-DIUMAD_CUDA=off")
    assert plan, said
    assert "_cuda.so" not in plan


def test_on_insists(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("cmake", "ninja", "c++", "g++", "cc", "gcc", "ld", "as", "ar", "ranlib"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    plan, said = configure(tmp_path / "build", "-DIUMAD_CUDA=on", "-DIUMAD_PYTHON=OFF", path=str(tools))
    assert not plan
    assert "no working nvcc was found" in " ".join(said.split())


def test_other_words_are_refused(tmp_path: Path) -> None:
    plan, said = configure(tmp_path, "-DIUMAD_CUDA=yes")
    assert not plan
    assert "IUMAD_CUDA is 'yes', expected auto, on or off" in " ".join(said.split())
