"""Scores and metrics of test images, class by class, and the pictures of the best and worst cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from iumad.data.catalogue import Catalogue, Sample
from iumad.engine.cache import Batch, LiveFeatures
from iumad.engine.progress import Progress
from iumad.metrics import PixelMetrics, ResultMatrix, average_precision, f1_max, image_auroc, image_score
from iumad.model import Output
from iumad.report.pictures import Pixels, panel

BATCH = 16


@dataclass(frozen=True)
class Scored:
    """One image and what the model says about it."""

    sample: Sample
    images: dict[str, Tensor]  # (3, S, S) by modality
    anomaly_map: NDArray[np.float32]  # (S, S)
    score: float
    predicted: int | None  # index of the class head's answer; None for a model without class heads


def score_batches(
    model: nn.Module, source: LiveFeatures, samples: Sequence[Sample], device: torch.device
) -> Iterator[Scored]:
    """Run the model in evaluation mode over samples that the source can serve."""
    model.eval()
    for start in range(0, len(samples), BATCH):
        chunk = samples[start : start + BATCH]
        batch = source.batch(chunk)
        yield from _scored(model, batch, chunk, device)


@torch.inference_mode()
def _scored(model: nn.Module, batch: Batch, samples: Sequence[Sample], device: torch.device) -> list[Scored]:
    moved = batch.to(device)
    output = model(moved.images, moved.features)
    maps, scores = output.anomaly_map.float().cpu().numpy(), output.score.float().cpu().tolist()
    predicted = predicted_classes(output)
    return [
        Scored(
            sample,
            {name: image[index] for name, image in batch.images.items()},
            maps[index],
            scores[index],
            None if predicted is None else predicted[index],
        )
        for index, sample in enumerate(samples)
    ]


def predicted_classes(output: Output) -> list[int] | None:
    """The class that the heads of all branches together find most probable, for each image."""
    logits = [*output.class_logits.values()]
    if output.bottleneck_logits is not None:
        logits.append(output.bottleneck_logits)
    if not logits:
        return None
    together = torch.stack([one.float().log_softmax(dim=1) for one in logits]).sum(dim=0)
    return list(together.argmax(dim=1).tolist())


@dataclass
class ClassResult:
    """Metrics of one class, the scores of its images, and some of them as pictures."""

    metrics: dict[str, float]
    scores: dict[str, list[float]]  # "good" and "defect"
    cases: list[tuple[dict[str, Any], Pixels]]


METRICS = ("i_auroc", "i_ap", "i_f1max", "i_auroc_std", "i_auroc_mean", "class_accuracy")


def evaluate_class(
    model: nn.Module,
    source: LiveFeatures,
    samples: Sequence[Sample],
    label: int,
    device: torch.device,
    *,
    progress: Progress,
    with_cases: bool = False,
) -> ClassResult:
    """Evaluate one class on its test samples; unlabelled ones are left out.

    Metrics, all in [0, 1], NaN where undefined: those of :class:`iumad.metrics.PixelMetrics`, ``i_auroc``,
    ``i_ap``, ``i_f1max`` by the model's image score, ``i_auroc_std`` and ``i_auroc_mean`` by the other two
    scores (paper.md A22), ``class_accuracy``.
    """
    pixels = PixelMetrics()
    kept: list[tuple[Scored, NDArray[np.bool_]]] = []
    scores, labels, spread, hits = [], [], [], []
    for scored in score_batches(model, source, samples, device):
        progress.advance()
        mask = source.pipeline.mask(scored.sample)
        if mask is None:
            continue
        pixels.update(scored.anomaly_map, mask)
        scores.append(scored.score)
        labels.append(not scored.sample.is_good)
        spread.append([float(image_score(scored.anomaly_map, how)) for how in ("std", "mean")])
        hits.append(scored.predicted == label)
        if with_cases:
            kept.append((scored, mask))
    split = {
        name: [score for score, defective in zip(scores, labels, strict=True) if defective == wanted]
        for name, wanted in (("good", False), ("defect", True))
    }
    if not scores:
        return ClassResult(dict.fromkeys(METRICS, float("nan")), split, [])
    metrics = {
        "i_auroc": image_auroc(scores, labels),
        "i_ap": average_precision(scores, labels),
        "i_f1max": f1_max(scores, labels),
        "i_auroc_std": image_auroc([one[0] for one in spread], labels),
        "i_auroc_mean": image_auroc([one[1] for one in spread], labels),
        "class_accuracy": float(np.mean(hits)),
        **pixels.compute(),
    }
    return ClassResult(metrics, split, _cases(kept) if with_cases else [])


def evaluate_step(
    model: nn.Module,
    source: LiveFeatures,
    catalogue: Catalogue,
    matrix: ResultMatrix,
    step: int,
    device: torch.device,
    *,
    with_cases: bool,
    quiet: bool = False,
) -> tuple[dict[str, dict[str, list[float]]], list[tuple[dict[str, Any], Pixels]]]:
    """Evaluate every class learned by ``step`` into ``matrix``; return image scores by class, and pictures."""
    seen = [name for names in matrix.steps[: step + 1] for name in names]
    tests = {name: catalogue.select(cls=name, split="test") for name in seen}
    everything = [sample for samples in tests.values() for sample in samples]
    source.ensure(everything, f"step {step + 1} test features", quiet=quiet)
    scores, cases = {}, []
    with Progress(f"step {step + 1} evaluation", len(everything), quiet=quiet) as progress:
        for name, samples in tests.items():
            label = matrix.classes.index(name)
            result = evaluate_class(
                model, source, samples, label, device, progress=progress, with_cases=with_cases
            )
            matrix.record(step, name, result.metrics)
            scores[name] = result.scores
            cases += result.cases
    return scores, cases


def _cases(kept: list[tuple[Scored, NDArray[np.bool_]]]) -> list[tuple[dict[str, Any], Pixels]]:
    """Best and worst localised defect (by AP inside the image), lowest-scored defect, highest normal."""
    found = np.concatenate([scored.anomaly_map.ravel() for scored, _ in kept])
    low, high = np.percentile(found, (1, 99.8))
    precision = [
        (average_precision(scored.anomaly_map, mask), scored, mask) for scored, mask in kept if mask.any()
    ]
    normal = [(scored, mask) for scored, mask in kept if not mask.any()]
    chosen = []
    if precision:
        ranked = sorted(precision, key=lambda item: item[0])
        missed = min(ranked[1:-1] or ranked, key=lambda item: item[1].score)
        for good, text, (value, scored, mask) in (
            (True, "best localised defect", ranked[-1]),
            (False, "worst localised defect", ranked[0]),
            (False, "lowest score of the other defects", missed),
        ):
            chosen.append((scored, mask, good, f"{text}, AP {100 * value:.0f} %, score {scored.score:.3g}"))
    if normal:
        scored, mask = max(normal, key=lambda item: item[0].score)
        chosen.append((scored, mask, False, f"normal image with the highest score, {scored.score:.3g}"))
    cases = []
    for scored, mask, good, why in chosen:
        sample = scored.sample
        about = {"class": sample.cls, "kind": sample.kind, "id": sample.id, "good": good, "why": why}
        images = {name: image.numpy() for name, image in scored.images.items()}
        cases.append((about, panel(images, scored.anomaly_map, mask, low=float(low), high=float(high))))
    return cases
