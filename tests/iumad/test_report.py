"""report.html: complete, self-contained, and right in a real browser."""

import base64
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from iumad.config import apply_overrides
from iumad.engine import group
from iumad.engine.distributed import World
from iumad.engine.runner import Machine
from iumad.metrics import ResultMatrix
from iumad.presets import get
from iumad.report.pictures import colour, outline, panel
from iumad.report.tables import forgetting_text, matrix_text


@pytest.fixture(scope="module")
def reported(tmp_path_factory, tiny_data, cache_root):
    """A group of two runs with its report."""
    overrides = [
        f"data.dataset={tiny_data}",
        "data.image_size=64",
        "backbone.name=random:lite0",
        "model.dim=16",
    ]
    overrides += ["model.num_heads=2", "model.layers=2", "model.ffn_dim=32", "model.fusion_layers=[1, 2]"]
    overrides += ["model.mamba_state=4", "train.epochs=2", "train.increment_epochs=2", "protocol.name=2-1"]
    config = apply_overrides(get("small"), overrides)
    root = tmp_path_factory.mktemp("reported") / "run"
    group.start(root, group.plan_runs(config, [1, 2], [], bounds=False), overwrite=False)
    views = group.execute(root, Machine(torch.device("cpu"), World(), cache_root / "features", quiet=True))
    return root, views


class Page(HTMLParser):
    """Collects what a page would load, its pictures, and whether tags are balanced."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.pictures, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key in ("src", "href"):
                (self.pictures if value.startswith("data:image/png") else self.loads).append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(root):
    page = Page()
    page.feed((root / "report.html").read_text())
    assert page.open == []
    return page


def test_page_is_whole_and_loads_nothing(reported):
    root, views = reported
    page = parse(root)
    assert page.loads == ["data:,"]
    source = (root / "report.html").read_text()
    assert not re.search(r"https?://(?!www\.w3\.org)|url\(|@import", source)
    assert len(page.pictures) == len(views[0].results["cases"]) == 12
    for picture in page.pictures:
        with Image.open(BytesIO(base64.b64decode(picture.partition(",")[2]))) as image:
            assert image.size == (4 * 64 + 3 * 6, 64)


def test_page_tells_the_results(reported):
    root, views = reported
    text = " ".join(parse(root).text)
    matrix = views[0].matrix
    for name in matrix.classes:
        assert name in text
    assert f"{100 * matrix.final_mean('aupro_30'):.1f}" in text
    assert f"{100 * matrix.forgetting_measure('i_auroc'):.1f}" in text
    for title in (
        "All runs",
        "Classes and steps",
        "Forgetting",
        "Training",
        "Scores and thresholds",
        "Environment",
    ):
        assert title in text
    assert "mean ± std of 2" in text
    assert torch.__version__ in text


def test_report_of_an_unfinished_run_says_so(reported, tmp_path):
    from iumad.cli import main

    root, _ = reported
    copy = tmp_path / "cut"
    shutil.copytree(root / "seed_1", copy)
    results = json.loads((copy / "results.json").read_text())
    results["steps"] = results["steps"][:1]
    matrix = results["matrix"]
    matrix["recorded_steps"] = [0]
    for rows in matrix["metrics"].values():
        rows[1] = [None] * 3
    results["cases"] = []
    (copy / "results.json").write_text(json.dumps(results))
    assert main(["report", str(copy)]) == 0
    assert "not finished" in " ".join(parse(copy).text)


def chromium():
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))),
        None,
    )


@pytest.mark.skipif(
    chromium() is None, reason="no chromium or chrome is installed: the page is not opened in a browser"
)
def test_page_in_a_browser(reported, tmp_path):
    """No console message at all, every picture loads, the tabs switch."""
    root, views = reported
    probe = """
    <script>
    addEventListener("error", (event) => { document.title = "ERROR " + event.message; }, true);
    addEventListener("load", () => {
      const images = [...document.images];
      const loaded = images.filter((image) => image.complete && image.naturalWidth > 0).length;
      const visible = () => [...document.querySelectorAll("[data-tab]")].filter((p) => !p.hidden).map((p) => p.dataset.tab);
      const before = visible();
      document.querySelectorAll(".tabs button")[2].click();
      const answer = { images: images.length, loaded, before, after: visible(), title: document.title };
      const node = document.createElement("pre");
      node.id = "probe";
      node.textContent = JSON.stringify(answer);
      document.body.append(node);
    });
    </script>"""
    page = tmp_path / "probed.html"
    page.write_text((root / "report.html").read_text().replace("<head>", "<head>" + probe))
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        page.as_uri(),
    ]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr
    answer = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)[1].replace("&amp;", "&"))
    assert answer["images"] == answer["loaded"] == 12
    assert set(answer["before"]) == {"i_auroc"}
    assert answer["after"][0] == "aupro_30"
    assert not answer["title"].startswith("ERROR")


def test_tables_of_a_hand_made_matrix():
    matrix = ResultMatrix([("a", "b"), ("c",)])
    matrix.record(0, "a", {"i_auroc": 0.9})
    matrix.record(0, "b", {"i_auroc": 0.8})
    matrix.record(1, "a", {"i_auroc": 0.7})
    matrix.record(1, "b", {"i_auroc": 0.85})
    matrix.record(1, "c", {"i_auroc": 0.6})
    lines = matrix_text(matrix, "i_auroc").splitlines()
    assert lines[2].split() == ["a", "90.0", "70.0", "90.0", "70.0", "20.0"]
    assert lines[3].split() == ["b", "80.0", "85.0", "85.0", "85.0", "-5.0"]
    assert lines[4].split() == ["c", "-", "60.0", "60.0", "60.0", "-"]
    assert lines[5].split()[:3] == ["mean", "85.0", "71.7"]
    assert "FM (best earlier - last)          7.5" in forgetting_text(matrix)


def test_colours_grow_lighter():
    ramp = colour(np.linspace(0, 1, 64)[None], 0.0, 1.0)[0].astype(float)
    light = ramp @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > 0).all()
    assert (colour(np.array([[-5.0, 7.0]]), 0, 1)[0] == ramp[[0, -1]]).all()


def test_outline_is_the_inner_border():
    region = np.zeros((5, 6), bool)
    region[1:4, 1:5] = True
    drawn = outline(np.zeros((5, 6, 3), np.uint8), region)[..., 0] > 0
    inner = np.zeros_like(region)
    inner[2, 2:4] = True
    assert (drawn == (region & ~inner)).all()


def test_panel_leaves_out_what_is_missing():
    image = np.zeros((3, 8, 8), np.float32)
    heat = np.zeros((8, 8))
    assert panel({"rgb": image}, heat, None, low=0, high=1).shape == (8, 2 * 8 + 6, 3)
    assert panel({"rgb": image, "depth": image}, heat, heat > 1, low=0, high=1).shape == (8, 4 * 8 + 3 * 6, 3)
