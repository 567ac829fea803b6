"""A killed run, resumed, ends in the bits of an uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from iumad.engine import checkpoint, files, group
from iumad.engine.distributed import World
from iumad.engine.log import read_log
from iumad.engine.runner import Machine, Run, prepare_run


class Killed(BaseException):
    """Stands for a kill that Python does not see: nothing may handle it to any effect."""


@pytest.fixture
def machine(cache_root):
    return Machine(torch.device("cpu"), World(), cache_root / "features", quiet=True)


def outcome(root):
    """Everything of a run but times: weights of every step, results, losses."""
    results = json.loads((root / "results.json").read_text())
    for step in results["steps"]:
        for name in ("train_seconds", "features_computed", "feature_seconds"):
            del step[name]
    models = [checkpoint.load(root / f"step_{t}.safetensors", "model") for t in (1, 2)]
    losses = [
        (line["step"], line["iteration"], line["loss"], tuple(line["terms"].items()))
        for line in read_log(root / "log.jsonl")
        if line["event"] == "train"
    ]
    return results, models, losses


def assert_same(left, right):
    for one, other in zip(left[1], right[1], strict=True):
        for name, value in one.pop("weights").items():
            assert torch.equal(value, other["weights"][name]), name
        del other["weights"]
        assert one == other
    assert left[0] == right[0]
    assert left[2] == right[2]


@pytest.fixture
def reference(tmp_path, machine, tiny_config):
    root = tmp_path / "uninterrupted"
    prepare_run(root, tiny_config())
    Run(root, machine).execute()
    return root


def test_killed_before_and_after_every_write(tmp_path, machine, tiny_config, reference, monkeypatch):
    """Each attempt lives for one write more, dying alternately just before and just after a rename."""
    root = tmp_path / "killed"
    prepare_run(root, tiny_config())
    replace, deaths = os.replace, 0
    while True:
        writes = iter(range(deaths + 1))

        def dying(source, target, writes=writes, last=deaths, early=deaths % 2 == 1):
            is_last = next(writes, None) == last
            if is_last and early:
                raise Killed
            replace(source, target)
            if is_last:
                raise Killed

        monkeypatch.setattr(files.os, "replace", dying)
        try:
            Run(root, machine).execute()
            break
        except Killed:
            deaths += 1
        finally:
            monkeypatch.undo()
    assert deaths > 5
    assert_same(outcome(reference), outcome(root))
    assert not list(root.rglob("*.tmp"))


def test_sigkill_of_the_process(tmp_path, machine, tiny_config, reference, cache_root):
    """Killed for real, three times, at moments that nobody chose; each process goes on where the last one died."""
    root = tmp_path / "killed"
    group.start(root, [group.Planned("main", "main", tiny_config())], overwrite=False)
    command = [sys.executable, "-m", "iumad", "resume", str(root), "--cache", str(cache_root / "features")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "IUMAD_CACHE": str(cache_root)}
    kills = 0
    for lines in (3, 5, 8):
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while process.poll() is None and logged(root) < lines:
            time.sleep(0.002)
        time.sleep(0.01 * kills)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    Run(root, machine).execute()
    assert_same(outcome(reference), outcome(root))


def logged(root):
    path = root / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_resuming_a_finished_run_changes_nothing(reference, machine):
    before = (reference / "results.json").read_bytes()
    group.execute(reference, machine)
    assert (reference / "results.json").read_bytes() == before


def test_state_of_another_configuration_is_refused(tmp_path, machine, tiny_config, monkeypatch):
    root = tmp_path / "r"
    prepare_run(root, tiny_config())
    interrupted = Run(root, machine)
    monkeypatch.setattr(interrupted, "_evaluate", lambda step: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        interrupted.execute()
    settings = json.loads((root / "config.json").read_text())
    settings["config"]["train"]["lr"] = 0.5
    (root / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"state\.safetensors was saved with another configuration"):
        Run(root, machine)


def test_full_disk_during_training_keeps_the_last_state(
    tmp_path, machine, tiny_config, reference, monkeypatch
):
    root = tmp_path / "full"
    prepare_run(root, tiny_config())
    replace, writes = os.replace, []

    def full(source, target):
        writes.append(target)
        if len(writes) == 4:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device.*state\.safetensors"):
        Run(root, machine).execute()
    monkeypatch.undo()
    assert not list(root.rglob("*.tmp"))
    Run(root, machine).execute()
    assert_same(outcome(reference), outcome(root))
