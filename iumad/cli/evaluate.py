"""``iumad eval``: metrics of a stored model on a data set."""

from __future__ import annotations

import argparse
from typing import Any

from iumad.cli.options import machine_from
from iumad.data import open_dataset
from iumad.engine.artefact import load_artefact
from iumad.engine.cache import FeatureCache
from iumad.engine.evaluate import evaluate_class
from iumad.engine.progress import Progress
from iumad.engine.rundir import checkpoint_path
from iumad.report.tables import METRICS, aligned, percent


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate every class that the model has learned and the data set has."""
    path = checkpoint_path(args.checkpoint)
    machine = machine_from(args)
    artefact = load_artefact(path, machine.device)
    spec = args.data or artefact.config.data.dataset
    catalogue = open_dataset(spec)
    names = [name for name in artefact.seen if name in catalogue.classes]
    if not names:
        raise ValueError(f"{path} has learned {', '.join(artefact.seen)}; {spec} has none of these classes")
    source = FeatureCache(machine.cache, artefact.pipeline)
    results = {}
    for name in names:
        samples = catalogue.select(cls=name, split="test")
        source.ensure(samples, f"features of {name}")
        label = artefact.classes.index(name)
        with Progress(f"evaluating {name}", len(samples)) as progress:
            result = evaluate_class(
                artefact.model, source, samples, label, machine.device, progress=progress, with_cases=False
            )
        results[name] = result.metrics
    metrics = next(iter(results.values()))
    means = {key: sum(values[key] for values in results.values()) / len(results) for key in metrics}
    return {"checkpoint": str(path), "data": spec, "classes": results, "mean": means}


def show(result: dict[str, Any]) -> str:
    """One row a class."""
    body = [
        [name, *(percent(values[metric]) for metric in METRICS)]
        for name, values in [*result["classes"].items(), ("mean", result["mean"])]
    ]
    return aligned([result["data"], *METRICS.values()], body)
