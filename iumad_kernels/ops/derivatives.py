"""First derivatives without detours, second derivatives refused: the kernels have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

REMEDY = 'for second derivatives run it under iumad_kernels.backend("reference")'


def gradient_op(name: str) -> Callable[..., Any]:
    """``torch.ops.iumad.<name>`` for the backward of an op, where differentiating its results raises instead of giving zeros.

    Under ``create_graph=True`` it is called as any op. Otherwise the dispatcher goes straight to the kernel: the detour through
    the autograd registration costs microseconds and finds nothing to record.
    """
    op = getattr(torch.ops.iumad, name).default

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{name} has no derivative of its own: {REMEDY}")

    torch.library.register_autograd(f"iumad::{name}", refuse)

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled():
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call
