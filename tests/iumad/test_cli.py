"""The command line: light to start, one sentence for a mistake, one JSON object on request."""

import json
import subprocess
import sys

import pytest

from iumad.cli import main

COMMANDS = ["demo", "train", "resume", "eval", "predict", "report", "data check", "info"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_nothing_heavy(command):
    code = (
        "import sys; from iumad.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'PIL', 'skimage', 'scipy', 'tqdm'} & set(sys.modules)\n"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage: iumad" in done.stdout
    if not command:
        for name in COMMANDS:
            assert name.split()[0] in done.stdout


def test_module_and_command_are_the_same():
    done = subprocess.run([sys.executable, "-m", "iumad", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: iumad")


@pytest.mark.parametrize("argv", [[], ["trian"], ["train"], ["data"], ["report", "x", "--compare", "novel"]])
def test_usage_errors_exit_with_2(argv, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: iumad" in captured.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--data", "folder:/nowhere", "--out", "{tmp}/r"], "/nowhere"),
        (["train", "--data", "zip:/x", "--out", "{tmp}/r"], "data spec is 'zip:/x'"),
        (["train", "--preset", "smal", "--out", "{tmp}/r"], "did you mean small?"),
        (["train", "--set", "train.epocs=3", "--out", "{tmp}/r"], "did you mean epochs?"),
        (["train", "--set", "train.epochs=none", "--out", "{tmp}/r"], "train.epochs"),
        (["train", "--config", "{tmp}/absent.toml", "--out", "{tmp}/r"], "absent.toml: No such file"),
        (["train", "--seeds", "1,1", "--out", "{tmp}/r"], "--seeds is '1,1'"),
        (["train", "--device", "tpu", "--out", "{tmp}/r"], "device is 'tpu'"),
        (["resume", "{tmp}"], "not a run directory"),
        (["report", "{tmp}"], "not a run directory"),
        (["eval", "{tmp}"], "no finished step"),
        (["predict", "{tmp}/x.safetensors", "{tmp}"], "no such checkpoint"),
        (["info", "{tmp}/x.safetensors"], "no such checkpoint"),
        (["data", "check", "{tmp}/absent"], "absent"),
    ],
)
def test_mistakes_are_one_sentence(argv, words, tmp_path, capsys):
    assert main([part.format(tmp=tmp_path) for part in argv]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("iumad: ")
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_json_is_one_object_on_stdout(tmp_path, capsys, tiny_config):
    config = tiny_config()
    overrides = [
        f"{s}.{k}={json.dumps(v)}"
        for s, keys in config.to_dict().items()
        for k, v in keys.items()
        if v is not None
    ]
    argv = ["train", "--json", "--seed", "3", "--out", str(tmp_path / "r")]
    for override in overrides:
        if not override.startswith("train.seed"):
            argv += ["--set", override]
    assert main(argv) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["runs"][0]["steps"] == json.loads((tmp_path / "r" / "config.json").read_text())["steps"]
    assert json.loads((tmp_path / "r" / "config.json").read_text())["config"]["train"]["seed"] == 3
    assert "run directory" in captured.err

    for argv in (["report"], ["eval"], ["info"], ["resume"]):
        assert main([*argv, str(tmp_path / "r"), "--json"]) == 0
        json.loads(capsys.readouterr().out)
    assert main(["eval", str(tmp_path / "r")]) == 0
    shown = capsys.readouterr().out
    evaluated = json.loads((tmp_path / "r" / "results.json").read_text())
    name = result["runs"][0]["steps"][0][0]
    aupro = evaluated["matrix"]["metrics"]["aupro_30"][-1][0]
    row = next(line for line in shown.splitlines() if line.startswith(name))
    assert f"{100 * aupro:.1f}" in row.split()


def test_info_and_data_check(capsys, tiny_data, tmp_path):
    assert main(["info"]) == 0
    assert "small" in json.loads(capsys.readouterr().out)["presets"]
    assert main(["data", "check", tiny_data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_cache_benchmark_counts_both_ways(capsys, tiny_data, tiny_config, cache_root):
    overrides = ["data.image_size=64", "backbone.name=random:lite0", "model.dim=16", "model.num_heads=2"]
    argv = ["info", "--cache-benchmark", tiny_data, "--json"]
    for override in overrides:
        argv += ["--set", override]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 15
    assert result["epoch_seconds_cached"] > 0
    assert result["epoch_seconds_uncached"] > 0
