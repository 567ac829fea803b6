"""selective_state_update on the CPU against its float64 definition."""

from __future__ import annotations

import pytest
import torch
from scan_inputs import FORWARD, ISAS, inputs, rms
from torch import Tensor

from iumad_kernels import reference, selective_scan, selective_state_update


def test_opcheck_update() -> None:
    arguments = (
        torch.randn(2, 1, 20, 5),
        torch.randn(2, 20, 1, 1),
        torch.randn(2, 1, 20, 1, 1),
        -torch.rand(1, 20, 5),
        torch.randn(2, 1, 2, 1, 1, 5),
        torch.randn(2, 1, 2, 1, 1, 5),
        torch.randn(1, 20),
        None,
        None,
        True,
    )
    torch.library.opcheck(torch.ops.iumad.selective_state_update.default, arguments)


@ISAS
@pytest.mark.parametrize("heads", [None, 4])
@pytest.mark.parametrize("groups", [None, 1, 2])
@pytest.mark.parametrize("full", [False, True])
def test_state_update(isa: str, heads: int | None, groups: int | None, full: bool) -> None:
    batch, dim, N = 3, 20, 7
    channels = (dim,) if heads is None else (heads, dim)
    projection = (batch, N) if groups is None else (batch, groups, N)
    arguments = {
        "x": torch.randn(batch, *channels),
        "dt": torch.randn(batch, *channels),
        "A": -torch.rand(*channels, N),
        "B": torch.randn(*projection),
        "C": torch.randn(*projection),
        "D": torch.randn(*channels) if full else None,
        "z": torch.randn(batch, *channels) if full else None,
        "dt_bias": torch.randn(*channels) if full else None,
        "dt_softplus": full,
    }
    state = torch.randn(batch, *channels, N)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    want_state = state.double()
    want = reference.selective_state_update(want_state, **wide)
    got = selective_state_update(state, **arguments)
    assert rms(got, want) <= FORWARD
    assert rms(state, want_state) <= FORWARD


def test_state_update_in_any_memory() -> None:
    """Tied parameters (stride 0), a state that cannot be viewed flat, a bfloat16 state, rows picked by index."""
    batch, heads, dim, N = 2, 3, 4, 5
    x = torch.randn(batch, heads, dim)
    dt = torch.rand(batch, heads, 1).expand(batch, heads, dim)
    A = -torch.rand(heads, 1, 1).expand(heads, dim, N)
    B, C = torch.randn(batch, N), torch.randn(batch, N)
    for state in (
        torch.randn(batch, dim, heads, N).transpose(1, 2),
        torch.randn(batch, heads, dim, N, dtype=torch.bfloat16),
    ):
        want_state = state.double()
        want = reference.selective_state_update(
            want_state, x.double(), dt.double(), A.double(), B.double(), C.double()
        )
        got = selective_state_update(state, x, dt, A, B, C)
        assert rms(got, want) <= 1e-2 if state.dtype == torch.bfloat16 else FORWARD
        assert rms(state, want_state) <= (5e-3 if state.dtype == torch.bfloat16 else FORWARD)
    pool = torch.randn(6, heads, dim, N)
    untouched, index = pool.clone(), torch.tensor([4, 1])
    rows = pool[index].clone()
    want = selective_state_update(rows, x, dt, A, B, C)
    got = selective_state_update(pool, x, dt, A, B, C, state_batch_indices=index)
    assert torch.equal(got, want)
    assert torch.equal(pool[index], rows)
    assert torch.equal(pool[[0, 2, 3, 5]], untouched[[0, 2, 3, 5]])


def test_steps_equal_the_scan() -> None:
    t = {name: x.float() for name, x in inputs(2, 20, 9, 4).items()}
    out, last = selective_scan(**t, delta_softplus=True, return_last_state=True)
    state = t["initial_state"].clone()
    for i in range(9):
        y = selective_state_update(
            state,
            t["u"][..., i],
            t["delta"][..., i],
            t["A"],
            t["B"][..., i],
            t["C"][..., i],
            t["D"],
            t["z"][..., i],
            t["delta_bias"],
            True,
        )
        torch.testing.assert_close(y, out[..., i])
    torch.testing.assert_close(state, last)


def test_bad_input_update() -> None:
    state, x = torch.zeros(2, 4, 3), torch.ones(2, 4)
    with pytest.raises(ValueError, match="A has shape"):
        selective_state_update(state, x, x, -torch.ones(4, 2), torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="not differentiable"):
        selective_state_update(
            state, x.requires_grad_(), x, -torch.ones(4, 3), torch.ones(2, 3), torch.ones(2, 3)
        )
