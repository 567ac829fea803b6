"""One block of the Mamba decoder: selective scan, channel attention and depthwise convolution (paper.md 2.3).

Shapes: B batch, H x W grid, D block width, I inner width of the scan (I = expand * D).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from iumad.config import ModelConfig
from iumad.model.layers import Attention
from iumad_kernels import depthwise_conv2d
from iumad_kernels.nn import SelectiveScan2d


class DepthwiseConv(nn.Conv2d):
    """3 x 3 depthwise convolution of a channels-last grid (B, H, W, D), with SiLU if asked."""

    def __init__(self, dim: int, *, activation: str | None = None) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)
        self.activation = activation

    def forward(self, x_BHWD: Tensor) -> Tensor:
        """(B, H, W, D) to (B, H, W, D)."""
        x_BDHW = x_BHWD.permute(0, 3, 1, 2)
        y_BDHW = depthwise_conv2d(x_BDHW, self.weight, self.bias, activation=self.activation)
        return y_BDHW.permute(0, 2, 3, 1)


class ESSM(nn.Module):
    """Gated state-space layer: u = LN(x); Linear(LN(ES2D(SiLU(DwConv(Linear(u))))) * SiLU(Linear(u))).

    The ES2D scan reads every cell once, in four interleaved sub-grids with directions and parameters of their own.
    """

    def __init__(self, dim: int, *, expand: int, num_states: int) -> None:
        super().__init__()
        inner = expand * dim
        self.norm_in = nn.LayerNorm(dim)
        self.project_in = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = DepthwiseConv(inner, activation="silu")
        self.scan = SelectiveScan2d(inner, num_states=num_states, rank=math.ceil(dim / 16))
        self.project_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x_BHWD: Tensor) -> Tensor:
        """(B, H, W, D) to (B, H, W, D)."""
        main_BHWI, gate_BHWI = self.project_in(self.norm_in(x_BHWD)).chunk(2, dim=-1)
        main_BHWI = self.scan(self.conv(main_BHWI))
        return self.project_out(main_BHWI * F.silu(gate_BHWI))


class EfficientChannelAttention(nn.Module):
    """ECA: channels gated by a width-3 convolution over the vector of channel means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x_BHWD: Tensor) -> Tensor:
        """(B, H, W, D) to (B, H, W, D)."""
        gate_B1D = self.conv(x_BHWD.mean(dim=(1, 2)).unsqueeze(1)).sigmoid()
        return x_BHWD * gate_B1D.unsqueeze(2)


class SqueezeExcite(nn.Module):
    """SE: channels gated by a two-layer network on the vector of channel means."""

    def __init__(self, dim: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(dim // reduction, 1)
        self.gate = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim), nn.Sigmoid())

    def forward(self, x_BHWD: Tensor) -> Tensor:
        """(B, H, W, D) to (B, H, W, D)."""
        return x_BHWD * self.gate(x_BHWD.mean(dim=(1, 2)))[:, None, None]


class GridSelfAttention(nn.Module):
    """Multi-head self-attention over the cells of a grid."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads, dropout=0.0)

    def forward(self, x_BHWD: Tensor) -> Tensor:
        """(B, H, W, D) to (B, H, W, D)."""
        x_BLD = x_BHWD.flatten(1, 2)
        return rearrange(self.attention(x_BLD, x_BLD, x_BLD), "b (h w) d -> b h w d", h=x_BHWD.shape[1])


class MambaBlock(nn.Module):
    """x~ = x + ESSM(x) (E3); v = LN(x~), a = v + Attention(v) (E4); y = a + DwConv(x) (E5).

    Without `mamba_skips` the two identity skips are left out: the block's formulas, not its figure (A2).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.skips = config.mamba_skips
        self.essm = ESSM(dim, expand=config.mamba_expand, num_states=config.mamba_state)
        self.norm = nn.LayerNorm(dim)
        self.attention: nn.Module
        if config.mamba_attention == "eca":
            self.attention = EfficientChannelAttention()
        elif config.mamba_attention == "se":
            self.attention = SqueezeExcite(dim)
        else:
            self.attention = GridSelfAttention(dim, config.num_heads)
        self.conv = DepthwiseConv(dim)

    def forward(self, x_BHWD: Tensor) -> Tensor:
        """(B, H, W, D) to (B, H, W, D)."""
        scanned = self.essm(x_BHWD)
        v = self.norm(x_BHWD + scanned if self.skips else scanned)
        attended = self.attention(v)
        return (v + attended if self.skips else attended) + self.conv(x_BHWD)
