"""``iumad report``: the HTML page and the tables of one run or group, or of several beside the paper."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from iumad.cli.train import result_of
from iumad.report.html import write_report
from iumad.report.load import load_runs


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write ``report.html`` into the run directory; with --compare, print instead."""
    roots = [Path(root) for root in args.run]
    if args.compare == "paper":
        from iumad.report.compare import compare_with_paper

        return compare_with_paper([view for root in roots for view in load_runs(root)])
    if len(roots) != 1:
        raise ValueError(f"{len(roots)} run directories given, expected one (any number with --compare)")
    views = load_runs(roots[0])
    write_report(views, roots[0] / "report.html")
    return result_of(views, roots[0])


def show(result: dict[str, Any]) -> str:
    """The tables."""
    return f"{result['text']}\n\nreport: {result['report']}" if "report" in result else result["text"]
