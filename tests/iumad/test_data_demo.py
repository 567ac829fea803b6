"""The procedural demo set: reproducible, well-formed, and hard in the way it claims to be."""

from __future__ import annotations

import numpy as np
import pytest

from iumad.data import DataError, open_dataset, read_sample
from iumad.data.demo import DEFECT_KINDS, DEMO_CLASSES, DemoConfig, render, write_demo

SMALL = DemoConfig(train=2, validation=1, good=1, per_defect=1, size=64)


def picture(cls="gear", kind="good", index=0, *, seed=0, split="test", size=128):
    return render(cls, kind, index, seed=seed, split=split, size=size)


def test_equal_arguments_give_equal_pictures():
    for kind in ("good", "dent", "missing_part"):
        for one, two in zip(picture(kind=kind), picture(kind=kind)):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("change", [{"seed": 1}, {"index": 1}, {"split": "train"}, {"cls": "tile"}])
def test_every_argument_matters(change):
    assert not np.array_equal(picture().rgb, picture(**change).rgb)
    assert not np.array_equal(picture().depth, picture(**change).depth)


@pytest.mark.parametrize("cls", DEMO_CLASSES)
@pytest.mark.parametrize("kind", ["good", *DEFECT_KINDS])
def test_pictures_are_well_formed(cls, kind):
    for index in range(2):
        rgb, depth, mask = picture(cls, kind, index)
        assert rgb.shape == (128, 128, 3)
        assert rgb.dtype == np.uint8
        assert 40 < rgb.mean() < 200, "neither black nor burnt out"
        assert rgb.std() > 12
        assert depth.dtype == np.uint16
        invalid = (depth == 0).mean()
        assert 0.001 < invalid < 0.25, "a real sensor has gaps, but sees most of the scene"
        assert 35000 < depth[depth > 0].min() < depth.max() < 45000, "around 400 mm, in 1/100 mm"
        if kind == "good":
            assert not mask.any()
        else:
            assert 10 <= mask.sum() < 0.25 * mask.size


def surface_changes(cls, kind, monkeypatch):
    """The mask, the change of height (mm) and of albedo that the defect made, per pixel."""
    from iumad.data.demo import scene

    seen = []
    original = scene._scene
    monkeypatch.setattr(scene, "_scene", lambda *args: seen.append(original(*args)) or seen[-1])
    mask = picture(cls, kind).mask
    sound, broken = seen[0], seen[-1]
    return mask, broken.height - sound.height, np.abs(broken.albedo - sound.albedo).max(axis=2)


@pytest.mark.parametrize("cls", DEMO_CLASSES)
@pytest.mark.parametrize("kind", DEFECT_KINDS)
def test_masks_are_exact_and_kinds_need_what_they_claim(cls, kind, monkeypatch):
    mask, height, albedo = surface_changes(cls, kind, monkeypatch)
    assert np.abs(height[~mask]).max() <= 0.2
    assert albedo[~mask].max() <= 0.02
    in_depth, in_colour = np.abs(height) > 0.2, albedo > 0.02
    np.testing.assert_array_equal(mask, in_depth | in_colour)
    if kind == "stain":
        assert not in_depth.any(), "colour only"
    if kind in ("dent", "bump"):
        assert not in_colour.any(), "depth only"
        assert (height[mask] < 0).all() if kind == "dent" else (height[mask] > 0).all()
    if kind in ("foreign_object", "missing_part"):
        assert in_depth.any(), "both"
        assert in_colour.any()


def test_set_on_disk(tmp_path):
    root = write_demo(tmp_path / "set", SMALL)
    catalogue = open_dataset(f"folder:{root}")
    assert catalogue.classes == tuple(sorted(DEMO_CLASSES))
    assert len(catalogue.classes) >= 4
    for cls in catalogue.classes:
        assert len(catalogue.training(cls, include_validation=True)) == 3
        assert {s.kind for s in catalogue.select(cls=cls, split="test")} == {"good", *DEFECT_KINDS}
    digests = [sample.digest() for sample in catalogue.samples]
    assert len(set(digests)) == len(digests)
    sample = catalogue.select(cls="rope", good=False)[0]
    expected = render("rope", sample.kind, 0, seed=0, split="test", size=64)
    raw = read_sample(sample)
    np.testing.assert_array_equal(raw.rgb, expected.rgb)
    np.testing.assert_array_equal(raw.depth, expected.depth)
    np.testing.assert_array_equal(raw.mask, expected.mask)


def test_rendered_once_into_the_cache(tmp_path):
    spec = "demo:train=1,validation=0,good=1,per_defect=0,size=48,classes=gear+rope"
    first = open_dataset(spec, cache_dir=tmp_path)
    assert first.name == "demo"
    assert first.classes == ("gear", "rope")
    stamp = first.samples[0].rgb.stat().st_mtime_ns
    assert open_dataset(spec, cache_dir=tmp_path).samples[0].rgb.stat().st_mtime_ns == stamp
    other = open_dataset(spec + ",seed=1", cache_dir=tmp_path)
    assert other.samples[0].digest() != first.samples[0].digest()
    assert len(list(tmp_path.iterdir())) == 2


def test_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    from iumad.data.demo import writing

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    calls = []
    monkeypatch.setattr(writing, "render", lambda *a, **k: calls.append(1) or render(*a, **k))
    monkeypatch.setattr(writing.Image.Image, "save", lambda *a, **k: full_disk() if len(calls) > 2 else None)
    with pytest.raises(DataError, match="No space left on device"):
        write_demo(tmp_path / "set", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_writing_errors(tmp_path):
    with pytest.raises(DataError, match="exists already"):
        write_demo(tmp_path, SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot create"):
        write_demo(tmp_path / "file" / "set", SMALL)
    with pytest.raises(ValueError, match="train is 0, expected at least 1"):
        DemoConfig(train=0)


def test_needs_no_download(monkeypatch):
    """The texture photographs ship inside scikit-image's wheel."""
    import skimage.data._fetchers as fetchers

    from iumad.data.demo.fields import _texture

    def no_network(*args, **kwargs):
        raise AssertionError("tried to download")

    if getattr(fetchers, "_image_fetcher", None) is not None:
        monkeypatch.setattr(fetchers._image_fetcher, "fetch", no_network)
    _texture.cache_clear()
    for name in ("brick", "grass", "gravel"):
        texture = _texture(name)
        assert texture.shape == (512, 512)
        assert abs(float(texture.mean())) < 1e-3
