from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from iumad_kernels.nn.information_bottleneck import InformationBottleneck


def test_is_the_papers_formula():
    module = InformationBottleneck(16, 8, 5, dropout=0.0)
    fused, labels = torch.randn(3, 7, 16), torch.tensor([0, 4, 2])
    output = module(fused)
    W1, _, _ = module.narrow
    features = F.linear(F.linear(fused, W1.weight, W1.bias).relu(), module.widen.weight, module.widen.bias)
    torch.testing.assert_close(output.features, features)
    teacher, student = module.fused_head(fused.mean(1)), module.head(features.mean(1))
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
    ce = F.cross_entropy(teacher, labels) + F.cross_entropy(student, labels)
    loss = module.loss(output, labels, kl_weight=2.0, ce_weight=0.5)
    torch.testing.assert_close(loss.total, 2 * kl + 0.5 * ce)
    assert output.rate.item() == 0


def test_every_parameter_learns_and_the_teacher_only_from_labels():
    module = InformationBottleneck(16, 8, 5)
    fused, labels = torch.randn(3, 7, 16), torch.tensor([0, 4, 2])
    module.loss(module(fused), labels).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    module.zero_grad()
    module.loss(module(fused)).total.backward()
    assert not module.fused_head.weight.grad.any()
    assert module.head.weight.grad.any()


def test_shared_head():
    module = InformationBottleneck(16, 8, 5, shared_head=True).eval()
    fused = torch.randn(3, 7, 16)
    torch.testing.assert_close(module(fused).fused_logits, module.head(fused.mean(1)))
    assert sorted(name for name, _ in module.named_children()) == ["head", "narrow", "widen"]


def test_variational():
    module = InformationBottleneck(16, 8, 5, variational=True)
    fused, labels = torch.randn(3, 7, 16), torch.tensor([0, 4, 2])
    torch.manual_seed(1)
    output = module(fused)
    torch.manual_seed(1)
    assert torch.equal(module(fused).features, output.features)
    assert not torch.equal(module(fused).features, output.features)
    mu, logvar = module.narrow(fused).chunk(2, -1)
    rate = 0.5 * (logvar.exp() + mu**2 - 1 - logvar).sum(-1).mean()
    torch.testing.assert_close(output.rate, rate)
    plain = module.loss(output, labels)
    torch.testing.assert_close(module.loss(output, labels, rate_weight=0.1).total, plain.total + 0.1 * rate)
    module.loss(output, labels, rate_weight=0.1).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    torch.testing.assert_close(module.eval()(fused).features, module.widen(mu))


@pytest.mark.parametrize("variational", [False, True])
def test_compiles(variational):
    module = InformationBottleneck(16, 8, 5, variational=variational).eval()
    fused, labels = torch.randn(3, 7, 16), torch.tensor([0, 4, 2])
    compiled = torch.compile(lambda x: module.loss(module(x), labels).total, fullgraph=True)
    torch.testing.assert_close(compiled(fused), module.loss(module(fused), labels).total)
