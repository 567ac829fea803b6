"""Decoding and preprocessing: range, sign, validity, and errors that name the file."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from iumad.data import DataError, RawSample, Sample, prepare, read_sample
from iumad.data.reading import read_depth, read_mask, read_rgb


def depth_sample(path):
    return Sample(id="x", cls="c", split="train", depth=path)


def raw_depth(depth, valid=None, xyz=None):
    depth = np.asarray(depth, dtype=np.float32)
    valid = depth != 0 if valid is None else valid
    return RawSample(rgb=None, depth=depth, valid=valid, xyz=xyz, mask=np.zeros(depth.shape, bool))


@pytest.mark.parametrize("cut", [0, 10, 60, 0.5, 0.95])
@pytest.mark.parametrize("role", ["rgb.png", "rgb.jpg", "depth.png", "depth.tiff", "mask.png"])
def test_truncated_files_are_named(tmp_path, role, cut):
    rng = np.random.default_rng(0)
    path = tmp_path / role
    if role.endswith("tiff"):
        tifffile.imwrite(path, rng.normal(size=(40, 40, 3)).astype(np.float32), photometric="rgb")
    elif role.startswith("depth"):
        Image.fromarray(rng.integers(1, 65535, (40, 40), dtype=np.uint16)).save(path)
    elif role.startswith("mask"):
        Image.fromarray(rng.integers(0, 255, (40, 40), dtype=np.uint8)).save(path)
    else:
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content)) if isinstance(cut, float) else cut])
    reader = {"rgb": read_rgb, "depth": read_depth, "mask": read_mask}[path.stem]
    with pytest.raises(DataError, match=f"{path}"):
        reader(path)


@pytest.mark.parametrize("reader", [read_rgb, read_depth, read_mask])
@pytest.mark.parametrize("name", ["gone.png", "folder.png", "text.png", "text.tiff", "gone.tiff"])
def test_not_an_image(tmp_path, reader, name):
    path = tmp_path / name
    if name.startswith("folder"):
        path.mkdir()
    if name.startswith("text"):
        path.write_text("this is no image\n" * 20)
    with pytest.raises(DataError, match=name):
        reader(path)


def test_rgb_modes(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([grey] * 4)).save(tmp_path / "rgba.png")
    for name in ("grey.png", "rgba.png"):
        np.testing.assert_array_equal(read_rgb(tmp_path / name), np.dstack([grey] * 3))
    Image.fromarray(grey.astype(np.uint16) * 1000).save(tmp_path / "sixteen.png")
    with pytest.raises(DataError, match=r"sixteen\.png: pixel type is I;16, expected an 8-bit"):
        read_rgb(tmp_path / "sixteen.png")


def test_depth_keeps_sixteen_bits(tmp_path):
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "d.png")
    depth, valid, xyz = read_depth(tmp_path / "d.png")
    np.testing.assert_array_equal(depth, values.astype(np.float32))
    np.testing.assert_array_equal(valid, values > 0)
    assert xyz is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16, np.int16])
def test_single_channel_tiffs(tmp_path, dtype):
    values = np.arange(1, 31).reshape(5, 6).astype(dtype)
    values[0, 0] = 0
    tifffile.imwrite(tmp_path / "d.tiff", values)
    depth, valid, _ = read_depth(tmp_path / "d.tiff")
    np.testing.assert_array_equal(depth, values.astype(np.float32))
    assert valid.sum() == 29


def test_no_measurement(tmp_path):
    values = np.array([[1.0, np.nan, np.inf], [-np.inf, 0.0, -2.0], [1e300, 3.0, -0.0]])
    tifffile.imwrite(tmp_path / "d.tiff", values)
    depth, valid, _ = read_depth(tmp_path / "d.tiff")
    np.testing.assert_array_equal(valid, [[True, False, False], [False, False, True], [False, True, False]])
    np.testing.assert_array_equal(depth, [[1, 0, 0], [0, 0, -2], [0, 3, 0]])


def test_wrong_depth_files(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "colour.png")
    with pytest.raises(DataError, match=r"colour\.png: pixel type is RGB"):
        read_depth(tmp_path / "colour.png")
    tifffile.imwrite(tmp_path / "two.tiff", np.zeros((4, 4, 5), np.float32), photometric="minisblack")
    with pytest.raises(DataError, match=r"two\.tiff: shape is"):
        read_depth(tmp_path / "two.tiff")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "eight.png")
    with pytest.raises(DataError, match=r"eight\.png: uint8 .* expected a 16-bit grey PNG"):
        read_depth(tmp_path / "eight.png", (0.0, 1.0))


@pytest.mark.parametrize("values", [[0, 1], [0, 255], [0, 253, 254, 255]])
def test_mask_values_above_zero_are_defects(tmp_path, values):
    pixels = np.zeros((6, 6), np.uint8)
    pixels.flat[: len(values)] = values
    Image.fromarray(pixels).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").sum() == len(values) - 1


def test_sizes_must_agree(tmp_path):
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(tmp_path / "rgb.png")
    Image.fromarray(np.ones((9, 8), np.uint16)).save(tmp_path / "depth.png")
    Image.fromarray(np.ones((4, 4), np.uint8)).save(tmp_path / "mask.png")
    common = {"id": "x", "cls": "c", "split": "test", "rgb": tmp_path / "rgb.png"}
    with pytest.raises(DataError, match=r"depth\.png is 8 x 9 .*rgb\.png is 9 x 8"):
        read_sample(Sample(**common, depth=tmp_path / "depth.png"))
    with pytest.raises(DataError, match=r"mask\.png is 4 x 4"):
        read_sample(Sample(**common, kind="hole", mask=tmp_path / "mask.png"))


def test_mask_of_unlabelled_and_of_unmasked_defect(tmp_path):
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(tmp_path / "rgb.png")
    common = {"id": "c/1", "cls": "c", "split": "test", "rgb": tmp_path / "rgb.png"}
    unlabelled = read_sample(Sample(**common, kind="unlabelled"))
    assert unlabelled.mask is None
    assert prepare(unlabelled, 4).mask is None
    with pytest.raises(DataError, match="'c/1' is of kind 'hole' but has no mask"):
        read_sample(Sample(**common, kind="hole"))


def test_prepare_is_deterministic_and_in_range():
    rng = np.random.default_rng(0)
    depth = rng.normal(0.6, 0.05, (50, 70)).astype(np.float32)
    depth[rng.uniform(size=depth.shape) < 0.2] = 0
    raw = RawSample(
        rgb=rng.integers(0, 256, (50, 70, 3), dtype=np.uint8),
        depth=depth,
        valid=depth != 0,
        xyz=None,
        mask=rng.uniform(size=depth.shape) < 0.5,
    )
    one, two = prepare(raw, 32), prepare(raw, 32)
    for name in ("rgb", "depth", "valid", "mask"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    for image in (one.rgb, one.depth):
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.float32
        assert image.min() >= 0
        assert image.max() <= 1
    assert one.valid.dtype == one.mask.dtype == torch.bool
    assert torch.equal(one.depth[0], one.depth[2])


def test_rgb_resize_matches_pillow():
    """Antialiased bilinear: Pillow's, up to its rounding to 8 bits."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    raw = RawSample(rgb=pixels, depth=None, valid=None, xyz=None, mask=None)
    theirs = np.asarray(Image.fromarray(pixels).resize((24, 24), Image.Resampling.BILINEAR))
    ours = prepare(raw, 24).rgb.permute(1, 2, 0).numpy() * 255
    assert np.abs(ours - theirs).max() < 1.01


def test_mask_resize_takes_the_nearest_pixel():
    mask = np.zeros((4, 4), bool)
    mask[1, 1] = mask[3, 2] = True
    raw = RawSample(rgb=np.zeros((4, 4, 3), np.uint8), depth=None, valid=None, xyz=None, mask=mask)
    theirs = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize((2, 2), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(prepare(raw, 2).mask.numpy(), theirs > 0)
    np.testing.assert_array_equal(prepare(raw, 4).mask.numpy(), mask)


def test_invalid_pixels_do_not_bleed():
    """A step of depth beside a hole of zeros: no value outside the measured range appears at any size."""
    depth = np.full((40, 40), 0.5, dtype=np.float32)
    depth[:, 20:] = 0.7
    depth[10:30, 15:22] = 0
    for size in (7, 20, 40, 64):
        ready = prepare(raw_depth(depth), size)
        # range [.5, .7] with 10 % headroom: the two levels map to 1/12 and 11/12
        levels = ready.depth[0]
        assert levels.min() > 1 / 12 - 1e-6
        assert levels.max() < 11 / 12 + 1e-6
    ready = prepare(raw_depth(depth), 40)
    assert not ready.valid[10:30, 15:22].any()
    assert ready.valid.sum() == 1600 - 140
    assert ready.depth[0, 20, 16] == pytest.approx(1 / 12), "filled from the nearer side"
    assert ready.depth[0, 20, 21] == pytest.approx(11 / 12)


def test_depth_unit_and_offset_do_not_matter():
    rng = np.random.default_rng(1)
    depth = rng.uniform(1, 2, (30, 30)).astype(np.float32)
    reference = prepare(raw_depth(depth), 16).depth
    for scale, offset in [(1000, 0), (1, 50), (0.001, -0.01)]:
        same = prepare(raw_depth(depth * scale + offset), 16).depth
        torch.testing.assert_close(same, reference, atol=3e-5, rtol=0)


def test_outliers_do_not_flatten_the_object():
    rng = np.random.default_rng(1)
    depth = rng.uniform(1, 2, (64, 64)).astype(np.float32)
    depth[5, 5], depth[6, 9] = 1e6, -1e6
    ready = prepare(raw_depth(depth), 64).depth[0]
    assert ready.std() > 0.2
    assert ready[5, 5] == 1
    assert ready[6, 9] == 0


@pytest.mark.parametrize("value", [0.0, 0.6])
def test_flat_and_empty_depth(value):
    ready = prepare(raw_depth(np.full((20, 20), value)), 8)
    assert ready.depth.isfinite().all()
    assert ready.depth.unique().numel() == 1
    assert ready.valid.all() == (value != 0)


def test_xyz_raw():
    rng = np.random.default_rng(0)
    points = rng.normal(scale=0.1, size=(20, 20, 3)).astype(np.float32)
    points[:4, :4] = 0
    valid = (points != 0).any(axis=2)
    ready = prepare(raw_depth(points[..., 2], valid, points), 20, depth_mode="xyz_raw")
    assert not torch.equal(ready.depth[0], ready.depth[1])
    for channel in range(3):
        values = points[..., channel][valid]
        low, high = np.percentile(values, [1, 99])
        margin = 0.1 * (high - low)
        expected = np.clip((values - low + margin) / (high - low + 2 * margin), 0, 1)
        np.testing.assert_allclose(ready.depth[channel].numpy()[valid], expected, atol=1e-5)
    with pytest.raises(DataError, match="needs an xyz TIFF"):
        prepare(raw_depth(points[..., 2], valid), 20, depth_mode="xyz_raw")


def test_prepare_errors():
    raw = raw_depth(np.ones((4, 4)))
    with pytest.raises(ValueError, match="size is 0"):
        prepare(raw, 0)
    with pytest.raises(ValueError, match="depth_mode is 'xyz'"):
        prepare(raw, 4, depth_mode="xyz")
