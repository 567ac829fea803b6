"""Every choice of a run as frozen dataclasses: what the paper leaves open, what a user may tune.

    config = Config()                                       # the recommended model
    config = presets.get("small")                           # a named preset, iumad/presets.py
    config = load("run.toml")                               # TOML, one table per section
    config = apply_overrides(config, ["train.epochs=20", "model.dim=128"])
    Config.from_dict(config.to_dict()) == config            # plain dict and JSON

Sections: `data`, `backbone`, `model`, `loss`, `train`, `protocol`, `iuf`, `threshold`. A value of the wrong
type or X

`A1` .. `A25` in comments are the ambiguities of the IB-IUMAD paper (paper.md section 2.5); the default given
there is the default here. Two of them have no field because one answer only is sound: A16 (the mask of Alg.1
line 15 is unused: training images are normal, it would be all zeros) and A23 (the last checkpoint is
reported, never the best on the test set).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from iumad.section import Count, Fraction, NonNegative, PositiveInt, Range, Section, require, suggestion

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Modality = Literal["rgb", "depth"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Where images come from and how they are prepared (paper.md 1.5)."""

    # `demo`, `folder:PATH`, `mvtec3d:PATH`, `eyecandies:PATH` or `manifest:FILE`.
    dataset: str = "demo"
    # Side in pixels of the square that images become; the token grid has image_size / 16 cells a side.
    image_size: PositiveInt = 224
    # z: the distance alone, replicated to three channels; xyz_raw: the three coordinates as channels.
    depth_mode: Literal["z", "xyz_raw"] = "z"
    # Train on train/good and validation/good together, as the paper's lists do.
    include_validation: bool = True

    def check(self) -> None:
        """The backbone's stride must divide the image."""
        require(self.image_size % 16 == 0, "data.image_size", self.image_size, "a multiple of 16")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(Section):
    """The frozen feature extractor; names and files are explained in `iumad.backbone`."""

    # lite0..lite2 (packaged weights), b0..b4 (weights_path), timm:NAME, random:NAME (untrained, for tests).
    name: str = "lite0"
    # Checkpoint of b0..b4; optional for timm:NAME.
    weights_path: str | None = None
    # Divide each tap by its root mean square over the image. Raw taps (the paper's) differ widely in size, and
    # the largest, early ones then dominate reconstruction loss and map.
    equal_taps: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Architecture (paper.md 2.3). Class count and feature channels come from the data and the backbone."""

    # A25: with one modality the network is the same, the sum over modalities is the identity, and the
    # reference is that modality's own feature.
    modality: Literal["both", "rgb", "depth"] = "both"
    # Width of the tokens.
    dim: PositiveInt = 256
    # Encoder layers = decoder layers = condition blocks, in each modality.
    layers: PositiveInt = 4
    num_heads: PositiveInt = 8
    ffn_dim: PositiveInt = 1024
    # In both transformers and in the cross-attention.
    dropout: Fraction = 0.1
    # xavier: as the paper initialises, attention is near uniform at first and takes tens of thousands of iterations to
    # find its place. local: it starts around the query's own cell, see reconstruction.start_local.
    attention_start: Literal["xavier", "local"] = "xavier"
    # A20: a query may not attend to the k x k cells around it (UniAD: 7); 0 = off.
    neighbour_mask: Count = 0
    # A19: one input and one output projection for both modalities.
    shared_projections: bool = True
    # E2: noise on the input features while training, relative to their norm; 0 = off.
    jitter_scale: NonNegative = 20.0

    # The condition branch makes class-aware maps that modulate the encoder's queries. none: no modulation;
    # vit: plain transformer blocks as in IUF.
    condition: Literal["mamba", "vit", "none"] = "mamba"
    # How a map M modulates a query: E6's product q M, or q (1 + g M) with g learned from 0, which leaves the queries
    # intact until the maps mean something.
    condition_gate: Literal["product", "residual"] = "product"
    # A1: how the image enters; the branch works on a grid of 1/16, 1/8 or 1/4 of the image side.
    condition_stem: Literal["patch16", "conv8", "conv4"] = "patch16"
    # A24: one stack and one head for both modalities.
    condition_shared: bool = False
    # A4: the branch learns from its class loss alone.
    condition_detach: bool = True
    # A2: the identity skips of E3 and E4 that the figure draws and the formulas lack.
    mamba_skips: bool = True
    # A3: efficient channel attention, self-attention, or squeeze-and-excitation.
    mamba_attention: Literal["eca", "self", "se"] = "eca"
    # Inner width of the scan as a multiple of dim, and states per inner channel.
    mamba_expand: PositiveInt = 2
    mamba_state: PositiveInt = 16

    # A5: how two modalities become one before the fusion operator.
    fusion_sum: Literal["add", "concat"] = "add"
    # Operator that joins F1 and F2. none: F2 alone.
    fusion: Literal["cross_attention", "addition", "concat_fc", "linear_glu", "none"] = "cross_attention"
    # The decoder layers that give F1 and F2, counted from 1.
    fusion_layers: tuple[int, int] = (2, 4)
    # A6: fuse in the space of tokens, or after projection to features.
    fusion_space: Literal["tokens", "features"] = "tokens"
    # A7: the query of the cross-attention: F1, F2, each in turn (summed), or RGB asking depth.
    fusion_query: Literal["first", "second", "bidirectional", "modality"] = "first"
    # A8: LN(F2 + CrossAtt(F1, F2)) instead of the bare attention output, which can blur location.
    fusion_residual: bool = True
    # Chance per training step that the depth branch is left out of the sum; above 0 the model may be used
    # with a missing depth image.
    modality_dropout: Fraction = 0.0

    # The information bottleneck after the fusion.
    bottleneck: bool = True
    bottleneck_dim: PositiveInt = 128  # A9
    bottleneck_dropout: Fraction = 0.1  # A10
    # A11: one class head for F_fu and F_fu^g instead of one each.
    bottleneck_shared_head: bool = False

    # A15: the map also counts the depth branch's own error, where RGB is the reference. Give
    # loss.reconstruction a weight with it.
    depth_distance: bool = False
    # A22: image score from the map: largest mean of a score_pool x score_pool window, or standard
    # deviation, or mean.
    image_score: Literal["max", "std", "mean"] = "max"
    score_pool: PositiveInt = 16

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The modalities the model is built for, RGB first."""
        return ("rgb", "depth") if self.modality == "both" else (self.modality,)

    def check(self) -> None:
        """Conditions between fields."""
        heads, layers, mask = self.num_heads, self.layers, self.neighbour_mask
        require(self.dim % heads == 0, "model.num_heads", heads, f"a divisor of model.dim = {self.dim}")
        require(self.dim % 2 == 0, "model.dim", self.dim, "an even number")
        inside = all(1 <= layer <= layers for layer in self.fusion_layers)
        require(
            inside, "model.fusion_layers", self.fusion_layers, f"numbers from 1 to model.layers = {layers}"
        )
        require(mask == 0 or mask % 2 == 1, "model.neighbour_mask", mask, "0 or an odd number")
        if self.modality != "both":
            both = "needs model.modality = 'both'"
            require(self.fusion_query != "modality", "model.fusion_query", self.fusion_query, both)
            require(self.modality_dropout == 0, "model.modality_dropout", self.modality_dropout, both)
        if self.fusion_query == "modality":
            require(
                self.fusion_sum == "add", "model.fusion_sum", self.fusion_sum, "add, with modality queries"
            )
        if self.modality_dropout > 0:
            sums = self.fusion_sum == "add" and self.fusion_query != "modality"
            expected = "0 unless fusion_sum is 'add' and fusion_query is not 'modality'"
            require(sums, "model.modality_dropout", self.modality_dropout, expected)


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """Weights of the objective E12 (paper.md 3.1); a term of weight 0 is not computed."""

    rgb_class: NonNegative = 1.0  # l1: cross-entropy of the RGB condition branch
    depth_class: NonNegative = 1.0  # l2: the same for depth
    fusion: NonNegative = 1.0  # l3: mean squared error of the fused reconstruction, E11
    bottleneck: NonNegative = 1.0  # l4: KL[P(Y|F_fu) || P(Y|F_fu^g)]
    # A12: cross-entropy of both bottleneck heads; without it heads that answer a constant minimise the KL.
    bottleneck_class: NonNegative = 1.0
    # A13: P(Y|F_fu) is a fixed target in the KL term.
    detach_teacher: bool = True
    # A14: mean squared error of each modality's own reconstruction.
    reconstruction: NonNegative = 0.0
    # A21: which classes compete in every softmax. all: the full list, known in advance; seen: a head that
    # grows step by step; step: the current step's classes, which leaves old logits alone (paper.md 3.4).
    classes: Literal["all", "seen", "step"] = "all"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Optimisation (paper.md 3.2)."""

    epochs: PositiveInt = 1000  # base step
    increment_epochs: PositiveInt = 800  # each later step
    batch_size: PositiveInt = 24  # of all processes together
    lr: NonNegative = 1e-4  # AdamW
    weight_decay: NonNegative = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    grad_clip: NonNegative = 0.1  # global norm; 0 = off
    # Restarted at every step of the protocol. `step` multiplies by schedule_gamma every schedule_epochs.
    schedule: Literal["constant", "step", "cosine"] = "step"
    schedule_epochs: PositiveInt = 800
    schedule_gamma: Fraction = 0.1
    warmup: Fraction = 0.0  # share of a protocol step over which the rate rises linearly
    seed: Count = 133
    autocast: bool = False  # bfloat16 forward passes
    # A batch is computed in so many equal parts, each with random numbers of its own, so that the result does
    # not depend on how many processes share them. 0: one part per process.
    shards: Count = 0
    # Seconds between two saves of the training state; 0 = after every iteration. No influence on the result.
    checkpoint_seconds: NonNegative = 60.0
    # Compute backbone features once per image and keep them on disk.
    feature_cache: bool = True


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig(Section):
    """Decision thresholds, from normal images that are never trained on."""

    # Share of new normal images that may be called anomalous.
    false_positive_rate: Annotated[float, Range(1e-6, 0.5)] = 0.05
    # Share of a class's training images held out for this where no validation split is left for it;
    # 0 = train on all, have no thresholds.
    holdout: Annotated[float, Range(0.0, 0.5)] = 0.1


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig(Section):
    """Which classes arrive when, and how the model takes them in (paper.md 1.2)."""

    # `X-Y`: X classes in the base step, then Y per increment; `X-0` and `joint`: all at once;
    # `finetune:X-Y`: the steps of X-Y with the plain update rule, the lower bound.
    name: str = "6-1"
    # Empty: the data set's own order.
    class_order: tuple[str, ...] = ()
    # A17: how increments change the weights, see iumad/incremental/update.py.
    update_rule: Literal["iuf", "plain"] = "iuf"
    # A18: the classes in the mean of the forgetting measure.
    forgetting: Literal["old", "all"] = "old"

    def check(self) -> None:
        """Form of the name; each class once."""
        legal = re.fullmatch(r"joint|finetune|(finetune:)?[1-9]\d*-\d+", self.name) is not None
        require(legal, "protocol.name", self.name, "`X-Y` such as 6-1, `joint`, `finetune` or `finetune:X-Y`")
        once = len(set(self.class_order)) == len(self.class_order)
        require(once, "protocol.class_order", self.class_order, "each class once")


@dataclass(frozen=True, kw_only=True)
class IUFConfig(Section):
    """The constrained update of increments (paper.md 3.4); read where protocol.update_rule is `iuf`."""

    # What makes the raw step that is then projected. SGD without momentum, as released, or AdamW.
    optimizer: Literal["sgd", "adamw"] = "sgd"
    # Its rate. With gradients clipped to train.grad_clip an SGD step has norm <= lr * grad_clip.
    lr: NonNegative = 1.0
    # Before an iteration: weights = (1 - pull) * weights + pull * (weights at the start of the step). The pull follows
    # the rate's schedule: against a rate that decays alone it would undo the step.
    pull: Fraction = 0.05
    pull_every: PositiveInt = 1


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """All sections of one run."""

    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    iuf: IUFConfig = field(default_factory=IUFConfig)
    threshold: ThresholdConfig = field(default_factory=ThresholdConfig)

    @property
    def grid(self) -> int:
        """Cells a side of the token grid."""
        return self.data.image_size // 16


def load(path: str | Path) -> Config:
    """Read a TOML file. Raises ValueError naming the file on bad syntax, keys or values."""
    try:
        return Config.from_dict(tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:  # includes TOMLDecodeError and UnicodeDecodeError
        raise ValueError(f"{path}: {error}") from error


def apply_overrides(config: Config, assignments: Iterable[str]) -> Config:
    """Copy `config` with `section.key=value` applied; values are TOML literals, bare words or `none`."""
    values = config.to_dict()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot):
            raise ValueError(f"override {assignment!r}: expected SECTION.KEY=VALUE such as train.epochs=20")
        if section not in values:
            raise ValueError(f"unknown config section {section}{suggestion(section, values)}")
        values[section][name] = _parse(text.strip())
    return Config.from_dict(values)


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
