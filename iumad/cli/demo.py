"""``iumad demo``: data, training, evaluation and report from nothing, in minutes on a CPU."""

from __future__ import annotations

import argparse
from typing import Any

from iumad.cli.options import config_from
from iumad.cli.train import show, train

__all__ = ["run", "show"]


# A shorter schedule than the preset's: the whole demo in about six minutes on two cores.
SCHEDULE = ["train.epochs=40", "train.increment_epochs=40"]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the ``small`` preset, unless another is named, on the rendered data set."""
    if args.preset is None and args.config is None:
        args.overrides = [*SCHEDULE, *args.overrides]
    return train(config_from(args, preset="small"), args)
