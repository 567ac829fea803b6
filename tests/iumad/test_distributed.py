"""Two processes under torchrun against one process that computes the same shards."""

import os
import subprocess
import sys

import torch

from iumad.engine import checkpoint, group
from iumad.engine.distributed import World
from iumad.engine.log import read_log
from iumad.engine.runner import Machine, Run, prepare_run


def test_two_processes_equal_one(tmp_path, tiny_config, cache_root):
    """Jitter and dropout are on: the random numbers belong to the shard, not to the process."""
    config = tiny_config("train.shards=2", "model.dropout=0.2", "train.epochs=3")
    alone, together = tmp_path / "alone", tmp_path / "together"
    prepare_run(alone, config)
    Run(alone, Machine(torch.device("cpu"), World(), cache_root / "features", quiet=True)).execute()
    group.start(together, [group.Planned("main", "main", config)], overwrite=False)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "iumad",
    ]
    command += ["resume", str(together), "--cache", str(cache_root / "features"), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "IUMAD_CACHE": str(cache_root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Image AUROC") == 2  # the tables, printed by one process only
    for name in ("step_1.safetensors", "step_2.safetensors"):
        one = checkpoint.load(alone / name, "model")["weights"]
        two = checkpoint.load(together / name, "model")["weights"]
        for key in one:
            # Gradients of two shards are added in both cases; only the place where that happens differs.
            torch.testing.assert_close(two[key], one[key], rtol=1e-6, atol=1e-7, msg=key)
    losses = [
        [line["loss"] for line in read_log(root / "log.jsonl") if line["event"] == "train"]
        for root in (alone, together)
    ]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-6, atol=0)
