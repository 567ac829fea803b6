"""nn.SelectiveScan and nn.SelectiveScan2d: projections, directions and initialisation against loops over the tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from iumad_kernels.nn import SelectiveScan, SelectiveScan2d
from iumad_kernels.nn.selective_scan import project_subgrids


def token_loop(scan, k, x_BLD, state_BDN=None):
    """h_t = exp(dt A) h_{t-1} + dt B u, y = C h + D u with the parameters of direction k; outputs and last state."""
    sizes = (scan.rank, scan.num_states, scan.num_states)
    state_BDN = x_BLD.new_zeros(len(x_BLD), scan.dim, scan.num_states) if state_BDN is None else state_BDN
    A_DN, outputs = -torch.exp(scan.A_log[k]), []
    for u_BD in x_BLD.unbind(1):
        low, B, C = (u_BD @ scan.project[k]).split(sizes, dim=-1)
        delta = F.softplus(low @ scan.delta_weight[k] + scan.delta_bias[k])
        state_BDN = torch.exp(delta[..., None] * A_DN) * state_BDN + (delta * u_BD)[..., None] * B[:, None]
        outputs.append((state_BDN * C[:, None]).sum(-1) + scan.D[k] * u_BD)
    return torch.stack(outputs, 1), state_BDN


def test_sequence_equals_a_loop_and_continues_from_its_state():
    torch.manual_seed(0)
    scan = SelectiveScan(5, num_states=3, rank=2).double()
    x, gate = torch.randn(2, 2, 11, 5, dtype=torch.float64)
    want, last = token_loop(scan, 0, x)
    first, state = scan(x[:, :4])
    second, end = scan(x[:, 4:], gate[:, 4:], initial_state=state)
    torch.testing.assert_close(first, want[:, :4])
    torch.testing.assert_close(second, want[:, 4:] * F.silu(gate[:, 4:]))
    torch.testing.assert_close(end, last)


def test_sequence_in_reverse():
    torch.manual_seed(0)
    scan = SelectiveScan(5, num_states=3).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(scan(x, reverse=True)[0], token_loop(scan, 0, x.flip(1))[0].flip(1))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 4), (4, 7), (5, 3), (1, 1), (14, 14)])
def test_pixels_keep_their_place_and_use_the_weight_of_their_subgrid(height, width):
    x = torch.randn(2, height, width, 3)
    y = project_subgrids(x, torch.eye(3) * torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None, None], 2)
    factor = 1 + torch.arange(height)[:, None] % 2
    factor = factor * (1 + 3 * (torch.arange(width) % 2))
    assert torch.equal(y, x * factor[..., None])


@pytest.mark.parametrize("step", [2, 3])
def test_es2d_equals_a_loop_in_every_subgrid(step):
    """Sub-grids are scanned row by row and column by column in turn (paper.md 2.3), each with its own parameters."""
    torch.manual_seed(0)
    scan = SelectiveScan2d(3, num_states=4, rank=2, step=step, norm=False).double()
    x = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    y = scan(x)
    for k in range(step * step):
        row, column = k % step, k // step
        own, got = (t[:, row::step, column::step] for t in (x, y))
        if k % 2:
            own, got = own.transpose(1, 2), got.transpose(1, 2)
        torch.testing.assert_close(got.flatten(1, 2), token_loop(scan, k, own.flatten(1, 2))[0])


def test_cross_sums_four_directions_and_normalises():
    torch.manual_seed(0)
    scan = SelectiveScan2d(3, num_states=4, scheme="cross").double()
    x = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    rows, columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)

    def by_columns(y):
        return y.unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2)

    want = (
        token_loop(scan, 0, rows)[0]
        + by_columns(token_loop(scan, 1, columns)[0])
        + token_loop(scan, 2, rows.flip(1))[0].flip(1)
        + by_columns(token_loop(scan, 3, columns.flip(1))[0].flip(1))
    )
    torch.testing.assert_close(scan(x), F.layer_norm(want, (3,)).unflatten(1, (3, 4)))


def test_initial_state_space():
    scan = SelectiveScan2d(64, num_states=4, rank=2)
    delta = F.softplus(scan.delta_bias)
    assert delta.min() > 0.99e-3
    assert delta.max() < 1.01e-1
    torch.testing.assert_close(scan.A_log.exp()[0, 0], torch.tensor([1.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize(("name", "value"), [("dim", 0), ("num_states", 0), ("rank", 0)])
def test_sizes_below_one_are_refused(name, value):
    sizes = {"dim": 4, "num_states": 2, "rank": 1} | {name: value}
    with pytest.raises(ValueError, match=f"{name} = 0"):
        SelectiveScan2d(sizes.pop("dim"), **sizes)
