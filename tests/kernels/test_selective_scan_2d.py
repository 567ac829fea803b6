"""selective_scan_2d on the CPU against its float64 definition."""

from __future__ import annotations

import pytest
import torch
from scan_inputs import ISAS, compare, grid_inputs

from iumad_kernels import selective_scan, selective_scan_2d
from iumad_kernels.reference.selective_scan import scan_order


@ISAS
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("scheme", "step"),
    [("es2d", 1), ("es2d", 2), ("es2d", 3), ("cross", 2), ("row", 2), ("bidirectional", 2)],
)
def test_2d(isa: str, scheme: str, step: int, shared: bool) -> None:
    for H, W in ((1, 1), (4, 4), (5, 7), (2, 9), (0, 3)):
        arguments = grid_inputs(scheme, step, H, W, shared=shared, groups=1 if shared else 2)
        compare(arguments, op="selective_scan_2d", scheme=scheme, step=step, delta_softplus=True)


@ISAS
@pytest.mark.parametrize("scheme", ["es2d", "cross"])
def test_2d_channels_last_and_low_precision(isa: str, scheme: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for shared in (False, True):
            arguments = grid_inputs(scheme, 2, 9, 14, dim=32, states=16, shared=shared)
            arguments = {
                n: t.movedim(-3, -1).contiguous().movedim(-1, -3) if t.dim() >= 4 else t
                for n, t in arguments.items()
            }
            compare(arguments, dtype, op="selective_scan_2d", scheme=scheme, delta_softplus=True)


@pytest.mark.parametrize("scheme", ["es2d", "cross", "bidirectional", "row"])
def test_2d_gradcheck(scheme: str) -> None:
    arguments = grid_inputs(scheme, 2, 3, 4, dim=2, states=2, shared=scheme == "cross")
    names = list(arguments)
    assert torch.autograd.gradcheck(
        lambda *t: selective_scan_2d(**dict(zip(names, t)), scheme=scheme, delta_softplus=True),
        [t.requires_grad_() for t in arguments.values()],
    )


@pytest.mark.parametrize(("H", "W"), [(4, 6), (5, 7), (1, 2)])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_es2d_visits_every_pixel_once(H: int, W: int, step: int) -> None:
    visited = torch.cat(scan_order("es2d", H, W, step))
    assert visited.sort().values.equal(torch.arange(H * W))


def test_es2d_of_a_sequence_is_the_scan_of_every_pth_token() -> None:
    t = grid_inputs("row", 1, 1, 24, shared=True)
    out = selective_scan_2d(**t, scheme="es2d", step=3)
    every = {name: x[..., 0, :] if x.dim() == 4 else x for name, x in t.items()}
    for j in range(3):
        part = {name: x[..., j::3] if x.dim() == 3 else x for name, x in every.items()}
        torch.testing.assert_close(out[:, :, 0, j::3], selective_scan(**part))


@pytest.mark.usefixtures("fresh_nan")
def test_every_output_is_written_2d() -> None:
    for scheme in ("es2d", "cross", "bidirectional"):
        compare(grid_inputs(scheme, 2, 5, 3), op="selective_scan_2d", scheme=scheme)
        compare(
            grid_inputs(scheme, 2, 5, 3, shared=True),
            torch.bfloat16,
            op="selective_scan_2d",
            scheme=scheme,
        )


def test_bad_input_2d() -> None:
    t = {name: x.float() for name, x in grid_inputs("cross", 2, 4, 4).items()}
    with pytest.raises(ValueError, match="scheme = 'spiral'"):
        selective_scan_2d(**t, scheme="spiral")
    with pytest.raises(ValueError, match="step = 0"):
        selective_scan_2d(**t, scheme="es2d", step=0)
    with pytest.raises(ValueError, match="delta has shape"):
        selective_scan_2d(**t, scheme="bidirectional")
