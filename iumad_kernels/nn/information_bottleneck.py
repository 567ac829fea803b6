"""Information bottleneck (second half of IBFM, paper.md 2.3, E9): a narrow passage, and class heads on both of its sides.

Shapes: B batch, L tokens, D width, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from iumad_kernels.ops.gaussian_bottleneck import gaussian_bottleneck
from iumad_kernels.ops.kl_bottleneck import KLBottleneck, kl_bottleneck


class BottleneckOutput(NamedTuple):
    """What an :class:`InformationBottleneck` computes."""

    features: Tensor
    """(B, L, D): what came through the bottleneck, F_fu^g."""
    fused_logits: Tensor
    """(B, K): classes seen from what went in, P(Y | F_fu)."""
    bottleneck_logits: Tensor
    """(B, K): classes seen from what came out, P(Y | F_fu^g)."""
    rate: Tensor
    """Mean over the tokens of the KL of the variational code from its prior, nats per token; 0 if not variational."""


class InformationBottleneck(nn.Module):
    """F_fu^g = W2 Drop(ReLU(W1 F_fu)), with class logits of the token means of F_fu and of F_fu^g.

    Args:
        dim: width D of the tokens. hidden: width of the passage (paper.md A9). num_classes: K.
        dropout: of the passage (A10).
        shared_head: one head reads both sides instead of a head each (A11).
        variational: the passage is a random code N(mu, sigma^2) of ``hidden`` numbers instead (Alemi et al., arXiv 1612.00410);
            without ReLU and dropout, whose place the noise takes. Training draws a sample, with a seed from torch's generator;
            evaluation takes the mean.

    >>> module = InformationBottleneck(256, 128, 10)
    >>> output = module(torch.randn(6, 196, 256))
    >>> loss = module.loss(output, labels=torch.arange(6))
    >>> output.features.shape, loss.total.shape
    (torch.Size([6, 196, 256]), torch.Size([]))
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_classes: int,
        *,
        dropout: float = 0.1,
        shared_head: bool = False,
        variational: bool = False,
    ) -> None:
        super().__init__()
        self.variational = variational
        self.narrow: nn.Module
        if variational:
            self.narrow = nn.Linear(dim, 2 * hidden)
        else:
            self.narrow = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.widen = nn.Linear(hidden, dim)
        self.head = nn.Linear(dim, num_classes)
        self.fused_head = None if shared_head else nn.Linear(dim, num_classes)

    def forward(self, fused_BLD: Tensor) -> BottleneckOutput:
        """The bottleneck's output, and the class logits on both sides of it."""
        code, rate = self._code(fused_BLD)
        features_BLD = self.widen(code)
        fused_head = self.head if self.fused_head is None else self.fused_head
        return BottleneckOutput(
            features_BLD, fused_head(fused_BLD.mean(1)), self.head(features_BLD.mean(1)), rate
        )

    def _code(self, fused_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """What passes, (B, L, hidden), and its rate."""
        code = self.narrow(fused_BLD)
        if not self.variational:
            return code, code.new_zeros(())
        mu, logvar = code.chunk(2, dim=-1)
        sample, kl = gaussian_bottleneck(mu, logvar, seed=torch.randint(2**63 - 1, (), device=mu.device))
        return sample if self.training else mu, kl.mean()

    def loss(
        self,
        output: BottleneckOutput,
        labels: Tensor | None = None,
        *,
        kl_weight: float = 1.0,
        ce_weight: float = 1.0,
        rate_weight: float = 0.0,
        temperature: float = 1.0,
        detach_teacher: bool = True,
        mask: Tensor | None = None,
    ) -> KLBottleneck:
        """:func:`kl_bottleneck` of the two heads; ``rate_weight`` times the rate is added to the total.

        labels: (B) int64. mask: (K,) bool, the classes that compete (all by default).
        """
        loss = kl_bottleneck(
            output.fused_logits,
            output.bottleneck_logits,
            labels,
            kl_weight=kl_weight,
            ce_weight=ce_weight,
            temperature=temperature,
            detach_teacher=detach_teacher,
            mask=mask,
        )
        return loss._replace(total=loss.total + rate_weight * output.rate) if rate_weight else loss
