"""causal_conv1d against its float64 reference and F.conv1d, at the shapes of the causal-conv1d package's own tests."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import iumad_kernels as ik
from iumad_kernels import _C, nn, reference

ISAS = _C.cpu_isas()
LENGTHS = (1, 2, 8, 16, 32, 64, 128, 129, 130, 151, 256, 372, 512, 784, 1024, 1134, 2048, 4096)
LAYOUTS = ("channels_last", "contiguous", "sliced_channels_last", "sliced", "expanded")


def rms(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def tokens(batch: int, dim: int, length: int, layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    if layout == "channels_last":
        return torch.randn(batch, length, dim).to(dtype).transpose(1, 2)
    if layout == "sliced_channels_last":
        return torch.randn(batch, length + 2, dim + 9).to(dtype).transpose(1, 2)[:, 5:-4, 1:-1]
    if layout == "sliced":
        return torch.randn(batch, dim + 3, 2 * length).to(dtype)[:, 3:, ::2]
    if layout == "expanded":
        return torch.randn(1, dim, 1).to(dtype).expand(batch, dim, length)
    return torch.randn(batch, dim, length).to(dtype)


def run(op: Any, inputs: list[Tensor | None], **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients; inputs are x, weight, bias, initial_states."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = op(*leaves[:3], initial_states=leaves[3], **options)
    outputs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    used = [t for t in leaves if t is not None]
    found = torch.autograd.grad(outputs, used, grads, allow_unused=True, materialize_grads=True)  # width 1
    return [o.detach() for o in outputs], list(found)


def check(inputs: list[Tensor | None], **options: Any) -> None:
    want, want_grads = run(
        reference.causal_conv1d, [None if t is None else t.double() for t in inputs], **options
    )
    got, grads = run(ik.causal_conv1d, inputs, **options)
    assert inputs[0] is not None
    exact = inputs[0].dtype == torch.float32
    plain, plain_grads = (want, want_grads) if exact else run(reference.causal_conv1d, inputs, **options)
    for g, w, p in zip(got, want, plain):
        assert g.shape == w.shape
        assert g.dtype == inputs[0].dtype
        assert rms(g, w) <= (2e-6 if exact else 2 * rms(p, w))
    names = [n for n, t in zip(("x", "weight", "bias", "initial_states"), inputs) if t is not None]
    for name, g, w, p in zip(names, grads, want_grads, plain_grads):
        assert g.shape == w.shape
        assert rms(g, w) <= (1e-5 if exact else 3 * rms(p, w)), f"gradient of {name}"


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_lengths(layout: str, length: int, width: int) -> None:
    states = torch.randn(2, 64, width - 1) if length % 2 == 0 else None
    inputs = [tokens(2, 64, length, layout), torch.randn(64, width), torch.randn(64), states]
    check(inputs, activation="silu", return_final_states=True)


def test_many_channels() -> None:
    check([tokens(2, 4096 + 32, 130, "channels_last"), torch.randn(4128, 4), None, None], activation="silu")


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_width_and_strides(layout: str, width: int, isa: str) -> None:
    for dim, length, activation in ((37, 19, "silu"), (5, 3, None), (130, 300, "swish")):
        weight = torch.randn(width, dim).t()
        states = torch.randn(2, width - 1, dim).transpose(1, 2) if width % 2 else None
        check(
            [tokens(2, dim, length, layout), weight, torch.randn(2 * dim)[::2], states],
            activation=activation,
            return_final_states=length == 3,
        )


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_half(layout: str, dtype: torch.dtype, isa: str) -> None:
    inputs = [tokens(2, 70, 151, layout, dtype), torch.randn(70, 4).to(dtype), torch.randn(70).to(dtype)]
    check([*inputs, torch.randn(2, 70, 3).to(dtype)], activation="silu", return_final_states=True)


def test_is_a_convolution() -> None:
    """PyTorch's own operator as the oracle."""
    x, weight, bias = torch.randn(2, 12, 50), torch.randn(12, 4), torch.randn(12)
    want = F.silu(F.conv1d(x, weight.unsqueeze(1), bias, padding=3, groups=12)[..., :50])
    assert rms(ik.causal_conv1d(x, weight, bias, activation="silu"), want) < 1e-6


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("width", [2, 4, 6])
def test_packed_sequences(width: int, layout: str, isa: str) -> None:
    """Equal to filtering every sequence alone; padding tokens (number < 0) give 0 and take no part."""
    lengths, dim = (1, 5, 2, 300, 1), 40
    x = tokens(2, dim, sum(lengths) + 3, layout)
    number = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((3,), -1)])
    seq_idx = number.expand(2, -1).int()
    inputs = [x, torch.randn(dim, width), torch.randn(dim), None]
    check(inputs, seq_idx=seq_idx, activation="silu")
    got = ik.causal_conv1d(*inputs[:3], seq_idx=seq_idx.long(), activation="silu")
    parts = [
        ik.causal_conv1d(part, *inputs[1:3], activation="silu") for part in x[..., :-3].split(lengths, dim=2)
    ]
    assert torch.allclose(got, torch.cat([*parts, torch.zeros(2, dim, 3)], dim=2), rtol=1e-6, atol=1e-6)


def test_numbers_that_return() -> None:
    """Only equality of the numbers counts, as in the package: 0 1 0 lets the third token see the first."""
    seq_idx = torch.tensor([[0, 1, 0, 0, 1, -1, 1]])
    inputs = [torch.randn(1, 20, 7), torch.randn(20, 4), torch.randn(20), None]
    check(inputs, seq_idx=seq_idx)


def test_other_sequences_do_not_leak_nan() -> None:
    x = torch.randn(1, 20, 10)
    x[..., 4] = torch.nan
    seq_idx = torch.tensor([[0] * 5 + [1] * 5])
    out = ik.causal_conv1d(x, torch.randn(20, 4), seq_idx=seq_idx)
    assert out[..., 5:].isfinite().all()
    assert out[..., 4].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("cut", [1, 2, 3, 100])
def test_states_continue_a_sequence(cut: int, layout: str) -> None:
    x, weight = tokens(2, 24, 150, layout), torch.randn(24, 4)
    whole, last = ik.causal_conv1d(x, weight, return_final_states=True)
    first, states = ik.causal_conv1d(x[..., :cut], weight, return_final_states=True)
    rest, end = ik.causal_conv1d(x[..., cut:], weight, initial_states=states, return_final_states=True)
    assert torch.allclose(torch.cat([first, rest], dim=2), whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(end, last)


def test_final_states_are_a_copy() -> None:
    x = torch.randn(1, 4, 10)
    _, states = ik.causal_conv1d(x, torch.randn(4, 3), return_final_states=True)
    before = states.clone()
    x.zero_()
    assert torch.equal(states, before)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_same_bits(layout: str, isa: str) -> None:
    """On every run, for any number of threads, whatever uninitialised memory holds."""
    inputs = [tokens(3, 90, 700, layout), torch.randn(90, 4), torch.randn(90), torch.randn(3, 90, 3)]
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True)  # fills empty tensors with NaN
        try:
            outputs, grads = run(ik.causal_conv1d, inputs, activation="silu", return_final_states=True)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_num_threads(1)
        results.append([*outputs, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_size_zero(shape: tuple[int, ...]) -> None:
    inputs = [torch.randn(shape), torch.randn(shape[1], 4), torch.randn(shape[1]), torch.randn(*shape[:2], 3)]
    (out, states), grads = run(ik.causal_conv1d, inputs, activation="silu", return_final_states=True)
    assert out.shape == shape
    assert states.shape == (*shape[:2], 3)
    assert not grads[1].any()
    assert not grads[2].any()


@pytest.mark.parametrize(
    "options", [{}, {"activation": "silu"}, {"seq_idx": torch.tensor([[0, 0, 1, 1, 1, -1]] * 2)}]
)
@pytest.mark.parametrize("width", [1, 3, 4])
def test_gradcheck(width: int, options: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    if "seq_idx" in options:
        assert torch.autograd.gradcheck(lambda *t: ik.causal_conv1d(*t, **options), (x, weight, bias))
        return
    states = torch.randn(2, 3, width - 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w, b, s: ik.causal_conv1d(x, w, b, initial_states=s, return_final_states=True, **options),
        (x, weight, bias, states),
    )


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_opcheck(layout: str) -> None:
    x = tokens(2, 12, 20, layout).unsqueeze(2)
    weight, bias = torch.randn(12, 1, 1, 4), torch.randn(12)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, torch.randn(2, 12, 1, 3))]
    torch.library.opcheck(torch.ops.iumad.depthwise_conv2d.default, (*leaves, None, 1, 0, 3, True))
    seq_idx = torch.zeros(2, 20, dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.iumad.depthwise_conv2d.default, (*leaves[:3], None, seq_idx, 1, 0, 3, True)
    )


def test_compile() -> None:
    def f(x: Tensor, weight: Tensor, states: Tensor) -> Tensor:
        out, last = ik.causal_conv1d(
            x * 2, weight, initial_states=states, return_final_states=True, activation="silu"
        )
        return out.sum() + (last**2).sum()

    leaves = [t.requires_grad_() for t in (torch.randn(2, 6, 9), torch.randn(6, 4), torch.randn(2, 6, 3))]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    got, want = compiled(*leaves), f(*leaves)
    assert torch.equal(got, want)
    for g, w in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)):
        assert torch.allclose(g, w, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({}, True),
        ({"width": 5}, False),  # the package has 2, 3 and 4
        ({"dtype": torch.float64}, False),
        ({"states": True}, False),  # only channels-last there
        ({"states": True, "channels_last": True}, True),
        ({"channels_last": True, "dim": 12}, False),  # wants multiples of 8
        ({"device": "cpu"}, False),
        ({"installed": False}, False),
    ],
)
def test_package_on_cuda(changes: dict[str, Any], used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """causal-conv1d runs where it is installed and can; the choice is tested with a stand-in, since it needs a GPU."""
    case = {
        "width": 4,
        "dtype": torch.float32,
        "states": False,
        "channels_last": False,
        "dim": 16,
        "device": "cuda",
    }
    case |= {"installed": True} | changes
    module = SimpleNamespace(causal_conv1d_fn=object(), __spec__=object())
    monkeypatch.setitem(sys.modules, "causal_conv1d", module if case["installed"] else None)
    monkeypatch.setattr(sys.modules["iumad_kernels.backend"], "_environment", None)
    from iumad_kernels.ops import causal_conv1d as op

    if not case["installed"]:
        monkeypatch.setattr(op, "find_spec", lambda name: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        dim, length = case["dim"], 24
        stride = (dim * length, 1, dim) if case["channels_last"] else (dim * length, length, 1)
        x = torch.empty_strided((2, dim, length), stride, dtype=case["dtype"], device=case["device"])
        found = op._package(x, case["width"], case["states"])
        with ik.backend("reference"):
            forced = op._package(x, case["width"], case["states"])
    assert found is (module.causal_conv1d_fn if used else None)
    assert forced is None


@pytest.mark.parametrize("case", ["plain", "sequences", "states"])
def test_package_is_called_as_it_expects(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function hands everything over by the package's names, sequence numbers as int32, and returns its result."""
    calls: list[dict[str, Any]] = []

    def package(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> str:
        calls.append({"x": x, "weight": weight, "bias": bias, **options})
        return "result"

    module = SimpleNamespace(causal_conv1d_fn=package, __spec__=object())
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)
    monkeypatch.setattr(sys.modules["iumad_kernels.backend"], "_environment", None)
    with FakeTensorMode():
        x = torch.empty(2, 24, 16, device="cuda").transpose(1, 2)
        weight, bias = torch.empty(16, 4, device="cuda"), torch.empty(16, device="cuda")
        given: dict[str, Any] = {"seq_idx": None, "initial_states": None, "return_final_states": False}
        if case == "sequences":
            given["seq_idx"] = torch.empty(2, 24, dtype=torch.int64, device="cuda")
        elif case == "states":
            given |= {"initial_states": torch.empty(2, 16, 3, device="cuda"), "return_final_states": True}
        assert ik.causal_conv1d(x, weight, bias, **given, activation="silu") == "result"
    (call,) = calls
    assert call["x"] is x
    assert call["weight"] is weight
    assert call["bias"] is bias
    assert call["activation"] == "silu"
    assert call["initial_states"] is given["initial_states"]
    assert call["return_final_states"] is given["return_final_states"]
    assert (call["seq_idx"] is None) == (case != "sequences")
    if case == "sequences":
        assert call["seq_idx"].dtype == torch.int32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(4, 5)}, ValueError, r"x has shape \(4, 5\)"),
        (
            {"weight": torch.zeros(4, 1, 3)},
            ValueError,
            r"weight has shape \(4, 1, 3\), expected .*\(dim, width\)",
        ),
        ({"weight": torch.zeros(4, 0)}, ValueError, r"weight has shape \(4, 0\)"),
        ({"weight": torch.zeros(4, 3).double()}, TypeError, "weight has dtype torch.float64"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias has shape \(3,\)"),
        ({"initial_states": torch.zeros(2, 4, 3)}, ValueError, r"initial_states has shape \(2, 4, 3\)"),
        ({"seq_idx": torch.zeros(2, 4).int()}, ValueError, r"seq_idx has shape \(2, 4\)"),
        ({"seq_idx": torch.zeros(2, 5)}, TypeError, "seq_idx has dtype torch.float32"),
        (
            {"seq_idx": torch.zeros(2, 5).int(), "return_final_states": True},
            ValueError,
            "seq_idx cannot be combined",
        ),
        ({"activation": "relu"}, ValueError, "activation = 'relu'"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 4, 5), "weight": torch.zeros(4, 3)}
    with pytest.raises(error, match=message):
        ik.causal_conv1d(**(arguments | changes))


def test_module() -> None:
    module = nn.CausalConv1d(8, 4, activation="silu")
    twin = torch.nn.Conv1d(8, 8, 4, padding=3, groups=8)
    module.load_state_dict(twin.state_dict())
    x = torch.randn(2, 8, 20)
    assert rms(module(x), F.silu(twin(x)[..., :20])) < 2e-6
    out, states = module(x, initial_states=torch.randn(2, 8, 3), return_final_states=True)
    assert torch.equal(states, x[..., -3:])
    with pytest.raises(ValueError, match="width = 0"):
        nn.CausalConv1d(8, 0)
