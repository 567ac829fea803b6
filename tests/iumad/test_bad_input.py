"""What real data sets get wrong, through the whole program: one sentence, nothing lost."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from iumad.cli import main
from iumad.data import open_dataset


@pytest.fixture
def tree(tiny_data, tmp_path):
    """A private copy of the tiny data set as a folder."""
    sample = open_dataset(tiny_data).samples[0]
    shutil.copytree(sample.rgb.parents[4], tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def train(tree, tmp_path, tiny_config, cache_root):
    """Run ``iumad train`` on the tree; a function: more overrides -> exit code."""

    def run(*overrides):
        config = tiny_config(*overrides).to_dict()
        config["data"]["dataset"] = f"folder:{tree}"
        argv = ["train", "--out", str(tmp_path / "run"), "--cache", str(cache_root / "features")]
        for section, values in config.items():
            for key, value in values.items():
                argv += ["--set", f"{section}.{key}={'none' if value is None else json.dumps(value)}"]
        return main(argv)

    return run


def one(tree, pattern):
    return sorted(tree.glob(pattern))[0]


def test_truncated_image_is_named_and_the_run_goes_on_once_it_is_whole(tree, train, tmp_path, capsys):
    victim = sorted(tree.glob("*/train/good/rgb/*.png"))[-1]  # of the class that the last step learns
    whole = victim.read_bytes()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(victim)
    victim.write_bytes(victim.read_bytes()[:2000])
    assert train() == 1
    error = capsys.readouterr().err
    assert str(victim) in error
    assert "Traceback" not in error
    assert (tmp_path / "run" / "step_1.safetensors").exists()
    assert not (tmp_path / "run" / "step_2.safetensors").exists()
    victim.write_bytes(whole)
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_rgb_and_depth_of_different_sizes(tree, train, capsys):
    victim = one(tree, "*/train/good/rgb/*.png")
    Image.new("RGB", (50, 64)).save(victim)
    assert train() == 1
    assert "50 x 64" in capsys.readouterr().err


def test_class_without_defects_and_class_without_test_images(tree, train, tmp_path, capsys):
    first, second, _ = sorted(path for path in tree.iterdir() if path.is_dir())
    for kind in (first / "test").iterdir():
        if kind.name != "good":
            shutil.rmtree(kind)
    shutil.rmtree(second / "test")
    assert train("protocol.name=3-0") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    metrics = results["matrix"]["metrics"]
    assert metrics["i_auroc"][0][:2] == metrics["aupro_30"][0][:2] == [None, None]
    assert metrics["i_auroc"][0][2] is not None
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith(first.name))
    assert row.split()[1:] == ["-"] * 4
    assert "NaN" not in (tmp_path / "run" / "results.json").read_text()


def test_class_without_training_images(tree, train, capsys):
    first = sorted(path for path in tree.iterdir() if path.is_dir())[0]
    for path in first.glob("train/good/*/*.png"):
        path.unlink()
    assert train() == 1
    assert first.name in capsys.readouterr().err


def test_leak_in_the_folders(tree, train, capsys):
    stolen = one(tree, "*/test/*/rgb/*.png")
    target = one(tree, "*/train/good/rgb/*.png")
    shutil.copy(stolen, target)
    depth = stolen.parent.parent / "depth" / stolen.name
    shutil.copy(depth, target.parent.parent / "depth" / target.name)
    assert train() == 1
    assert "has the same content as test image" in capsys.readouterr().err


def test_autocast_trains(train, tmp_path):
    assert train("train.autocast=true", "protocol.name=joint") == 0
    losses = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in losses if line["event"] == "train")
