"""Triton attention, through the public function, against the float64 definition; the dropout masks must be the CPU's."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import iumad_kernels
from iumad_kernels import reference


def arguments(
    batch: int, heads: int, Lq: int, Lk: int, dim: int, value_dim: int, key_heads: int = 0
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    key_heads = key_heads or heads
    shapes = {
        "query": (batch, heads, Lq, dim), "key": (batch, key_heads, Lk, dim), "value": (batch, key_heads, Lk, value_dim)
    }  # fmt: skip
    return {name: torch.randn(shape, generator=g).requires_grad_() for name, shape in shapes.items()}


def compare(agree, given: dict[str, Tensor | None], **flags: object) -> None:
    agree(
        functools.partial(iumad_kernels.cross_attention, **flags),
        functools.partial(reference.cross_attention, **flags),
        **given,
    )


@pytest.mark.parametrize(
    ("batch", "heads", "Lq", "Lk", "dim", "value_dim", "key_heads"),
    [
        (1, 1, 1, 1, 1, 1, 1),
        (1, 2, 17, 65, 5, 3, 1),  # two blocks of keys, a group of heads
        (2, 1, 33, 3, 33, 20, 1),
        (1, 1, 5, 40, 70, 100, 1),  # more than 64 features: in two parts
        (1, 2, 3, 0, 4, 4, 2),
        (0, 2, 3, 4, 4, 4, 2),
    ],
)
def test_shapes(agree, batch, heads, Lq, Lk, dim, value_dim, key_heads):
    compare(agree, arguments(batch, heads, Lq, Lk, dim, value_dim, key_heads))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_flags(agree, need_weights, dropout_p, is_causal):
    flags = {"need_weights": need_weights, "dropout_p": dropout_p, "is_causal": is_causal, "seed": 2**40 + 7}
    compare(agree, arguments(1, 2, 20, 70, 8, 8), **flags)


@pytest.mark.parametrize("shape", [(1, 2, 5, 66), (2, 1, 1, 66), (66,)])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks(agree, shape, kind):
    given: dict = arguments(2, 2, 5, 66, 4, 4)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    given["attn_mask"] = noise > 0 if kind == "bool" else noise.requires_grad_()
    compare(agree, given, need_weights=True)


def test_mask_of_whole_rows(agree):
    given: dict = arguments(2, 2, 5, 66, 4, 4)
    given["attn_mask"] = torch.arange(10).view(2, 1, 5, 1) % 3 > 0
    compare(agree, given)


def test_rows_without_keys_give_zeros(agree):
    given: dict = arguments(1, 1, 3, 4, 4, 4)
    given["attn_mask"] = torch.zeros(3, 4).index_fill_(0, torch.tensor([1]), float("-inf")).requires_grad_()
    given["attn_mask"].data[0, 2] = float("-inf")
    compare(agree, given, need_weights=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(agree, dtype):
    given = {k: t.detach().to(dtype).requires_grad_() for k, t in arguments(1, 2, 17, 70, 8, 8).items()}
    compare(agree, given, dropout_p=0.2, seed=5)


def test_any_strides(agree):
    g = torch.Generator().manual_seed(0)
    given = {
        "query": torch.randn(1, 5, 2, 8, generator=g).transpose(1, 2),
        "key": torch.randn(1, 2, 8, 7, generator=g).transpose(2, 3),
        "value": torch.randn(1, 1, 7, 16, generator=g)[..., ::2].expand(1, 2, 7, 8),
    }
    compare(agree, {k: t.requires_grad_() for k, t in given.items()}, scale=0.7)


def test_dropout_masks_are_the_ones_of_the_definition(triton_device):
    query = torch.zeros(1, 2, 3, 4, device=triton_device)
    key = torch.zeros(1, 2, 130, 4, device=triton_device)
    one_hot = torch.eye(130, device=triton_device).expand(1, 2, 130, 130).contiguous()
    weights = iumad_kernels.cross_attention(query, key, one_hot, dropout_p=0.4, seed=-3)
    keep = reference.philox.dropout_keep(-3, 0.4, (1, 2, 3, 130), torch.device("cpu"))
    assert torch.equal(weights.cpu() > 0, keep)


def test_hostile_values(agree):
    given = {k: t.detach() for k, t in arguments(1, 1, 3, 4, 4, 4).items()}
    given["query"][0, 0, 1, 2] = float("nan")
    given["value"][0, 0, 2, 1] = float("inf")
    compare(agree, given)


def test_opcheck(triton_device):
    query, key, value = (t.to(triton_device) for t in arguments(1, 2, 3, 5, 4, 4).values())
    mask = torch.zeros(1, 1, 3, 5, device=triton_device).requires_grad_()
    seed = torch.tensor(1, device=triton_device)
    torch.library.opcheck(
        torch.ops.iumad.cross_attention, (query, key, value, mask, seed, 0.1, True, 0.5, True)
    )
