"""The paper's numbers, our rows among them, and the recipes that make the runs."""

import csv
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from iumad.cli import main
from iumad.cli.arguments import make_parser
from iumad.cli.options import config_from
from iumad.engine.runner import run_settings
from iumad.report.compare import compare_with_paper, paper_results

ROOT = Path(__file__).parents[2]
RECIPES = [
    shlex.split(line)
    for line in (ROOT / "recipes" / "README.md").read_text().splitlines()
    if line.startswith("    iumad train")
]
TINY = [
    "data.image_size=32",
    "backbone.name=random:lite0",
    "model.dim=8",
    "model.num_heads=2",
    "model.layers=2",
    "model.ffn_dim=8",
    "model.fusion_layers=[1, 2]",
    "model.mamba_state=2",
    "train.epochs=1",
    "train.increment_epochs=1",
    "train.batch_size=10",
    "train.autocast=false",
]


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Both data sets in their published layouts: the right class names, two training and two test images each."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("published")
    mask = np.zeros((40, 40), np.uint8)
    mask[5:20, 5:20] = 253
    classes = paper_results()["classes"]
    for name in classes["mvtec3d"]:
        for kind in ("train/good", "validation/good", "test/good", "test/hole"):
            folder = root / "mvtec" / name / kind
            save(folder / "rgb" / "000.png", rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
            (folder / "xyz").mkdir()
            tifffile.imwrite(
                folder / "xyz" / "000.tiff",
                rng.normal(size=(40, 40, 3)).astype(np.float32),
                photometric="rgb",
            )
            if kind.startswith("test"):
                save(folder / "gt" / "000.png", mask if kind.endswith("hole") else np.zeros_like(mask))
    for name in classes["eyecandies"]:
        for split, count in (("train", 1), ("val", 2), ("test_public", 2)):
            for index in range(count):
                stem = root / "eyecandies" / name / split / "data" / f"{index:03d}_"
                bad = split == "test_public" and index == 1
                save(Path(f"{stem}image_4.png"), rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
                save(Path(f"{stem}depth.png"), rng.integers(0, 65535, (40, 40), dtype=np.uint16))
                save(Path(f"{stem}mask.png"), mask if bad else np.zeros_like(mask))
                Path(f"{stem}info_depth.yaml").write_text("normalization:\n  max: 1.5\n  min: 0.5\n")
                Path(f"{stem}metadata.yaml").write_text(f"anomalous: {int(bad)}\n")
    return root


def filled(command, trees, out):
    """A recipe with its placeholders filled in and everything made tiny."""
    names = {"$MVTEC": trees / "mvtec", "$EYECANDIES": trees / "eyecandies", "recipes/": ROOT / "recipes"}
    argv = []
    for part in command[1:]:
        for name, path in names.items():
            part = part.replace(name, f"{path}/" if name.endswith("/") else str(path))
        argv.append(part)
    argv[argv.index("--out") + 1] = str(out)
    return [*argv, *(item for override in TINY for item in ("--set", override))]


@pytest.mark.parametrize("command", RECIPES, ids=lambda command: command[command.index("--out") + 1])
def test_every_recipe_resolves_on_data_of_the_published_layout(command, trees, tmp_path):
    args = make_parser().parse_args(filled(command, trees, tmp_path / "run"))
    settings = run_settings(config_from(args, preset="recommended"))
    x, y = map(int, args.protocol.split("-"))
    assert [len(step) for step in settings["steps"]] == [x] + [y] * ((10 - x) // (y or 1))
    dataset = "mvtec3d" if "mvtec3d" in args.data else "eyecandies"
    assert settings["classes"] == paper_results()["classes"][dataset]


def test_recipes_cover_the_paper():
    texts = [" ".join(command) for command in RECIPES]
    for data in ("mvtec3d:", "eyecandies:"):
        for protocol in ("10-0", "9-1", "6-4", "6-1"):
            assert any(data in text and f"--protocol {protocol}" in text for text in texts)


def test_runs_appear_beside_the_paper(trees, tmp_path, capsys, cache_root):
    chosen = {"runs/mvtec_both_6-1": "a", "runs/eyecandies_both_10-0": "b", "runs/fusion_addition_10-0": "c"}
    for command in RECIPES:
        out = chosen.get(command[command.index("--out") + 1])
        if out:
            seeds = ["--seeds", "1,2"] if out == "b" else []
            assert main([*filled(command, trees, tmp_path / out), *seeds]) == 0
    capsys.readouterr()
    assert main(["report", "--compare", "paper", *(str(tmp_path / out) for out in "abc")]) == 0
    text = capsys.readouterr().out
    tables = text.split("\n\n")
    mvtec, eyecandies = tables[1], tables[3]
    own = next(line for line in mvtec.splitlines() if "* IUMAD" in line and "addition" not in line)
    assert re.search(
        r"RGB\+3D\s+\* IUMAD\s+-\s+-\s+-\s+-\s+-\s+\d+\.\d / \d+\.\d\s+-?\d+\.\d / -?\d+\.\d", own
    )
    assert any("* IUMAD (addition)" in line for line in mvtec.splitlines())
    own = next(line for line in eyecandies.splitlines() if "* IUMAD" in line)
    assert "±" in own
    fusion = next(line for line in text.splitlines() if line.startswith("Addition"))
    assert "-" not in fusion.split()


def test_numbers_of_the_paper():
    """Means that the supplement prints against the classes that it prints; spot checks of the rest."""
    paper = paper_results()
    assert len(paper["incremental"]) == 18
    assert len(paper["per_class"]) == 54
    for row in paper["per_class"]:
        assert np.mean(row["classes"]) == pytest.approx(row["mean"], abs=0.1)
        joint = [
            one["protocols"]["10-0"]["aupro"]
            for one in paper["incremental"]
            if row["metric"] == "aupro" and all(one[k] == row[k] for k in ("dataset", "modality", "method"))
        ]
        assert joint in ([], [row["mean"]])
    best = next(
        one for one in paper["incremental"] if one["method"] == "IB-IUMAD" and one["modality"] == "both"
    )
    assert best["protocols"]["6-1"] == {"i_auroc": 78.6, "aupro": 82.4, "fm_i_auroc": 9.3, "fm_aupro": 6.9}


def test_tables_without_runs():
    result = compare_with_paper([])
    assert "* IUMAD" not in result["text"].replace("  * IUMAD\n", "")
    assert result["ours"] == []
    assert list(csv.reader(io.StringIO(result["text"])))
