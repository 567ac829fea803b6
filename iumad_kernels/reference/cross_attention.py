"""Attention (Vaswani et al., arXiv 1706.03762, section 3.2.1) in plain PyTorch, with the whole matrix of weights in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from iumad_kernels.reference.philox import dropout_keep


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    need_weights: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of :func:`iumad_kernels.cross_attention`; same arguments, shapes and results."""
    compute = torch.promote_types(query.dtype, torch.float32)
    (batch, heads, queries, dim), keys = query.shape, key.shape[2]
    dtype, query = query.dtype, query.to(compute)
    key, value = (t.to(compute).repeat_interleave(heads // key.shape[1], dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (max(dim, 1) ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        else:
            scores = scores + attn_mask.to(compute)
    if is_causal:
        visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~visible, -torch.inf)
    unseen = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(unseen, 0).softmax(-1).masked_fill(unseen, 0)
    if dropout_p > 0:
        if seed is None:
            seed = torch.randint(2**63 - 1, (), device=query.device)
        keep = dropout_keep(seed, dropout_p, (batch, heads, queries, keys), query.device)
        weights = weights * keep / (1 - dropout_p)
    out = (weights @ value).to(dtype)
    return (out, weights.mean(1).to(dtype)) if need_weights else out
