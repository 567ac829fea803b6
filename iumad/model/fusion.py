"""Fusion of the two modalities and of two decoder depths (first half of IBFM): E7 and E8 of paper.md 2.3.

F1 and F2 are the sums over modalities of an early and of the last decoder output; an operator joins them.

Shapes: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iumad.config import ModelConfig
from iumad.model.layers import Attention


class ModalitySum(nn.Module):
    """The circled plus of the figure (A5): addition, or concatenation and a linear map; identity for one."""

    def __init__(self, dim: int, count: int, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(count * dim, dim) if kind == "concat" and count > 1 else None

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors (B, L, D), one per modality, to one."""
        if self.linear is not None:
            return self.linear(torch.cat(list(parts), dim=-1))
        return torch.stack(list(parts)).sum(0) if len(parts) > 1 else parts[0]


class Addition(nn.Module):
    """F1 + F2."""

    def forward(self, first_BLD: Tensor, second_BLD: Tensor) -> Tensor:
        """(B, L, D) twice to (B, L, D)."""
        return first_BLD + second_BLD


class ConcatLinear(nn.Module):
    """Linear map of the concatenation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * dim, dim)

    def forward(self, first_BLD: Tensor, second_BLD: Tensor) -> Tensor:
        """(B, L, D) twice to (B, L, D)."""
        return self.linear(torch.cat((first_BLD, second_BLD), dim=-1))


class LinearGLU(nn.Module):
    """Linear map of the concatenation, one half of which gates the other."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * dim, 2 * dim)

    def forward(self, first_BLD: Tensor, second_BLD: Tensor) -> Tensor:
        """(B, L, D) twice to (B, L, D)."""
        return F.glu(self.linear(torch.cat((first_BLD, second_BLD), dim=-1)), dim=-1)


class CrossAttention(nn.Module):
    """CrossAtt(F1, F2), E8: one side asks the other, or each the other (A7)."""

    def __init__(self, dim: int, *, num_heads: int, dropout: float, query: str) -> None:
        super().__init__()
        self.swap = query == "second"
        self.attention = Attention(dim, num_heads, dropout)
        self.reverse = Attention(dim, num_heads, dropout) if query == "bidirectional" else None

    def forward(self, first_BLD: Tensor, second_BLD: Tensor) -> Tensor:
        """(B, L, D) twice to (B, L, D)."""
        asking, asked = (second_BLD, first_BLD) if self.swap else (first_BLD, second_BLD)
        mixed = self.attention(asking, asked, asked)
        return mixed if self.reverse is None else mixed + self.reverse(asked, asking, asking)


class Fusion(nn.Module):
    """Decoder outputs of the modalities that are present to F_fu; `fusion = none` gives F2."""

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        make_sum = partial(ModalitySum, dim, len(config.modalities), config.fusion_sum)
        self.layer1, self.layer2 = (layer - 1 for layer in config.fusion_layers)
        self.sum2 = make_sum()
        self.sum1 = None if config.fusion == "none" else make_sum()
        self.between_modalities = config.fusion == "cross_attention" and config.fusion_query == "modality"
        self.operator: nn.Module | None = None
        self.norm: nn.LayerNorm | None = None
        if config.fusion == "cross_attention":
            heads, dropout, query = config.num_heads, config.dropout, config.fusion_query
            self.operator = CrossAttention(dim, num_heads=heads, dropout=dropout, query=query)
            self.norm = nn.LayerNorm(dim) if config.fusion_residual else None
        elif config.fusion == "addition":
            self.operator = Addition()
        elif config.fusion == "concat_fc":
            self.operator = ConcatLinear(dim)
        elif config.fusion == "linear_glu":
            self.operator = LinearGLU(dim)

    def forward(self, decoder: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """`decoder`: per modality, one (B, L, D) per decoder layer. Returns (B, L, D)."""
        second_BLD = self.sum2([outputs[self.layer2] for outputs in decoder.values()])
        if self.sum1 is None or self.operator is None:
            return second_BLD
        if self.between_modalities:
            fused_BLD = self.operator(decoder["rgb"][self.layer2], decoder["depth"][self.layer2])
        else:
            first_BLD = self.sum1([outputs[self.layer1] for outputs in decoder.values()])
            fused_BLD = self.operator(first_BLD, second_BLD)
        return fused_BLD if self.norm is None else self.norm(second_BLD + fused_BLD)
