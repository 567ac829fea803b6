"""Selective scans with the projections that make them input-dependent, as Mamba and vision Mamba blocks use them.

Shapes: B batch, L length or H x W grid, D channels, K directions, N states per channel, R rank of the step size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iumad_kernels.ops.selective_scan import selective_scan
from iumad_kernels.ops.selective_scan_2d import directions, selective_scan_2d


class _Projected(nn.Module):
    """Parameters of K scans: step size (rank R, bias), B and C as linear functions of the input; A = -exp(A_log), D.

    Initialised as in Mamba: A = -1..-N, D = 1, softplus(bias) log-uniform in [1e-3, 1e-1].
    """

    def __init__(self, dim: int, num_directions: int, num_states: int, rank: int | None) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_states", num_states), ("rank", 1 if rank is None else rank)):
            if value < 1:
                raise ValueError(f"{name} = {value}, expected >= 1")
        self.dim, self.num_states, self.rank = dim, num_states, rank or math.ceil(dim / 16)
        K = num_directions
        self.project = nn.Parameter(torch.empty(K, dim, self.rank + 2 * num_states))
        self.delta_weight = nn.Parameter(torch.empty(K, self.rank, dim))
        self.delta_bias = nn.Parameter(torch.empty(K, dim))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, num_states + 1)).repeat(K, dim, 1))
        self.D = nn.Parameter(torch.ones(K, dim))
        nn.init.uniform_(self.project, -(dim**-0.5), dim**-0.5)
        nn.init.uniform_(self.delta_weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            low, high = math.log(1e-3), math.log(1e-1)
            delta = torch.exp(torch.rand_like(self.delta_bias) * (high - low) + low).clamp_min(1e-4)
            self.delta_bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # inverse of softplus

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step size (before its second projection), B and C."""
        low, B, C = projected.split((self.rank, self.num_states, self.num_states), dim=-1)
        return low, B, C

    def decay(self) -> Tensor:
        """A (K, D, N), in float32 where the parameters are shorter: it is exponentiated once more."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def extra_repr(self) -> str:
        """The sizes, for print(module)."""
        return f"dim={self.dim}, num_states={self.num_states}, rank={self.rank}"


class SelectiveScan(_Projected):
    """Selective scan of a sequence with its projections: the S6 layer between Mamba's convolution and output projection.

    Args:
        dim: channels D. num_states: N. rank: R, ceil(D / 16) by default.
    """

    def __init__(self, dim: int, *, num_states: int = 16, rank: int | None = None) -> None:
        super().__init__(dim, 1, num_states, rank)

    def forward(
        self,
        x_BLD: Tensor,
        z_BLD: Tensor | None = None,
        *,
        initial_state: Tensor | None = None,
        reverse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(B, L, D), optional gate of the same shape and state (B, D, N), to output (B, L, D) and last state (B, D, N)."""
        low_BLR, B_BLN, C_BLN = self.split(x_BLD @ self.project[0])
        delta_BLD = low_BLR @ self.delta_weight[0]
        out = selective_scan(
            x_BLD.mT,
            delta_BLD.mT,
            self.decay()[0],
            B_BLN.mT,
            C_BLN.mT,
            self.D[0],
            None if z_BLD is None else z_BLD.mT,
            self.delta_bias[0],
            delta_softplus=True,
            return_last_state=True,
            initial_state=initial_state,
            reverse=reverse,
        )
        return out[0].mT, out[1]


class SelectiveScan2d(_Projected):
    """Selective scan of a grid in K directions with their projections and the norm that follows, channels-last throughout.

    Args:
        dim: channels D. num_states: N. rank: R, ceil(D / 16) by default.
        scheme, step: the directions, as :func:`iumad_kernels.selective_scan_2d`; ``es2d`` (EfficientVMamba, paper.md 2.3) or
            ``cross`` (VMamba), ``bidirectional``, ``row``.
        norm: LayerNorm of the summed directions, as both models have it.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_states: int = 16,
        rank: int | None = None,
        scheme: str = "es2d",
        step: int = 2,
        norm: bool = True,
    ) -> None:
        super().__init__(dim, directions(scheme, step), num_states, rank)
        self.scheme, self.step = scheme, step
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x_BHWD: Tensor) -> Tensor:
        """(B, H, W, D) to (B, H, W, D)."""
        if self.scheme == "es2d":  # every pixel belongs to one direction, so each is projected once
            low, B, C = self.split(project_subgrids(x_BHWD, self.project, self.step))
            delta = project_subgrids(low, self.delta_weight, self.step)
        else:
            low, B, C = self.split(torch.einsum("bhwd,kdp->bkhwp", x_BHWD, self.project))
            delta = torch.einsum("bkhwr,krd->bkhwd", low, self.delta_weight)
        y_BDHW = selective_scan_2d(
            x_BHWD.movedim(-1, -3),
            delta.movedim(-1, -3),
            self.decay(),
            B.movedim(-1, -3),
            C.movedim(-1, -3),
            self.D,
            self.delta_bias,
            delta_softplus=True,
            scheme=self.scheme,
            step=self.step,
        )
        return self.norm(y_BDHW.movedim(1, -1))

    def extra_repr(self) -> str:
        """The sizes and directions, for print(module)."""
        return f"{super().extra_repr()}, scheme={self.scheme!r}, step={self.step}"


def project_subgrids(x_BHWD: Tensor, weight_KDP: Tensor, step: int) -> Tensor:
    """Linear map of every pixel by the weight of its own es2d sub-grid; (B, H, W, D) to (B, H, W, P).

    Sub-grid k holds the pixels (k % step, k // step) + step * (0..., 0...), as in :func:`iumad_kernels.selective_scan_2d`.
    """
    H, W = x_BHWD.shape[1:3]
    x = F.pad(x_BHWD, (0, 0, 0, -W % step, 0, -H % step))
    B, padded_H, padded_W, D = x.shape
    cells = x.view(B, padded_H // step, step, padded_W // step, step, D).permute(4, 2, 0, 1, 3, 5)
    y = cells.reshape(step * step, -1, D) @ weight_KDP
    y = y.view(step, step, B, padded_H // step, padded_W // step, -1).permute(2, 3, 1, 4, 0, 5)
    return y.reshape(B, padded_H, padded_W, -1)[:, :H, :W]
