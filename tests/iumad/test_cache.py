"""The feature cache: the same bits as without it, computed once, whole after a crash."""

import dataclasses
import errno
import os

import pytest
import torch

from iumad.backbone import build_backbone
from iumad.data import open_dataset
from iumad.engine.cache import FeatureCache, LiveFeatures
from iumad.engine.inputs import InputPipeline


@pytest.fixture
def pipeline(tiny_config):
    config = tiny_config()
    return InputPipeline(config, build_backbone(config.backbone))


@pytest.fixture
def samples(tiny_data):
    return open_dataset(tiny_data).samples[:10]


def same(left, right):
    pairs = [(left.images, right.images), (left.features, right.features)]
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


def test_cached_inputs_are_the_bits_of_fresh_ones(tmp_path, pipeline, samples):
    cache, live = FeatureCache(tmp_path, pipeline), LiveFeatures(pipeline)
    cache.ensure(samples, "", quiet=True)
    chosen = [samples[7], samples[0], samples[7]]
    batch = cache.batch(chosen)
    assert same(batch, live.batch(chosen))
    assert batch.images["rgb"].shape == batch.images["depth"].shape == (3, 3, 64, 64)
    assert batch.features["rgb"].shape == (3, pipeline.channels, 4, 4)


def test_nothing_is_computed_twice(tmp_path, pipeline, samples):
    first = FeatureCache(tmp_path, pipeline)
    first.ensure(samples[:6], "", quiet=True)
    first.ensure(samples, "", quiet=True)
    assert first.computed == 10
    second = FeatureCache(tmp_path, pipeline)
    second.ensure(samples, "", quiet=True)
    assert second.computed == 0
    assert same(first.batch(samples), second.batch(samples))


def test_key_is_content_not_path(tmp_path, pipeline, samples):
    cache = FeatureCache(tmp_path, pipeline)
    cache.ensure(samples[:1], "", quiet=True)
    original = samples[0]
    moved = tmp_path / "moved.png"
    moved.write_bytes(original.rgb.read_bytes())
    cache.ensure([dataclasses.replace(original, id="moved", rgb=moved)], "", quiet=True)
    assert cache.computed == 1
    other = samples[1]
    moved.write_bytes(other.rgb.read_bytes())  # same path, other content: must not be found
    fresh = FeatureCache(tmp_path, pipeline)
    changed = dataclasses.replace(original, id="changed", rgb=moved)
    fresh.ensure([changed], "", quiet=True)
    assert fresh.computed == 1
    assert same(fresh.batch([changed]), LiveFeatures(pipeline).batch([changed]))


def test_other_preprocessing_or_backbone_is_another_folder(tmp_path, tiny_config, pipeline):
    folders = {FeatureCache(tmp_path, pipeline).folder}
    for override in ("data.image_size=32", "model.modality=rgb", "backbone.name=random:lite1"):
        config = tiny_config(override)
        other = InputPipeline(config, build_backbone(config.backbone))
        folders.add(FeatureCache(tmp_path, other).folder)
    assert len(folders) == 4


@pytest.mark.parametrize("damage", ["records", "index", "both"])
def test_crash_between_and_inside_writes(tmp_path, pipeline, samples, damage):
    cache = FeatureCache(tmp_path, pipeline)
    cache.ensure(samples, "", quiet=True)
    expected = cache.batch(samples)
    for name in ("records.bin", "index.txt"):
        if damage in (name.split(".")[0], "both"):
            path = cache.folder / name
            os.truncate(path, path.stat().st_size - 7)
    again = FeatureCache(tmp_path, pipeline)
    again.ensure(samples, "", quiet=True)
    assert 0 < again.computed < len(samples)
    assert same(again.batch(samples), expected)


def test_full_disk_names_the_file_and_keeps_what_is_done(tmp_path, pipeline, samples, monkeypatch):
    cache = FeatureCache(tmp_path, pipeline)
    cache.ensure(samples[:3], "", quiet=True)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*records\.bin"):
        cache.ensure(samples, "", quiet=True)
    monkeypatch.undo()
    again = FeatureCache(tmp_path, pipeline)
    again.ensure(samples, "", quiet=True)
    assert again.computed == 7
    assert same(again.batch(samples), LiveFeatures(pipeline).batch(samples))
