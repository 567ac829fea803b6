"""nn.CrossAttention equals torch.nn.MultiheadAttention, forward and backward, from a module and from a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from iumad_kernels.nn import CrossAttention


def torch_attention(**options) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(48, 6, batch_first=True, **options).eval()
    for p in module.parameters():
        nn.init.normal_(p, std=0.2)
    return module


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 20, "vdim": 20}])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_multihead_attention(options, masked):
    source = torch_attention(**options)
    ours = CrossAttention.from_multihead_attention(source)
    x, context = torch.randn(2, 9, 48), torch.randn(2, 31, options.get("kdim", 48))
    mask = torch.rand(9, 31) > 0.4 if masked else None
    out, weights = ours(x, context, attn_mask=mask, need_weights=True)
    # torch's module marks with True the keys that do not take part.
    want, want_weights = source(x, context, context, attn_mask=None if mask is None else ~mask)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights, want_weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(x, context, attn_mask=mask), out)
    (want**2).sum().backward()
    (out**2).sum().backward()
    torch.testing.assert_close(ours.out_proj.weight.grad, source.out_proj.weight.grad, rtol=1e-4, atol=1e-4)
    if source.in_proj_weight is not None:
        grads = torch.cat([p.weight.grad for p in (ours.q_proj, ours.k_proj, ours.v_proj)])
        torch.testing.assert_close(grads, source.in_proj_weight.grad, rtol=1e-4, atol=1e-4)


def test_loads_a_checkpoint_of_multihead_attention_inside_a_model():
    source = nn.ModuleDict({"fusion": torch_attention()})
    ours = nn.ModuleDict({"fusion": CrossAttention(48, 6)}).eval()
    ours.load_state_dict(source.state_dict())
    x, context = torch.randn(2, 5, 48), torch.randn(2, 7, 48)
    want = source["fusion"](x, context, context)[0]
    torch.testing.assert_close(ours["fusion"](x, context), want, rtol=1e-5, atol=1e-5)
    again = nn.ModuleDict({"fusion": CrossAttention(48, 6)})
    again.load_state_dict(ours.state_dict())  # its own checkpoints load, too


def test_residual_norm_and_dropout():
    module = CrossAttention(16, 2, context_dim=24, dropout=0.5, residual=True, norm=True)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 24)
    assert not torch.equal(module(x, context), module(x, context))
    module.eval()
    assert torch.equal(module(x, context), module(x, context))
    plain = CrossAttention(16, 2, context_dim=24)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "norm" not in k})
    want = x + plain(module.norm_query(x), module.norm_context(context))
    torch.testing.assert_close(module(x, context), want)


def test_compiles_in_one_graph():
    module = CrossAttention(16, 2, residual=True, norm=True, dropout=0.1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 5, 16), torch.randn(2, 7, 16)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CrossAttention(16, 3), "num_heads = 3 must divide embed_dim = 16"),
        (lambda: CrossAttention(16, 0), "num_heads = 0"),
        (lambda: CrossAttention(16, 2, dropout=1.0), "dropout = 1.0"),
        (
            lambda: CrossAttention(16, 2)(torch.randn(2, 5, 8), torch.randn(2, 5, 16)),
            r"x_query has shape \(2, 5, 8\)",
        ),
        (
            lambda: CrossAttention(16, 2)(torch.randn(2, 5, 16), torch.randn(5, 16)),
            r"x_context has shape \(5, 16\)",
        ),
        (
            lambda: CrossAttention(16, 2)(torch.randn(2, 5, 16), torch.randn(3, 5, 16)),
            "x_context has batch 3",
        ),
        (lambda: CrossAttention.from_multihead_attention(torch_attention(add_bias_kv=True)), "add_bias_kv"),
        (
            lambda: CrossAttention.from_multihead_attention(torch_attention(kdim=4, vdim=5)),
            "kdim = 4 and vdim = 5",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
