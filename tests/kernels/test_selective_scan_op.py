"""torch.ops.iumad.selective_scan as torch sees it: opcheck, compile, export, second derivatives, what is saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scan_inputs import inputs
from torch import Tensor

from iumad_kernels import selective_scan, selective_scan_2d
from iumad_kernels.ops.scan_arguments import SCHEMES


def op_arguments(dtype: torch.dtype = torch.float32, scheme: str = "row") -> tuple[Any, ...]:
    """A grid's; of "sequence" with groups, of "constant" with B as a parameter."""
    K = {"cross": 4, "es2d": 4}.get(scheme, 1)
    if scheme in ("sequence", "constant"):
        u, delta, z = torch.randn(3, 2, 20, 17).unbind()
        B, C = torch.randn(2, 2, 2, 17, 5).mT.unbind()
        A, (D, bias), last = -torch.rand(20, 5), torch.randn(2, 20), torch.randn(2, 20, 5)
        tensors = [u, delta[:, ::4], A, B if scheme == "sequence" else A, C, D, z, bias, last]
        scheme = "row"
    else:
        tensors = _grid_tensors(K)
    return (
        tuple(None if t is None else t.to(dtype).requires_grad_() for t in tensors),
        SCHEMES.index(scheme),
        2,
        True,
        True,
    )


def _grid_tensors(K: int) -> list[Tensor | None]:
    return [
        torch.randn(2, 20, 3, 17),
        torch.randn(2, K, 20, 3, 17),
        -torch.rand(K, 20, 5),
        torch.randn(2, K, 2, 3, 17, 5),
        torch.randn(2, K, 2, 3, 17, 5),
        torch.randn(K, 20),
        torch.randn(2, 20, 3, 17) if K == 1 else None,
        torch.randn(K, 20),
        torch.randn(2, K, 20, 5) if K == 1 else None,
    ]


@pytest.mark.parametrize("scheme", ["sequence", "constant", "row", "cross", "es2d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(scheme: str, dtype: torch.dtype) -> None:
    tensors, *rest = op_arguments(dtype, scheme)
    torch.library.opcheck(torch.ops.iumad.selective_scan.default, (*tensors, *rest))
    torch.library.opcheck(torch.ops.iumad.selective_scan.default, (*tensors, *rest, False))
    detached = [None if t is None else t.detach() for t in tensors]
    out, last, tile_states = torch.ops.iumad.selective_scan(*detached, *rest)
    arguments = (
        torch.randn_like(out),
        torch.randn_like(last),
        *detached[:8],
        tile_states,
        *rest[:3],
        detached[8] is not None,
    )
    torch.library.opcheck(torch.ops.iumad.selective_scan_backward.default, arguments)


def test_compiles_without_graph_breaks_and_exports() -> None:
    t = {name: x.float() for name, x in inputs(2, 12, 20, 4).items()}

    class Scan(torch.nn.Module):
        def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
            out = selective_scan(u.sin(), delta, A, B, C, D, delta_softplus=True)
            return selective_scan_2d(
                out.unflatten(2, (4, 5)),
                delta.unflatten(2, (4, 5)),
                A,
                B[:, 0].unflatten(2, (4, 5)),
                C[:, 0].unflatten(2, (4, 5)),
            )

    arguments = tuple(t[name].requires_grad_() for name in ("u", "delta", "A", "B", "C", "D"))
    want = Scan()(*arguments)
    got = torch.compile(Scan(), fullgraph=True)(*arguments)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(got.sum(), arguments), torch.autograd.grad(want.sum(), arguments)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    exported = torch.export.export(Scan(), arguments)
    torch.testing.assert_close(exported.module()(*arguments), want, rtol=1e-4, atol=1e-4)


def test_backward_twice_is_refused_clearly() -> None:
    t = {name: x.requires_grad_() for name, x in inputs(1, 2, 3, 2).items()}
    (gradient,) = torch.autograd.grad(selective_scan(**t).sum(), t["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan_backward"):
        gradient.sum().backward()


def test_no_state_is_saved_without_gradients() -> None:
    tensors, *rest = op_arguments()
    with torch.no_grad():
        out, last_state, tile_states = torch.ops.iumad.selective_scan(*tensors, *rest[:-1], False)
        alone, *empty = torch.ops.iumad.selective_scan(*tensors, *rest[:-1], False, False)
    assert tile_states.numel() == 0
    assert last_state.numel() > 0
    assert [t.numel() for t in empty] == [0, 0]
    assert torch.equal(alone, out)


def test_backward_without_saved_states_is_refused() -> None:
    tensors, *rest = op_arguments(scheme="sequence")
    out, _, _ = torch.ops.iumad.selective_scan(*tensors, *rest[:-1], False)
    with pytest.raises(RuntimeError, match="save_states=True"):
        out.sum().backward()
