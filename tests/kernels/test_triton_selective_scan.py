"""The Triton selective scan, through the public functions, against the float64 definition; tiny shapes for the interpreter."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import iumad_kernels
from iumad_kernels import reference


def sequence(batch: int, dim: int, N: int, length: int, groups: int = 1, rows: int = 0) -> dict[str, Tensor]:
    """Random arguments of selective_scan, all with gradients."""
    g = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    given = {
        "u": new(batch, dim, length),
        "delta": new(batch, rows or dim, length),
        "A": -torch.rand(dim, N, generator=g),
        "B": new(batch, groups, N, length),
        "C": new(batch, groups, N, length),
        "D": new(dim),
        "z": new(batch, dim, length),
        "delta_bias": new(dim),
        "initial_state": new(batch, dim, N),
    }
    return {k: t.requires_grad_() for k, t in given.items()}


both = functools.partial(iumad_kernels.selective_scan, return_last_state=True, delta_softplus=True)
both_reference = functools.partial(reference.selective_scan, return_last_state=True, delta_softplus=True)


@pytest.mark.parametrize(
    ("batch", "dim", "N", "length", "groups", "rows"),
    [
        (1, 3, 2, 1, 1, 0),
        (2, 5, 3, 17, 1, 0),  # one token more than a tile
        (1, 40, 16, 6, 1, 0),  # more channels than a block
        (1, 6, 20, 4, 2, 0),
        (1, 4, 1, 33, 4, 2),
        (1, 1, 300, 2, 1, 0),
        (2, 3, 4, 0, 1, 0),
        (0, 3, 4, 5, 1, 0),
    ],
)
def test_shapes(agree, batch, dim, N, length, groups, rows):
    agree(both, both_reference, **sequence(batch, dim, N, length, groups, rows))


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias", "initial_state"])
def test_optional_arguments(agree, absent):
    agree(both, both_reference, **sequence(1, 3, 2, 5) | {absent: None})


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_flags(agree, softplus, reverse):
    flags = {"delta_softplus": softplus, "reverse": reverse}
    given = sequence(1, 3, 2, 18)
    if not softplus:
        given["delta"] = given["delta"].detach().abs().requires_grad_()
        given["delta_bias"] = None
    agree(
        functools.partial(iumad_kernels.selective_scan, **flags),
        functools.partial(reference.selective_scan, **flags),
        **given,
    )


def test_constant_projections(agree):
    given = sequence(2, 3, 2, 5)
    for name in "BC":
        given[name] = given[name].detach()[0, 0, :, :3].t().contiguous().requires_grad_()  # (dim, N)
        agree(both, both_reference, **given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(agree, dtype):
    agree(
        both,
        both_reference,
        **{k: t.detach().to(dtype).requires_grad_() for k, t in sequence(1, 3, 2, 17).items()},
    )


def test_mixed_dtypes(agree):
    given = sequence(1, 3, 2, 5)
    for name in ("u", "B", "z"):
        given[name] = given[name].detach().bfloat16().requires_grad_()
    agree(both, both_reference, **given)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_strides(agree, layout):
    given = sequence(2, 4, 3, 5)
    for name in ("u", "delta", "z"):
        t = given[name].detach()
        if layout == "channels_last":
            t = t.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "sliced":
            t = torch.stack((t, t + 1), -1).flatten(2)[:, :, ::2]
        else:
            t = t[:1].expand_as(t)
        given[name] = t.requires_grad_()
    agree(both, both_reference, **given)


def grid(scheme: str, K: int, own: bool, H: int, W: int, dim: int = 2, N: int = 2) -> dict[str, Tensor]:
    """Random arguments of selective_scan_2d; ``own``: every direction has its own delta, B, C and parameters."""
    g = torch.Generator().manual_seed(0)
    k = (K,) if own else ()
    shapes = {
        "u": (1, dim, H, W), "delta": (1, *k, dim, H, W), "A": (*k, dim, N), "B": (1, *k, N, H, W), "C": (1, *k, N, H, W),
        "D": (*k, dim), "delta_bias": (*k, dim),
    }  # fmt: skip
    given = {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}
    given["A"] = -given["A"].abs()
    return {name: t.requires_grad_() for name, t in given.items()}


@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize(
    ("scheme", "K", "step", "H", "W"),
    [
        ("es2d", 4, 2, 5, 4),
        ("es2d", 4, 2, 1, 3),  # two of the four sub-grids are empty
        ("es2d", 9, 3, 4, 5),
        ("cross", 4, 2, 3, 4),
        ("bidirectional", 2, 2, 2, 3),
        ("row", 1, 2, 3, 3),
    ],
)
def test_grids(agree, scheme, K, step, H, W, own):
    flags = {"delta_softplus": True, "scheme": scheme, "step": step}
    agree(
        functools.partial(iumad_kernels.selective_scan_2d, **flags),
        functools.partial(reference.selective_scan_2d, **flags),
        **grid(scheme, K, own, H, W),
    )


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "cropped", "rows"])
def test_grid_layouts(agree, layout):
    given = grid("cross", 4, True, 3, 4)
    u, delta = given["u"].detach(), given["delta"].detach()
    if layout == "channels_last":
        u = u.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        u = u.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "cropped":
        u = torch.nn.functional.pad(u, (1, 2, 1, 0))[:, :, 1:, 1:5]
    else:
        delta = delta[:, :, :1]  # all channels share one row
    given["u"], given["delta"] = u.requires_grad_(), delta.requires_grad_()
    flags = {"delta_softplus": True, "scheme": "cross"}
    agree(
        functools.partial(iumad_kernels.selective_scan_2d, **flags),
        functools.partial(reference.selective_scan_2d, **flags),
        **given,
    )


def test_hostile_values(agree):
    given = {k: t.detach() for k, t in sequence(1, 4, 2, 18).items()}
    given["u"][0, 0, 3] = float("nan")
    given["u"][0, 1, 5] = float("inf")
    given["delta"][0, 2, 4], given["delta"][0, 3, 2] = 200.0, -200.0  # softplus is the identity, or zero
    given["A"] = -torch.arange(1.0, 9.0).view(4, 2) * 4
    agree(both, both_reference, **given)


def test_state_update(triton_device):
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4), (2, 3), (2, 3), (3, 4), (2, 4), (2, 4), (3,), (2, 3), (3,)]
    args = [torch.randn(*shape, generator=g) for shape in shapes]
    args[3] = -args[3].abs()
    want_state = args[0].double().clone()
    want = reference.selective_state_update(want_state, *(t.double() for t in args[1:]), dt_softplus=True)
    state, *rest = (t.to(triton_device) for t in args)
    state = torch.stack([state, state], -1)[..., 0]  # any strides, updated in place
    got = iumad_kernels.selective_state_update(state, *rest, dt_softplus=True)
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double().cpu(), want_state, rtol=1e-5, atol=1e-5)


def test_same_bits_twice(triton_device):
    given = {k: t.to(triton_device) for k, t in sequence(1, 9, 2, 18).items()}
    first, second = (
        torch.autograd.grad(sum(r.sum() for r in both(**given)), list(given.values())) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_opcheck(triton_device):
    # 16 channels: the saved states are in chunks of so many, and what is beyond the last channel stays as torch.empty left it.
    given = {k: t.to(triton_device) for k, t in grid("cross", 4, True, 2, 2, dim=16, N=1).items()}
    u, delta, A, B, C, D, bias = given.values()
    projections = [p.detach().movedim(2, -1).contiguous().unsqueeze(2).requires_grad_() for p in (B, C)]
    args = (u, delta, A, *projections, D, None, bias, None, 3, 1, True, True)
    torch.library.opcheck(torch.ops.iumad.selective_scan, args)
