"""Which implementation of an op runs, and why.

Four backends exist: ``cpu`` (C++), ``cuda`` (CUDA C++), ``triton``, and ``reference`` (plain PyTorch, any device).
The choice follows the device of the tensors; ``with backend("reference"):`` or the environment variable
``IUMAD_BACKEND`` overrides it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

BACKENDS = ("cpu", "cuda", "triton", "reference")
# In the order of preference on that type of device.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

_implemented: dict[str, set[str]] = {}  # op -> the backends this installation can run
_warned: set[tuple[str, str]] = set()
_forced: str | None = None


class Choice(NamedTuple):
    """The backend an op would run on, and the reason in words."""

    backend: str
    reason: str


def implement(op: str, *backends: str) -> None:
    """Declare that ``op`` has these backends, besides ``reference``, which every op has."""
    _implemented.setdefault(op, {"reference"}).update(backends)


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
    if name := os.environ.get("IUMAD_BACKEND"):
        return Choice(_check(name), "forced by the environment variable IUMAD_BACKEND")
    preference = _PREFERENCE.get(kind, ("reference",))
    for rank, name in enumerate(preference):
        if name in _implemented[op]:
            missing = preference[:rank]
            reason = (
                f"the fastest built for {kind}"
                if not missing
                else f"{' and '.join(missing)} not available for {kind}"
            )
            return Choice(name, reason)
    raise AssertionError("every op has a reference")


def select(op: str, device: torch.device) -> str:
    """The backend to run now; says once when it is the slow reference although nobody asked for it."""
    choice = backend_for(op, device)
    if choice.backend not in _implemented[op]:
        raise RuntimeError(
            f"{op} has no {choice.backend} backend in this installation ({choice.reason}); "
            f"available: {', '.join(sorted(_implemented[op]))}"
        )
    if (
        choice.backend == "reference"
        and not choice.reason.startswith("forced")
        and (op, device.type) not in _warned
    ):
        _warned.add((op, device.type))
        warnings.warn(
            f"{op} on {device.type} runs the slow reference implementation: {choice.reason}", stacklevel=3
        )
    return choice.backend
