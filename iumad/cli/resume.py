"""``iumad resume``: go on where a run was interrupted."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from iumad.cli.options import machine_from
from iumad.cli.train import result_of, show
from iumad.engine import group
from iumad.engine.distributed import leave

__all__ = ["run", "show"]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Finish every unfinished run of a directory; a finished one is reported again."""
    root = Path(args.run)
    if not (root / "config.json").exists() and not (root / "runs.json").exists():
        raise FileNotFoundError(2, "not a run directory", str(root))
    machine = machine_from(args)
    try:
        return result_of(group.execute(root, machine), root)
    finally:
        leave()
