"""One run: the whole incremental protocol on one data set, with one seed and one class order."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iumad.backbone import build_backbone
from iumad.config import Config
from iumad.data import Catalogue, open_dataset
from iumad.engine import checkpoint
from iumad.engine.artefact import Artefact, save_artefact
from iumad.engine.cache import FeatureCache, LiveFeatures
from iumad.engine.distributed import World
from iumad.engine.environment import environment
from iumad.engine.evaluate import evaluate_step, score_batches
from iumad.engine.files import read_json, strict, write_bytes, write_json
from iumad.engine.inputs import InputPipeline, check_modalities
from iumad.engine.log import RunLog
from iumad.engine.progress import Progress
from iumad.engine.rundir import RunDirectory
from iumad.engine.seeding import derive
from iumad.engine.thresholds import threshold
from iumad.engine.trainer import Progression, Trainer
from iumad.incremental.guard import LeakGuard
from iumad.incremental.protocol import Protocol, parse_protocol
from iumad.incremental.update import build_update_rule
from iumad.metrics import ResultMatrix
from iumad.model import build_model
from iumad.report.pictures import Pixels, png


@dataclass(frozen=True)
class Machine:
    """What a run is computed on; none of it changes the result."""

    device: torch.device
    world: World
    cache: Path
    quiet: bool = False


def run_settings(config: Config) -> dict[str, Any]:
    """The content of ``config.json`` of a new run.

    Raises:
        ValueError: if the configuration does not fit the data.
    """
    catalogue = open_dataset(config.data.dataset)
    check_modalities(catalogue, config)
    protocol = resolve_protocol(config, catalogue)
    if protocol.update is not None:
        config = dataclasses.replace(
            config, protocol=dataclasses.replace(config.protocol, update_rule=protocol.update)
        )
    return {
        "data": config.data.dataset,
        "name": catalogue.name,
        "protocol": protocol.name,
        "update_rule": config.protocol.update_rule,
        "steps": [list(names) for names in protocol.steps],
        "classes": list(protocol.classes),
        "command": sys.argv,
        "config": config.to_dict(),
    }


def prepare_run(root: Path, config: Config) -> None:
    """Write ``config.json`` of a new run."""
    write_json(RunDirectory(root).config, run_settings(config))


def resolve_protocol(config: Config, catalogue: Catalogue) -> Protocol:
    """The protocol of a configuration over the classes of a data set."""
    order = config.protocol.class_order
    unknown = [name for name in order if name not in catalogue.classes]
    if unknown:
        known = ", ".join(catalogue.classes)
        raise ValueError(
            f"protocol.class_order names {unknown[0]!r}; the classes of the data set are {known}"
        )
    return parse_protocol(config.protocol.name, order or catalogue.classes)


def source_for(config: Config, machine: Machine) -> LiveFeatures:
    """The feature source of a configuration: cached, unless train.feature_cache is off."""
    pipeline = InputPipeline(config, build_backbone(config.backbone), device=machine.device)
    return FeatureCache(machine.cache, pipeline) if config.train.feature_cache else LiveFeatures(pipeline)


class Prepared:
    """What every kind of run starts from: settings, data, protocol, guard, features."""

    def __init__(self, root: Path, machine: Machine):
        self.directory, self.machine = RunDirectory(root), machine
        self.settings = self.directory.settings()
        self.config = Config.from_dict(self.settings["config"])
        dataset = self.config.data.dataset
        self.catalogue = open_dataset(dataset)
        self.protocol = resolve_protocol(self.config, self.catalogue)
        if [list(names) for names in self.protocol.steps] != self.settings["steps"]:
            raise ValueError(f"{self.directory.config}: the classes of {dataset} have changed since")
        self.quiet = machine.quiet or not machine.world.is_main
        self.source = source_for(self.config, machine)
        with Progress("content hashes", len(self.catalogue.samples), quiet=self.quiet) as progress:
            for sample in self.catalogue.samples:
                self.source.digest(sample)
                progress.advance()
        self.guard = LeakGuard(
            self.catalogue,
            self.protocol,
            include_validation=self.config.data.include_validation,
            holdout=self.config.threshold.holdout,
            digest=self.source.digest,
        )
        self.matrix = ResultMatrix(self.protocol.steps)
        self.results: dict[str, Any] = {"matrix": None, "thresholds": {}, "steps": [], "cases": []}


class Run(Prepared):
    """A run in its directory, new or interrupted. ``execute`` brings it to its end."""

    def __init__(self, root: Path, machine: Machine):
        super().__init__(root, machine)
        state = checkpoint.load(self.directory.state, "state") if self.directory.state.exists() else None
        torch.manual_seed(derive(self.config.train.seed, "weights"))
        self.model = build_model(self.config, len(self.protocol.classes), self.source.pipeline.channels)
        self.model.to(machine.device)
        self.rule = build_update_rule(self.config, self.model)
        self.position = Progression()
        self.computed: dict[int, dict[str, float]] = {}  # by step: how often and how long the backbone ran
        offset = None
        if state is not None:
            offset = self._restore(state)
        elif self.directory.log.exists():
            offset = 0
        is_main = machine.world.is_main
        self.log = RunLog(self.directory.log if is_main else None, offset)
        self.log.write("resume" if state else "start", environment=environment(machine.device))
        self.trainer = Trainer(
            self.config,
            self.protocol,
            self.model,
            self.rule,
            self.source,
            world=machine.world,
            device=machine.device,
            log=self.log,
            save=self._save,
            quiet=self.quiet,
        )

    def execute(self) -> dict[str, Any]:
        """Train and evaluate every step that is left; return the content of ``results.json``."""
        for step in range(self.position.step, len(self.protocol.steps)):
            if step != self.position.step:
                self.position = Progression(step=step)
            self._learn(step)
            if self.machine.world.is_main:
                self._evaluate(step)
            self.machine.world.barrier()
        if self.machine.world.is_main:
            self.log.write("done")
            self.directory.state.unlink(missing_ok=True)
        self.log.close()
        return self.results

    def _learn(self, step: int) -> None:
        access = self.guard.open(step)
        before = (self.source.computed, self.source.seconds)
        self.source.ensure(access.samples, f"step {step + 1} features", quiet=self.quiet)
        computed, seconds = self.source.computed - before[0], self.source.seconds - before[1]
        cached = len(access.samples) - computed
        self.log.write("features", step=step, computed=computed, cached=cached, seconds=seconds)
        self.computed[step] = {"features_computed": computed, "feature_seconds": seconds}
        if self.position.iteration == 0:
            self.rule.begin_step(step, self.model, iterations=self.trainer.plan(access).iterations)
        self.trainer.run(access, self.position)
        self.rule.end_step(self.model, self.trainer.batches(access))
        access.close()

    def _evaluate(self, step: int) -> None:
        """Thresholds of the step's classes, the checkpoint, then the test images of all seen classes."""
        device = self.machine.device
        thresholds = self.results["thresholds"]
        for name in self.protocol.steps[step]:
            samples = self.guard.calibration(name)
            self.source.ensure(samples, f"features of {name}", quiet=self.quiet)
            normal = [scored.score for scored in score_batches(self.model, self.source, samples, device)]
            thresholds[name] = threshold(normal, self.config.threshold.false_positive_rate)
        seen = self.protocol.seen(step)
        artefact = Artefact(
            self.config, self.protocol.classes, seen, dict(thresholds), self.model, self.source.pipeline
        )
        save_artefact(self.directory.checkpoint(step), artefact)
        scores, cases = evaluate_step(
            self.model,
            self.source,
            self.catalogue,
            self.matrix,
            step,
            device,
            with_cases=step == len(self.protocol.steps) - 1,
            quiet=self.quiet,
        )
        plan = self.trainer.plan(self.guard.open(step))
        self.results["steps"].append(
            {
                "step": step,
                "classes": list(self.protocol.steps[step]),
                "train_images": plan.images,
                "iterations": plan.iterations,
                "epochs": plan.iterations * plan.batch_size / plan.images,
                "train_seconds": self.position.seconds,
                "kept_bytes": self.rule.storage(),
                **self.computed[step],
                "scores": scores,
            }
        )
        write_results(self.directory, self.results, self.matrix, cases, self.config, device)
        means = {name: self.matrix.final_mean(name) for name in self.matrix.metrics}
        self.log.write("evaluate", step=step, means=strict(means))

    def _save(self, position: Progression) -> None:
        if not self.machine.world.is_main:
            return
        content = {
            "config": json.dumps(self.settings["config"], sort_keys=True),
            "position": dataclasses.asdict(position),
            "weights": self.model.state_dict(),
            "rule": self.rule.state_dict(),
            "log": self.log.sync(),
            "threads": torch.get_num_threads(),
        }
        checkpoint.save(self.directory.state, "state", content)

    def _restore(self, saved: dict[str, Any]) -> int:
        """Continue from a saved state; return the length of the log at that moment."""
        if saved["config"] != json.dumps(self.settings["config"], sort_keys=True):
            state, config = self.directory.state, self.directory.config
            raise ValueError(f"{state} was saved with another configuration than {config} holds")
        self.position = Progression(**saved["position"])
        checkpoint.load_weights(self.directory.state, self.model, saved["weights"])
        self.rule.load_state_dict(saved["rule"])
        torch.set_num_threads(saved["threads"])
        step = self.position.step
        if step > 0:
            self.results = read_json(self.directory.results)
            self.results["steps"] = self.results["steps"][:step]
            self.matrix = ResultMatrix.from_dict(self.results["matrix"])
        return int(saved["log"])


def write_results(
    directory: RunDirectory,
    results: dict[str, Any],
    matrix: ResultMatrix,
    cases: list[tuple[dict[str, Any], Pixels]],
    config: Config,
    device: torch.device,
) -> None:
    """Complete ``results`` (thresholds and steps) with matrix, summary and pictures, and write them."""
    for index, (about, picture) in enumerate(cases):
        about["file"] = f"cases/{index:03d}_{about['class']}.png"
        write_bytes(directory.root / about["file"], png(picture))
    columns = [{"rgb": "RGB", "depth": "depth"}[name] for name in config.model.modalities]
    results |= {
        "matrix": matrix.to_dict(),
        "summary": {name: matrix.summary(name) for name in matrix.metrics},
        "cases": [about for about, _ in cases],
        "case_columns": " | ".join([*columns, "anomaly map", "mask"]),
        "environment": environment(device),
    }
    write_json(directory.results, results)
