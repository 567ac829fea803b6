"""Efficient 2-D selective scan (ES2D) of EfficientVMamba, the heart of the Mamba block (paper.md 2.3).

The grid is split into four interleaved sub-grids by the parity of row and column. Each is scanned once, in
its own direction and with its own parameters, so every cell is read once instead of four times.

Shapes: B batch, H x W grid, D inner channels, K = 4 sub-grids, N states per channel, R rank of the step size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from iumad_kernels import selective_scan_2d


class ES2D(nn.Module):
    """Input-dependent selective scan of a grid along ES2D's four sub-grids.

    Step sizes, B and C are linear functions of the input; A = -exp(A_log) starts at -1..-N, D at 1, and
    softplus(bias) of the step size is log-uniform in [1e-3, 1e-1], as in Mamba.
    """

    def __init__(self, dim: int, *, num_states: int, rank: int) -> None:
        super().__init__()
        subgrids = 4
        self.split = (rank, num_states, num_states)
        self.project = nn.Parameter(torch.empty(subgrids, dim, sum(self.split)))
        self.delta_weight = nn.Parameter(torch.empty(subgrids, rank, dim))
        self.delta_bias = nn.Parameter(torch.empty(subgrids, dim))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, num_states + 1)).repeat(subgrids, dim, 1))
        self.D = nn.Parameter(torch.ones(subgrids, dim))
        nn.init.uniform_(self.project, -(dim**-0.5), dim**-0.5)
        nn.init.uniform_(self.delta_weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            low, high = math.log(1e-3), math.log(1e-1)
            delta = torch.exp(torch.rand_like(self.delta_bias) * (high - low) + low).clamp_min(1e-4)
            self.delta_bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # inverse of softplus

    def forward(self, x_BHWD: Tensor) -> Tensor:
        """(B, H, W, D) to (B, H, W, D)."""
        low_BHWR, B_BHWN, C_BHWN = project_subgrids(x_BHWD, self.project).split(self.split, dim=-1)
        delta_BHWD = project_subgrids(low_BHWR, self.delta_weight)
        u, delta, B, C = (x.permute(0, 3, 1, 2) for x in (x_BHWD, delta_BHWD, B_BHWN, C_BHWN))
        A = -torch.exp(self.A_log)
        y_BDHW = selective_scan_2d(
            u, delta, A, B, C, self.D, self.delta_bias, delta_softplus=True, scheme="es2d"
        )
        return y_BDHW.permute(0, 2, 3, 1)


def project_subgrids(x_BHWD: Tensor, weight_KDP: Tensor) -> Tensor:
    """Linear map of every cell by the weight of its own sub-grid; (B, H, W, D) to (B, H, W, P).

    K counts sub-grids (row parity, column parity) as `selective_scan_2d` does: (0, 0), (1, 0), (0, 1), (1,
    1).
    """
    height, width = x_BHWD.shape[1:3]
    if height % 2 or width % 2:
        x_BHWD = F.pad(x_BHWD, (0, 0, 0, width % 2, 0, height % 2))
    cells = rearrange(x_BHWD, "b (h r) (w c) d -> (c r) (b h w) d", r=2, c=2)
    sizes = {"h": (height + 1) // 2, "w": (width + 1) // 2}
    y_BHWP = rearrange(cells @ weight_KDP, "(c r) (b h w) p -> b (h r) (w c) p", r=2, c=2, **sizes)
    return y_BHWP[:, :height, :width]
