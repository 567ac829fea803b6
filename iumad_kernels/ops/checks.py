"""Argument checks shared by the ops: they raise before any work and name the argument, what it was and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Floating tensors on one device; float64 only where all are float64. None is an absent optional argument."""
    given = {name: t for name, t in tensors.items() if t is not None}
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    first_name, first = next(iter(given.items()))
    dtype, device = first.dtype, first.device
    for name, t in given.items():
        if t.dtype not in FLOATING:
            expected = "float32, bfloat16, float16 or float64"
            raise TypeError(f"{op}: {name} has dtype {t.dtype}, expected {expected}")
        if t.device != device:
            raise ValueError(f"{op}: {name} is on {t.device}, but {first_name} is on {device}")
        if t.dtype != dtype and torch.float64 in (t.dtype, dtype):
            raise TypeError(
                f"{op}: {name} has dtype {t.dtype} beside {first_name} of {dtype}: float64 cannot be mixed"
            )


def check_shape(op: str, name: str, t: Tensor | None, *allowed: Sequence[int | None], legend: str) -> None:
    """The shape of ``t`` is one of ``allowed`` (None: any size). ``legend`` names the sizes in the message."""
    if t is None:
        return
    have = t.shape
    if have in allowed or any(_fits(have, shape) for shape in allowed):
        return
    choices = " or ".join(
        str(tuple("any" if n is None else n for n in shape)).replace("'", "") for shape in allowed
    )
    raise ValueError(f"{op}: {name} has shape {tuple(have)}, expected {choices} = {legend}")


def _fits(have: Sequence[int], shape: Sequence[int | None]) -> bool:
    return len(have) == len(shape) and all(want is None or n == want for n, want in zip(have, shape))


def check_divides(op: str, name: str, part: int, whole_name: str, whole: int) -> None:
    """``part`` groups split ``whole`` evenly."""
    if part < 1 or whole % part:
        raise ValueError(f"{op}: {name} = {part} must divide {whole_name} = {whole}")
