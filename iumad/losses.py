"""The training objective: E11 and E12 of the paper (paper.md 3.1) with the terms that A12 and A14 add.

Shapes: B batch, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from iumad.config import LossConfig
from iumad.model import Output
from iumad_kernels import kl_bottleneck


def objective(
    output: Output, labels: Tensor, config: LossConfig, classes: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of all terms, and the unweighted terms by name (detached).

    labels: (B) int64, indices into all classes. classes: sorted indices of the classes that compete in every
    softmax, from `competing_classes`; None = all.
    Terms: rgb_class, depth_class, fusion, reconstruction, bottleneck, bottleneck_class.
    """
    targets = labels if classes is None else torch.searchsorted(classes, labels)
    weighted: list[Tensor] = []
    terms: dict[str, Tensor] = {}

    def select(logits: Tensor) -> Tensor:
        return (logits if classes is None else logits[:, classes]).float()

    def add(name: str, weight: float, term: Tensor) -> None:
        weighted.append(weight * term)
        terms[name] = term.detach()

    class_weight = {"rgb": config.rgb_class, "depth": config.depth_class}
    for modality, logits in output.class_logits.items():
        if class_weight[modality] > 0:
            add(f"{modality}_class", class_weight[modality], F.cross_entropy(select(logits), targets))
    if config.fusion > 0:
        add("fusion", config.fusion, _squared_error(output.reconstruction, output.reference))
    if config.reconstruction > 0:
        errors = [
            _squared_error(branch, output.branch_reference[modality])
            for modality, branch in output.branch_reconstruction.items()
        ]
        add("reconstruction", config.reconstruction, torch.stack(errors).sum())
    heads = output.fused_logits, output.bottleneck_logits
    if heads[0] is not None and heads[1] is not None and config.bottleneck + config.bottleneck_class > 0:
        loss = kl_bottleneck(
            select(heads[0]),
            select(heads[1]),
            targets,
            kl_weight=config.bottleneck,
            ce_weight=config.bottleneck_class,
            detach_teacher=config.detach_teacher,
        )
        weighted.append(loss.total)
        terms["bottleneck"] = loss.kl.detach()
        terms["bottleneck_class"] = (loss.fused_ce + loss.bottleneck_ce).detach()
    return torch.stack(weighted).sum(), terms


def _squared_error(reconstruction: Tensor, reference: Tensor) -> Tensor:
    """E11: mean over all elements, in float32 under autocast too."""
    return F.mse_loss(reconstruction.float(), reference.float())


def competing_classes(config: LossConfig, seen: list[int], current: list[int]) -> Tensor | None:
    """Classes that loss.classes lets compete (A21): all (None), those seen so far, or the current step's."""
    chosen = {"all": None, "seen": seen, "step": current}[config.classes]
    return None if chosen is None else torch.tensor(sorted(chosen))
