"""A frozen feature extractor whose taps are aligned on the token grid (Phi_MFEN of paper.md 2.3).

Shapes: B batch, S image side in pixels, G = S / 16 cells a side, C feature channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenBackbone(nn.Module):
    """Images in [0, 1] to features; no gradient, always in evaluation mode, channels-last inside.

    equal_taps: every tap is scaled to a root mean square of 1 over the image before it is resized.
    channels: sum of `tap_channels`. identity: name, hash of the weights, scaling of the pixels; backbones of
    equal identity give equal features.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        tap_channels: tuple[int, ...],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        identity: str,
        equal_taps: bool = False,
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.tap_channels = tap_channels
        self.channels = sum(tap_channels)
        self.identity = f"{identity} equal taps" if equal_taps else identity
        self.equal_taps = equal_taps
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images_B3SS: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1], S a multiple of 16, to (B, C, G, G): taps resized and concatenated."""
        side = images_B3SS.shape[-1]
        if images_B3SS.ndim != 4 or images_B3SS.shape[1] != 3 or images_B3SS.shape[2] != side or side % 16:
            shape = tuple(images_B3SS.shape)
            raise ValueError(f"images have shape {shape}: expected (batch, 3, S, S) with S a multiple of 16")
        pixels = ((images_B3SS - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        grid = (side // 16, side // 16)
        taps = self.network(pixels)
        if self.equal_taps:
            taps = [
                tap / tap.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp_min(1e-6) for tap in taps
            ]
        aligned = [F.interpolate(tap, size=grid, mode="bilinear", align_corners=True) for tap in taps]
        return torch.cat(aligned, dim=1).contiguous()
