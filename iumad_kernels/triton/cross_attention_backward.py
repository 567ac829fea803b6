"""Backward of attention in Triton. Formulas: csrc/core/cross_attention.h.

Weights and dropout masks are computed again from the saved log-sum-exp and the seed. Two kernels share the work, so that no sum
needs atomics: one walks the keys for a block of queries (gradient of query and mask), the other walks the queries of all
heads of a group for a block of keys (gradients of key and value).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iumad_kernels.triton.cross_attention import (
    common_arguments,
    dropout_keep,
    load_rows,
    probabilities,
    scores,
    sizes,
)
from iumad_kernels.triton.launch import compute_type, launch
from iumad_kernels.triton.numerics import matmul


@triton.jit
def _weight_gradient(d, dweights, seed, b, heads, i, j, queries, keys, row, first, threshold,
                     KEPT: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """Gradient of the softmax's result, and the factor dropout gives it (1 without): a block of each.

    ``d``: products of the gradient of out with the values.
    """
    if dweights is not None:
        weights_row = dweights + (b * queries + i.to(tl.int64)) * keys
        inside = (i < queries)[:, None] & (j < keys)[None, :]
        d += tl.load(weights_row[:, None] + j[None, :], inside, other=0.0).to(COMPUTE) * (1.0 / heads)
    factor = tl.full(d.shape, 1.0, COMPUTE)
    if seed is not None:
        factor = tl.where(dropout_keep(seed, row, first, keys, threshold, BLOCK_K), 1.0 / KEPT, 0.0).to(
            COMPUTE
        )
    return d * factor, factor


@triton.jit
def _row_products(
    a, a_s, i, a_rows, b, b_s, j, b_rows, features,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Products of rows i of a with rows j of b.

    Float32, whose products need their operands in parts, takes 64 features at a time and loads them anew for every block:
    registers would not hold more.
    """
    PART: tl.constexpr = min(BLOCK, 64) if PRECISION == "tf32x3" else BLOCK
    x = tl.zeros([i.shape[0], j.shape[0]], COMPUTE)
    for first in range(0, BLOCK, PART):
        tile_a = load_rows(a + first * a_s[3], i, a_rows, features - first, a_s[2], a_s[3], PART)
        tile_b = load_rows(b + first * b_s[3], j, b_rows, features - first, b_s[2], b_s[3], PART)
        x += matmul(tile_a, tl.trans(tile_b), PRECISION, COMPUTE)
    return x


@triton.jit
def _row_sums(
    query, key, value, mask, seed, lse, dout, dweights, delta, query_s, key_s, value_s, mask_s, dout_s,
    heads, group, queries, keys, dim, value_dim, threshold,
    SCALE: tl.constexpr, KEPT: tl.constexpr, BOOL_MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Row sums delta_i = sum_j P_ij dP_ij of a block of queries."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_Q)
    block, bh = (program % blocks).to(tl.int32), program // blocks
    b, h = bh // heads, bh % heads
    i = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query += b * query_s[0] + h * query_s[1]
    dout += b * dout_s[0] + h * dout_s[1]
    key += b * key_s[0] + h // group * key_s[1]
    value += b * value_s[0] + h // group * value_s[1]
    total = tl.zeros([BLOCK_Q], COMPUTE)
    end = tl.minimum(keys, (block + 1) * BLOCK_Q) if CAUSAL else keys
    for first in range(0, end, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        qk = _row_products(query, query_s, i, queries, key, key_s, j, keys, dim, BLOCK_E, PRECISION, COMPUTE)
        x = scores(qk, mask, mask_s, b, h, i, j, queries, keys, SCALE, BOOL_MASK, CAUSAL, COMPUTE)
        p = probabilities(x, lse, bh * queries, i, queries)
        dp, _ = _weight_gradient(
            _row_products(dout, dout_s, i, queries, value, value_s, j, keys, value_dim, BLOCK_V, PRECISION, COMPUTE),
            dweights, seed, b, heads, i, j, queries, keys, bh * queries + i, first, threshold, KEPT, BLOCK_K, COMPUTE,
        )  # fmt: skip
        total += tl.sum(p * dp, 1)
    tl.store(delta + bh * queries + i, total, i < queries)


@triton.jit
def _query_gradient(
    query, key, value, mask, seed, lse, delta, dout, dweights, dquery, dmask, query_s, key_s, value_s, mask_s, dout_s, dquery_s,
    heads, group, queries, keys, dim, value_dim, threshold,
    SCALE: tl.constexpr, KEPT: tl.constexpr, BOOL_MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_Q)
    block, bh = (program % blocks).to(tl.int32), program // blocks
    b, h = bh // heads, bh % heads
    i = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query += b * query_s[0] + h * query_s[1]
    dout += b * dout_s[0] + h * dout_s[1]
    row_sum = tl.load(delta + bh * queries + i, i < queries, other=0.0)
    key += b * key_s[0] + h // group * key_s[1]
    value += b * value_s[0] + h // group * value_s[1]
    acc = tl.zeros([BLOCK_Q, BLOCK_E], COMPUTE)
    end = tl.minimum(keys, (block + 1) * BLOCK_Q) if CAUSAL else keys
    for first in range(0, end, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        qk = _row_products(query, query_s, i, queries, key, key_s, j, keys, dim, BLOCK_E, PRECISION, COMPUTE)
        x = scores(qk, mask, mask_s, b, h, i, j, queries, keys, SCALE, BOOL_MASK, CAUSAL, COMPUTE)
        p = probabilities(x, lse, bh * queries, i, queries)
        dp, _ = _weight_gradient(
            _row_products(dout, dout_s, i, queries, value, value_s, j, keys, value_dim, BLOCK_V, PRECISION, COMPUTE),
            dweights, seed, b, heads, i, j, queries, keys, bh * queries + i, first, threshold, KEPT, BLOCK_K, COMPUTE,
        )  # fmt: skip
        dx = p * (dp - row_sum[:, None])
        if dmask is not None:
            at = (bh * queries + i)[:, None] * keys + j[None, :]
            tl.store(dmask + at, dx, (i < queries)[:, None] & (j < keys)[None, :])
        k = load_rows(key, j, keys, dim, key_s[2], key_s[3], BLOCK_E)
        acc += matmul(dx.to(k.dtype), k, PRECISION, COMPUTE)
    e = tl.arange(0, BLOCK_E)
    at = i.to(tl.int64)[:, None] * dquery_s[2] + e[None, :] * dquery_s[3]
    inside = (i < queries)[:, None] & (e < dim)[None, :]
    tl.store(dquery + b * dquery_s[0] + h * dquery_s[1] + at, acc * SCALE, inside)


@triton.jit
def _key_gradient(
    query, key, value, mask, seed, lse, delta, dout, dweights, dkey, dvalue,
    query_s, key_s, value_s, mask_s, dout_s, dkey_s, dvalue_s,
    heads, group, queries, keys, dim, value_dim, threshold,
    SCALE: tl.constexpr, KEPT: tl.constexpr, BOOL_MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(keys, BLOCK_K)
    first, bg = (program % blocks).to(tl.int32) * BLOCK_K, program // blocks
    b, key_head = bg // (heads // group), bg % (heads // group)
    j = first + tl.arange(0, BLOCK_K)
    key += b * key_s[0] + key_head * key_s[1]
    value += b * value_s[0] + key_head * value_s[1]
    dk = tl.zeros([BLOCK_K, BLOCK_E], COMPUTE)
    dv = tl.zeros([BLOCK_K, BLOCK_V], COMPUTE)
    start = first // BLOCK_Q * BLOCK_Q if CAUSAL else 0
    for member in range(group):
        h = key_head * group + member
        bh = b * heads + h
        head_query, head_dout = query + b * query_s[0] + h * query_s[1], dout + b * dout_s[0] + h * dout_s[1]
        for first_query in range(start, queries, BLOCK_Q):
            i = first_query + tl.arange(0, BLOCK_Q)
            row_sum = tl.load(delta + bh * queries + i, i < queries, other=0.0)
            qk = _row_products(
                head_query, query_s, i, queries, key, key_s, j, keys, dim, BLOCK_E, PRECISION, COMPUTE
            )
            x = scores(qk, mask, mask_s, b, h, i, j, queries, keys, SCALE, BOOL_MASK, CAUSAL, COMPUTE)
            p = probabilities(x, lse, bh * queries, i, queries)
            dp, factor = _weight_gradient(
                _row_products(
                    head_dout, dout_s, i, queries, value, value_s, j, keys, value_dim, BLOCK_V, PRECISION, COMPUTE
                ),
                dweights, seed, b, heads, i, j, queries, keys, bh * queries + i, first, threshold, KEPT, BLOCK_K, COMPUTE,
            )  # fmt: skip
            dx = p * (dp - row_sum[:, None])
            q = load_rows(head_query, i, queries, dim, query_s[2], query_s[3], BLOCK_E)
            do = load_rows(head_dout, i, queries, value_dim, dout_s[2], dout_s[3], BLOCK_V)
            dv += matmul(tl.trans((p * factor).to(do.dtype)), do, PRECISION, COMPUTE)
            dk += matmul(tl.trans(dx.to(q.dtype)), q, PRECISION, COMPUTE)
    e, c = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_V)
    rows = j.to(tl.int64)[:, None]
    dkey += b * dkey_s[0] + key_head * dkey_s[1]
    dvalue += b * dvalue_s[0] + key_head * dvalue_s[1]
    tl.store(
        dkey + rows * dkey_s[2] + e[None, :] * dkey_s[3], dk * SCALE, (j < keys)[:, None] & (e < dim)[None, :]
    )
    tl.store(
        dvalue + rows * dvalue_s[2] + c[None, :] * dvalue_s[3],
        dv,
        (j < keys)[:, None] & (c < value_dim)[None, :],
    )


def backward(
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
    """torch.ops.iumad.cross_attention_backward."""
    (batch, heads, queries, _), (key_heads, keys, value_dim) = query.shape, value.shape[1:]
    dtype, _ = compute_type(query)
    dquery, dkey, dvalue = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    dmask = query.new_zeros((batch, heads, queries, keys), dtype=dtype) if mask_grad else None
    common = common_arguments(query, key, attn_mask, seed, dropout_p, is_causal, scale) | {
        "value": value, "value_s": value.stride(), "value_dim": value_dim, "lse": lse,
        "dout": grad_out, "dout_s": grad_out.stride(), "dweights": grad_weights,
    }  # fmt: skip
    masked, weights = attn_mask is not None, grad_weights is not None
    size = sizes("cross_attention_backward", query, value, masked=masked, weights=weights)
    programs = batch * heads * -(-queries // size["BLOCK_Q"])
    if grad_weights is None:  # then the row sums are what every output got from its gradient
        delta = (out.to(dtype) * grad_out).sum(-1)
    else:
        delta = lse.new_empty(lse.shape)
        launch(_row_sums, programs, query, **common, **size, delta=delta)
    launch(
        _query_gradient, programs, query, **common, **size,
        delta=delta, dquery=dquery, dquery_s=dquery.stride(), dmask=dmask,
    )  # fmt: skip
    # Two sums in registers, and in float32 the parts of their factors: more queries would spill.
    size["BLOCK_Q"] = min(size["BLOCK_Q"], 32 if query.element_size() == 2 else 16)
    launch(
        _key_gradient, batch * key_heads * -(-keys // size["BLOCK_K"]), query, **common, **size,
        delta=delta, dkey=dkey, dkey_s=dkey.stride(), dvalue=dvalue, dvalue_s=dvalue.stride(),
    )  # fmt: skip
    if dmask is None or attn_mask is None:
        return dquery, dkey, dvalue, query.new_empty((0,), dtype=dtype)
    return dquery, dkey, dvalue, dmask.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
