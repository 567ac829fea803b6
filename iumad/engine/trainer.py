"""Training of one step: batches from the cache, shards with their own random numbers, averaged gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from iumad.config import Config
from iumad.engine.cache import Batch, LiveFeatures
from iumad.engine.distributed import World
from iumad.engine.log import RunLog
from iumad.engine.progress import Progress
from iumad.engine.seeding import BatchPlan, derive
from iumad.incremental.guard import StepAccess
from iumad.incremental.protocol import Protocol
from iumad.incremental.update import UpdateRule
from iumad.losses import competing_classes, objective
from iumad.model import IBIUMAD


@dataclass
class Progression:
    """How far the training of one step is: what the training state holds besides weights and update rule."""

    step: int = 0
    iteration: int = 0
    seconds: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)  # loss terms of the current epoch, summed
    summed: int = 0


class Objective(nn.Module):
    """Model and loss as one module, so that DistributedDataParallel sees which weights the loss reaches."""

    def __init__(self, model: IBIUMAD, config: Config):
        super().__init__()
        self.model, self.config = model, config

    def forward(
        self, batch: Batch, labels: Tensor, classes: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its terms."""
        output = self.model(batch.images, batch.features)
        return objective(output, labels, self.config.loss, classes)


class Trainer:
    """Trains a model step by step.

    ``save`` is called with the progression whenever the training state should be stored.
    """

    def __init__(
        self,
        config: Config,
        protocol: Protocol,
        model: IBIUMAD,
        rule: UpdateRule,
        source: LiveFeatures,
        *,
        world: World,
        device: torch.device,
        log: RunLog,
        save: Callable[[Progression], None],
        quiet: bool = False,
    ):
        self.config, self.protocol, self.model, self.rule, self.source = config, protocol, model, rule, source
        self.world, self.device, self.log, self.save, self.quiet = world, device, log, save, quiet
        self.shards = config.train.shards or world.size
        for name, value, divisor in (
            ("train.batch_size", config.train.batch_size, self.shards),
            ("train.shards", self.shards, world.size),
        ):
            if value % divisor:
                raise ValueError(f"{name} = {value}: expected a multiple of {divisor}")
        module: nn.Module = Objective(model, config)
        if world.size > 1:
            module = DistributedDataParallel(module, find_unused_parameters=True)
        self._objective = module
        self._labels = {name: index for index, name in enumerate(protocol.classes)}

    def plan(self, access: StepAccess) -> BatchPlan:
        """The batches of a step."""
        train = self.config.train
        epochs = train.increment_epochs if access.step else train.epochs
        return BatchPlan(len(access.samples), epochs, train.batch_size, train.seed, access.step)

    def run(self, access: StepAccess, state: Progression) -> None:
        """Train from ``state`` to the end of the step; ``state`` is kept up to date."""
        plan = self.plan(access)
        competing = self._competing(access.step)
        saved = time.monotonic()
        title = f"step {access.step + 1}/{len(self.protocol.steps)}"
        with Progress(title, plan.iterations, start=state.iteration, quiet=self.quiet) as progress:
            while state.iteration < plan.iterations:
                began = time.monotonic()
                self._iterate(access, plan, competing, state)
                now = time.monotonic()
                state.seconds += now - began
                is_end = state.iteration == plan.iterations
                if is_end or plan.epoch(state.iteration) != plan.epoch(state.iteration - 1):
                    self._log_epoch(plan, state, progress)
                progress.advance()
                if is_end or now - saved >= self.config.train.checkpoint_seconds:
                    self.save(state)
                    saved = time.monotonic()

    def batches(self, access: StepAccess) -> Iterator[Batch]:
        """The training images of the step once, in order, for the end of the step."""
        size = self.config.train.batch_size
        for start in range(0, len(access.samples), size):
            samples = access.samples[start : start + size]
            access.check(samples)
            yield self.source.batch(samples).to(self.device)

    def _iterate(
        self, access: StepAccess, plan: BatchPlan, competing: Tensor | None, state: Progression
    ) -> None:
        seed, indices = self.config.train.seed, plan.batch(state.iteration)
        own = range(self.world.rank, self.shards, self.world.size)
        self._objective.train()
        for shard in own:
            torch.manual_seed(derive(seed, "shard", access.step, state.iteration, shard))
            samples = [access.samples[index] for index in indices[shard :: self.shards]]
            access.check(samples)
            labels = torch.tensor([self._labels[sample.cls] for sample in samples], device=self.device)
            batch = self.source.batch(samples).to(self.device)
            with self._sync(last=shard == own[-1]):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.autocast):
                    loss, terms = self._objective(batch, labels, competing)
                (loss * (self.world.size / self.shards)).backward()
            for name, value in {"loss": loss.detach(), **terms}.items():
                state.sums[name] = state.sums.get(name, torch.zeros(())) + value.float().cpu()
            state.summed += 1
        self.rule.step()
        state.iteration += 1

    def _sync(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients travel between processes once an iteration, with the last shard."""
        if isinstance(self._objective, DistributedDataParallel) and not last:
            return self._objective.no_sync()
        return nullcontext()

    def _competing(self, step: int) -> Tensor | None:
        seen = [self._labels[name] for name in self.protocol.seen(step)]
        current = [self._labels[name] for name in self.protocol.steps[step]]
        classes = competing_classes(self.config.loss, seen, current)
        return None if classes is None else classes.to(self.device)

    def _log_epoch(self, plan: BatchPlan, state: Progression, progress: Progress) -> None:
        names = sorted(state.sums)
        means = self.world.mean(torch.stack([state.sums[name] for name in names]) / state.summed)
        values = dict(zip(names, means.tolist(), strict=True))
        total = values.pop("loss")
        epoch = state.iteration * plan.batch_size / plan.images
        where = {"step": state.step, "epoch": round(epoch, 3), "iteration": state.iteration}
        self.log.write("train", **where, seconds=round(state.seconds, 3), loss=total, terms=values)
        progress.note(f"loss {total:.4g}")
        state.sums, state.summed = {}, 0
