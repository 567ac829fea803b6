"""The model: shapes, wiring, gradients, and the acceptance checks of paper.md section 7."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from iumad import presets
from iumad.config import Config, DataConfig, LossConfig, ModelConfig
from iumad.losses import objective
from iumad.model import build_model
from iumad.model.bottleneck import InformationBottleneck
from iumad.model.condition import ConditionBranch
from iumad.model.discriminator import discriminate
from iumad.model.jitter import FeatureJitter
from iumad.model.mamba import EfficientChannelAttention, MambaBlock
from iumad.model.reconstruction import EncoderLayer, PositionEmbedding, Reconstruction, neighbour_mask

CLASSES, CHANNELS, GRID, SIDE, BATCH = 5, 24, 4, 64, 3


def tiny(loss=None, **model):
    """A small model in a small image; `model` overrides its fields."""
    fields = {"dim": 16, "num_heads": 4, "ffn_dim": 32, "mamba_state": 4, "bottleneck_dim": 8} | model
    return Config(data=DataConfig(image_size=SIDE), model=ModelConfig(**fields), loss=loss or LossConfig())


def build(config, classes=CLASSES, channels=CHANNELS):
    torch.manual_seed(0)
    return build_model(config, classes, channels)


def inputs(config, seed=0, batch=BATCH, channels=CHANNELS):
    generator = torch.Generator().manual_seed(seed)
    side, grid = config.data.image_size, config.grid
    images = {m: torch.rand(batch, 3, side, side, generator=generator) for m in config.model.modalities}
    features = {
        m: torch.randn(batch, channels, grid, grid, generator=generator) for m in config.model.modalities
    }
    return images, features


def test_shapes_of_the_published_configuration():
    """The table of paper.md 2.2: EfficientNet-B4 channels, 224 pixels, ten classes."""
    config = presets.get("recommended")
    model = build(config, 10, 272).eval()
    images, features = inputs(config, batch=1, channels=272)
    with torch.no_grad():
        output = model(images, features)
        maps, _ = model.condition["rgb"](images["rgb"])
    assert output.reconstruction.shape == output.reference.shape == (1, 272, 14, 14)
    assert output.anomaly_map.shape == (1, 224, 224)
    assert output.score.shape == (1,)
    assert [tuple(m.shape) for m in maps] == [(1, 196, 256)] * 4
    for modality in ("rgb", "depth"):
        assert output.class_logits[modality].shape == (1, 10)
        assert [tuple(x.shape) for x in output.decoder[modality]] == [(1, 196, 256)] * 4
    assert output.fused_logits.shape == output.bottleneck_logits.shape == (1, 10)


def test_parameter_counts_of_the_published_configuration():
    """Arithmetic of paper.md 2.2: transformer 7.574 M, Mamba block 0.571 M, all about 20.7 M."""

    def count(module):
        return sum(p.numel() for p in module.parameters())

    model = build(presets.get("recommended"), 10, 272)
    transformer = model.reconstruction["rgb"]
    assert count(transformer) - count(transformer.position) == 7_574_016
    assert count(model.condition["rgb"].blocks[0]) == 570_883
    assert count(model) == pytest.approx(20.7e6, rel=0.005)


VARIANTS = {
    "recommended": {},
    "rgb": {"modality": "rgb"},
    "depth": {"modality": "depth"},
    "no_condition": {"condition": "none"},
    "vit": {"condition": "vit"},
    "conv8": {"condition_stem": "conv8"},
    "conv4": {"condition_stem": "conv4"},
    "shared_condition": {"condition_shared": True},
    "attached": {"condition_detach": False},
    "no_skips": {"mamba_skips": False},
    "self_attention": {"mamba_attention": "self"},
    "se": {"mamba_attention": "se"},
    "concat": {"fusion_sum": "concat"},
    "addition": {"fusion": "addition"},
    "concat_fc": {"fusion": "concat_fc"},
    "linear_glu": {"fusion": "linear_glu"},
    "no_fusion": {"fusion": "none", "fusion_sum": "concat"},
    "second": {"fusion_query": "second"},
    "bidirectional": {"fusion_query": "bidirectional"},
    "between_modalities": {"fusion_query": "modality", "fusion_residual": False},
    "features": {"fusion_space": "features"},
    "separate": {"shared_projections": False},
    "separate_features": {"shared_projections": False, "fusion_space": "features"},
    "no_bottleneck": {"bottleneck": False},
    "shared_head": {"bottleneck_shared_head": True},
    "mask": {"neighbour_mask": 3},
    "depth_distance": {"depth_distance": True, "shared_projections": False},
    "depth_distance_alone": {"depth_distance": True, "modality": "depth"},
    "no_ibfm": {"fusion": "none", "bottleneck": False},
    "modality_dropout": {"modality_dropout": 0.1},
    "two_layers": {"layers": 2, "fusion_layers": (1, 2)},
    "local": {"attention_start": "local"},
    "gated": {"condition_gate": "residual"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_every_parameter(name):
    """No parameter is left without gradient (paper.md section 6, defects 2-4)."""
    reconstruction = 1.0 if name == "depth_distance" else 0.0
    config = tiny(LossConfig(reconstruction=reconstruction), **VARIANTS[name])
    model = build(config).train()
    images, features = inputs(config)
    torch.manual_seed(1)  # with modality dropout: a draw that keeps some depth
    output = model(images, features)
    assert output.reconstruction.shape == (BATCH, CHANNELS, GRID, GRID)
    assert output.anomaly_map.shape == (BATCH, SIDE, SIDE)
    total, _ = objective(output, torch.arange(BATCH), config.loss)
    total.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias shifts all scores of a query alike, so softmax cancels it: its gradient is zero by nature.
    assert [n for n in without if not n.endswith("key.bias")] == []
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", presets.NAMES)
def test_presets_train_every_parameter(name):
    preset = presets.get(name)
    small = {"dim": 16, "num_heads": 4, "ffn_dim": 32, "mamba_state": 4, "bottleneck_dim": 8}
    config = dataclasses.replace(
        preset, data=DataConfig(image_size=SIDE), model=dataclasses.replace(preset.model, **small)
    )
    model = build(config).train()
    total, _ = objective(model(*inputs(config)), torch.arange(BATCH), config.loss)
    total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_decoder_outputs_are_the_layers_in_order():
    """Four outputs, entry i = final norm of layer i (paper.md section 6, defect 3)."""
    config = tiny().model
    torch.manual_seed(0)
    network = Reconstruction(config, GRID).eval()
    raw = []
    for layer in network.decoder:
        layer.register_forward_hook(lambda module, args, output: raw.append(output))
    outputs = network(torch.randn(2, GRID * GRID, 16), None)
    assert len(outputs) == len(raw) == 4
    for output, layer_output in zip(outputs, raw):
        torch.testing.assert_close(output, F.layer_norm(layer_output, (16,)))


def test_first_decoder_layer_reads_the_memory_twice():
    config = tiny().model
    torch.manual_seed(0)
    network = Reconstruction(config, GRID).eval()
    seen = []
    network.decoder[0].register_forward_hook(lambda module, args, output: seen.append(args))
    network(torch.randn(2, GRID * GRID, 16), None)
    assert torch.equal(seen[0][0], seen[0][1])


def test_object_aware_attention_modulates_queries_only():
    """E6: the condition multiplies (x + pos) of the query; ones change nothing, keys and values stay."""
    torch.manual_seed(0)
    layer = EncoderLayer(tiny().model).eval()
    x, position = torch.randn(2, 16, 16), torch.randn(16, 16)
    condition = torch.randn(2, 16, 16)
    calls = []
    layer.attention.register_forward_hook(lambda module, args, output: calls.append(args))
    plain, ones = layer(x, position, None, None), layer(x, position, torch.ones_like(x), None)
    layer(x, position, condition, None)
    torch.testing.assert_close(plain, ones)
    query, key, value, _ = calls[-1]
    torch.testing.assert_close(query, (x + position) * condition)
    torch.testing.assert_close(key, x + position)
    torch.testing.assert_close(value, x)


def test_residual_gate_starts_without_effect():
    torch.manual_seed(0)
    layer = EncoderLayer(tiny(condition_gate="residual").model).eval()
    x, position, condition = torch.randn(2, 16, 16), torch.randn(16, 16), torch.randn(2, 16, 16)
    assert torch.equal(layer(x, position, condition, None), layer(x, position, None, None))
    queries = []
    layer.attention.register_forward_hook(lambda module, args, output: queries.append(args[0]))
    with torch.no_grad():
        layer.modulate.gate.fill_(0.5)
    layer(x, position, condition, None)
    torch.testing.assert_close(queries[0], (x + position) * (1 + 0.5 * condition))


@pytest.mark.parametrize("start", ["xavier", "local"])
def test_where_attention_looks_at_first(start):
    """Share of the memory attention of decoder queries that falls on the 7 x 7 cells around their own."""
    config = dataclasses.replace(tiny(attention_start=start, dim=128), data=DataConfig(image_size=224))
    network = build(config).reconstruction["rgb"]
    attention, layer = network.decoder[0].memory_attention, network.decoder[0]
    position = network.position()
    query, key = attention.query(layer.query + position), attention.key(position)
    scores = torch.einsum("qhe,khe->hqk", query.unflatten(1, (4, -1)), key.unflatten(1, (4, -1)))
    weights = (scores / math.sqrt(32)).softmax(-1)
    near = (weights * neighbour_mask(14, 7).logical_not()).sum(-1).mean()
    assert near > 0.45 if start == "local" else near < 0.25  # evenly spread: 0.19


def test_position_embedding_knows_row_and_column():
    position = PositionEmbedding(GRID, 8)
    cells = position().reshape(GRID, GRID, 8)
    assert torch.equal(cells[2, :, :4], position.row[2].expand(GRID, 4))
    assert torch.equal(cells[:, 3, 4:], position.column[3].expand(GRID, 4))


def test_neighbour_mask():
    mask = neighbour_mask(5, 3).reshape(5, 5, 5, 5)
    blocked = ~mask[2, 2]
    assert blocked.sum() == 9
    assert blocked[1:4, 1:4].all()
    assert (~mask[0, 0]).sum() == 4


@pytest.mark.parametrize("skips", [True, False])
def test_mamba_block_wiring(skips):
    """E3-E5: the second skip starts after the norm, the convolution reads the raw input."""
    torch.manual_seed(0)
    block = MambaBlock(tiny(mamba_skips=skips).model)
    x = torch.randn(2, 4, 4, 16)
    scanned = block.essm(x)
    v = block.norm(x + scanned if skips else scanned)
    expected = block.attention(v) + block.conv(x) + (v if skips else 0)
    torch.testing.assert_close(block(x), expected)


def test_eca_gates_channels_by_neighbouring_means():
    attention = EfficientChannelAttention()
    x = torch.randn(1, 3, 3, 6)
    mean = F.pad(x.mean((1, 2))[0], (1, 1))
    gate = torch.sigmoid(
        torch.stack([(mean[i : i + 3] * attention.conv.weight[0, 0]).sum() for i in range(6)])
    )
    torch.testing.assert_close(attention(x), x * gate)


@pytest.mark.parametrize("stem", ["patch16", "conv8", "conv4"])
def test_condition_maps_are_on_the_token_grid(stem):
    branch = ConditionBranch(tiny(condition_stem=stem).model, CLASSES)
    maps, logits = branch(torch.rand(2, 3, SIDE, SIDE))
    assert [tuple(m.shape) for m in maps] == [(2, GRID * GRID, 16)] * 4
    assert logits.shape == (2, CLASSES)


def test_condition_blocks_differ():
    """Each block is applied once more than the one before (paper.md section 6, defect 2)."""
    maps, _ = ConditionBranch(tiny().model, CLASSES)(torch.rand(1, 3, SIDE, SIDE))
    assert all(not torch.allclose(a, b) for i, a in enumerate(maps) for b in maps[:i])


@pytest.mark.parametrize("detach", [True, False])
def test_condition_branch_learns_from_its_class_loss_only_if_detached(detach):
    config = tiny(condition_detach=detach)
    model = build(config)
    model(*inputs(config)).reconstruction.square().sum().backward()
    gradients = [p.grad for p in model.condition.parameters()]
    assert all(g is None for g in gradients) == detach


def test_depth_reaches_the_output_by_its_own_path():
    """Regression test for the released code, which fed RGB features to the depth branch (defect 1)."""
    config = tiny()
    model = build(config).eval()
    images, features = inputs(config)
    before = model(images, features)
    after = model(images, {**features, "depth": features["depth"] + 1})
    assert torch.equal(before.decoder["rgb"][-1], after.decoder["rgb"][-1])
    assert not torch.allclose(before.decoder["depth"][0], after.decoder["depth"][0])
    assert not torch.allclose(before.reconstruction, after.reconstruction)
    assert torch.equal(before.reference, features["rgb"])
    image_only = model({**images, "depth": 1 - images["depth"]}, features)
    assert not torch.allclose(before.class_logits["depth"], image_only.class_logits["depth"])
    assert torch.equal(before.class_logits["rgb"], image_only.class_logits["rgb"])


def test_modalities_are_not_tied():
    """Swapping the inputs is not the same as swapping the outputs: each modality has its own network."""
    config = tiny()
    model = build(config).eval()
    images, features = inputs(config)
    same = model(
        {"rgb": images["rgb"], "depth": images["rgb"]}, {"rgb": features["rgb"], "depth": features["rgb"]}
    )
    assert not torch.allclose(same.decoder["rgb"][0], same.decoder["depth"][0])


def test_jitter_only_in_training_with_the_papers_magnitude():
    """RMS of the noise per element = 20 ||f|| / C (paper.md section 7)."""
    torch.manual_seed(0)
    jitter = FeatureJitter(20.0)
    features = torch.randn(8, 272, 14, 14) * torch.rand(8, 1, 14, 14)
    assert torch.equal(jitter.eval()(features), features)
    noise = jitter.train()(features) - features
    expected = 20 * features.norm(dim=1) / 272
    torch.testing.assert_close(
        noise.square().mean(1).sqrt() / expected, torch.ones(8, 14, 14), rtol=0, atol=0.25
    )
    ratio = noise / expected.unsqueeze(1)
    assert ratio.square().mean().sqrt() == pytest.approx(1, abs=0.01)
    assert ratio.mean() == pytest.approx(0, abs=0.01)


def test_jitter_does_not_touch_the_target():
    config = tiny()
    model = build(config).train()
    images, features = inputs(config)
    output = model(images, features)
    assert torch.equal(output.reference, features["rgb"])


def test_evaluation_is_deterministic():
    config = tiny()
    model = build(config).eval()
    first, second = model(*inputs(config)), model(*inputs(config))
    assert torch.equal(first.anomaly_map, second.anomaly_map)


def test_images_of_a_batch_do_not_mix():
    config = tiny()
    model = build(config).eval()
    images, features = inputs(config)
    whole = model(images, features)
    one = model({m: x[1:2] for m, x in images.items()}, {m: x[1:2] for m, x in features.items()})
    torch.testing.assert_close(whole.anomaly_map[1:2], one.anomaly_map)
    torch.testing.assert_close(whole.score[1:2], one.score)


def test_bottleneck():
    """E9 and A11: two linear maps around ReLU; heads on token means."""
    torch.manual_seed(0)
    module = InformationBottleneck(16, 8, CLASSES, dropout=0.1, shared_head=False).eval()
    fused = torch.randn(2, 9, 16)
    narrowed, fused_logits, logits = module(fused)
    first, last = module.narrow[0], module.widen
    expected = F.relu(fused @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(narrowed, expected)
    torch.testing.assert_close(logits, module.head(expected.mean(1)))
    torch.testing.assert_close(fused_logits, module.fused_head(fused.mean(1)))


def test_map_is_distance_and_score_its_largest_window():
    reconstruction, reference = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    reference[1, :, 3, 0] = torch.tensor([2.0, 3.0, 6.0])
    anomaly_map, score = discriminate(reconstruction, reference, size=64, score="max", pool=16)
    assert anomaly_map[0].abs().max() == 0
    assert anomaly_map[1, 63, 0] == pytest.approx(7)
    assert anomaly_map[1, 0, 63] == 0
    windows = anomaly_map[1].unfold(0, 16, 1).unfold(1, 16, 1).mean((2, 3))
    assert score[1].item() == pytest.approx(windows.max().item())
    for kind, value in (("std", anomaly_map[1].std()), ("mean", anomaly_map[1].mean())):
        _, score = discriminate(reconstruction, reference, size=64, score=kind, pool=16)
        assert score[1].item() == pytest.approx(value.item())


def test_depth_distance_adds_to_the_map():
    config = tiny(depth_distance=True)
    model = build(config).eval()
    images, features = inputs(config)
    output = model(images, features)
    distance = (output.reconstruction - features["rgb"]).square().sum(1)
    distance = distance + (output.branch_reconstruction["depth"] - features["depth"]).square().sum(1)
    corner = output.anomaly_map[:, 0, 0]
    torch.testing.assert_close(corner, distance[:, 0, 0].sqrt())


def test_depth_may_be_missing_only_if_trained_for_it():
    for chance in (0.0, 0.3):
        config = tiny(modality_dropout=chance)
        model = build(config)
        images, features = inputs(config)
        rgb = {"rgb": images["rgb"]}, {"rgb": features["rgb"]}
        if chance:
            output = model.eval()(*rgb)
            assert list(output.class_logits) == ["rgb"]
            assert output.anomaly_map.isfinite().all()
        else:
            with pytest.raises(ValueError, match="modality_dropout"):
                model.eval()(*rgb)
        with pytest.raises(ValueError, match="lacks 'depth'"):
            model.train()(*rgb)
        with pytest.raises(ValueError, match="lacks 'rgb'"):
            model.eval()({"depth": images["depth"]}, {"depth": features["depth"]})


def test_modality_dropout_leaves_depth_out_sample_by_sample():
    config = tiny(modality_dropout=0.5, fusion="none", bottleneck=False, dropout=0.0, jitter_scale=0.0)
    model = build(config).train()
    images, features = inputs(config, batch=16)
    reconstruction = model(images, features).reconstruction
    model.eval()
    with_depth = model(images, features).reconstruction
    without = model({"rgb": images["rgb"]}, {"rgb": features["rgb"]}).reconstruction
    for both, alone, trained in zip(with_depth, without, reconstruction):
        assert torch.allclose(trained, both, atol=1e-5) != torch.allclose(trained, alone, atol=1e-5)
    kept = sum(torch.allclose(t, b, atol=1e-5) for t, b in zip(reconstruction, with_depth))
    assert 0 < kept < 16


def test_bad_inputs():
    config = tiny()
    model = build(config)
    images, features = inputs(config)
    with pytest.raises(ValueError, match=r"features\['rgb'\] has shape"):
        model(images, {**features, "rgb": features["rgb"][:, 1:]})
    with pytest.raises(ValueError, match="num_classes = 0"):
        build_model(config, 0, CHANNELS)
    with pytest.raises(ValueError, match="divisor of the backbone's 30 channels"):
        build_model(tiny(fusion_space="features"), CLASSES, 30)


def test_bfloat16_autocast():
    config = tiny()
    model = build(config)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = objective(model(*inputs(config)), torch.arange(BATCH), config.loss)
    total.backward()
    assert math.isfinite(total.item())
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_golden_losses():
    """Three seeded steps without noise; a refactoring must not change them."""
    config = tiny(dropout=0.0, bottleneck_dropout=0.0, jitter_scale=0.0)
    model = build(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        total, _ = objective(model(*inputs(config, seed)), torch.arange(BATCH), config.loss)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        losses.append(total.item())
    assert losses == pytest.approx([9.811964, 7.975735, 8.117257], rel=1e-4)
