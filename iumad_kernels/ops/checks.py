"""Argument checks shared by the ops: they raise before any work and name the argument, what it was and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Floating tensors on one device; float64 only where all are float64. None is an absent optional argument."""
    first: Tensor | None = None
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in FLOATING:
            expected = "float32, bfloat16, float16 or float64"
            raise TypeError(f"{op}: {name} has dtype {t.dtype}, expected {expected}")
        if first is None:
            first_name, first, dtype, device = name, t, t.dtype, t.device
            continue
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
    for shape in allowed:
        if len(have) == len(shape):
            for n, want in zip(have, shape):  # a loop of few bytecodes: this runs several times in every call
                if want is not None and n != want:
                    break
            else:
                return
    choices = " or ".join(
        str(tuple("any" if n is None else n for n in shape)).replace("'", "") for shape in allowed
    )
    raise ValueError(f"{op}: {name} has shape {tuple(have)}, expected {choices} = {legend}")


def check_divides(op: str, name: str, part: int, whole_name: str, whole: int) -> None:
    """``part`` groups split ``whole`` evenly."""
    if part < 1 or whole % part:
        raise ValueError(f"{op}: {name} = {part} must divide {whole_name} = {whole}")
