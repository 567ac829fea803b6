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
from iumad.engine.evaluate import evaluate_class, score_batches
from iumad.engine.files import read_json, write_bytes, write_json
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
from iumad.report.pictures import png


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


class Run:
    """A run in its directory, new or interrupted. ``execute`` brings it to its end."""

    def __init__(self, root: Path, machine: Machine):
        self.directory, self.machine = RunDirectory(root), machine
        self.settings = self.directory.settings()
        self.config = Config.from_dict(self.settings["config"])
        self.catalogue = open_dataset(self.config.data.dataset)
        self.protocol = resolve_protocol(self.config, self.catalogue)
        if [list(names) for names in self.protocol.steps] != self.settings["steps"]:
            dataset = self.config.data.dataset
            raise ValueError(f"{self.directory.config}: the classes of {dataset} have changed since")
        train, data = self.config.train, self.config.data
        state = checkpoint.load(self.directory.state, "state") if self.directory.state.exists() else None
        self.source = source_for(self.config, machine)
        self.guard = LeakGuard(
            self.catalogue,
            self.protocol,
            include_validation=data.include_validation,
            holdout=self.config.threshold.holdout,
            digest=self.source.digest,
        )
        torch.manual_seed(derive(train.seed, "weights"))
        self.model = build_model(self.config, len(self.protocol.classes), self.source.pipeline.channels)
        self.model.to(machine.device)
        self.rule = build_update_rule(self.config, self.model)
        self.position = Progression()
        self.matrix = ResultMatrix(self.protocol.steps)
        self.results: dict[str, Any] = {"matrix": None, "thresholds": {}, "steps": [], "cases": []}
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
            quiet=machine.quiet,
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
        quiet = self.machine.quiet or not self.machine.world.is_main
        before = (self.source.computed, self.source.seconds)
        self.source.ensure(access.samples, f"step {step + 1} features", quiet=quiet)
        computed, seconds = self.source.computed - before[0], self.source.seconds - before[1]
        cached = len(access.samples) - computed
        self.log.write("features", step=step, computed=computed, cached=cached, seconds=seconds)
        if self.position.iteration == 0:
            self.rule.begin_step(step, self.model, iterations=self.trainer.plan(access).iterations)
        self.trainer.run(access, self.position)
        self.rule.end_step(self.model, self.trainer.batches(access))
        access.close()

    def _evaluate(self, step: int) -> None:
        """Thresholds of the step's classes, the checkpoint, then the test images of all seen classes."""
        quiet, device = self.machine.quiet, self.machine.device
        thresholds = self.results["thresholds"]
        for name in self.protocol.steps[step]:
            samples = self.guard.calibration(name)
            self.source.ensure(samples, f"features of {name}", quiet=quiet)
            scores = [scored.score for scored in score_batches(self.model, self.source, samples, device)]
            thresholds[name] = threshold(scores, self.config.threshold.false_positive_rate)
        seen = self.protocol.seen(step)
        artefact = Artefact(
            self.config, self.protocol.classes, seen, dict(thresholds), self.model, self.source.pipeline
        )
        save_artefact(self.directory.checkpoint(step), artefact)
        tests = {name: self.catalogue.select(cls=name, split="test") for name in seen}
        everything = [sample for samples in tests.values() for sample in samples]
        self.source.ensure(everything, f"step {step + 1} test features", quiet=quiet)
        is_last = step == len(self.protocol.steps) - 1
        all_scores, cases = {}, []
        with Progress(f"step {step + 1} evaluation", len(everything), quiet=quiet) as progress:
            for name, samples in tests.items():
                label = self.protocol.classes.index(name)
                result = evaluate_class(
                    self.model, self.source, samples, label, device, progress=progress, with_cases=is_last
                )
                self.matrix.record(step, name, result.metrics)
                all_scores[name] = result.scores
                cases += result.cases
        for index, (about, picture) in enumerate(cases):
            about["file"] = f"cases/{index:03d}_{about['class']}.png"
            write_bytes(self.directory.root / about["file"], png(picture))
        self._write_results(step, all_scores, [about for about, _ in cases])

    def _write_results(self, step: int, scores: dict[str, Any], cases: list[dict[str, Any]]) -> None:
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
                "scores": scores,
            }
        )
        metrics = self.matrix.metrics
        columns = {"rgb": "RGB", "depth": "depth"}
        shown = [columns[name] for name in self.config.model.modalities]
        self.results |= {
            "matrix": self.matrix.to_dict(),
            "summary": {name: self.matrix.summary(name) for name in metrics},
            "cases": cases,
            "case_columns": " | ".join([*shown, "anomaly map", "mask"]),
            "environment": environment(self.machine.device),
        }
        write_json(self.directory.results, self.results)
        means = {name: self.matrix.final_mean(name) for name in metrics}
        self.log.write("evaluate", step=step, means=means)

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
