"""Feature jitter: noise on the input of the reconstruction while training, E2 of paper.md 2.3.

Shapes: B batch, C feature channels, G cells a side of the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeatureJitter(nn.Module):
    """f' = f + scale * (||f|| / C) * eps with eps ~ N(0, I); the norm is that of each cell's feature.

    `scale` 20 is the paper's. It sets how hard the denoising is: 0 lets the network copy its input, anomalies
    included. The target of the reconstruction stays the feature without noise.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, features_BCGG: Tensor) -> Tensor:
        """Identity in evaluation mode."""
        if not self.training or self.scale == 0:
            return features_BCGG
        norm_B1GG = torch.linalg.vector_norm(features_BCGG, dim=1, keepdim=True)
        noise_BCGG = torch.randn_like(features_BCGG)
        return features_BCGG + noise_BCGG * (self.scale / features_BCGG.shape[1]) * norm_B1GG
