"""Every op, forward and backward, on the kernels that its users get, against the float64 definition.

On the CPU as well as on the GPU: without one it is the test itself that runs. ``python benchmarks/gpu.py --all`` runs it on one.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import iumad_kernels
from iumad_kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def noise(dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=g).to(dtype).requires_grad_() for name, shape in shapes.items()
    }


def run(agree_on: Any, op: str, given: dict[str, Any], **flags: Any) -> None:
    functions = (functools.partial(getattr(module, op), **flags) for module in (iumad_kernels, reference))
    agree_on(*functions, **given)


def scan(dtype: torch.dtype, *pixels: int, directions: int = 0, N: int = 16, dim: int = 70) -> dict[str, Any]:
    """Inputs of a scan: the projections and parameters stay in float32, as autocast leaves them."""
    own = (directions,) if directions else ()
    grids = noise(dtype, u=(2, dim, *pixels), delta=(2, *own, dim, *pixels))
    rest = noise(torch.float32, B=(2, *own, N, *pixels), C=(2, *own, N, *pixels), D=(*own, dim))
    A = -torch.rand(*own, dim, N, generator=torch.Generator().manual_seed(1))
    return {**grids, "A": A.requires_grad_(), **rest}


@pytest.mark.parametrize(
    ("dtype", "length"),
    [
        (torch.float32, 1),
        (torch.float32, 260),
        (torch.bfloat16, 70),
        (torch.float16, 70),
    ],  # 260: 32 lanes a channel
)
def test_selective_scan(agree_on, length, dtype):
    given = scan(dtype, length, dim=34) | noise(dtype, z=(2, 34, length))
    run(agree_on, "selective_scan", given, delta_softplus=True, return_last_state=True)


@pytest.mark.parametrize("scheme", ["row", "bidirectional", "cross", "es2d"])
def test_selective_scan_2d(agree_on, scheme):
    directions = {"row": 1, "bidirectional": 2, "cross": 4, "es2d": 4}[scheme]
    given = scan(torch.float32, 13, 11, directions=directions)
    run(agree_on, "selective_scan_2d", given, delta_softplus=True, scheme=scheme)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "dropout_p"), [(32, 0.0), (64, 0.2), (128, 0.2)])
def test_cross_attention(agree_on, dim, dropout_p, dtype):
    given = noise(dtype, query=(2, 4, 100, dim), key=(2, 2, 130, dim), value=(2, 2, 130, dim))
    run(agree_on, "cross_attention", given, dropout_p=dropout_p, seed=2**40 + 7, need_weights=True)


@pytest.mark.parametrize("is_causal", [False, True])
def test_cross_attention_with_a_learned_bias(agree_on, is_causal):
    given = noise(
        torch.float32,
        query=(2, 3, 50, 24),
        key=(2, 3, 70, 24),
        value=(2, 3, 70, 40),
        attn_mask=(1, 3, 50, 70),
    )
    run(agree_on, "cross_attention", given, is_causal=is_causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_kl_divergence(agree_on, beta, dtype):
    given = noise(dtype, student_logits=(70, 3000), teacher_logits=(70, 3000))
    run(agree_on, "kl_divergence", given, temperature=2.0, beta=beta)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_bottleneck(agree_on, dtype):
    given = noise(dtype, fused_logits=(70, 300), bottleneck_logits=(70, 300)) | {"labels": torch.arange(70)}
    agree_on(
        lambda **tensors: tuple(iumad_kernels.kl_bottleneck(**tensors)), reference.kl_bottleneck, **given
    )


def test_fused_linear_kl(agree_on):
    given = noise(
        torch.float32, features_t=(70, 24), weight_t=(300, 24), features_s=(70, 20), weight_s=(300, 20)
    )
    fused = functools.partial(iumad_kernels.fused_linear_kl, chunk_rows=32)
    agree_on(fused, reference.fused_linear_kl, **given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_bottleneck(agree_on, dtype):
    run(
        agree_on,
        "gaussian_bottleneck",
        noise(dtype, mu=(100, 300), logvar=(100, 300)),
        seed=2**63 + 5,
        prior=(0.2, 1.5),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, "symmetric"), (5, 2, "tf_same")])
@pytest.mark.parametrize("channels_last", [False, True])
def test_depthwise_conv2d(agree_on, channels_last, kernel, stride, padding, dtype):
    given = noise(dtype, x=(2, 70, 19, 30), weight=(70, 1, kernel, kernel), bias=(70,))
    if channels_last:
        given["x"] = given["x"].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    run(agree_on, "depthwise_conv2d", given, stride=stride, padding=padding, activation="silu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_conv1d(agree_on, dtype):
    given = noise(dtype, x=(2, 64, 300), weight=(64, 4), bias=(64,))
    run(agree_on, "causal_conv1d", given, activation="silu")
    given["x"] = given["x"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    given |= noise(dtype, initial_states=(2, 64, 3))
    run(agree_on, "causal_conv1d", given, activation="silu", return_final_states=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sigma", [0.0, 3.0])
def test_anomaly_map(agree_on, sigma, dtype):
    given = noise(dtype, features=(2, 70, 14, 11), reference=(2, 70, 14, 11))
    functions = (
        functools.partial(module.anomaly_map, size=(100, 90), pool=16, sigma=sigma)
        for module in (iumad_kernels, reference)
    )
    agree_on(*functions, **given)


def test_selective_state_update(agree_on):
    shapes = {"state": (2, 40, 16), "x": (2, 40), "dt": (2, 40), "A": (40, 16), "B": (2, 16), "C": (2, 16)}
    given = {name: t.detach() for name, t in noise(torch.float32, **shapes).items()}
    given["A"] = -given["A"].abs()

    def both(update: Any, state: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        state = state.clone()
        return update(state, *rest, dt_softplus=True), state

    agree_on(
        lambda **t: both(iumad_kernels.selective_state_update, *t.values()),
        lambda **t: both(reference.selective_state_update, *t.values()),
        **given,
    )
