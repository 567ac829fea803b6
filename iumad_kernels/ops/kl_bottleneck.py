"""Divergence of two heads from their raw logits, and the information-bottleneck loss built on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iumad_kernels import reference
from iumad_kernels.backend import implement, select
from iumad_kernels.ops.checks import FLOATING, check_floating
from iumad_kernels.ops.derivatives import gradient_op, may_need_gradients, recorded

REDUCTIONS = ("none", "sum", "mean", "batchmean")  # as numbered by Reduction in csrc/torch/kl_bottleneck.cpp
_STATS = 9  # kKLStats in csrc/core/kl_bottleneck.h: what backward needs of a row
_MAX_DIMS = 7  # RowsView::kMaxDims in csrc/core/row_view.h, and the classes

_DIVERGENCE = torch.ops.iumad.kl_divergence.default
_BOTTLENECK = torch.ops.iumad.kl_bottleneck.default
_DIVERGENCE_AT_ONCE = torch.ops.iumad.kl_divergence_at_once.default
_BOTTLENECK_AT_ONCE = torch.ops.iumad.kl_bottleneck_at_once.default
_gradients = gradient_op("kl_bottleneck_backward")
_NONE = REDUCTIONS.index("none")

implement("kl_divergence", "cpu")
implement("kl_bottleneck", "cpu")


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 0.0,
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    detach_teacher: bool = False,
) -> Tensor:
    """Divergence of a student's class distribution from a teacher's, from raw logits, in one pass over each row.

    With t = softmax(teacher / temperature), s = softmax(student / temperature), in nats:

    - ``beta = 0``: KL[t || s] = sum t (log t - log s), what ``F.kl_div`` computes of log-probabilities;
    - ``beta = 1``: the reverse, KL[s || t];
    - between: the generalised Jensen-Shannon divergence beta KL[t || m] + (1 - beta) KL[s || m], m = beta t + (1 - beta) s
      (GKD, arXiv 2306.13649, equation 1). It tends to 0, not to a KL, as beta tends to 0 or 1.

    Args:
        student_logits, teacher_logits: (..., classes), same shape, any strides, dtypes may differ.
        temperature: > 0. The result is not multiplied by temperature^2 (do so to keep the size of the gradients).
        reduction: ``"none"``: (...), one value per row; ``"sum"``; ``"batchmean"``: sum / rows; ``"mean"``: sum / (rows *
            classes). For 2-D logits the last three are those of ``F.kl_div``. Only rows and classes that take part are counted.
        mask: bool, broadcastable to the logits, True takes part: (classes,) leaves out classes, (rows, 1) rows. Classes left out
            have probability 0 on both sides. A row with no class left gives 0 and no gradient; a mean over nothing is 0.
        detach_teacher: no gradient to the teacher.

    Returns:
        float32 (float64 for float64 logits), differentiable once, to both sides.

    A logit of -inf is a class of probability 0, and 0 log 0 = 0: never NaN. KL[t || s] is +inf, the true value, where
    s lacks mass that t has; such a row gives the student its usual finite gradient (s - t) and the teacher none (for the reverse,
    the other way round). A row of nothing but -inf has no mass at all: KL[0 || s] = 0. NaN and +inf logits give NaN.

    float32, bfloat16 and float16 may be mixed and are computed in float32; float64 only with float64. For backward the logits
    are kept and 9 values per row; forward reads both logits once, backward reads them once and writes their gradients. The
    result does not depend on the number of threads.

    Raises TypeError or ValueError naming the argument. Source: paper.md 3.1 (L_IB).

    >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, float("-inf")]]))
    tensor(0.6931)
    """
    op = "kl_divergence"
    _check_logits(op, "student_logits", student_logits, "teacher_logits", teacher_logits, temperature, mask)
    if not 0 <= beta <= 1:
        raise ValueError(f"{op}: beta = {beta}, expected a number from 0 to 1")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{op}: reduction = {reduction!r}, expected one of {', '.join(map(repr, REDUCTIONS))}"
        )
    if detach_teacher:
        teacher_logits = teacher_logits.detach()
    if select(op, student_logits.device) == "reference":
        return reference.kl_divergence(
            student_logits, teacher_logits, temperature=temperature, beta=beta, reduction=reduction, mask=mask
        )
    p, q = (student_logits, teacher_logits) if beta == 1 else (teacher_logits, student_logits)
    mask = None if mask is None else mask.expand(p.shape)
    return _run(
        _DIVERGENCE,
        _Divergence,
        p,
        q,
        mask,
        temperature,
        0.0 if beta == 1 else beta,
        REDUCTIONS.index(reduction),
    )


class KLBottleneck(NamedTuple):
    """The information-bottleneck loss and its parts, each a mean over the rows and differentiable by itself."""

    total: Tensor
    """kl_weight * kl + ce_weight * ce."""
    kl: Tensor
    """KL[P(Y | fused) || P(Y | bottleneck)]."""
    fused_ce: Tensor
    """Cross-entropy of the fused head; 0 without labels."""
    bottleneck_ce: Tensor
    """Cross-entropy of the bottleneck head; 0 without labels."""

    @property
    def ce(self) -> Tensor:
        """Cross-entropy of both heads."""
        return self.fused_ce + self.bottleneck_ce


def kl_bottleneck(
    fused_logits: Tensor,
    bottleneck_logits: Tensor,
    labels: Tensor | None = None,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 1.0,
    temperature: float = 1.0,
    detach_teacher: bool = True,
    mask: Tensor | None = None,
) -> KLBottleneck:
    """Information-bottleneck loss of IB-IUMAD: what the bottleneck lets through should predict the class as what entered does.

    ``kl_weight KL[P(Y | fused) || P(Y | bottleneck)] + ce_weight (CE(fused) + CE(bottleneck))``, all from one pass over each row.

    Args:
        fused_logits, bottleneck_logits: (..., classes), the head before the bottleneck (teacher) and behind it (student).
        labels: int64 (...), the class of each row; None leaves the cross-entropies out.
        temperature: of the KL (cross-entropies are at temperature 1); as in :func:`kl_divergence`.
        kl_weight, ce_weight: a weight of 0 switches its term off, also where that is infinite.
        detach_teacher: the KL gives no gradient to fused_logits (its cross-entropy still does).
        mask: as in :func:`kl_divergence`; here also who competes in the cross-entropies, for classes not learned yet. A label
            must not be left out of a row that takes part.

    Returns:
        :class:`KLBottleneck` ``(total, kl, fused_ce, bottleneck_ce)``, scalars: means over the rows that take part.

    Dtypes, infinite logits, memory and determinism as in :func:`kl_divergence`. Raises TypeError or ValueError naming the
    argument. Source: paper.md 2.3 (IBFM), 2.5 (A12, A13), 3.1 (L_IB).

    >>> loss = kl_bottleneck(torch.zeros(6, 10), torch.zeros(6, 10), torch.arange(6))
    >>> loss.kl, loss.fused_ce
    (tensor(0.), tensor(2.3026))
    """
    op = "kl_bottleneck"
    _check_logits(op, "fused_logits", fused_logits, "bottleneck_logits", bottleneck_logits, temperature, mask)
    if labels is not None:
        check_labels(op, labels, fused_logits)
    if select(op, fused_logits.device) == "reference":
        if labels is not None:
            _check_label_values(op, labels, fused_logits, mask)
        parts = reference.kl_bottleneck(
            fused_logits,
            bottleneck_logits,
            labels,
            kl_weight=kl_weight,
            ce_weight=ce_weight,
            temperature=temperature,
            detach_teacher=detach_teacher,
            mask=mask,
        )
        return KLBottleneck(*parts)
    labels = None if labels is None else labels.reshape(-1)
    mask = None if mask is None else mask.expand(fused_logits.shape)
    flags = (temperature, kl_weight, ce_weight, detach_teacher)
    return KLBottleneck(
        *_run(_BOTTLENECK, _Bottleneck, fused_logits, bottleneck_logits, labels, mask, *flags)
    )


def _check_logits(
    op: str, p_name: str, p: Tensor, q_name: str, q: Tensor, temperature: float, mask: Tensor | None
) -> None:
    for name, logits in ((p_name, p), (q_name, q)):
        if not isinstance(logits, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(logits).__name__}")
    if p.dtype != q.dtype or p.dtype not in FLOATING or p.device != q.device:
        check_floating(op, **{p_name: p, q_name: q})
    if p.shape != q.shape:
        raise ValueError(
            f"{op}: {q_name} has shape {tuple(q.shape)}, expected that of {p_name}, {tuple(p.shape)}"
        )
    if not 1 <= p.dim() <= _MAX_DIMS:
        raise ValueError(
            f"{op}: {p_name} has shape {tuple(p.shape)}, expected (..., classes) of at most {_MAX_DIMS} dimensions"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature = {temperature}, expected a finite number > 0")
    if mask is not None:
        check_mask(op, mask, p)


def check_mask(op: str, mask: Tensor, logits: Tensor) -> None:
    """A bool tensor on the logits' device that broadcasts to their shape."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{op}: mask must be a bool tensor (True takes part), got {kind}")
    if mask.device != logits.device:
        raise ValueError(f"{op}: mask is on {mask.device}, but the logits are on {logits.device}")
    shape = logits.shape
    fits = mask.dim() <= len(shape) and all(
        have in (1, want) for have, want in zip(reversed(mask.shape), reversed(shape))
    )
    if not fits:
        raise ValueError(
            f"{op}: mask has shape {tuple(mask.shape)}, expected one that broadcasts to the logits' {tuple(shape)}: "
            f"({shape[-1]},) for classes, {(*shape[:-1], 1)} for rows"
        )


def check_labels(op: str, labels: Tensor, logits: Tensor) -> None:
    """An int64 tensor on the logits' device with one label per row; the values are checked where they are read."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{op}: labels must be an int64 tensor, got {kind}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op}: labels has shape {tuple(labels.shape)}, expected {tuple(logits.shape[:-1])}, a class for each row"
        )
    if labels.device != logits.device:
        raise ValueError(f"{op}: labels is on {labels.device}, but the logits are on {logits.device}")


def _check_label_values(op: str, labels: Tensor, logits: Tensor, mask: Tensor | None) -> None:
    """What the kernel checks while it reads the labels, for the backend that cannot."""
    classes = logits.shape[-1]
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        row = int(outside.flatten().nonzero()[0])
        raise ValueError(
            f"{op}: labels[{row}] = {int(labels.flatten()[row])}, expected a class from 0 to {classes - 1}"
        )
    if mask is not None:
        mask = mask.expand(logits.shape)
        left_out = mask.any(-1) & ~mask.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        if left_out.any():
            row = int(left_out.flatten().nonzero()[0])
            raise ValueError(
                f"{op}: labels[{row}] = {int(labels.flatten()[row])}, a class that mask leaves out of that row"
            )


@torch.library.register_fake("iumad::kl_divergence")
def _fake_divergence(
    p: Tensor,
    q: Tensor,
    mask: Tensor | None,
    temperature: float,
    beta: float,
    reduction: int,
    save_stats: bool,
) -> tuple[Tensor, Tensor]:
    loss = _new(p, *(p.shape[:-1] if REDUCTIONS[reduction] == "none" else ()))
    return loss, _new_stats(p, save_stats)


@torch.library.register_fake("iumad::kl_bottleneck")
def _fake_bottleneck(
    p: Tensor,
    q: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
    detach_p: bool,
    save_stats: bool,
) -> tuple[Tensor, ...]:
    return (*(_new(p) for _ in range(4)), _new_stats(p, save_stats))


@torch.library.register_fake("iumad::kl_divergence_at_once")
def _fake_divergence_at_once(p: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _new(p), _new_stats(p, True), *_new_gradients(p, q, *rest[-2:])


@torch.library.register_fake("iumad::kl_bottleneck_at_once")
def _fake_bottleneck_at_once(p: Tensor, q: Tensor, labels: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return *(_new(p) for _ in range(4)), _new_stats(p, True), *_new_gradients(p, q, *rest[-2:])


@torch.library.register_fake("iumad::kl_bottleneck_backward")
def _fake_backward(
    grad_total: Tensor | None,
    grad_divergence: Tensor | None,
    grad_p_ce: Tensor | None,
    grad_q_ce: Tensor | None,
    p: Tensor,
    q: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    return _new_gradients(p, q, *rest[-2:])


def _new_gradients(p: Tensor, q: Tensor, need_p: bool, need_q: bool) -> tuple[Tensor, Tensor]:
    none = p.new_empty(0)
    return torch.empty_like(p) if need_p else none, torch.empty_like(q) if need_q else none


def _new(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _new_stats(p: Tensor, save_stats: bool) -> Tensor:
    return _new(p, p.shape[:-1].numel() if save_stats else 0, _STATS)


# Eager calls take a short cut past torch.library's registration, which costs more than a small call's work: an autograd.Function
# that calls the kernels directly and, where it can, computes the gradients of the (total) loss along with its value, while the
# rows are in the cache. backward hands those out once, and recomputes for whatever else is asked of it: gradients of a part, or
# a second time. Compiled graphs and callers of torch.ops take the registered way; both share `setup` and `backward`.
class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, mask: Tensor | None, *flags: Any) -> Tensor:
        if flags[2] != _NONE and _can_be_at_once(p, q, mask):
            loss, stats, *ctx.ready = _DIVERGENCE_AT_ONCE(p, q, *flags, *ctx.needs_input_grad[:2])
        else:
            with torch._C._AutoDispatchBelowAutograd():
                loss, stats = _DIVERGENCE(p, q, mask, *flags, True)
        _keep(ctx, flags, p, q, mask, stats)
        return loss

    @staticmethod
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        *tensors, temperature, beta, reduction, _ = inputs
        _keep(ctx, (temperature, beta, reduction), *tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dp, dq = _take_ready(ctx, grads[:1]) or _gradients(
            None, grads[0], None, None, *ctx.saved_tensors[:2], None, *ctx.saved_tensors[2:],
            *ctx.flags, 0.0, 0.0, True, *ctx.needs_input_grad[:2],
        )  # fmt: skip
        need_p, need_q = ctx.needs_input_grad[:2]
        return dp if need_p else None, dq if need_q else None, None, None, None, None


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, p: Tensor, q: Tensor, labels: Tensor | None, mask: Tensor | None, *flags: Any
    ) -> tuple[Tensor, ...]:
        if _can_be_at_once(p, q, mask):
            *losses, stats, dp, dq = _BOTTLENECK_AT_ONCE(p, q, labels, *flags, *ctx.needs_input_grad[:2])
            ctx.ready = dp, dq
        else:
            with torch._C._AutoDispatchBelowAutograd():
                *losses, stats = _BOTTLENECK(p, q, labels, mask, *flags, True)
        _keep(ctx, flags, p, q, labels, mask, stats)
        return tuple(losses)

    @staticmethod
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        *tensors, temperature, kl_weight, ce_weight, detach_p, _ = inputs
        _keep(ctx, (temperature, kl_weight, ce_weight, detach_p), *tensors, output[4])
        ctx.mark_non_differentiable(output[4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        temperature, kl_weight, ce_weight, detach_p = ctx.flags
        dp, dq = _take_ready(ctx, grads[:4]) or _gradients(
            *grads[:4], *ctx.saved_tensors, temperature, 0.0,
            REDUCTIONS.index("batchmean"), kl_weight, ce_weight, not detach_p, *ctx.needs_input_grad[:2],
        )  # fmt: skip
        need_p, need_q = ctx.needs_input_grad[:2]
        return dp if need_p else None, dq if need_q else None, *(None,) * 6


def _can_be_at_once(p: Tensor, q: Tensor, mask: Tensor | None) -> bool:
    """Not on a GPU, where reading the incoming gradient would wait; not in 16 bits, rounded only once that gradient is known."""
    return mask is None and p.is_cpu and p.element_size() > 2 and q.element_size() > 2


def _take_ready(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor] | None:
    ready = getattr(ctx, "ready", None)
    if ready is None or grads[0] is None or any(grad is not None for grad in grads[1:]):
        return None
    if torch.is_grad_enabled():  # create_graph: differentiating these again must be refused, as the op does
        return None
    ctx.ready = None
    if (factor := grads[0].item()) != 1:
        for gradient in ready:
            gradient *= factor
    return ready


def _keep(ctx: Any, flags: tuple[Any, ...], *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.flags = flags
    ctx.set_materialize_grads(False)


def _run(op: Any, function: Any, p: Tensor, q: Tensor, *rest: Any) -> Any:
    """The op's losses, without its statistics."""
    needs_grad = may_need_gradients(p, q)
    if recorded():
        *losses, _ = op(p, q, *rest, needs_grad)
    elif needs_grad:
        return function.apply(p, q, *rest)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            *losses, _ = op(p, q, *rest, False)
    return losses[0] if len(losses) == 1 else losses


def _register(op: Any, function: Any) -> None:
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return *function.backward(
            ctx, *grads[:-1]
        ), None  # neither of the statistics nor to the flag that asks for them

    torch.library.register_autograd(op, backward, setup_context=function.setup)


_register(_DIVERGENCE, _Divergence)
_register(_BOTTLENECK, _Bottleneck)
