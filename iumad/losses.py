"""The training objective: E11 and E12 of the paper (paper.md 3.1) with the terms that A12 and A14 add.

Shapes: B batch, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from iumad.config import LossConfig
from iumad.model import Output, ops


def objective(
    output: Output, labels: Tensor, config: LossConfig, classes: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of all terms, and the unweighted terms by name (detached).

    labels: (B) int64, indices into all classes. classes: sorted indices of the classes that compete in every
    softmax, from `competing_classes`; None = all.
    Terms: rgb_class, depth_class, fusion, bottleneck, bottleneck_class, reconstruction.
    """

    def select(logits: Tensor) -> Tensor:
        return (logits if classes is None else logits[:, classes]).float()

    targets = labels if classes is None else torch.searchsorted(classes, labels)
    weights = {"rgb": config.rgb_class, "depth": config.depth_class}
    terms: dict[str, tuple[float, Tensor]] = {}
    for modality, logits in output.class_logits.items():
        if weights[modality] > 0:
            terms[f"{modality}_class"] = weights[modality], F.cross_entropy(select(logits), targets)
    if config.fusion > 0:
        terms["fusion"] = config.fusion, F.mse_loss(output.reconstruction.float(), output.reference.float())
    if output.fused_logits is not None and output.bottleneck_logits is not None:
        _, parts = ops.kl_bottleneck(
            select(output.fused_logits),
            select(output.bottleneck_logits),
            targets,
            detach_teacher=config.detach_teacher,
        )
        if config.bottleneck > 0:
            terms["bottleneck"] = config.bottleneck, parts["kl"]
        if config.bottleneck_class > 0:
            terms["bottleneck_class"] = config.bottleneck_class, parts["ce"]
    if config.reconstruction > 0:
        errors = [
            F.mse_loss(branch.float(), output.branch_reference[modality].float())
            for modality, branch in output.branch_reconstruction.items()
        ]
        terms["reconstruction"] = config.reconstruction, torch.stack(errors).sum()
    total = torch.stack([weight * term for weight, term in terms.values()]).sum()
    return total, {name: term.detach() for name, (_, term) in terms.items()}


def competing_classes(config: LossConfig, seen: list[int], current: list[int]) -> Tensor | None:
    """Classes that loss.classes lets compete (A21): all (None), those seen so far, or the current step's."""
    chosen = {"all": None, "seen": seen, "step": current}[config.classes]
    return None if chosen is None else torch.tensor(sorted(chosen))
