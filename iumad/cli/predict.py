"""``iumad predict``: one JSON line for every image."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from iumad.cli.options import machine_from
from iumad.engine.artefact import load_artefact
from iumad.engine.files import strict
from iumad.engine.predict import find_samples, predict
from iumad.engine.rundir import checkpoint_path


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print results as they come (with --json all at the end); exit code 1 if an image could not be read."""
    machine = machine_from(args)
    artefact = load_artefact(checkpoint_path(args.checkpoint), machine.device)
    depth = Path(args.depth) if args.depth else None
    samples = find_samples([Path(image) for image in args.images], depth, artefact.pipeline.modalities)
    out = Path(args.out) if args.out else None
    results = []
    for result in predict(artefact, samples, cls=args.cls, out=out, device=machine.device):
        results.append(result)
        if not args.json:
            print(json.dumps(strict(result)), flush=True)
    return {"images": results, "exit_code": int(any("error" in result for result in results))}


def show(result: dict[str, Any]) -> str:
    """Nothing: every line has been printed already."""
    return ""
