"""Information bottleneck (second half of IBFM): E9 of paper.md 2.3 and the class heads of its loss.

What the bottleneck lets through should predict the class as well as what entered it; the rest is redundant.

Shapes: B batch, L tokens, D width, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn


class InformationBottleneck(nn.Module):
    """F_fu^g = W2 Drop(ReLU(W1 F_fu)), with class logits of the token means of F_fu and of F_fu^g (A11)."""

    def __init__(self, dim: int, hidden: int, num_classes: int, *, dropout: float, shared_head: bool) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.widen = nn.Linear(hidden, dim)
        self.head = nn.Linear(dim, num_classes)
        self.fused_head = None if shared_head else nn.Linear(dim, num_classes)

    def forward(self, fused_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """F_fu^g (B, L, D), logits of F_fu (B, K), logits of F_fu^g (B, K)."""
        bottleneck_BLD = self.widen(self.narrow(fused_BLD))
        fused_head = self.head if self.fused_head is None else self.fused_head
        return bottleneck_BLD, fused_head(fused_BLD.mean(1)), self.head(bottleneck_BLD.mean(1))
