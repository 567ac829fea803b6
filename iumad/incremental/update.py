"""Update rules: how training changes the weights, in the base step and in increments (paper.md 3.4, A17).

    rule = build_update_rule(config, model)
    for step in ...:
        rule.begin_step(step, model, iterations=...)    # of the whole step, for the schedule
        for batch in ...:
            loss.backward()
            rule.step()                                 # clips, updates, clears the gradients
        rule.end_step(model, batches)                   # the step's training images once more, no gradient
    rule.state_dict(), rule.load_state_dict(state)      # at any moment; resuming is exact to the bit

plain: AdamW in every step, new at each. With one new class per step its class heads soon answer the new class
    only: nothing in the data says otherwise (see loss.classes for a remedy).
iuf: the base step is plain. In increments the second linear layer of every encoder and decoder feed-forward
    moves little along directions that carried old classes, and all weights are pulled towards their values at
    the start of the step. Knobs in `IUFConfig`: a larger `pull` or smaller `lr` forgets less and learns less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from iumad.config import Config, TrainConfig
from iumad.model import IBIUMAD


class Inputs(Protocol):
    """A batch: the two arguments of the model."""

    images: Mapping[str, Tensor]
    features: Mapping[str, Tensor]


class UpdateRule:
    """The plain rule, AdamW, and the interface of all rules."""

    def __init__(self, config: Config, model: IBIUMAD) -> None:
        self.config = config
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.number = self.iteration = self.iterations = 0
        self.optimizer = self._make_optimizer()

    def begin_step(self, step: int, model: IBIUMAD, *, iterations: int) -> None:
        """Start step number `step` of the protocol (0 = base) with a new optimiser and schedule."""
        self.number, self.iteration, self.iterations = step, 0, iterations
        self.optimizer = self._make_optimizer()

    def step(self) -> None:
        """One iteration: clip the gradients to train.grad_clip, update, clear the gradients."""
        train = self.config.train
        if train.grad_clip > 0:
            nn.utils.clip_grad_norm_(self.parameters, train.grad_clip)
        factor = self._schedule_factor()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.iteration += 1
        self._update()
        self.optimizer.zero_grad()

    def end_step(self, model: IBIUMAD, batches: Iterable[Inputs]) -> None:
        """Learn from the finished step what later steps need; the plain rule needs nothing."""

    def storage(self) -> int:
        """Bytes kept from the data of finished steps, weights aside."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of tensors and numbers."""
        return {
            "number": self.number,
            "iteration": self.iteration,
            "iterations": self.iterations,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; the model's weights are restored separately."""
        self.number, self.iteration = state["number"], state["iteration"]
        self.iterations = state["iterations"]
        self.optimizer = self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return self._adamw(self.config.train.lr)

    def _adamw(self, lr: float) -> torch.optim.Optimizer:
        train = self.config.train
        group = {"params": self.parameters, "initial_lr": lr}
        return torch.optim.AdamW(
            [group], lr=lr, betas=train.betas, weight_decay=train.weight_decay, fused=True
        )

    def _update(self) -> None:
        self.optimizer.step()

    def _schedule_factor(self) -> float:
        train = self.config.train
        epochs = train.increment_epochs if self.number else train.epochs
        return schedule_factor(train, self.iteration, self.iterations, epochs)


class IUFRule(UpdateRule):
    """IUF's constrained update, with feature spaces taken at the end of every step.

    The token means of a protected layer's outputs over all old training images form a matrix with one row
    per image. Its right singular vectors V, strongest first, are the old directions; an update of the layer's
    weight (D x inner) or bias (D) is multiplied by V^T diag(ladder) V with ladder_k = log(k + 1) / log(D):
    the strongest direction is frozen, the weakest free. Only each layer's D x D Gram matrix is kept: it
    determines V, adds up over steps and does not grow with the number of images.
    """

    def __init__(self, config: Config, model: IBIUMAD) -> None:
        self.protected = model.protected_layers()
        self.grams: dict[str, Tensor] = {}
        self.projections: dict[str, Tensor] = {}
        self.old: list[Tensor] = []
        super().__init__(config, model)

    def begin_step(self, step: int, model: IBIUMAD, *, iterations: int) -> None:
        """As `UpdateRule`; an increment also remembers the present weights and prepares the projections."""
        super().begin_step(step, model, iterations=iterations)
        self.old = [p.detach().clone() for p in self.parameters] if self.constrained else []
        self._prepare()

    @property
    def constrained(self) -> bool:
        """Whether the present step is an increment with something to protect."""
        return self.number > 0 and bool(self.grams)

    @torch.no_grad()
    def end_step(self, model: IBIUMAD, batches: Iterable[Inputs]) -> None:
        """Add the step's training images to the feature spaces of all protected layers."""
        rows: dict[str, Tensor] = {}

        def remember(name: str) -> Any:
            return lambda module, inputs, output: rows.update({name: output.mean(dim=1).double()})

        handles = [layer.register_forward_hook(remember(name)) for name, layer in self.protected.items()]
        training = model.training
        model.eval()
        try:
            for batch in batches:
                model(batch.images, batch.features)
                for name, row_BD in rows.items():
                    gram_DD = row_BD.T @ row_BD
                    self.grams[name] = self.grams[name] + gram_DD if name in self.grams else gram_DD
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()

    def storage(self) -> int:
        """Bytes of the Gram matrices."""
        return sum(gram.nbytes for gram in self.grams.values())

    def state_dict(self) -> dict[str, Any]:
        """As `UpdateRule`, with the Gram matrices and the weights at the start of the step."""
        return {**super().state_dict(), "grams": dict(self.grams), "old": list(self.old)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `UpdateRule`."""
        device = self.parameters[0].device
        self.grams = {name: gram.to(device) for name, gram in state["grams"].items()}
        self.old = [old.to(device) for old in state["old"]]
        super().load_state_dict(state)
        self._prepare()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        iuf = self.config.iuf
        if not self.constrained:
            return super()._make_optimizer()
        if iuf.optimizer == "adamw":
            return self._adamw(iuf.lr)
        return torch.optim.SGD([{"params": self.parameters, "initial_lr": iuf.lr}], lr=iuf.lr)

    def _prepare(self) -> None:
        grams = self.grams if self.constrained else {}
        self.projections = {name: projection(gram).float() for name, gram in grams.items()}

    @torch.no_grad()
    def _update(self) -> None:
        """The optimiser's step, projected in protected layers; then the pull that precedes a next iteration.

        It is the step that is projected, not the gradient: the same for SGD, and right for AdamW too, whose
        element-wise scaling would otherwise turn the step back into frozen directions.
        """
        if not self.constrained:
            super()._update()
            return
        layers = [(self.protected[name], matrix) for name, matrix in self.projections.items()]
        before = [(layer.weight.clone(), layer.bias.clone()) for layer, _ in layers]
        self.optimizer.step()
        for (layer, matrix_DD), (weight, bias) in zip(layers, before):
            layer.weight.copy_(weight + matrix_DD @ (layer.weight - weight))
            layer.bias.copy_(bias + matrix_DD @ (layer.bias - bias))
        if self.iteration < self.iterations and self.iteration % self.config.iuf.pull_every == 0:
            pull = self.config.iuf.pull * self._schedule_factor()
            for parameter, old in zip(self.parameters, self.old):
                parameter.lerp_(old, pull)


def build_update_rule(config: Config, model: IBIUMAD) -> UpdateRule:
    """The rule `config.protocol.update_rule` for the trainable parameters of `model`."""
    return {"plain": UpdateRule, "iuf": IUFRule}[config.protocol.update_rule](config, model)


def projection(gram_DD: Tensor) -> Tensor:
    """V^T diag(ladder) V (D, D) of a feature matrix, from its Gram matrix; strongest direction frozen."""
    dim = len(gram_DD)
    directions = torch.linalg.eigh(gram_DD).eigenvectors.flip(1)  # columns, strongest first
    ladder = torch.arange(1, dim + 1, dtype=gram_DD.dtype, device=gram_DD.device).log() / math.log(dim)
    return (directions * ladder) @ directions.T


def schedule_factor(train: TrainConfig, iteration: int, iterations: int, epochs: int) -> float:
    """Rate of an iteration, counted from 0, relative to the base rate; the step has `epochs` epochs."""
    done = iteration / iterations
    if done < train.warmup:
        return (iteration + 1) / (train.warmup * iterations + 1)
    if train.schedule == "step":
        return train.schedule_gamma ** (int(done * epochs) // train.schedule_epochs)
    if train.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (done - train.warmup) / (1 - train.warmup)))
    return 1.0
