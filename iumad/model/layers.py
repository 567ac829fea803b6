"""Parts that several modules share: multi-head attention, feed-forward, per-modality sharing, initialisation.

Shapes: B batch, L tokens (Lq, Lk where query and key differ), D token width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from einops import rearrange
from torch import Tensor, nn

from iumad_kernels import cross_attention


class Attention(nn.Module):
    """Multi-head scaled dot-product attention with separate query, key and value inputs."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(
        self, query_BLD: Tensor, key_BLD: Tensor, value_BLD: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, Lq, D); `mask` (Lq, Lk) is True where attention is allowed."""
        q_BHLE, k_BHLE, v_BHLE = (
            rearrange(project(x), "b l (h e) -> b h l e", h=self.num_heads)
            for project, x in ((self.query, query_BLD), (self.key, key_BLD), (self.value, value_BLD))
        )
        dropout = self.dropout if self.training else 0.0
        mixed_BHLE = cross_attention(q_BHLE, k_BHLE, v_BHLE, mask, dropout)
        return self.out(rearrange(mixed_BHLE, "b h l e -> b l (h e)"))


class FeedForward(nn.Module):
    """Linear, ReLU, dropout, Linear. The IUF update rule protects `linear2`."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.activation = nn.Sequential(nn.ReLU(), nn.Dropout(dropout))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Token-wise; (B, L, D) to (B, L, D)."""
        return self.linear2(self.activation(self.linear1(x_BLD)))


class PerModality(nn.Module):
    """One module per key, or a single one that all keys share (then held once, under `shared`)."""

    def __init__(self, make: Callable[[], nn.Module], keys: Iterable[str], *, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.of = nn.ModuleDict({key: make() for key in (["shared"] if shared else keys)})

    def __getitem__(self, key: str) -> nn.Module:
        return self.of["shared" if self.shared else key]


def initialise(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers and 2-D convolutions (paper.md 2.3, UniAD)."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
