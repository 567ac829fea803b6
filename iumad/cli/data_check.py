"""``iumad data check``: what is wrong with a data set."""

from __future__ import annotations

import argparse
from typing import Any


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the checker; exit code 1 if it finds an error."""
    from iumad.data import check

    spec = args.data if ":" in args.data or args.data == "demo" else f"folder:{args.data}"
    return check.run(spec)


def show(result: dict[str, Any]) -> str:
    """The checker's own text."""
    return str(result["text"])
