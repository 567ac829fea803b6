"""Reconstruction network (Phi_MRN): a UniAD transformer with object-aware attention, one per modality.

The encoder reads jittered tokens; its queries are multiplied by the condition maps (E6). The decoder starts
from learned queries, so that it cannot copy its input. (paper.md 2.3; UniAD, NeurIPS 2022; IUF, ECCV 2024.)

Shapes: B batch, G side of the token grid, L = G * G tokens, D token width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import repeat
from torch import Tensor, nn

from iumad.config import ModelConfig
from iumad.model.layers import Attention, FeedForward


class PositionEmbedding(nn.Module):
    """Learned position of each cell: half of the channels from its row, half from its column."""

    def __init__(self, grid: int, dim: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.rand(grid, dim // 2))
        self.column = nn.Parameter(torch.rand(grid, dim // 2))

    def forward(self) -> Tensor:
        """(L, D), row by row."""
        grid = len(self.row)
        rows = repeat(self.row, "h d -> (h w) d", w=grid)
        columns = repeat(self.column, "w d -> (h w) d", h=grid)
        return torch.cat((rows, columns), dim=1)


def neighbour_mask(grid: int, side: int) -> Tensor:
    """(L, L) bool, False where the key lies in the `side` x `side` cells around the query (UniAD)."""
    cell = torch.arange(grid)
    row, column = torch.meshgrid(cell, cell, indexing="ij")
    row, column = row.flatten(), column.flatten()
    distance = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
    return distance > side // 2


class Modulation(nn.Module):
    """Queries times condition maps (E6): q M, or q (1 + g M) with a gate g per channel that starts at 0."""

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim)) if kind == "residual" else None

    def forward(self, query_BLD: Tensor, condition_BLD: Tensor) -> Tensor:
        """(B, L, D) twice to (B, L, D)."""
        if self.gate is None:
            return query_BLD * condition_BLD
        return query_BLD * (1 + self.gate * condition_BLD)


class EncoderLayer(nn.Module):
    """Post-norm self-attention whose query is x + pos modulated by the condition (E6), and feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.modulate = Modulation(config.dim, config.condition_gate) if config.condition != "none" else None
        self.attention = Attention(config.dim, config.num_heads, config.dropout)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim, config.dropout)
        self.norm1, self.norm2 = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BLD: Tensor, position_LD: Tensor, condition_BLD: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """(B, L, D) to (B, L, D); no condition = plain self-attention."""
        key_BLD = x_BLD + position_LD
        query_BLD = key_BLD
        if self.modulate is not None and condition_BLD is not None:
            query_BLD = self.modulate(key_BLD, condition_BLD)
        x_BLD = self.norm1(x_BLD + self.dropout(self.attention(query_BLD, key_BLD, x_BLD, mask)))
        return self.norm2(x_BLD + self.dropout(self.feed_forward(x_BLD)))


class DecoderLayer(nn.Module):
    """A learned query attends to the encoder's memory, then to the previous layer's output; feed-forward."""

    def __init__(self, config: ModelConfig, num_tokens: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(num_tokens, config.dim))
        self.memory_attention = Attention(config.dim, config.num_heads, config.dropout)
        self.previous_attention = Attention(config.dim, config.num_heads, config.dropout)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim, config.dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(config.dim) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, previous_BLD: Tensor, memory_BLD: Tensor, position_LD: Tensor, mask: Tensor | None
    ) -> Tensor:
        """(B, L, D) to (B, L, D); the first layer's `previous` is the memory."""
        x_BLD = self.query.expand_as(memory_BLD)
        mixed = self.memory_attention(x_BLD + position_LD, memory_BLD + position_LD, memory_BLD, mask)
        x_BLD = self.norm1(x_BLD + self.dropout(mixed))
        mixed = self.previous_attention(x_BLD + position_LD, previous_BLD + position_LD, previous_BLD, mask)
        x_BLD = self.norm2(x_BLD + self.dropout(mixed))
        return self.norm3(x_BLD + self.dropout(self.feed_forward(x_BLD)))


class Reconstruction(nn.Module):
    """Encoder and decoder of one modality; returns the output of every decoder layer."""

    mask: Tensor | None

    def __init__(self, config: ModelConfig, grid: int) -> None:
        super().__init__()
        self.position = PositionEmbedding(grid, config.dim)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.decoder = nn.ModuleList(DecoderLayer(config, grid * grid) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        mask = neighbour_mask(grid, config.neighbour_mask) if config.neighbour_mask else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens_BLD: Tensor, conditions: Sequence[Tensor] | None) -> list[Tensor]:
        """One (B, L, D) per decoder layer, each through the shared final layer norm."""
        position_LD = self.position()
        memory_BLD = tokens_BLD
        for i, layer in enumerate(self.encoder):
            memory_BLD = layer(
                memory_BLD, position_LD, None if conditions is None else conditions[i], self.mask
            )
        outputs = []
        x_BLD = memory_BLD
        for layer in self.decoder:
            x_BLD = layer(x_BLD, memory_BLD, position_LD, self.mask)
            outputs.append(self.norm(x_BLD))
        return outputs


@torch.no_grad()
def start_local(reconstruction: Reconstruction) -> None:
    """Make every attention look around the query's own cell at first (model.attention_start).

    Positions become sines and cosines of the row and the column, keys are projected like queries, so that near positions
    agree, and the decoder's learned queries start small beside the positions.
    """
    position = reconstruction.position
    grid, half = position.row.shape
    frequency = torch.exp(-math.log(50.0) * torch.arange(0, half, 2) / half)
    angle = torch.arange(grid)[:, None] * frequency
    waves = math.sqrt(2.0) * torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :half]
    position.row.copy_(waves)
    position.column.copy_(waves)
    for module in reconstruction.modules():
        if isinstance(module, Attention):
            module.key.weight.copy_(module.query.weight)
        elif isinstance(module, DecoderLayer):
            module.query.mul_(0.02)
