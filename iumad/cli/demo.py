"""``iumad demo``: data, training, evaluation and report from nothing, in minutes on a CPU."""

from __future__ import annotations

import argparse
from typing import Any

from iumad.cli.options import config_from
from iumad.cli.train import show, train

__all__ = ["run", "show"]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the ``small`` preset on the rendered data set."""
    return train(config_from(args, preset="small"), args)
