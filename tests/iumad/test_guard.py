"""The leak guard against planted leaks."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from iumad.data import open_dataset
from iumad.data.catalogue import Catalogue, Sample
from iumad.incremental.guard import LeakError, LeakGuard
from iumad.incremental.protocol import parse_protocol


def make_catalogue(tmp_path, *, train=8, validation=0, test=3):
    """Three classes of files with different bytes; nothing decodes them."""
    samples = []
    for cls in "abc":
        for split, count in (("train", train), ("validation", validation), ("test", test)):
            for index in range(count):
                path = tmp_path / cls / split / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{cls}{split}{index}")
                samples.append(Sample(id=f"{cls}/{split}/{index}", cls=cls, split=split, rgb=path))
    return Catalogue("planted", ("a", "b", "c"), tuple(samples))


def make_guard(catalogue, *, include_validation=True, holdout=0.1):
    return LeakGuard(
        catalogue,
        parse_protocol("2-1", catalogue.classes),
        include_validation=include_validation,
        holdout=holdout,
        digest=Sample.digest,
    )


def test_a_step_offers_its_own_training_images_only(tmp_path):
    guard = make_guard(make_catalogue(tmp_path, train=20))
    assert {(s.cls, s.split) for s in guard.training(0)} == {("a", "train"), ("b", "train")}
    assert {(s.cls, s.split) for s in guard.training(1)} == {("c", "train")}
    for cls in "abc":
        kept = guard.calibration(cls)
        assert len(kept) == 3
        assert not set(kept) & {*guard.training(0), *guard.training(1)}


def test_reading_anything_else_raises(tmp_path):
    catalogue = make_catalogue(tmp_path)
    guard = make_guard(catalogue)
    access = guard.open(0)
    access.check(guard.training(0))
    with pytest.raises(LeakError, match=r"step 0 must not see the train image c/train/\d of class c"):
        access.check(guard.training(1))
    with pytest.raises(LeakError, match="test image a/test/0"):
        access.check(catalogue.select(cls="a", split="test"))
    with pytest.raises(LeakError, match="train image"):
        access.check(guard.calibration("a"))


def test_no_replay_once_a_step_is_over(tmp_path):
    guard = make_guard(make_catalogue(tmp_path))
    access = guard.open(0)
    access.close()
    with pytest.raises(LeakError, match="step 0 is over"):
        access.check(guard.training(0))


def test_validation_split_calibrates_unless_it_is_trained_on(tmp_path):
    catalogue = make_catalogue(tmp_path, train=20, validation=4)
    separate = make_guard(catalogue, include_validation=False)
    assert {s.split for s in separate.calibration("a")} == {"validation"}
    assert len(separate.training(1)) == 20
    joined = make_guard(catalogue)
    assert len(joined.training(1)) + len(joined.calibration("c")) == 24
    assert make_guard(catalogue, holdout=0).calibration("a") == []


def test_training_list_that_names_a_test_file_stops_the_run(tmp_path):
    catalogue = make_catalogue(tmp_path)
    victim = catalogue.select(cls="c", split="test")[0]
    planted = dataclasses.replace(victim, id="c/train/planted", split="train")
    with pytest.raises(LeakError, match="is the same file as test image"):
        make_guard(Catalogue("planted", catalogue.classes, (*catalogue.samples, planted)))


def test_link_to_a_test_file_stops_the_run(tmp_path):
    catalogue = make_catalogue(tmp_path)
    link = tmp_path / "innocent.png"
    link.symlink_to(catalogue.select(cls="a", split="test")[1].rgb)
    planted = Sample(id="x", cls="b", split="train", rgb=link)
    with pytest.raises(LeakError, match=r"innocent\.png is the same file"):
        make_guard(Catalogue("planted", catalogue.classes, (*catalogue.samples, planted)))


def test_copy_of_a_test_file_stops_the_run(tmp_path):
    catalogue = make_catalogue(tmp_path)
    copy = tmp_path / "copy.png"
    shutil.copy(catalogue.select(cls="a", split="test")[1].rgb, copy)
    planted = Sample(id="x", cls="a", split="train", rgb=copy)
    with pytest.raises(LeakError, match=r"copy\.png has the same content as test image"):
        make_guard(Catalogue("planted", catalogue.classes, (*catalogue.samples, planted)))


def test_class_without_training_images_is_named(tmp_path):
    catalogue = make_catalogue(tmp_path)
    kept = tuple(s for s in catalogue.samples if (s.cls, s.split) != ("b", "train"))
    with pytest.raises(ValueError, match="class b of planted has no normal training image"):
        make_guard(Catalogue("planted", catalogue.classes, kept))


def test_manifest_with_the_leak_of_the_released_lists(tmp_path, tiny_data):
    """The released Eyecandies increments train on test images (paper.md 1.4); a manifest can say so."""
    catalogue = open_dataset(tiny_data)
    lines = ["class,split,kind,rgb,depth,mask"]
    for sample in catalogue.samples:
        split = "train" if sample.is_good else sample.split
        columns = [
            sample.cls,
            split,
            sample.kind,
            *(str(p or "") for p in (sample.rgb, sample.depth, sample.mask)),
        ]
        lines.append(",".join(columns))
    for sample in catalogue.select(split="test"):
        if sample.is_good:
            columns = [
                sample.cls,
                "test",
                sample.kind,
                str(sample.rgb),
                str(sample.depth),
                str(sample.mask or ""),
            ]
            lines.append(",".join(columns))
    manifest = Path(tmp_path / "leak.csv")
    manifest.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="same"):
        make_guard(open_dataset(f"manifest:{manifest}"))
