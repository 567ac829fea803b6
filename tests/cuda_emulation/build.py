"""Compiles the emulator's cases, and the CUDA kernels as C++ under the emulator, with sanitizers, where a source changed.

``python tests/cuda_emulation/build.py`` builds both and prints their paths.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
TORCH = Path(torch.__file__).parent
FLAGS = [
    "-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
    "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all",
    "-DIUMAD_CUDA_EMULATION", f"-I{HERE / 'include'}", f"-I{CSRC / 'cuda'}",
    f"-isystem{TORCH / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000",
]  # fmt: skip


def _compile(source: Path) -> Path:
    """The object file of a source; its name holds a digest of everything it may depend on."""
    headers = [
        *(HERE / "include").iterdir(),
        *(f for d in ("core", "cuda", "torch") for f in (CSRC / d).iterdir()),
    ]
    digest = hashlib.sha256("\0".join([torch.__version__, *FLAGS]).encode())
    for file in [source, *sorted(headers)]:
        digest.update(file.read_bytes())
    cache = Path(tempfile.gettempdir()) / "iumad_cuda_emulation"
    cache.mkdir(exist_ok=True)
    target = cache / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    if not target.exists():
        for old in cache.glob(f"{source.stem}-*"):
            old.unlink()
        scratch = target.with_suffix(".tmp")
        _run(["g++", *FLAGS, "-x", "c++", "-c", source, "-o", scratch])
        scratch.rename(target)
    return target


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def build_cases() -> Path:
    """The program of the emulator's own cases."""
    object_file = _compile(HERE / "emulator_cases.cpp")
    program = object_file.with_suffix("")
    if not program.exists():
        _run(["g++", *FLAGS, object_file, "-o", program])
    return program


def build_ops() -> Path:
    """The library that holds torch.ops.iumad_emulated; load it into a process that runs with libasan preloaded."""
    sources = [HERE / "emulated_ops.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(_compile, sources))
    library = objects[0].parent / f"emulated_ops-{hashlib.sha256(str(objects).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        _run(
            [
                "g++",
                *FLAGS,
                "-shared",
                "-Wl,-Bsymbolic",
                *objects,
                TORCH / "lib/libtorch_cpu.so",
                "-o",
                library,
            ]
        )
    return library


if __name__ == "__main__":
    print(build_cases(), build_ops(), sep="\n")
