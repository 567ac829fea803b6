"""Prediction: the scores of evaluation, thresholds, pictures, and images that cannot be read."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from iumad.cli import main
from iumad.data import open_dataset
from iumad.engine.distributed import World
from iumad.engine.runner import Machine, Run, prepare_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data, cache_root):
    from iumad.config import apply_overrides
    from iumad.presets import get

    root = tmp_path_factory.mktemp("trained") / "run"
    tiny = ["image_size=64"]
    overrides = [
        f"data.dataset={tiny_data}".replace("train=6", "train=12"),
        *(f"data.{item}" for item in tiny),
    ]
    overrides += ["backbone.name=random:lite0", "model.dim=16", "model.num_heads=2", "model.layers=2"]
    overrides += ["model.ffn_dim=32", "model.mamba_state=4", "model.bottleneck_dim=8"]
    overrides += [
        "model.fusion_layers=[1, 2]",
        "train.epochs=2",
        "train.increment_epochs=1",
        "protocol.name=2-1",
    ]
    overrides += ["model.modality_dropout=0.3"]
    prepare_run(root, apply_overrides(get("small"), overrides))
    Run(root, Machine(torch.device("cpu"), World(), cache_root / "features", quiet=True)).execute()
    return root


@pytest.fixture
def samples(trained):
    settings = json.loads((trained / "config.json").read_text())
    return open_dataset(settings["data"]).select(cls=settings["classes"][0], split="test")


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_scores_are_those_of_the_evaluation(trained, samples, capsys, tmp_path):
    sample = next(s for s in samples if s.is_good)
    folder, depth = sample.rgb.parent, sample.depth.parent
    assert (
        main(["predict", str(trained), str(folder), "--depth", str(depth), "--out", str(tmp_path / "maps")])
        == 0
    )
    found = lines(capsys.readouterr().out)
    results = json.loads((trained / "results.json").read_text())
    scores = results["steps"][-1]["scores"][sample.cls]["good"]
    # One image at a time here, batches there: the same numbers up to the order of additions.
    assert sorted(one["score"] for one in found) == pytest.approx(sorted(scores), rel=1e-4)
    for one in found:
        threshold = results["thresholds"][one["predicted_class"]]["value"]
        assert one["threshold"] == pytest.approx(threshold)
        assert one["is_anomalous"] == (one["score"] > one["threshold"])
        with Image.open(one["map"]) as picture:
            assert picture.size == (3 * 64 + 2 * 6, 64)
    assert (
        main(["predict", str(trained), str(sample.rgb), "--depth", str(sample.depth), "--class", sample.cls])
        == 0
    )
    assert lines(capsys.readouterr().out)[0]["predicted_class"] == sample.cls


def test_depth_may_be_missing_if_trained_for_it(trained, samples, capsys):
    assert main(["predict", str(trained), str(samples[0].rgb), "--json"]) == 0
    image = json.loads(capsys.readouterr().out)["images"][0]
    assert np.isfinite(image["score"])


def test_unreadable_image_is_reported_and_the_others_go_on(trained, samples, capsys, tmp_path):
    shutil.copy(samples[0].rgb, tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(samples[0].rgb.read_bytes()[:500])
    shutil.copy(samples[1].rgb, tmp_path / "c.png")
    assert main(["predict", str(trained), str(tmp_path)]) == 1
    found = lines(capsys.readouterr().out)
    assert ["error" in one for one in found] == [False, True, False]
    assert "b.png" in found[1]["error"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{image}", "--class", "zebra"], "--class is 'zebra'"),
        (["{tmp}"], "holds no image"),
        (["{tmp}/absent.png"], "no such file or folder"),
        (["{image}", "--depth", "{tmp}"], "has no depth image"),
        (["{image}", "{image}", "--depth", "{image}"], "expected a folder"),
    ],
)
def test_mistakes(trained, samples, capsys, tmp_path, argv, words):
    filled = [part.format(image=samples[0].rgb, tmp=tmp_path) for part in argv]
    assert main(["predict", str(trained), *filled]) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_checkpoint_made_with_another_backbone_is_refused(trained, samples, capsys, tmp_path):
    from iumad.engine import checkpoint

    path = tmp_path / "other.safetensors"
    content = checkpoint.load(trained / "step_1.safetensors", "model")
    content["inputs"] = content["inputs"].replace("random", "other")
    checkpoint.save(path, "model", content)
    assert main(["predict", str(path), str(samples[0].rgb)]) == 1
    assert "other.safetensors belongs to inputs" in capsys.readouterr().err
