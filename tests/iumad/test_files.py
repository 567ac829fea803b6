"""Atomic writes, the log and checkpoints: whole or absent, and never unpickled."""

import errno
import os
import pickle

import pytest
import torch

from iumad.engine import checkpoint, files
from iumad.engine.log import RunLog, read_log


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "deep" / "a.json"
    files.write_json(target, {"x": 1})
    files.write_json(target, {"x": 2})
    assert files.read_json(target) == {"x": 2}
    assert [p.name for p in target.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_keeps_the_old_file_and_names_it(tmp_path, monkeypatch, call):
    target = tmp_path / "a.json"
    files.write_json(target, {"x": 1})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"No space left on device.*a\.json"):
        files.write_json(target, {"x": 2})
    monkeypatch.undo()
    assert files.read_json(target) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_interrupt_leaves_no_partial_file(tmp_path):
    target = tmp_path / "a.bin"

    def interrupted():
        with files.atomic_path(target) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_log_offset_cuts_off_what_a_resumed_run_repeats(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.write("train", loss=1.0)
    offset = log.sync()
    log.write("train", loss=2.0)
    log.close()
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'{"event": "tra')
    assert [line["loss"] for line in read_log(tmp_path / "log.jsonl")] == [1.0, 2.0]
    log = RunLog(tmp_path / "log.jsonl", offset)
    log.write("train", loss=3.0)
    log.close()
    assert [line["loss"] for line in read_log(tmp_path / "log.jsonl")] == [1.0, 3.0]


def test_checkpoint_round_trip_of_an_optimiser(tmp_path):
    layer = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    content = {
        "weights": layer.state_dict(),
        "optimiser": optimiser.state_dict(),
        "empty": torch.empty(0, 4),
        "view": torch.arange(6.0).view(2, 3).t(),
        "position": [1, None, "x", True, 0.1],
    }
    checkpoint.save(tmp_path / "c.safetensors", "state", content)
    loaded = checkpoint.load(tmp_path / "c.safetensors", "state")
    assert loaded["position"] == content["position"]
    assert loaded["empty"].shape == (0, 4)
    assert torch.equal(loaded["view"], content["view"])
    fresh = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters())
    fresh.load_state_dict(loaded["optimiser"])
    for key, value in optimiser.state_dict()["state"][0].items():
        assert torch.equal(torch.as_tensor(fresh.state_dict()["state"][0][key]), torch.as_tensor(value))


def test_checkpoint_errors_name_the_file(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(FileNotFoundError, match=r"c\.safetensors"):
        checkpoint.load(path, "model")
    checkpoint.save(path, "state", {"x": torch.ones(1000)})
    with pytest.raises(ValueError, match=r"c\.safetensors .*kind 'state'"):
        checkpoint.load(path, "model")
    whole = path.read_bytes()
    for cut in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"c\.safetensors is not a whole checkpoint"):
            checkpoint.load(path, "state")
    with pytest.raises(TypeError, match="a set"):
        checkpoint.save(path, "state", {"x": {1, 2}})


def test_a_pickle_is_refused_unread(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="evil"):
        checkpoint.load(tmp_path / "evil.safetensors", "model")
    torch.save({"w": torch.ones(1)}, tmp_path / "torch.pt")
    with pytest.raises(ValueError, match=r"torch\.pt"):
        checkpoint.load(tmp_path / "torch.pt", "model")
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_configuration_are_named(tmp_path):
    layer = torch.nn.Linear(3, 2)
    for weights, expected in [
        ({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, r"weight is \(2, 4\), expected \(2, 3\)"),
        ({"weight": torch.ones(2, 3)}, "bias is missing"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "more": torch.ones(1)}, "more is .* not part"),
    ]:
        with pytest.raises(ValueError, match=expected):
            checkpoint.load_weights("x.safetensors", layer, weights)


def test_json_error_names_the_file(tmp_path):
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(ValueError, match=r"r\.json is not a valid JSON"):
        files.read_json(tmp_path / "r.json")
