"""Named configurations: functions that return a `Config`. `get(name)` finds them; `NAMES` lists them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from iumad.config import (
    BackboneConfig,
    Config,
    IUFConfig,
    LossConfig,
    ModelConfig,
    ProtocolConfig,
    TrainConfig,
)
from iumad.section import suggestion


def recommended() -> Config:
    """The paper's model where the paper is silent completed as paper.md advises (A8, A12 on, A17 `iuf`)."""
    return Config()


def paper_strict() -> Config:
    """The paper to the letter: E12 with its four terms only, EfficientNet-B4, AdamW in every step.

    The KL teacher is not detached here: the stop-gradient comes from another paper (DMIB), and with it the
    teacher's head would have no loss term at all and stay random.
    """
    return Config(
        backbone=BackboneConfig(name="b4"),
        model=ModelConfig(fusion_residual=False),
        loss=LossConfig(bottleneck_class=0.0, detach_teacher=False),
        protocol=ProtocolConfig(update_rule="plain"),
    )


def small() -> Config:
    """For CPUs: the same modules, narrow and shallow, with a schedule of minutes instead of days.

    In so short a training attention has to start local and the condition maps must not disturb it, or the reconstruction
    stays a constant; and the depth branch has a loss and a share of the map of its own (A14, A15), for the fused
    reconstruction alone hardly sees defects of shape.
    """
    return Config(
        backbone=BackboneConfig(equal_taps=True),
        model=ModelConfig(
            dim=128,
            layers=2,
            fusion_layers=(1, 2),
            dropout=0.0,
            num_heads=4,
            attention_start="local",
            condition_gate="residual",
            ffn_dim=256,
            mamba_expand=1,
            mamba_state=8,
            bottleneck_dim=64,
            jitter_scale=5.0,
            depth_distance=True,
        ),
        loss=LossConfig(reconstruction=1.0),
        train=TrainConfig(
            epochs=60,
            increment_epochs=40,
            batch_size=4,
            lr=2e-3,
            schedule="cosine",
            warmup=0.05,
            grad_clip=1.0,
        ),
        iuf=IUFConfig(optimizer="adamw", lr=1e-3, pull=0.02),
    )


def uniad() -> Config:
    """The UniAD baseline: RGB, all classes at once, no condition branch, no IBFM, masked neighbours."""
    return Config(
        model=ModelConfig(
            modality="rgb", condition="none", fusion="none", bottleneck=False, neighbour_mask=7
        ),
        protocol=ProtocolConfig(name="joint", update_rule="plain"),
    )


def iuf() -> Config:
    """The IUF baseline: RGB, transformer condition branch, constrained update, no IBFM.

    Its semantic compression loss is left out: in the released code it carries no gradient (paper.md 3.1).
    """
    return Config(
        model=ModelConfig(modality="rgb", condition="vit", fusion="none", bottleneck=False),
        protocol=ProtocolConfig(update_rule="iuf"),
    )


def _with_model(**changes: object) -> Callable[[], Config]:
    """A preset that is `recommended` with some model fields changed."""
    config = recommended()
    changed = replace(config, model=replace(config.model, **changes))  # type: ignore[arg-type]
    return lambda: changed


_PRESETS: dict[str, Callable[[], Config]] = {
    "recommended": recommended,
    "paper_strict": paper_strict,
    "small": small,
    "uniad": uniad,
    "iuf": iuf,
    # Modalities (rows of the paper's tables).
    "both": recommended,
    "rgb": _with_model(modality="rgb"),
    "depth": _with_model(modality="depth"),
    # Ablations (paper.md 4.4). no_ibfm: the plain sum of the last decoder outputs.
    "no_mamba": _with_model(condition="none"),
    "no_bottleneck": _with_model(bottleneck=False),
    "no_ibfm": _with_model(fusion="none", bottleneck=False),
    "no_mamba_no_ibfm": _with_model(condition="none", fusion="none", bottleneck=False),
    "fusion_addition": _with_model(fusion="addition"),
    "fusion_concat_fc": _with_model(fusion="concat_fc"),
    "fusion_linear_glu": _with_model(fusion="linear_glu"),
    "fusion_cross_attention": _with_model(fusion="cross_attention"),
}

NAMES = tuple(_PRESETS)


def get(name: str) -> Config:
    """The preset called `name`. Raises ValueError with the closest known name.

    >>> get("small").model.dim
    128
    """
    if name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}{suggestion(name, _PRESETS)}")
    return _PRESETS[name]()
