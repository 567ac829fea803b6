"""Update rules: the constrained step, the old-weight pull, the schedule, exact resumption."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from iumad.config import Config, IUFConfig, ModelConfig, ProtocolConfig, TrainConfig
from iumad.incremental.update import build_update_rule, projection, schedule_factor
from iumad.losses import objective
from iumad.model import build_model

DIM, GRID, CHANNELS = 16, 2, 12


def tiny(rule="iuf", **sections):
    model = ModelConfig(
        dim=DIM, num_heads=2, ffn_dim=24, layers=2, fusion_layers=(1, 2), mamba_state=2, bottleneck_dim=8
    )
    data = dataclasses.replace(Config().data, image_size=16 * GRID)
    protocol = ProtocolConfig(name="2-1", update_rule=rule)
    return Config(data=data, model=model, protocol=protocol, **sections)


def batch(seed, size=4):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(size, *shape, generator=generator)

    return SimpleNamespace(
        images={m: draw(3, 16 * GRID, 16 * GRID) for m in ("rgb", "depth")},
        features={m: draw(CHANNELS, GRID, GRID) for m in ("rgb", "depth")},
    )


def build(config, seed=0):
    torch.manual_seed(seed)
    model = build_model(config, num_classes=3, channels=CHANNELS).train()
    return model, build_update_rule(config, model)


def iterate(config, model, rule, seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        data = batch(seed)
        total, _ = objective(model(data.images, data.features), torch.zeros(4, dtype=torch.long), config.loss)
        total.backward()
        rule.step()


def after_base(config):
    model, rule = build(config)
    rule.begin_step(0, model, iterations=2)
    iterate(config, model, rule, range(2))
    rule.end_step(model, (batch(seed) for seed in range(10)))
    return model, rule


def old_directions(model, layer, seeds=range(10)):
    """Right singular vectors of the layer's token-mean outputs, straight from their definition."""
    rows = []
    handle = layer.register_forward_hook(lambda module, inputs, output: rows.append(output.mean(1)))
    model.eval()
    with torch.no_grad():
        for seed in seeds:
            data = batch(seed)
            model(data.images, data.features)
    handle.remove()
    model.train()
    return torch.linalg.svd(torch.cat(rows).double()).Vh


def test_projection_is_the_ladder_in_the_old_directions():
    rows = torch.randn(40, DIM, dtype=torch.float64) * torch.logspace(0, -1, DIM, dtype=torch.float64)
    directions = torch.linalg.svd(rows).Vh
    matrix = projection(rows.T @ rows)
    for k, direction in enumerate(directions):
        expected = direction * math.log(k + 1) / math.log(DIM)
        torch.testing.assert_close(matrix @ direction, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_constrained_step(optimizer):
    """No change along the top old direction, the optimiser's own change along the last."""
    config = tiny(iuf=IUFConfig(optimizer=optimizer, lr=0.1, pull=0.0))
    model, rule = after_base(config)
    layers = model.protected_layers()
    assert len(layers) == 2 * (2 + 2)  # modalities x (encoder + decoder layers)
    directions = {name: old_directions(model, layer) for name, layer in layers.items()}
    before = {
        name: (layer.weight.detach().clone(), layer.bias.detach().clone()) for name, layer in layers.items()
    }
    free = copy.deepcopy(model)
    rule.begin_step(1, model, iterations=5)
    iterate(config, model, rule, [7])

    unconstrained = copy.deepcopy(rule)
    unconstrained.parameters = list(free.parameters())
    unconstrained.projections = {}
    unconstrained.optimizer = unconstrained._make_optimizer()
    iterate(config, free, unconstrained, [7])

    for name, layer in layers.items():
        raw = dict(free.protected_layers())[name]
        for now, then, reference in (
            (layer.weight, before[name][0], raw.weight),
            (layer.bias, before[name][1], raw.bias),
        ):
            moved, raw_move = (now - then).double(), (reference - then).double()
            size = raw_move.norm()
            assert size > 0
            assert (directions[name][0] @ moved).norm() < 1e-4 * size
            assert (directions[name][-1] @ (moved - raw_move)).norm() < 1e-3 * size
    assert torch.equal(model.embed["rgb"].weight, free.embed["rgb"].weight)


def test_feature_spaces_add_up_over_steps_and_need_no_images():
    config = tiny()
    model, rule = after_base(config)
    name, layer = next(iter(model.protected_layers().items()))
    torch.testing.assert_close(
        projection(rule.grams[name]).double(),
        ladder(old_directions(model, layer)),
        rtol=1e-4,
        atol=1e-4,
    )
    size = rule.storage()
    assert size == 8 * DIM * DIM * 8  # layers, matrix, float64
    first = rule.grams[name].clone()
    rule.end_step(model, (batch(seed) for seed in range(10)))
    torch.testing.assert_close(rule.grams[name], 2 * first)
    assert rule.storage() == size
    assert model.training


def ladder(directions):
    factors = torch.log(torch.arange(1, DIM + 1, dtype=torch.float64)) / math.log(DIM)
    return directions.T @ torch.diag(factors) @ directions


def test_pull_towards_old_weights():
    """With a zero learning rate an iteration only pulls: 5 % of the way, and not after the last one."""
    config = tiny(iuf=IUFConfig(lr=0.0))
    model, rule = after_base(config)
    rule.begin_step(1, model, iterations=2)
    old = model.embed["rgb"].weight.detach().clone()
    with torch.no_grad():
        model.embed["rgb"].weight.add_(1.0)
    iterate(config, model, rule, [0])
    torch.testing.assert_close(model.embed["rgb"].weight.detach(), old + 0.95)
    iterate(config, model, rule, [1])
    torch.testing.assert_close(model.embed["rgb"].weight.detach(), old + 0.95)


def test_pull_follows_the_schedule_of_the_rate():
    """Otherwise a rate that decays to zero leaves the old weights, whatever was learned."""
    config = tiny(iuf=IUFConfig(lr=0.0, pull=0.2), train=TrainConfig(schedule="cosine"))
    model, rule = after_base(config)
    rule.begin_step(1, model, iterations=4)
    old = model.embed["rgb"].weight.detach().clone()
    with torch.no_grad():
        model.embed["rgb"].weight.add_(1.0)
    iterate(config, model, rule, [0, 1])
    factors = [0.5 * (1 + math.cos(math.pi * done / 4)) for done in (1, 2)]
    expected = old + (1 - 0.2 * factors[0]) * (1 - 0.2 * factors[1])
    torch.testing.assert_close(model.embed["rgb"].weight.detach(), expected)


def test_base_step_of_iuf_is_plain():
    weights = []
    for name in ("iuf", "plain"):
        config = tiny(name)
        model, rule = build(config)
        rule.begin_step(0, model, iterations=3)
        iterate(config, model, rule, range(3))
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_sgd_step_is_bounded_by_the_clip():
    config = tiny(train=TrainConfig(grad_clip=0.01, schedule="constant"))
    model, rule = after_base(config)
    rule.begin_step(1, model, iterations=5)
    before = [p.detach().clone() for p in model.parameters()]
    iterate(config, model, rule, [0])
    moved = torch.stack([(p - q).norm() for p, q in zip(model.parameters(), before)]).norm()
    assert 0 < moved <= 0.01 + 1e-6


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["iuf", "plain"])
@pytest.mark.parametrize("step", [0, 1])
def test_resumed_run_equals_uninterrupted(name, optimizer, step):
    config = tiny(name, iuf=IUFConfig(optimizer=optimizer, lr=0.01), train=TrainConfig(schedule="cosine"))
    model, rule = after_base(config)
    rule.begin_step(step, model, iterations=6)
    iterate(config, model, rule, range(3))
    weights, state = copy.deepcopy((model.state_dict(), rule.state_dict()))
    iterate(config, model, rule, range(3, 6))

    again, fresh = build(config, seed=99)
    again.load_state_dict(weights)
    fresh.load_state_dict(state)
    iterate(config, again, fresh, range(3, 6))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert fresh.storage() == rule.storage()


def test_plain_optimiser_is_new_in_every_step():
    config = tiny("plain")
    model, rule = after_base(config)
    assert rule.optimizer.state
    rule.begin_step(1, model, iterations=3)
    assert not rule.optimizer.state
    assert rule.storage() == 0


def test_schedules():
    step = TrainConfig(schedule="step", schedule_epochs=10, schedule_gamma=0.1)
    factors = [schedule_factor(step, i, iterations=50, epochs=25) for i in (0, 19, 20, 39, 40)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    cosine = TrainConfig(schedule="cosine", warmup=0.1)
    factors = [schedule_factor(cosine, i, iterations=100, epochs=25) for i in range(100)]
    assert factors[0] > 0
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[10] == 1
    assert factors[-1] < 1e-3
    assert schedule_factor(TrainConfig(schedule="constant"), 99, iterations=100, epochs=5) == 1
