"""Which implementation of an op runs, and why.

Four backends exist: ``cpu`` (C++), ``cuda`` (CUDA C++), ``triton``, and ``reference`` (plain PyTorch, any device).
The choice follows the device of the tensors; ``with backend("reference"):`` or the environment variable
``IUMAD_BACKEND``, as it is when the package is imported, overrides it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from iumad_kernels import gpu

BACKENDS = ("cpu", "cuda", "triton", "reference")

_implemented: dict[str, set[str]] = {}  # op -> its backends on a CPU
_torch_op: dict[str, str] = {}  # op -> the one of torch.ops.iumad its GPU kernels are looked up by
_warned: set[tuple[str, str]] = set()
_forced: str | None = None
_environment = os.environ.get(
    "IUMAD_BACKEND"
)  # once: a look into os.environ takes as long as all checks of a call


class Choice(NamedTuple):
    """The backend an op would run on, and the reason in words."""

    backend: str
    reason: str


def implement(op: str, *backends: str, torch_op: str | None = None) -> None:
    """Declare that ``op`` has these backends on a CPU, besides ``reference``, which every op has.

    On a GPU it has those of ``torch_op``, the op of torch.ops.iumad it is built on (default: of the same name).
    """
    _implemented.setdefault(op, {"reference"}).update(backends)
    _torch_op[op] = torch_op or op


def _available(op: str, kind: str) -> tuple[tuple[str, ...], str]:
    """The backends of an op for a type of device, fastest first, and why faster ones are missing."""
    if kind == "cpu":
        return (
            (("cpu", "reference"), "")
            if "cpu" in _implemented[op]
            else (("reference",), "the op has no CPU kernel")
        )
    if kind != "cuda":
        return ("reference",), f"no kernels for {kind}"
    found, torch_op = gpu.activate(), _torch_op[op]
    cuda_missing = found.cuda_missing or "the op has no CUDA C++ kernel"
    if torch_op in found.cuda_ops:
        return ("cuda", "reference"), ""
    if torch_op in found.triton_ops:
        return ("triton", "reference"), cuda_missing
    triton_missing = found.triton_missing or "the op has no Triton kernel"
    return ("reference",), f"{cuda_missing} and {triton_missing}"


def _check(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the block on the backend ``name`` (process-wide, all threads).

    Raises ValueError for an unknown name; an op that lacks the backend raises RuntimeError when it is called.
    """
    global _forced
    previous, _forced = _forced, _check(name)
    try:
        yield
    finally:
        _forced = previous


def backend_for(op: str, device: torch.device | str) -> Choice:
    """Which backend would run ``op`` on ``device``, and why.

    >>> backend_for("selective_scan", "cpu").backend
    'cpu'
    """
    if op not in _implemented:
        raise ValueError(f"unknown op {op!r}: one of {', '.join(sorted(_implemented))}")
    kind = torch.device(device).type
    if _forced is not None:
        return Choice(_forced, "forced by iumad_kernels.backend")
    if _environment:
        return Choice(_check(_environment), "forced by the environment variable IUMAD_BACKEND")
    available, missing = _available(op, kind)
    return Choice(available[0], missing or f"the fastest for {kind}")


def select(op: str, device: torch.device) -> str:
    """The backend to run now; says once when it is the slow reference although nobody asked for it."""
    if _forced is None and not _environment and device.type == "cpu" and "cpu" in _implemented[op]:
        return "cpu"  # the usual answer, without the words
    choice = backend_for(op, device)
    if choice.backend == "reference" and choice.reason.startswith("forced"):
        return choice.backend
    available, missing = _available(op, device.type)
    if choice.backend not in available:
        raise RuntimeError(
            f"{op} has no {choice.backend} backend for {device.type} tensors here ({choice.reason}); "
            f"available: {', '.join(available)}{f' ({missing})' if missing else ''}"
        )
    if choice.backend == "reference" and (op, device.type) not in _warned:
        _warned.add((op, device.type))
        warnings.warn(
            f"{op} on {device.type} runs the slow reference implementation: {choice.reason}", stacklevel=3
        )
    return choice.backend
