"""``iumad data check``: what is wrong with a data set."""

from __future__ import annotations

import argparse
from typing import Any

from iumad.data.check import check_dataset


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check every file; exit code 1 if there is an error among the findings."""
    report = check_dataset(args.data)
    return {**report.to_dict(), "text": str(report), "exit_code": 0 if report.ok else 1}


def show(result: dict[str, Any]) -> str:
    """The table and the findings."""
    return str(result["text"])
