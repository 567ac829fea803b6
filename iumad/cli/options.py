"""From command-line options to a configuration and a machine."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

from iumad import presets
from iumad.config import Config, apply_overrides, load
from iumad.engine.cache import default_cache_root
from iumad.engine.distributed import choose_device, join
from iumad.engine.runner import Machine


def config_from(args: argparse.Namespace, *, preset: str) -> Config:
    """Preset or file, then --data, --protocol and --seed, then --set; ``preset`` is the default preset."""
    config = load(args.config) if args.config else presets.get(args.preset or preset)
    if getattr(args, "data", None):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, dataset=args.data))
    if getattr(args, "protocol", None):
        steps = dataclasses.replace(config.protocol, name=args.protocol)
        config = dataclasses.replace(config, protocol=steps)
    if args.seed is not None:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=args.seed))
    return apply_overrides(config, args.overrides)


def machine_from(args: argparse.Namespace) -> Machine:
    """Device, processes and cache folder; joins the process group under torchrun."""
    device = choose_device(args.device)
    cache = Path(args.cache) if args.cache else default_cache_root() / "features"
    return Machine(device=device, world=join(device), cache=cache.expanduser())


def is_main() -> bool:
    """Whether this is the process that writes files, before a process group exists."""
    return int(os.environ.get("RANK", "0")) == 0
