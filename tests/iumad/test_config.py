"""Config: round trips, overrides, and errors that name the field; presets."""

import json

import pytest

from iumad import presets
from iumad.config import Config, ModelConfig, ProtocolConfig, TrainConfig, apply_overrides, load


@pytest.mark.parametrize("name", presets.NAMES)
def test_presets_round_trip_through_json(name):
    config = presets.get(name)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_recommended_is_the_default():
    assert presets.get("recommended") == Config()


def test_presets_differ_as_the_paper_says():
    strict = presets.get("paper_strict")
    assert not strict.model.fusion_residual
    assert strict.loss.bottleneck_class == 0
    assert strict.protocol.update_rule == "plain"
    assert (strict.train.epochs, strict.train.increment_epochs) == (1000, 800)
    assert (strict.loss.rgb_class, strict.loss.depth_class, strict.loss.fusion, strict.loss.bottleneck) == (
        1,
    ) * 4
    assert presets.get("no_mamba").model.condition == "none"
    assert presets.get("depth").model.modalities == ("depth",)
    assert presets.get("uniad").model.modalities == ("rgb",)
    assert {
        presets.get(f"fusion_{kind}").model.fusion for kind in ("addition", "concat_fc", "linear_glu")
    } == {
        "addition",
        "concat_fc",
        "linear_glu",
    }


def test_unknown_preset_suggests():
    with pytest.raises(ValueError, match="did you mean small"):
        presets.get("smal")


def test_toml_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[train]\nepochs = 3\nlr = 1\n[protocol]\nname = "2-1"\nclass_order = ["b", "a"]\n')
    config = load(path)
    assert config.train.epochs == 3
    assert isinstance(config.train.lr, float)
    assert config.protocol == ProtocolConfig(name="2-1", class_order=("b", "a"))
    assert config.model == ModelConfig()


@pytest.mark.parametrize("text", ["[train]\nepochs = -1", "[trian]\nepochs = 1", "[train\n", "train = 3"])
def test_toml_errors_name_the_file(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.toml: "):
        load(path)


def test_overrides():
    config = apply_overrides(
        Config(),
        [
            "train.epochs=20",
            "train.autocast = true",
            "protocol.name=9-1",
            "model.fusion_layers=[1, 4]",
            'data.dataset="folder:/x=y"',
            "backbone.weights_path=a b.pth",
        ],
    )
    assert config.train.epochs == 20
    assert config.train.autocast is True
    assert config.protocol.name == "9-1"
    assert config.model.fusion_layers == (1, 4)
    assert config.data.dataset == "folder:/x=y"
    assert config.backbone.weights_path == "a b.pth"
    assert apply_overrides(config, ["backbone.weights_path=none"]).backbone.weights_path is None
    assert apply_overrides(config, ["model.condition=none"]).model.condition == "none"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.epoch=2", r"unknown config key train\.epoch \(did you mean epochs\?\)"),
        ("trian.epochs=2", r"unknown config section trian \(did you mean train\?\)"),
        ("train.epochs", "expected SECTION.KEY=VALUE"),
        ("epochs=3", "expected SECTION.KEY=VALUE"),
        ("train.epochs=2.5", r"train\.epochs = 2\.5: expected a whole number"),
        ("train.epochs=true", r"train\.epochs = True: expected a whole number"),
        ("train.epochs=0", r"train\.epochs = 0: expected a value >= 1"),
        ("train.lr=nan", r"train\.lr = nan: expected a value >= 0"),
        ("train.lr=fast", r"train\.lr = 'fast': expected a number"),
        ("train.autocast=1", r"train\.autocast = 1: expected true or false"),
        ("model.dropout=1.5", r"model\.dropout = 1\.5: expected a value between 0\.0 and 1\.0"),
        ("model.fusion=add", r"model\.fusion = 'add': expected one of cross_attention, addition"),
        ("model.num_heads=7", r"model\.num_heads = 7: expected a divisor of model\.dim = 256"),
        ("model.fusion_layers=[1, 9]", r"model\.fusion_layers = \(1, 9\)"),
        ("model.fusion_layers=[1]", r"model\.fusion_layers = \(1,\): expected 2 values"),
        ("model.neighbour_mask=4", r"model\.neighbour_mask = 4"),
        ("data.image_size=225", r"data\.image_size = 225: expected a multiple of 16"),
        ("protocol.name=six", r"protocol\.name = 'six'"),
        ('protocol.class_order=["a", "a"]', r"protocol\.class_order"),
        ("protocol.class_order=[1]", r"protocol\.class_order = 1: expected a string"),
        ("backbone.weights_path=3", r"backbone\.weights_path = 3: expected a string"),
    ],
)
def test_bad_values_name_the_field(assignment, message):
    with pytest.raises(ValueError, match=message):
        apply_overrides(Config(), [assignment])


def test_direct_construction_is_checked_too():
    with pytest.raises(ValueError, match=r"train\.batch_size = 0"):
        TrainConfig(batch_size=0)
    with pytest.raises(ValueError, match=r"model\.modality_dropout"):
        ModelConfig(modality="rgb", modality_dropout=0.5)


def test_frozen():
    with pytest.raises(AttributeError):
        Config().train.epochs = 3
