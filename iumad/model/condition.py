"""The condition branch (Phi_Mamba): from an image, one class-aware map per encoder layer, and class logits.

Shapes: B batch, S image side in pixels, H x W grid of the branch, D token width, G side of the token grid,
L = G * G tokens, K classes.
"""

from __future__ import annotations

from einops import rearrange, reduce
from torch import Tensor, nn

from iumad.config import ModelConfig
from iumad.model.layers import Attention, FeedForward
from iumad.model.mamba import MambaBlock

_STRIDES = {"patch16": 16, "conv8": 8, "conv4": 4}


class Stem(nn.Module):
    """Image to grid (A1): non-overlapping patches of side 16, 8 or 4, one linear map, layer norm."""

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        stride = _STRIDES[kind]
        self.patches = nn.Conv2d(3, dim, stride, stride)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images_B3SS: Tensor) -> Tensor:
        """Images with values in [0, 1] to (B, H, W, D)."""
        return self.norm(self.patches(2 * images_B3SS - 1).permute(0, 2, 3, 1))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward: the block that the Mamba block replaces (IUF's baseline)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.attention = Attention(config.dim, config.num_heads, config.dropout)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim, config.dropout)

    def forward(self, x_BHWD: Tensor) -> Tensor:
        """(B, H, W, D) to (B, H, W, D)."""
        x_BLD = x_BHWD.flatten(1, 2)
        normed = self.norm1(x_BLD)
        x_BLD = x_BLD + self.attention(normed, normed, normed)
        x_BLD = x_BLD + self.feed_forward(self.norm2(x_BLD))
        return rearrange(x_BLD, "b (h w) d -> b h w d", h=x_BHWD.shape[1])


class ConditionBranch(nn.Module):
    """Stem, a chain of blocks, and a classifier on the last one's output; every output is a condition map."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        block = MambaBlock if config.condition == "mamba" else TransformerBlock
        self.stem = Stem(config.dim, config.condition_stem)
        self.pool = _STRIDES["patch16"] // _STRIDES[config.condition_stem]
        self.blocks = nn.ModuleList(block(config) for _ in range(config.layers))
        self.head = nn.Sequential(
            nn.Linear(config.dim, config.dim), nn.ReLU(), nn.Linear(config.dim, num_classes)
        )

    def forward(self, images_B3SS: Tensor) -> tuple[list[Tensor], Tensor]:
        """Maps, one (B, L, D) per block, averaged down to the token grid, and logits (B, K)."""
        x_BHWD = self.stem(images_B3SS)
        maps = []
        for block in self.blocks:
            x_BHWD = block(x_BHWD)
            pool = {"p": self.pool, "q": self.pool}
            maps.append(reduce(x_BHWD, "b (h p) (w q) d -> b (h w) d", "mean", **pool))
        return maps, self.head(x_BHWD.mean(dim=(1, 2)))
