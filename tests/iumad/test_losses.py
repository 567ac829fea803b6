"""The objective: its terms against their definitions, weights, gradients, competing classes."""

import math

import pytest
import torch

from iumad.config import LossConfig
from iumad.losses import competing_classes, objective
from iumad.model import Output

BATCH, CLASSES = 4, 3


def output(seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    fields = {
        "reconstruction": draw(BATCH, 6, 2, 2),
        "reference": draw(BATCH, 6, 2, 2).detach(),
        "anomaly_map": draw(BATCH, 8, 8),
        "score": draw(BATCH),
        "class_logits": {"rgb": draw(BATCH, CLASSES), "depth": draw(BATCH, CLASSES)},
        "fused_logits": draw(BATCH, CLASSES),
        "bottleneck_logits": draw(BATCH, CLASSES),
        "branch_reconstruction": {"rgb": draw(BATCH, 6, 2, 2), "depth": draw(BATCH, 6, 2, 2)},
        "branch_reference": {"rgb": draw(BATCH, 6, 2, 2), "depth": draw(BATCH, 6, 2, 2)},
    }
    return Output(**fields | changes)


LABELS = torch.tensor([0, 2, 1, 2])


def cross_entropy(logits):
    probabilities = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    return -torch.log(probabilities[range(BATCH), LABELS]).mean()


def test_terms_match_their_definitions():
    out = output()
    total, terms = objective(out, LABELS, LossConfig(reconstruction=1.0))
    teacher, student = out.fused_logits.softmax(1), out.bottleneck_logits.softmax(1)
    expected = {
        "rgb_class": cross_entropy(out.class_logits["rgb"]),
        "depth_class": cross_entropy(out.class_logits["depth"]),
        "fusion": ((out.reconstruction - out.reference) ** 2).mean(),
        "bottleneck": (teacher * (teacher / student).log()).sum(1).mean(),
        "bottleneck_class": cross_entropy(out.fused_logits) + cross_entropy(out.bottleneck_logits),
        "reconstruction": sum(
            ((out.branch_reconstruction[m] - out.branch_reference[m]) ** 2).mean() for m in ("rgb", "depth")
        ),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach(), msg=name)
    torch.testing.assert_close(total, sum(expected.values()))


def test_weights():
    weights = {
        "rgb_class": 2.0,
        "depth_class": 3.0,
        "fusion": 5.0,
        "bottleneck": 7.0,
        "bottleneck_class": 11.0,
    }
    total, terms = objective(output(), LABELS, LossConfig(**weights))
    assert total.item() == pytest.approx(sum(weights[name] * value.item() for name, value in terms.items()))


def test_terms_of_weight_zero_are_left_out():
    _, terms = objective(output(), LABELS, LossConfig(depth_class=0.0, bottleneck=0.0, bottleneck_class=0.0))
    assert set(terms) == {"rgb_class", "fusion"}


@pytest.mark.parametrize("name", ["bottleneck", "bottleneck_class"])
def test_bottleneck_terms_are_independent(name):
    """A weight of zero takes its term out of the total."""
    total, terms = objective(output(), LABELS, LossConfig(**{name: 0.0}))
    assert total.item() == pytest.approx(sum(v.item() for key, v in terms.items() if key != name))


def test_models_without_heads():
    bare = output(class_logits={}, fused_logits=None, bottleneck_logits=None)
    total, terms = objective(bare, LABELS, LossConfig())
    assert set(terms) == {"fusion"}
    torch.testing.assert_close(total.detach(), terms["fusion"])


@pytest.mark.parametrize("detach", [True, False])
def test_kl_teacher(detach):
    """KL >= 0, zero when both heads agree, and no gradient to a detached teacher (paper.md section 7)."""
    config = LossConfig(
        rgb_class=0.0, depth_class=0.0, fusion=0.0, bottleneck_class=0.0, detach_teacher=detach
    )
    for seed in range(5):
        out = output(seed)
        total, terms = objective(out, LABELS, config)
        assert terms["bottleneck"] > 0
        total.backward()
        assert (out.fused_logits.grad is None or not out.fused_logits.grad.any()) == detach
        assert out.bottleneck_logits.grad.any()
    same = output(fused_logits=out.fused_logits, bottleneck_logits=out.fused_logits + 3.0)
    assert objective(same, LABELS, config)[1]["bottleneck"].abs() < 1e-6


def test_competing_classes():
    assert competing_classes(LossConfig(), seen=[0, 1], current=[1]) is None
    seen = competing_classes(LossConfig(classes="seen"), seen=[4, 0, 2], current=[2])
    assert seen.tolist() == [0, 2, 4]
    assert competing_classes(LossConfig(classes="step"), seen=[0, 2, 4], current=[4]).tolist() == [4]


def test_other_classes_neither_count_nor_change():
    """With a subset of classes the loss is that of the sub-matrix, and other logits get no gradient."""
    out = output()
    labels, classes = torch.tensor([0, 2, 0, 2]), torch.tensor([0, 2])
    total, terms = objective(out, labels, LossConfig(), classes)
    logits = out.class_logits["rgb"][:, [0, 2]]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(terms["rgb_class"], expected.detach())
    total.backward()
    for tensor in (
        out.class_logits["rgb"],
        out.class_logits["depth"],
        out.fused_logits,
        out.bottleneck_logits,
    ):
        assert tensor.grad[:, [0, 2]].any()
        assert not tensor.grad[:, 1].any()


def test_one_class_alone_has_nothing_to_learn():
    out = output()
    _, terms = objective(out, torch.full((BATCH,), 1), LossConfig(), torch.tensor([1]))
    assert terms["rgb_class"] == 0
    assert math.isclose(terms["bottleneck"].item(), 0.0, abs_tol=1e-7)
