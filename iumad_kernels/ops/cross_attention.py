"""Attention of the queries of one sequence over the keys of another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iumad_kernels import reference
from iumad_kernels.backend import implement, select
from iumad_kernels.ops.autocast import to_autocast_dtype
from iumad_kernels.ops.checks import check_divides, check_floating, check_shape
from iumad_kernels.ops.derivatives import differentiable_op, gradient_op
from iumad_kernels.ops.seeds import check_seed, seed_tensor

_gradients = gradient_op("cross_attention_backward")

implement("cross_attention", "cpu")


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    enable_gqa: bool = False,
    need_weights: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention; a superset of ``torch.nn.functional.scaled_dot_product_attention``.

    ``softmax(scale query key^T + attn_mask) value`` per batch element and head.

    Args:
        query: (batch, heads, Lq, E). key: (batch, key_heads, Lk, E). value: (batch, key_heads, Lk, Ev). Any strides; features
            with stride 1 are fast. heads is a multiple of key_heads: consecutive query heads share a key head.
        attn_mask: broadcastable to (batch, heads, Lq, Lk). bool: True takes part. Floating: added to the scores, and
            differentiable.
        dropout_p: probability in [0, 1) of dropping a weight; the rest is divided by 1 - dropout_p. As in torch it applies
            whenever it is > 0: pass 0 in evaluation.
        is_causal: query i sees keys 0 .. i (aligned top-left, as in torch); may be combined with attn_mask.
        scale: factor of the scores, default 1 / sqrt(E).
        enable_gqa: accepted because torch has it; grouped heads always work.
        need_weights: also return the weights (after dropout) averaged over the heads.
        seed: of the dropout mask, an int or an int64 scalar tensor; None draws one from torch's generator. The mask is a
            function of the seed and the position alone (iumad_kernels/reference/philox.py).

    Returns:
        (batch, heads, Lq, Ev) in query's dtype, laid out in memory as (batch, Lq, heads, Ev); with ``need_weights`` also
        (batch, Lq, Lk). Both are differentiable, once; so are query, key, value and a floating attn_mask.

    A query whose keys are all masked (-inf) gets zeros. Values of keys that ``is_causal`` hides must be finite. float32,
    bfloat16, float16 and float64, the same for query, key and value (under autocast they are cast); the softmax and all sums
    are float32 or better. Results do not depend on the thread count.
    For backward the inputs, the output and one log-sum-exp per query are kept; scores and dropout mask are computed again.
    Nothing of size Lq x Lk exists, but for the weights if asked for, and for the gradient of an attn_mask: (batch, heads, Lq,
    Lk) values before they are summed over the dimensions the mask lacks.

    Raises TypeError or ValueError naming the argument. Source: arXiv 1706.03762, equation 1; blocks as in FlashAttention,
    arXiv 2205.14135.

    >>> rgb, depth = torch.randn(2, 8, 49, 32), torch.randn(2, 8, 196, 32)
    >>> cross_attention(rgb, depth, depth).shape
    torch.Size([2, 8, 49, 32])
    """
    query, key, value = to_autocast_dtype(query, key, value)
    _check(query, key, value, attn_mask, dropout_p, seed)
    if dropout_p > 0:
        if seed is None:  # a tensor, so that drawing it can be traced and never waits for a device
            seed = torch.randint(2**63 - 1, (), device=query.device)
        seed = seed_tensor(seed, query.device)
    if select("cross_attention", query.device) == "reference":
        return reference.cross_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            need_weights=need_weights,
            seed=seed,
        )
    if attn_mask is not None and attn_mask.dim() < 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    out, weights, _ = _cross_attention(
        query,
        key,
        value,
        attn_mask,
        seed if dropout_p > 0 else None,
        dropout_p,
        is_causal,
        max(query.shape[3], 1) ** -0.5 if scale is None else scale,
        need_weights,
    )
    return (out, weights.to(out.dtype)) if need_weights else out


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
) -> None:
    op = "cross_attention"
    check_floating(op, query=query, key=key, value=value)
    for name, t in (("key", key), ("value", value)):
        if t.dtype != query.dtype:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}, expected {query.dtype} as query")
    check_shape(op, "query", query, (None,) * 4, legend="(batch, heads, Lq, E)")
    batch, heads, queries, dim = query.shape
    check_shape(op, "key", key, (batch, None, None, dim), legend="(batch, key heads, Lk, E)")
    key_heads, keys = key.shape[1:3]
    check_shape(op, "value", value, (batch, key_heads, keys, None), legend="(batch, key heads, Lk, Ev)")
    if key_heads != heads:
        check_divides(op, "heads of key", key_heads, "heads of query", heads)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p = {dropout_p}, expected 0 <= dropout_p < 1")
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor) or attn_mask.dtype != torch.bool:
            check_floating(op, query=query, attn_mask=attn_mask)
        elif attn_mask.device != query.device:
            raise ValueError(f"{op}: attn_mask is on {attn_mask.device}, but query is on {query.device}")
        whole = (batch, heads, queries, keys)
        if attn_mask.dim() > 4 or any(
            n not in (1, m) for n, m in zip(reversed(attn_mask.shape), reversed(whole))
        ):
            raise ValueError(
                f"{op}: attn_mask has shape {tuple(attn_mask.shape)}, expected one that broadcasts to "
                f"{whole} = (batch, heads, Lq, Lk)"
            )
    if seed is not None:
        check_seed(op, seed, query.device)


def _compute_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


@torch.library.register_fake("iumad::cross_attention")
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    keys, value_dim = value.shape[2:]
    compute = _compute_dtype(query)
    return (
        query.new_empty((batch, queries, heads, value_dim)).transpose(1, 2),
        query.new_empty((batch, queries, keys) if need_weights else (0,), dtype=compute),
        query.new_empty((batch, heads, queries), dtype=compute),
    )


@torch.library.register_fake("iumad::cross_attention_backward")
def _fake_backward(
    grad_out: Tensor,
    grad_weights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dmask = query.new_empty((0,), dtype=_compute_dtype(query))
    if mask_grad:
        assert attn_mask is not None
        dmask = attn_mask.new_empty(attn_mask.shape)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), dmask


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, dropout_p, is_causal, scale, _ = inputs
    out, _, lse = output
    ctx.save_for_backward(*tensors, out, lse)
    ctx.flags = (dropout_p, is_causal, scale)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_weights: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    query, key, value, attn_mask, seed, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = out.new_zeros(()).expand(out.shape)
    mask_grad = ctx.needs_input_grad[3]
    dquery, dkey, dvalue, dmask = _gradients(
        grad_out,
        None if grad_weights is None else grad_weights.contiguous(),
        query,
        key,
        value,
        attn_mask,
        seed,
        out,
        lse,
        *ctx.flags,
        mask_grad,
    )
    return dquery, dkey, dvalue, dmask if mask_grad else None, None, None, None, None, None


_cross_attention = differentiable_op(torch.ops.iumad.cross_attention.default, _setup_context, _backward)
