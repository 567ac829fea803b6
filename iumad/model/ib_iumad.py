"""IB-IUMAD assembled: features and images of one or two modalities in, anomaly map and class logits out.

Shapes: B batch, S image side in pixels, C feature channels, G = S / 16 cells a side, L = G * G tokens,
D token width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from iumad.config import Config, Modality
from iumad.model.bottleneck import InformationBottleneck
from iumad.model.condition import ConditionBranch
from iumad.model.discriminator import discriminate
from iumad.model.fusion import Fusion
from iumad.model.jitter import FeatureJitter
from iumad.model.layers import PerModality, initialise
from iumad.model.reconstruction import Reconstruction, start_local


@dataclass(frozen=True, kw_only=True)
class Output:
    """Everything the losses, the metrics and a curious user read from one forward pass."""

    reconstruction: Tensor
    """(B, C, G, G): F_fu^g projected to features."""
    reference: Tensor
    """(B, C, G, G): what `reconstruction` should be, the RGB feature if there is one."""
    anomaly_map: Tensor
    """(B, S, S): larger is more anomalous; unitless."""
    score: Tensor
    """(B): image score."""
    class_logits: dict[Modality, Tensor] = field(default_factory=dict)
    """(B, K) of each condition branch; empty without condition branches."""
    fused_logits: Tensor | None = None
    """(B, K): P(Y | F_fu); None without a bottleneck."""
    bottleneck_logits: Tensor | None = None
    """(B, K): P(Y | F_fu^g); None without a bottleneck."""
    decoder: dict[Modality, list[Tensor]] = field(default_factory=dict)
    """Per modality, one (B, L, D) per decoder layer."""
    branch_reconstruction: dict[Modality, Tensor] = field(default_factory=dict)
    """(B, C, G, G) of each modality alone; filled if loss.reconstruction or model.depth_distance needs it."""
    branch_reference: dict[Modality, Tensor] = field(default_factory=dict)
    """(B, C, G, G): the input features of each modality present."""


class IBIUMAD(nn.Module):
    """The trainable part of the system; the frozen backbone runs before it, once per image (paper.md 2.1)."""

    def __init__(self, config: Config, num_classes: int, channels: int) -> None:
        super().__init__()
        model = config.model
        self.config = config
        self.modalities = model.modalities
        self.channels, self.grid = channels, config.grid
        self.fuses_tokens = model.fusion_space == "tokens"
        self.reconstructs_branches = config.loss.reconstruction > 0 or model.depth_distance
        fusion_dim = model.dim if self.fuses_tokens else channels
        if model.fusion == "cross_attention" and fusion_dim % model.num_heads:
            raise ValueError(
                f"model.num_heads = {model.num_heads}: expected a divisor of the backbone's {channels}"
                " channels where model.fusion_space is 'features'"
            )
        shared = model.shared_projections
        projected = ["fused"] if self.fuses_tokens else []
        if self.reconstructs_branches or not self.fuses_tokens:
            projected += self.modalities

        self.jitter = FeatureJitter(model.jitter_scale)
        self.embed = PerModality(lambda: nn.Linear(channels, model.dim), self.modalities, shared=shared)
        self.condition: PerModality | None = None
        if model.condition != "none":
            branch_shared = model.condition_shared
            self.condition = PerModality(
                lambda: ConditionBranch(model, num_classes), self.modalities, shared=branch_shared
            )
        self.reconstruction = PerModality(
            lambda: Reconstruction(model, self.grid), self.modalities, shared=False
        )
        self.project = PerModality(lambda: nn.Linear(model.dim, channels), projected, shared=shared)
        self.fusion = Fusion(model, fusion_dim)
        self.bottleneck: InformationBottleneck | None = None
        if model.bottleneck:
            self.bottleneck = InformationBottleneck(
                fusion_dim,
                model.bottleneck_dim,
                num_classes,
                dropout=model.bottleneck_dropout,
                shared_head=model.bottleneck_shared_head,
            )
        self.apply(initialise)
        if model.attention_start == "local":
            for modality in self.modalities:
                start_local(cast(Reconstruction, self.reconstruction[modality]))

    def forward(self, images: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> Output:
        """Run the model.

        images: per modality (B, 3, S, S) in [0, 1]; not read where model.condition is `none`.
        features: per modality (B, C, G, G), the backbone's output.
        Depth may be missing in evaluation mode if the model was trained with model.modality_dropout > 0.
        Raises ValueError naming a missing modality or a tensor of the wrong shape.
        """
        model = self.config.model
        present = self._present(images, features)
        class_logits: dict[Modality, Tensor] = {}
        decoder: dict[Modality, list[Tensor]] = {}
        for modality in present:
            tokens = rearrange(self.jitter(features[modality]), "b c h w -> b (h w) c")
            conditions = None
            if self.condition is not None:
                conditions, class_logits[modality] = self.condition[modality](images[modality])
                if model.condition_detach:
                    conditions = [condition.detach() for condition in conditions]
            decoder[modality] = self.reconstruction[modality](self.embed[modality](tokens), conditions)

        to_fuse = self._drop_depth(decoder)
        if not self.fuses_tokens:
            to_fuse = {m: [self.project[m](x) for x in outputs] for m, outputs in to_fuse.items()}
        fused = self.fusion(to_fuse)
        fused_logits = bottleneck_logits = None
        if self.bottleneck is not None:
            fused, fused_logits, bottleneck_logits = self.bottleneck(fused)
        if self.fuses_tokens:
            fused = self.project["fused"](fused)
        reconstruction = self._to_grid(fused)
        branches: dict[Modality, Tensor] = {}
        if self.reconstructs_branches:
            branches = {m: self._to_grid(self.project[m](outputs[-1])) for m, outputs in decoder.items()}
        reference = features[present[0]]

        compared = [(reconstruction, reference)]
        if model.depth_distance and "depth" in present[1:]:
            compared.append((branches["depth"], features["depth"]))
        anomaly_map, score = discriminate(
            torch.cat([left for left, _ in compared], dim=1),
            torch.cat([right for _, right in compared], dim=1),
            size=self.config.data.image_size,
            score=model.image_score,
            pool=model.score_pool,
        )
        return Output(
            reconstruction=reconstruction,
            reference=reference,
            anomaly_map=anomaly_map,
            score=score,
            class_logits=class_logits,
            fused_logits=fused_logits,
            bottleneck_logits=bottleneck_logits,
            decoder=decoder,
            branch_reconstruction=branches,
            branch_reference={m: features[m] for m in present},
        )

    def protected_layers(self) -> dict[str, nn.Linear]:
        """The second feed-forward layer of every encoder and decoder layer, which the IUF rule protects."""
        return {
            name: layer
            for name, layer in self.reconstruction.named_modules()
            if name.endswith("feed_forward.linear2") and isinstance(layer, nn.Linear)
        }

    def _present(self, images: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> list[Modality]:
        """Modalities to run; checks that the inputs allow it."""
        given = features if self.condition is None else features.keys() & images.keys()
        present = [m for m in self.modalities if m in given]
        may_lack_depth = not self.training and self.config.model.modality_dropout > 0
        for modality in self.modalities:
            if modality not in present and not (modality == "depth" and may_lack_depth):
                hint = "; depth may be missing in evaluation if trained with model.modality_dropout > 0"
                raise ValueError(f"input lacks {modality!r}{hint if modality == 'depth' else ''}")
        for modality in present:
            expected = (self.channels, self.grid, self.grid)
            if tuple(features[modality].shape[1:]) != expected:
                shape = tuple(features[modality].shape)
                raise ValueError(f"features[{modality!r}] has shape {shape}: expected (batch, {expected})")
        return present

    def _drop_depth(self, decoder: dict[Modality, list[Tensor]]) -> dict[Modality, list[Tensor]]:
        """While training, leave depth out for a random part of the batch (model.modality_dropout)."""
        chance = self.config.model.modality_dropout
        if not self.training or chance == 0:
            return decoder
        first = decoder["depth"][0]
        keep = (torch.rand(len(first), 1, 1, device=first.device) >= chance).to(first.dtype)
        return {**decoder, "depth": [output * keep for output in decoder["depth"]]}

    def _to_grid(self, tokens_BLC: Tensor) -> Tensor:
        return rearrange(tokens_BLC, "b (h w) c -> b c h w", h=self.grid)


def build_model(config: Config, num_classes: int, channels: int) -> IBIUMAD:
    """The model of a config for `num_classes` classes and a backbone of `channels` feature channels.

    `num_classes` counts all classes of the protocol, later steps included (A21; see loss.classes). Weights
    are drawn from torch's global generator: seed it first.
    """
    for name, value in (("num_classes", num_classes), ("channels", channels)):
        if value < 1:
            raise ValueError(f"{name} = {value}: expected at least 1")
    return IBIUMAD(config, num_classes, channels)
