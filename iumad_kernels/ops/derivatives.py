"""First derivatives without detours, second derivatives refused: the kernels have none.

What torch.library registers (``register_autograd``) serves compiled graphs and callers of ``torch.ops.iumad``. It costs a call as
much as a small image's work, so eager calls of the public functions go past it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _refusal(name: str) -> RuntimeError:
    return RuntimeError(
        f'{name} has no derivative of its own: for second derivatives run it under iumad_kernels.backend("reference")'
    )


def gradient_op(name: str) -> Callable[..., Any]:
    """``torch.ops.iumad.<name>`` for the backward of an op, where differentiating its results raises instead of giving zeros.

    Under ``create_graph=True`` it is called as any op. Otherwise the dispatcher goes straight to the kernel, for there is nothing
    to record.
    """
    op = getattr(torch.ops.iumad, name).default

    def refuse(ctx: Any, *grads: Any) -> None:
        raise _refusal(name)

    torch.library.register_autograd(f"iumad::{name}", refuse)

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled():
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def recorded() -> bool:
    """Whether torch compiles, traces (torch.jit.trace) or maps (vmap) the call: then it has to see the registered op."""
    return (
        torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active()
    )


def may_need_gradients(*tensors: Tensor | None) -> bool:
    """Whether an op has to keep what its backward reads. Inside vmap tensors do not tell whether they require gradients."""
    required = any(t is not None and t.requires_grad for t in tensors)
    if not required and not torch.compiler.is_compiling():
        required = torch._C._are_functorch_transforms_active()
    return required and torch.is_grad_enabled()


def differentiable_op(
    op: Any, setup_context: Callable[..., None], backward_fn: Callable[..., Any]
) -> Callable[..., Any]:
    """An op of ``torch.ops.iumad`` for the public functions to call, with its derivative: the two functions are those of
    ``torch.library.register_autograd``, which is given them too.
    """
    torch.library.register_autograd(op, backward_fn, setup_context=setup_context)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            setup_context(ctx, inputs, output)
            return output

        backward = staticmethod(backward_fn)

    def call(*inputs: Any) -> Any:
        if recorded():
            return op(*inputs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Eager.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return call


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise _refusal(ctx.name)


def only_once(gradient: Tensor, name: str) -> Tensor:
    """A gradient that forward has computed already, handed out by backward: under ``create_graph=True`` it refuses another."""
    return _Refuse.apply(gradient, name) if torch.is_grad_enabled() else gradient
