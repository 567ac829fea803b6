"""The parameter-free discriminator: feature distance at image size, and an image score."""

from __future__ import annotations

from torch import Tensor, nn

from iumad_kernels.ops.anomaly_map import anomaly_map


class AnomalyMap(nn.Module):
    """Distance map of two feature grids and its largest window mean; see :func:`iumad_kernels.anomaly_map`.

    Args:
        size: (H, W) of the map, or one number. pool: side of the averaging window. sigma: of the Gaussian smoothing, 0: none.

    Shapes: features and reference (batch, channels, h, w) -> map (batch, H, W), score (batch,).

    >>> import torch
    >>> maps, scores = AnomalyMap(64)(torch.randn(2, 8, 7, 7), torch.randn(2, 8, 7, 7))
    >>> maps.shape
    torch.Size([2, 64, 64])
    """

    def __init__(self, size: int | tuple[int, int], *, pool: int = 16, sigma: float = 0.0) -> None:
        super().__init__()
        self.size, self.pool, self.sigma = size, pool, sigma

    def forward(self, features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Map and score of every image."""
        return anomaly_map(features, reference, self.size, pool=self.pool, sigma=self.sigma)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"size={self.size}, pool={self.pool}, sigma={self.sigma}"
