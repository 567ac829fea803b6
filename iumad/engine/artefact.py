"""The product of a run: a model with everything that scoring new images needs, in one checkpoint file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iumad.backbone import build_backbone
from iumad.config import Config
from iumad.engine import checkpoint
from iumad.engine.environment import environment
from iumad.engine.inputs import InputPipeline
from iumad.model import IBIUMAD, build_model


@dataclass(frozen=True)
class Artefact:
    """A trained model and its surroundings.

    ``classes`` are all classes of the protocol (the model's outputs), ``seen`` those learned so far,
    ``thresholds`` the image-score thresholds of :func:`iumad.engine.thresholds.threshold` by class.
    """

    config: Config
    classes: tuple[str, ...]
    seen: tuple[str, ...]
    thresholds: dict[str, dict[str, Any] | None]
    model: IBIUMAD
    pipeline: InputPipeline


def save_artefact(path: Path, artefact: Artefact) -> None:
    """Write the artefact atomically."""
    content = {
        "config": artefact.config.to_dict(),
        "classes": list(artefact.classes),
        "seen": list(artefact.seen),
        "thresholds": artefact.thresholds,
        "inputs": artefact.pipeline.identity,
        "environment": environment(),
        "weights": artefact.model.state_dict(),
    }
    checkpoint.save(path, "model", content)


def load_artefact(path: Path, device: torch.device) -> Artefact:
    """Read an artefact and build its model and backbone on ``device``, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: naming the file, if it is missing, damaged, or was made with other
        backbone
            weights than the configuration finds here.
    """
    content = checkpoint.load(path, "model")
    try:
        config = Config.from_dict(content["config"])
    except ValueError as error:
        raise ValueError(f"{path} was written by another version of this program: {error}") from error
    backbone = build_backbone(config.backbone)
    pipeline = InputPipeline(config, backbone, device=device)
    if pipeline.identity != content["inputs"]:
        raise ValueError(
            f"{path} belongs to inputs {content['inputs']!r}, but here they would be {pipeline.identity!r}: "
            "another backbone, other weights, or another version of the preprocessing"
        )
    model = build_model(config, len(content["classes"]), pipeline.channels)
    checkpoint.load_weights(path, model, content["weights"])
    classes, seen = tuple(content["classes"]), tuple(content["seen"])
    return Artefact(config, classes, seen, content["thresholds"], model.to(device).eval(), pipeline)
