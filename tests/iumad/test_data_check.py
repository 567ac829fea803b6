"""`iumad data check`: each defect of a data set is planted and must be found, by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from iumad.data.check import check_dataset, run
from iumad.data.demo import DemoConfig, write_demo


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    config = DemoConfig(train=2, validation=0, good=1, per_defect=1, size=48, classes=("gear", "rope"))
    return write_demo(tmp_path_factory.mktemp("check") / "clean", config)


@pytest.fixture
def tree(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "tree")


def save(path, pixels):
    Image.fromarray(pixels).save(path)


def found(report, code):
    return [finding for finding in report.findings if finding.code == code]


def test_clean_set(tree):
    report = check_dataset(tree)
    assert report.ok
    assert report.findings == []
    assert report.modalities == ["rgb", "depth"]
    gear = report.classes["gear"]
    assert gear.counts["train"] == {"good": 2}
    assert gear.counts["test"]["good"] == 1
    assert sum(gear.counts["test"].values()) == 7
    assert gear.sizes == {"48 x 48": 9}
    assert 0 < gear.invalid_depth_mean <= gear.invalid_depth_max < 0.5
    text = str(report)
    assert "gear" in text
    assert "scratch 1" in text
    assert text.endswith("ok")


def plant_truncated(tree):
    path = tree / "gear/train/good/rgb/001.png"
    path.write_bytes(path.read_bytes()[:200])
    return path


def plant_unreadable_depth(tree):
    path = tree / "gear/train/good/depth/000.png"
    path.write_text("not an image")
    return path


def plant_missing_mask(tree):
    path = tree / "rope/test/dent/gt/000.png"
    path.unlink()
    return path.parents[1]


def plant_missing_depth(tree):
    path = tree / "rope/train/good/depth/001.png"
    path.unlink()
    return path.parents[1]


def plant_empty_mask(tree):
    path = tree / "rope/test/stain/gt/000.png"
    save(path, np.zeros((48, 48), np.uint8))
    return path


def plant_mask_on_good(tree):
    path = tree / "rope/test/good/gt/000.png"
    save(path, np.eye(48, dtype=np.uint8) * 253)
    return path


def plant_size_mismatch(tree):
    path = tree / "gear/test/dent/depth/000.png"
    save(path, np.ones((50, 48), np.uint16))
    return path


def plant_leak(tree):
    """The same pixels, saved again with other compression: other bytes."""
    source, copy = tree / "gear/test/good/rgb/000.png", tree / "gear/train/good/rgb/000.png"
    Image.open(source).save(copy, compress_level=9)
    assert source.read_bytes() != copy.read_bytes()
    return "gear/train/good/0"


def plant_no_depth(tree):
    path = tree / "gear/train/good/depth/000.png"
    save(path, np.zeros((48, 48), np.uint16))
    return path


def plant_no_training(tree):
    shutil.rmtree(tree / "gear/train")
    return "gear"


def plant_empty_class(tree):
    (tree / "widget/train/good/rgb").mkdir(parents=True)
    return "widget"


ERRORS = [
    (plant_truncated, "unreadable file"),
    (plant_unreadable_depth, "unreadable file"),
    (plant_missing_mask, "layout"),
    (plant_missing_depth, "layout"),
    (plant_empty_mask, "odd mask"),
    (plant_mask_on_good, "odd mask"),
    (plant_size_mismatch, "size mismatch"),
    (plant_leak, "same image in train and test"),
    (plant_no_depth, "no depth"),
    (plant_no_training, "no training images"),
    (plant_empty_class, "empty class"),
]


@pytest.mark.parametrize(("plant", "code"), ERRORS, ids=[plant.__name__ for plant, _ in ERRORS])
def test_errors_are_found_and_named(tree, plant, code, capsys):
    culprit = plant(tree)
    report = check_dataset(f"folder:{tree}")
    assert not report.ok
    assert any(
        str(culprit) in finding.message and finding.level == "error" for finding in found(report, code)
    )
    assert run(str(tree)) == 1
    assert code in capsys.readouterr().out


def plant_twice(tree):
    shutil.copy(tree / "gear/train/good/rgb/000.png", tree / "gear/train/good/rgb/001.png")


def plant_twice_in_test(tree):
    shutil.copy(tree / "gear/test/dent/rgb/000.png", tree / "gear/test/bump/rgb/000.png")


def plant_no_defects(tree):
    for folder in (tree / "gear/test").iterdir():
        if folder.name != "good":
            shutil.rmtree(folder)


def plant_no_good_test(tree):
    shutil.rmtree(tree / "gear/test/good")


def plant_little_depth(tree):
    path = tree / "gear/train/good/depth/000.png"
    depth = np.array(Image.open(path))
    depth[:, :30] = 0
    save(path, depth)


def plant_full_mask(tree):
    save(tree / "rope/test/stain/gt/000.png", np.full((48, 48), 255, np.uint8))


def plant_defect_in_train(tree):
    shutil.copytree(tree / "gear/test/dent", tree / "gear/train/dent")
    shutil.rmtree(tree / "gear/test/dent")


def plant_misspelt_split(tree):
    (tree / "gear/trian/good/rgb").mkdir(parents=True)


def plant_rgb_only_class(tree):
    for folder in tree.glob("rope/*/*/depth"):
        shutil.rmtree(folder)


WARNINGS = [
    (plant_twice, "same image twice"),
    (plant_twice_in_test, "same image twice"),
    (plant_no_defects, "no defects"),
    (plant_no_good_test, "no good test images"),
    (plant_little_depth, "little depth"),
    (plant_full_mask, "odd mask"),
    (plant_defect_in_train, "defects in train"),
    (plant_misspelt_split, "ignored folder"),
    (plant_rgb_only_class, "modality not everywhere"),
]


@pytest.mark.parametrize(("plant", "code"), WARNINGS, ids=[plant.__name__ for plant, _ in WARNINGS])
def test_oddities_are_warnings(tree, plant, code):
    plant(tree)
    report = check_dataset(tree)
    assert report.ok, [finding for finding in report.findings if finding.level == "error"]
    assert [finding.level for finding in found(report, code)] == ["warning"]


def test_json_output_and_exit_codes(tree, tmp_path, capsys):
    assert run(str(tree), as_json=True) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["ok"] is True
    assert content["classes"]["gear"]["counts"]["train"] == {"good": 2}
    plant_truncated(tree)
    assert run(str(tree), as_json=True) == 1
    content = json.loads(capsys.readouterr().out)
    assert [finding["code"] for finding in content["findings"]] == ["unreadable file"]
    assert run(str(tmp_path / "nothing"), as_json=True) == 2
    assert "does not exist" in json.loads(capsys.readouterr().out)["error"]
    assert run("nothing:") == 2
    assert "error:" in capsys.readouterr().err
