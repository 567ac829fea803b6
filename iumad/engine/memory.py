"""A sanity row for every table: nearest neighbours in a memory of frozen features, without any training.

The memory keeps what it has seen (it may: it is no competitor under the no-replay rule, but a yardstick for
what the backbone alone is worth), so it does not forget.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from iumad.config import Config
from iumad.data import Sample
from iumad.engine.evaluate import evaluate_step
from iumad.engine.runner import Machine, Prepared, write_results
from iumad.engine.seeding import derive
from iumad.model import Output
from iumad.model.discriminator import discriminate

CELLS = 10_000  # feature vectors kept of a class


class NearestNeighbour(nn.Module):
    """Reconstructs every cell by the nearest cell of a normal image; map and score are the model's own.

    A cell's feature is averaged over its 3 x 3 neighbourhood; the modalities are concatenated.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.bank = torch.empty(0)  # (M, C)

    def add(self, cells_MC: Tensor) -> None:
        """Remember feature vectors."""
        self.bank = torch.cat([self.bank, cells_MC]) if len(self.bank) else cells_MC

    def cells(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features by modality (B, C, G, G) to what is compared, (B, sum of C, G, G)."""
        joined = torch.cat([features[name] for name in self.config.model.modalities], dim=1)
        return F.avg_pool2d(joined, 3, stride=1, padding=1, count_include_pad=False)

    def forward(self, images: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> Output:
        """The same output as the trained model's."""
        reference = self.cells(features)
        flat = rearrange(reference, "b c h w -> (b h w) c")
        nearest = torch.cat(
            [self.bank[torch.cdist(part, self.bank).argmin(dim=1)] for part in flat.split(1024)]
        )
        found = rearrange(nearest, "(b h w) c -> b c h w", h=reference.shape[2], w=reference.shape[3])
        model = self.config.model
        size = self.config.data.image_size
        heat, score = discriminate(
            found, reference, size=size, score=model.image_score, pool=model.score_pool
        )
        return Output(reconstruction=found, reference=reference, anomaly_map=heat, score=score)


def run_memory(root: Path, machine: Machine) -> None:
    """Evaluate the memory under a run's protocol and write ``results.json``; only the main process works."""
    if not machine.world.is_main:
        return
    run = Prepared(root, machine)
    model = NearestNeighbour(run.config).to(machine.device)
    for step, names in enumerate(run.protocol.steps):
        access = run.guard.open(step)
        run.source.ensure(access.samples, f"step {step + 1} features", quiet=run.quiet)
        began = time.monotonic()
        for name in names:
            model.add(_remembered(model, run, [s for s in access.samples if s.cls == name], name))
        access.close()
        seconds = time.monotonic() - began
        scores, cases = evaluate_step(
            model,
            run.source,
            run.catalogue,
            run.matrix,
            step,
            machine.device,
            with_cases=step == len(run.protocol.steps) - 1,
            quiet=run.quiet,
        )
        run.results["steps"].append(
            {
                "step": step,
                "classes": list(names),
                "train_images": len(access.samples),
                "iterations": 0,
                "epochs": 0,
                "train_seconds": seconds,
                "kept_bytes": model.bank.nbytes,
                "scores": scores,
            }
        )
        write_results(run.directory, run.results, run.matrix, cases, run.config, machine.device)


def _remembered(model: NearestNeighbour, run: Prepared, samples: Sequence[Sample], name: str) -> Tensor:
    """All cells of a class, or a random choice of CELLS of them."""
    parts = [model.cells(run.source.batch([sample]).to(run.machine.device).features) for sample in samples]
    cells = rearrange(torch.cat(parts), "b c h w -> (b h w) c")
    generator = torch.Generator().manual_seed(derive(run.config.train.seed, "memory", name))
    return cells[torch.randperm(len(cells), generator=generator)[:CELLS].to(cells.device)]
