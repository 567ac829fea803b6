"""Discriminator (Phi_Dis): anomaly map and image score from a reconstruction and its reference, E10.

Shapes: B batch, C feature channels, G side of the token grid, S image side in pixels.
"""

from __future__ import annotations

from torch import Tensor

from iumad_kernels import anomaly_map


def discriminate(
    reconstruction_BCGG: Tensor, reference_BCGG: Tensor, *, size: int, score: str, pool: int
) -> tuple[Tensor, Tensor]:
    """Map (B, S, S), the distance over channels at each cell, upsampled bilinearly; and image score (B).

    `score` (A22): max = largest mean of a `pool` x `pool` window of the map; std, mean = of the whole map.
    Units: those of the features; only the order of values matters.
    """
    map_BSS, largest_B = anomaly_map(reconstruction_BCGG, reference_BCGG, size, pool=pool)
    if score == "std":
        return map_BSS, map_BSS.flatten(1).std(1)
    if score == "mean":
        return map_BSS, map_BSS.flatten(1).mean(1)
    return map_BSS, largest_B
