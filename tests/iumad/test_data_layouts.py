"""Every on-disk layout, on tiny trees of the published shape."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from iumad.data import Catalogue, DataError, Sample, open_dataset, prepare, read_sample
from iumad.data.eyecandies import read_depth_range
from iumad.data.opening import detect_spec

RNG = np.random.default_rng(0)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tiff":
        tifffile.imwrite(path, pixels, photometric="rgb")
    else:
        Image.fromarray(pixels).save(path)
    return path


def rgb(height=20, width=30):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def xyz(height=20, width=30, dtype=np.float32):
    points = RNG.normal(scale=0.05, size=(height, width, 3))
    points[..., 2] += 0.6
    points[:3, :4] = 0
    return points.astype(dtype)


def make_mvtec(root, *, dtype=np.float32):
    """Two classes as in MVTec 3D-AD: ids in masks, all-zero masks of good images, a calibration folder."""
    for cls in ("bagel", "tire"):
        (root / cls / "calibration").mkdir(parents=True)
        (root / cls / "calibration" / "camera_parameters.json").write_text("{}")
        for split, kind, count in [
            ("train", "good", 3),
            ("validation", "good", 2),
            ("test", "good", 2),
            ("test", "cut", 2),
            ("test", "combined", 1),
        ]:
            for i in range(count):
                folder = root / cls / split / kind
                save(folder / "rgb" / f"{i:03d}.png", rgb())
                save(folder / "xyz" / f"{i:03d}.tiff", xyz(dtype=dtype))
                if split == "test":
                    mask = np.zeros((20, 30), dtype=np.uint8)
                    if kind != "good":
                        mask[5:9, 5:9] = 254
                        mask[5:9, 9:12] = 253
                    save(folder / "gt" / f"{i:03d}.png", mask)
    return root


def make_eyecandies(root):
    """One class in the native layout: padding differs by split, one good and one bad public test image."""
    for split, width, count in [
        ("train", 3, 12),
        ("val", 2, 2),
        ("test_public", 2, 2),
        ("test_private", 3, 1),
    ]:
        folder = root / "GummyBear" / split / "data"
        for i in range(count):
            name = f"{i:0{width}d}"
            for light in range(6):
                save(folder / f"{name}_image_{light}.png", np.full((16, 16, 3), 10 * light + i, np.uint8))
            depth = np.full((16, 16), 32768, dtype=np.uint16)
            depth[0, 0], depth[0, 1] = 0, 65535
            save(folder / f"{name}_depth.png", depth)
            (folder / f"{name}_info_depth.yaml").write_text(
                f"normalization:\n  max: {1.5 + i}\n  min: -2.5e-1  # metres\n"
            )
            if split != "test_private":
                mask = np.zeros((16, 16), dtype=np.uint8)
                mask[3:6, 3:6] = 255 if split == "test_public" and i == 1 else 0
                save(folder / f"{name}_mask.png", mask)
    return root


def count(catalogue: Catalogue, **selection) -> int:
    return len(catalogue.select(**selection))


def test_mvtec(tmp_path):
    catalogue = open_dataset(f"mvtec3d:{make_mvtec(tmp_path)}")
    assert catalogue.name == "mvtec3d"
    assert catalogue.classes == ("bagel", "tire")
    assert [count(catalogue, cls="tire", split=split) for split in ("train", "validation", "test")] == [
        3,
        2,
        5,
    ]
    assert len(catalogue.training("bagel", include_validation=True)) == 5
    assert len(catalogue.training("bagel", include_validation=False)) == 3
    assert count(catalogue, good=False) == 6
    raw = read_sample(catalogue.select(cls="tire", good=False)[0])
    assert raw.size == (20, 30)
    assert raw.mask.sum() == 4 * 7, "class ids 253 and 254 are both defects"
    assert not raw.valid[:3, :4].any()
    assert raw.valid.sum() == 20 * 30 - 12


def test_split_train_holds_no_test_image(tmp_path):
    catalogue = open_dataset(f"mvtec3d:{make_mvtec(tmp_path)}")
    for cls in catalogue.classes:
        for sample in catalogue.training(cls, include_validation=True):
            assert sample.cls == cls
            assert "test" not in sample.rgb.relative_to(tmp_path).parts


def test_float64_and_float32_tiffs_read_the_same(tmp_path):
    points = xyz(dtype=np.float64)
    points[10, 10], points[11, 11], points[12, 12] = np.nan, np.inf, [0, 0, -0.3]
    samples = []
    for dtype in (np.float32, np.float64):
        path = save(tmp_path / f"{np.dtype(dtype).name}.tiff", points.astype(dtype))
        samples.append(Sample(id="x", cls="c", split="train", depth=path))
    one, two = (read_sample(sample) for sample in samples)
    np.testing.assert_array_equal(one.depth, two.depth)
    np.testing.assert_array_equal(one.valid, two.valid)
    assert not one.valid[10, 10]
    assert not one.valid[11, 11]
    assert one.depth[12, 12] == np.float32(-0.3), "negative coordinates are measurements"
    assert one.valid[12, 12]
    assert prepare(one, 16).depth.isfinite().all()


def test_missing_xyz_is_told(tmp_path):
    make_mvtec(tmp_path)
    (tmp_path / "tire/test/cut/xyz/001.tiff").unlink()
    with pytest.raises(DataError, match="item 1 has no depth or xyz file") as error:
        open_dataset(f"mvtec3d:{tmp_path}")
    assert str(tmp_path / "tire/test/cut") in str(error.value)


def test_missing_mask_is_told(tmp_path):
    make_mvtec(tmp_path)
    (tmp_path / "tire/test/cut/gt/001.png").unlink()
    with pytest.raises(DataError, match="item 1 has no mask"):
        open_dataset(f"folder:{tmp_path}")


def test_mvtec_wants_xyz(tmp_path):
    save(tmp_path / "c/train/good/rgb/0.png", rgb())
    assert count(open_dataset(f"folder:{tmp_path}")) == 1
    with pytest.raises(DataError, match="no xyz folder"):
        open_dataset(f"mvtec3d:{tmp_path}")


def test_items_pair_by_number_and_sort_numerically(tmp_path):
    for i in (2, 10, 1):
        save(tmp_path / f"c/train/good/rgb/{i:03d}.png", rgb())
        save(tmp_path / f"c/train/good/depth/{i}.png", np.ones((20, 30), np.uint16))
    samples = open_dataset(f"folder:{tmp_path}").samples
    assert [sample.id for sample in samples] == [f"c/train/good/{i}" for i in (1, 2, 10)]
    assert all(int(sample.rgb.stem) == int(sample.depth.stem) for sample in samples)
    save(tmp_path / "c/train/good/rgb/02.png", rgb())
    with pytest.raises(DataError, match="same item as"):
        open_dataset(f"folder:{tmp_path}")


@pytest.mark.parametrize("role", ["rgb", "depth"])
def test_single_modality(tmp_path, role):
    for i in range(2):
        save(
            tmp_path / f"c/train/good/{role}/{i}.png", rgb() if role == "rgb" else np.ones((9, 8), np.uint16)
        )
    catalogue = open_dataset(f"folder:{tmp_path}")
    assert (catalogue.has_rgb, catalogue.has_depth) == (role == "rgb", role == "depth")
    raw = read_sample(catalogue.samples[0])
    ready = prepare(raw, 8)
    assert (ready.rgb is None, ready.depth is None) == (role != "rgb", role != "depth")
    assert raw.mask.shape == raw.size
    assert ready.mask.shape == (8, 8)


def test_eyecandies_native(tmp_path):
    catalogue = open_dataset(f"eyecandies:{make_eyecandies(tmp_path)}")
    assert [count(catalogue, split=split) for split in ("train", "validation", "test")] == [12, 2, 2]
    assert [sample.kind for sample in catalogue.select(split="test")] == ["good", "bad"]
    assert [int(sample.rgb.name[:3]) for sample in catalogue.select(split="train")] == list(range(12))
    sample = catalogue.select(split="test")[1]
    raw = read_sample(sample)
    assert raw.rgb[0, 0, 0] == 41, "image_4 is the colour image"
    assert raw.depth[0, 0] == np.float32(-0.25)
    assert raw.depth[0, 1] == np.float32(2.5)
    assert raw.depth[5, 5] == pytest.approx(-0.25 + 32768 / 65535 * 2.75, abs=1e-6)
    assert raw.valid.all()
    assert raw.mask.sum() == 9


def test_eyecandies_converted(tmp_path):
    for split, kind in [("train", "good"), ("test", "good"), ("test", "bad")]:
        folder = tmp_path / "Lollipop" / split / kind
        save(folder / "rgb" / "000.png", rgb())
        save(folder / "xyz" / "000.tiff", -xyz(dtype=np.float64))  # float64, and z below zero
        if split == "test":
            save(folder / "gt" / "000.png", np.full((20, 30), 255 * (kind == "bad"), np.uint8))
    catalogue = open_dataset(f"eyecandies:{tmp_path}")
    assert catalogue.name == "eyecandies"
    raw = read_sample(catalogue.samples[0])
    assert raw.depth[raw.valid].max() < 0
    assert raw.valid.sum() == 20 * 30 - 12


def test_eyecandies_missing_pieces(tmp_path):
    make_eyecandies(tmp_path)
    (tmp_path / "GummyBear/train/data/003_info_depth.yaml").unlink()
    with pytest.raises(DataError, match=r"item 3 lacks 003_info_depth\.yaml"):
        open_dataset(f"eyecandies:{tmp_path}")


@pytest.mark.parametrize("text", ["normalization:\n  max: 2\n", "max: 1\nmin: 2\n", "max: one\nmin: 0\n"])
def test_bad_depth_range(tmp_path, text):
    path = tmp_path / "info_depth.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=r"info_depth\.yaml"):
        read_depth_range(path)


def make_manifest(tmp_path, rows, header="class,split,kind,rgb,depth,mask"):
    path = tmp_path / "list.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_manifest(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / "img" / name, rgb())
    save(tmp_path / "z.png", np.ones((20, 30), np.uint16))
    save(tmp_path / "m.png", np.eye(20, 30, dtype=np.uint8))
    rows = [
        "widget,train,good,img/a.png,z.png,",
        "widget,test,hole,img/b.png,z.png,m.png",
        "gadget,train,good,img/c.png,z.png,",
    ]
    catalogue = open_dataset(f"manifest:{make_manifest(tmp_path, rows)}")
    assert catalogue.classes == ("widget", "gadget")
    assert read_sample(catalogue.select(split="test")[0]).mask.sum() == 20


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("widget,tset,good,a.png,,", "line 3: split is 'tset'"),
        ("widget,train,good,,,", "line 3: neither rgb nor depth"),
        ("widget,train,good,no.png,,", r"line 3: .*no\.png does not exist"),
        ("widget,test,hole,a.png,,", "line 3: a defect without mask"),
        (",test,hole,a.png,,", "line 3: class and kind"),
    ],
)
def test_manifest_errors_name_the_line(tmp_path, row, message):
    save(tmp_path / "a.png", rgb())
    with pytest.raises(DataError, match=message):
        open_dataset(f"manifest:{make_manifest(tmp_path, ['widget,train,good,a.png,,', row])}")


def test_manifest_columns(tmp_path):
    with pytest.raises(DataError, match="missing: kind; unknown: sort"):
        open_dataset(f"manifest:{make_manifest(tmp_path, [], header='class,split,sort,rgb')}")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("folder:/no/such/place", DataError, "/no/such/place does not exist; looked for CLASS/"),
        ("manifest:/no/such.csv", DataError, "/no/such.csv is not a file"),
        ("eyecandies:/no/such", DataError, "/no/such does not exist"),
        ("photos:/x", ValueError, "data spec is 'photos:/x', expected folder:PATH"),
        ("folder", ValueError, "expected a path after folder:"),
        ("demo:sedd=3", ValueError, "unknown option 'sedd', expected one of seed"),
        ("demo:train=many", ValueError, "train is 'many'"),
        ("demo:classes=gear+sofa", ValueError, "sofa"),
    ],
)
def test_bad_specs(spec, error, message):
    with pytest.raises(error) as raised:
        open_dataset(spec)
    assert message in str(raised.value)


def test_folder_without_classes(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match="no class found"):
        open_dataset(f"folder:{tmp_path}")


def test_detect_spec(tmp_path):
    assert detect_spec(str(make_mvtec(tmp_path / "m"))).startswith("folder:")
    assert detect_spec(str(make_eyecandies(tmp_path / "e"))).startswith("eyecandies:")
    assert detect_spec(str(make_manifest(tmp_path, []))).startswith("manifest:")
    assert detect_spec("demo:seed=1") == "demo:seed=1"
    with pytest.raises(DataError, match="does not exist"):
        detect_spec(str(tmp_path / "nothing"))


def test_select_and_sample_errors(tmp_path):
    catalogue = open_dataset(f"folder:{make_mvtec(tmp_path)}")
    with pytest.raises(ValueError, match="cls is 'tyre', expected one of bagel, tire"):
        catalogue.select(cls="tyre")
    with pytest.raises(ValueError, match="split is 'val'"):
        catalogue.select(split="val")
    with pytest.raises(ValueError, match="split is 'dev'"):
        Sample(id="x", cls="c", split="dev", rgb=Path("a.png"))
    with pytest.raises(ValueError, match="neither rgb nor depth"):
        Sample(id="x", cls="c", split="test")


def test_digest_follows_content_not_place(tmp_path):
    picture = rgb()
    one, two, other = (
        save(tmp_path / name, p) for name, p in [("1.png", picture), ("2.png", picture), ("3.png", rgb())]
    )
    digests = [Sample(id="x", cls="c", split="train", rgb=path).digest() for path in (one, two, other)]
    assert digests[0] == digests[1] != digests[2]
    as_depth = Sample(id="x", cls="c", split="train", depth=one)
    assert as_depth.digest() != digests[0], "the same bytes in another role are another input"


def test_real_road_data():
    root = (
        Path(os.environ.get("IUMAD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "road_rgbd"
    )
    if not root.is_dir():
        pytest.skip(f"real RGB-D data not found at {root}; set IUMAD_TEST_DATA")
    catalogue = open_dataset(f"folder:{root}")
    assert [count(catalogue, cls=cls, split="train") for cls in catalogue.classes] == [17, 20, 20]
    assert [count(catalogue, cls=cls, split="test", good=False) for cls in catalogue.classes] == [8, 14, 12]
    for sample in catalogue.samples:
        raw = read_sample(sample)
        assert raw.size == (256, 256)
        assert raw.valid.mean() > 0.94
        assert raw.mask.any() == (not sample.is_good)
    ready = prepare(raw, 224)
    assert ready.rgb.shape == ready.depth.shape == (3, 224, 224)
