"""``iumad info``: versions and presets, what a checkpoint holds, or what the feature cache is worth."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import iumad_kernels
from iumad import presets
from iumad.cli.options import config_from, machine_from
from iumad.config import Config
from iumad.engine import checkpoint
from iumad.engine.distributed import choose_device
from iumad.engine.environment import environment
from iumad.engine.rundir import checkpoint_path
from iumad.engine.runner import Machine, Run, prepare_run


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Facts as a dict."""
    if args.cache_benchmark:
        config = config_from(args, preset="small")
        data = dataclasses.replace(config.data, dataset=args.cache_benchmark)
        return cache_benchmark(dataclasses.replace(config, data=data), machine_from(args))
    if args.checkpoint:
        path = checkpoint_path(args.checkpoint)
        content = checkpoint.load(path, "model")
        weights = content.pop("weights")
        count = sum(weight.numel() for weight in weights.values())
        return {"checkpoint": str(path), "parameters": count, **content}
    return {
        "environment": environment(choose_device(args.device)),
        "kernels": getattr(iumad_kernels, "__version__", "unknown"),
        "presets": list(presets.NAMES),
    }


def cache_benchmark(config: Config, machine: Machine) -> dict[str, Any]:
    """Seconds of one epoch over all classes with the cache (filled before) and without it."""
    seconds = {}
    for cached in (True, False):
        train = dataclasses.replace(config.train, epochs=1, feature_cache=cached, checkpoint_seconds=1e9)
        steps = dataclasses.replace(config.protocol, name="joint")
        changed = dataclasses.replace(config, train=train, protocol=steps)
        with tempfile.TemporaryDirectory() as folder:
            prepare_run(Path(folder), changed)
            job = Run(Path(folder), machine)
            access = job.guard.open(0)
            job.source.ensure(access.samples, "features")
            job.rule.begin_step(0, job.model, iterations=job.trainer.plan(access).iterations)
            began = time.perf_counter()
            job.trainer.run(access, job.position)
            seconds[cached] = time.perf_counter() - began
            images = len(access.samples)
    return {"images": images, "epoch_seconds_cached": seconds[True], "epoch_seconds_uncached": seconds[False]}


def show(result: dict[str, Any]) -> str:
    """Indented JSON: short enough to read."""
    return json.dumps(result, indent=1)
