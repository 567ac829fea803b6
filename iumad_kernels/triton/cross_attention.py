"""Attention in Triton, forward; cross_attention_backward.py is its backward. Formulas: csrc/core/cross_attention.h.

A program takes a block of queries of one head and walks blocks of keys with the online softmax of FlashAttention
(arXiv 2205.14135). Products run on tensor cores: 16-bit inputs as they are, float32 as three TF32 products, which keeps
float32's accuracy. Blocks have 64 keys, a block of the random stream (so dropout masks are the CPU's, bit by bit), or half of
them where registers would not hold the parts of 64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from iumad_kernels.triton.launch import compute_type, launch, pow2
from iumad_kernels.triton.numerics import LN2, LOG2E, matmul
from iumad_kernels.triton.tuning import tuned


@triton.jit
def load_rows(base, row, rows, features, row_step, feature_step, BLOCK: tl.constexpr):
    """A (rows, features) tile, 0 outside."""
    e = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * row_step + e[None, :] * feature_step
    return tl.load(base + at, (row < rows)[:, None] & (e < features)[None, :], other=0.0)


@triton.jit
def scores(
    products, mask, mask_s, b, h, i, j, queries, keys,
    SCALE: tl.constexpr, BOOL_MASK: tl.constexpr, CAUSAL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Scores of a block, from its products of queries and keys, times log2(e); -inf where a key takes no part."""
    x = products * (SCALE * LOG2E)
    inside = (i < queries)[:, None] & (j < keys)[None, :]
    if mask is not None:
        at = i.to(tl.int64)[:, None] * mask_s[2] + j.to(tl.int64)[None, :] * mask_s[3]
        at += b * mask_s[0] + h * mask_s[1]
        if BOOL_MASK:
            inside &= tl.load(mask + at, inside, other=0) != 0
        else:
            x += tl.load(mask + at, inside, other=0.0).to(COMPUTE) * LOG2E
    if CAUSAL:
        inside &= i[:, None] >= j[None, :]
    return tl.where(inside, x, float("-inf"))


@triton.jit
def dropout_keep(seed, row, first_key, keys, threshold, BLOCK_K: tl.constexpr):
    """Which of 64 or 32 keys from ``first_key`` on survive dropout, for each row of weights: the layout of csrc/core/philox.h."""
    block = row.to(tl.int64) * tl.cdiv(keys, 64) + first_key // 64
    counter = 16 * block[:, None] + tl.arange(0, 16)[None, :]
    w0, w1, w2, w3 = tl.randint4x(tl.load(seed), counter)
    # Compared first: what changes threads then is bits, not words.
    k0, k1 = _survives(w0, threshold), _survives(w1, threshold)
    k2, k3 = _survives(w2, threshold), _survives(w3, threshold)
    if BLOCK_K == 64:
        keep = tl.join(tl.join(k0, k2), tl.join(k1, k3))  # (rows, lane, w // 2, w % 2)
        keep = tl.reshape(keep, (row.shape[0], 16, 4))
    else:
        lower = first_key % 64 == 0
        keep = tl.join(tl.where(lower, k0, k2), tl.where(lower, k1, k3))  # (rows, lane, w)
    return tl.reshape(tl.permute(keep, (0, 2, 1)), (row.shape[0], BLOCK_K))


@triton.jit
def _survives(word, threshold):
    return word.to(tl.uint32, bitcast=True) >= threshold


@triton.jit
def _forward(
    query, key, value, mask, seed, out, lse, query_s, key_s, value_s, mask_s, out_s,
    heads, group, queries, keys, dim, value_dim, threshold,
    SCALE: tl.constexpr, KEPT: tl.constexpr, BOOL_MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_Q)
    block, bh = (program % blocks).to(tl.int32), program // blocks
    b, h = bh // heads, bh % heads
    i = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = load_rows(query + b * query_s[0] + h * query_s[1], i, queries, dim, query_s[2], query_s[3], BLOCK_E)
    key += b * key_s[0] + h // group * key_s[1]
    value += b * value_s[0] + h // group * value_s[1]
    top = tl.full([BLOCK_Q], float("-inf"), COMPUTE)
    total = tl.zeros([BLOCK_Q], COMPUTE)
    acc = tl.zeros([BLOCK_Q, BLOCK_V], COMPUTE)
    end = tl.minimum(keys, (block + 1) * BLOCK_Q) if CAUSAL else keys
    for first in range(0, end, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        k = load_rows(key, j, keys, dim, key_s[2], key_s[3], BLOCK_E)
        v = load_rows(value, j, keys, value_dim, value_s[2], value_s[3], BLOCK_V)
        qk = matmul(q, tl.trans(k), PRECISION, COMPUTE)
        x = scores(qk, mask, mask_s, b, h, i, j, queries, keys, SCALE, BOOL_MASK, CAUSAL, COMPUTE)
        new_top = tl.maximum(top, tl.max(x, 1))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(x - reference[:, None])
        fade = tl.exp2(top - reference)
        total = total * fade + tl.sum(p, 1)
        if seed is not None:
            p = tl.where(
                dropout_keep(seed, bh * queries + i, first, keys, threshold, BLOCK_K), p * (1.0 / KEPT), 0.0
            )
        acc = acc * fade[:, None] + matmul(p.to(v.dtype), v, PRECISION, COMPUTE)
        top = new_top
    unseen = total == 0.0
    e = tl.arange(0, BLOCK_V)
    at = i.to(tl.int64)[:, None] * out_s[2] + e[None, :] * out_s[3]
    inside = (i < queries)[:, None] & (e < value_dim)[None, :]
    tl.store(out + b * out_s[0] + h * out_s[1] + at, acc / tl.where(unseen, 1.0, total)[:, None], inside)
    lse_row = tl.where(unseen, float("-inf"), (top + tl.log2(tl.where(unseen, 1.0, total))) * LN2)
    tl.store(lse + bh * queries + i, lse_row, i < queries)


@triton.jit
def _average_weights(
    query, key, mask, seed, lse, weights, query_s, key_s, mask_s, heads, group, queries, keys, dim, threshold,
    SCALE: tl.constexpr, KEPT: tl.constexpr, BOOL_MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_Q, BLOCK_K) block of the weights; its heads are added up in order."""
    program = tl.program_id(0).to(tl.int64)
    blocks_k, blocks_q = tl.cdiv(keys, BLOCK_K), tl.cdiv(queries, BLOCK_Q)
    b = program // (blocks_k * blocks_q)
    i = (program // blocks_k % blocks_q).to(tl.int32) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first = (program % blocks_k).to(tl.int32) * BLOCK_K
    j = first + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_Q, BLOCK_K], COMPUTE)
    for h in range(heads):
        bh = b * heads + h
        q = load_rows(
            query + b * query_s[0] + h * query_s[1], i, queries, dim, query_s[2], query_s[3], BLOCK_E
        )
        k = load_rows(key + b * key_s[0] + h // group * key_s[1], j, keys, dim, key_s[2], key_s[3], BLOCK_E)
        qk = matmul(q, tl.trans(k), PRECISION, COMPUTE)
        x = scores(qk, mask, mask_s, b, h, i, j, queries, keys, SCALE, BOOL_MASK, CAUSAL, COMPUTE)
        p = probabilities(x, lse, bh * queries, i, queries)
        if seed is not None:
            p = tl.where(
                dropout_keep(seed, bh * queries + i, first, keys, threshold, BLOCK_K), p * (1.0 / KEPT), 0.0
            )
        acc += p
    at = (b * queries + i.to(tl.int64))[:, None] * keys + j[None, :]
    tl.store(weights + at, acc / heads, (i < queries)[:, None] & (j < keys)[None, :])


@triton.jit
def probabilities(x, lse, first_row, i, queries):
    """exp(score - lse) of scores times log2(e); zero in rows without keys."""
    lse_row = tl.load(lse + first_row + i, i < queries, other=0.0)
    return tl.exp2(x - tl.where(lse_row == float("-inf"), 0.0, lse_row * LOG2E)[:, None])


def sizes(op: str, query: Tensor, value: Tensor, *, masked: bool, weights: bool = False) -> dict[str, Any]:
    """Block sizes and precision.

    More queries per block mean fewer passes over the keys, until registers end (sooner for float32, whose products need their
    operands in parts, and with ``weights``, a gradient of the averaged weights to be read along) or until an H100 gets less
    than two programs per multiprocessor. The addresses of a mask take registers too: then a block
    has half the queries and twice the warps, and in float32 nothing is loaded ahead.
    """
    batch, heads, queries, _ = query.shape
    block_e, block_v = max(pow2(query.shape[3]), 16), max(pow2(value.shape[3]), 16)
    row_bytes = max(block_e, block_v) * query.element_size()
    if weights:
        block_q = 16
    elif query.element_size() == 2:
        block_q = max(16384 // max(row_bytes, 128), 16)
    else:
        block_q = 64 if row_bytes <= 128 and not masked else 16
    if masked:
        block_q = max(block_q // 2, 16)
    if block_q > 64 and batch * heads * queries < 2 * 132 * block_q:
        block_q = 64
    many_warps = block_q >= 128 or row_bytes > 128 or query.element_size() > 2 or weights or masked
    tunable = {
        "BLOCK_Q": min(block_q, max(pow2(queries), 16)),
        "num_warps": 8 if many_warps else 4,
        "num_stages": 1 if masked and query.element_size() > 2 else 2,
    }
    precision = "tf32x3" if query.dtype == torch.float32 else "ieee"
    fixed = {
        "BLOCK_K": 64 if query.element_size() == 2 else 32,
        "BLOCK_E": block_e,
        "BLOCK_V": block_v,
        "PRECISION": precision,
    }
    return fixed | tuned(op, tunable)


def mask_strides(mask: Tensor | None) -> tuple[int, ...] | None:
    """Strides of a mask (batch, heads, queries, keys), 0 where it broadcasts."""
    return None if mask is None else tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.stride()))


def common_arguments(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: bool,
    scale: float,
) -> dict[str, Any]:
    """What all kernels of this op take."""
    return {
        "query": query, "key": key, "mask": mask, "seed": seed, "query_s": query.stride(), "key_s": key.stride(),
        "mask_s": mask_strides(mask), "heads": query.shape[1], "group": max(query.shape[1] // max(key.shape[1], 1), 1),
        "queries": query.shape[2], "keys": key.shape[2], "dim": query.shape[3], "threshold": int(dropout_p * 2**32),
        "SCALE": scale, "KEPT": 1.0 - dropout_p, "BOOL_MASK": mask is not None and mask.dtype == torch.bool,
        "CAUSAL": causal, "COMPUTE": compute_type(query)[1],
    }  # fmt: skip


def forward(
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
    """torch.ops.iumad.cross_attention. The averaged weights are a second kernel: heads have to be added up in order."""
    (batch, heads, queries, _), (keys, value_dim) = query.shape, value.shape[2:]
    dtype, _ = compute_type(query)
    out = query.new_empty((batch, queries, heads, value_dim)).transpose(1, 2)
    lse = query.new_empty((batch, heads, queries), dtype=dtype)
    weights = query.new_empty((batch, queries, keys) if need_weights else (0,), dtype=dtype)
    common = common_arguments(query, key, attn_mask, seed, dropout_p, is_causal, scale)
    size = sizes("cross_attention", query, value, masked=attn_mask is not None)
    blocks = -(-queries // size["BLOCK_Q"])
    launch(
        _forward, batch * heads * blocks, query, **common, **size,
        value=value, value_s=value.stride(), value_dim=value_dim, out=out, out_s=out.stride(), lse=lse,
    )  # fmt: skip
    if need_weights:
        size.pop("BLOCK_V")
        launch(
            _average_weights,
            batch * blocks * -(-keys // size["BLOCK_K"]),
            query,
            **common,
            **size,
            lse=lse,
            weights=weights,
        )
    return out, weights, lse
