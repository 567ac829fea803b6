"""EfficientNet B0-B4 and Lite0-Lite2, evaluation only, from one table (Tan & Le 2019; data-formats.md 1.1).

The two families share the stages. Lite drops squeeze-and-excitation, replaces SiLU by ReLU6, and scales
neither the stem nor the repeats of the first and last stage. Padding is TensorFlow's SAME, which puts the odd
pixel of a strided convolution after the image; batch norms have eps 1e-3 and fold into the convolutions.

Shapes: B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class Stage(NamedTuple):
    """A run of inverted-bottleneck blocks; only the first block strides."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
TAPS = (0, 1, 2, 4)
"""Stages whose outputs are the features: the last ones at strides 2, 4, 8 and 16."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Width and depth factors of one network."""

    width: float
    depth: float
    lite: bool = False

    def channels(self, base: int) -> int:
        """Scaled channel count: the nearest multiple of 8 that loses at most a tenth."""
        scaled = base * self.width
        rounded = max(8, int(scaled + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * scaled else rounded

    def stages(self) -> list[Stage]:
        """`STAGES` scaled to this network."""
        last = len(STAGES) - 1
        return [
            stage._replace(
                channels=self.channels(stage.channels),
                repeats=stage.repeats
                if self.lite and i in (0, last)
                else math.ceil(stage.repeats * self.depth),
            )
            for i, stage in enumerate(STAGES)
        ]


SPECS = {
    "b0": Spec(width=1.0, depth=1.0),
    "b1": Spec(width=1.0, depth=1.1),
    "b2": Spec(width=1.1, depth=1.2),
    "b3": Spec(width=1.2, depth=1.4),
    "b4": Spec(width=1.4, depth=1.8),
    "lite0": Spec(width=1.0, depth=1.0, lite=True),
    "lite1": Spec(width=1.0, depth=1.1, lite=True),
    "lite2": Spec(width=1.1, depth=1.2, lite=True),
}


def pad_same(x_BCHW: Tensor, kernel: int, stride: int) -> Tensor:
    """Zero padding for an output side of ceil(side / stride): the smaller half before, the rest after."""
    amounts: list[int] = []
    for side in (x_BCHW.shape[3], x_BCHW.shape[2]):
        total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
        amounts += [total // 2, total - total // 2]
    return F.pad(x_BCHW, amounts)


class ConvNorm(nn.Module):
    """Convolution with SAME padding, batch norm, activation."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int,
        activation: nn.Module | None,
        *,
        depthwise: bool = False,
    ) -> None:
        super().__init__()
        groups = c_in if depthwise else 1
        padding = (
            kernel // 2 if stride == 1 else 0
        )  # for stride 1 SAME is symmetric; see forward for the rest
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(c_out, eps=1e-3)
        self.activation = activation or nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, ceil(H / stride), ceil(W / stride))."""
        stride, kernel = self.conv.stride[0], self.conv.kernel_size[0]
        if stride > 1:
            x_BCHW = pad_same(x_BCHW, kernel, stride)
        return self.activation(self.norm(self.conv(x_BCHW)))

    def fold(self) -> None:
        """Put the batch norm into the convolution's weight and bias."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


class SqueezeExcite(nn.Module):
    """Channels gated by a two-layer network on the channel means."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        means_BC11 = x_BCHW.mean(dim=(2, 3), keepdim=True)
        return x_BCHW * self.expand(F.silu(self.reduce(means_BC11))).sigmoid()


class Block(nn.Module):
    """Inverted bottleneck: 1x1 expansion, depthwise convolution, squeeze-excite, 1x1 projection, residual."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int, *, lite: bool
    ) -> None:
        super().__init__()
        activation = nn.ReLU6() if lite else nn.SiLU()
        inner = c_in * expansion
        self.residual = stride == 1 and c_in == c_out
        self.expand = ConvNorm(c_in, inner, 1, 1, activation) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(inner, inner, kernel, stride, activation, depthwise=True)
        self.excite = nn.Identity() if lite else SqueezeExcite(inner, max(1, c_in // 4))
        self.project = ConvNorm(inner, c_out, 1, 1, None)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        y_BCHW = self.project(self.excite(self.depthwise(self.expand(x_BCHW))))
        return x_BCHW + y_BCHW if self.residual else y_BCHW


class EfficientNet(nn.Module):
    """The network up to its last feature tap, or with `classifier=True` up to the 1000 ImageNet logits."""

    def __init__(self, spec: Spec, *, classifier: bool = False) -> None:
        super().__init__()
        stages = spec.stages() if classifier else spec.stages()[: TAPS[-1] + 1]
        activation = nn.ReLU6() if spec.lite else nn.SiLU()
        channels = 32 if spec.lite else spec.channels(32)
        self.stem = ConvNorm(3, channels, 3, 2, activation)
        blocks: list[nn.Module] = []
        ends: list[int] = []
        for stage in stages:
            for i in range(stage.repeats):
                stride = stage.stride if i == 0 else 1
                blocks.append(
                    Block(channels, stage.channels, stage.kernel, stride, stage.expansion, lite=spec.lite)
                )
                channels = stage.channels
            ends.append(len(blocks) - 1)
        self.blocks = nn.ModuleList(blocks)
        self.taps = [ends[i] for i in TAPS]
        self.tap_channels = tuple(stages[i].channels for i in TAPS)
        self.head: ConvNorm | None = None
        if classifier:
            head_channels = 1280 if spec.lite else spec.channels(1280)
            self.head = ConvNorm(channels, head_channels, 1, 1, activation)
            self.classifier = nn.Linear(head_channels, 1000)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to the four taps, at strides 2, 4, 8 and 16."""
        outputs = self._block_outputs(x_BCHW)
        return [output for i, output in enumerate(outputs) if i in self.taps]

    def classify(self, x_BCHW: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to logits (B, 1000); needs `classifier=True`."""
        if self.head is None:
            raise ValueError("EfficientNet was built without its classifier: pass classifier=True")
        *_, last_BCHW = self._block_outputs(x_BCHW)
        return self.classifier(self.head(last_BCHW).mean(dim=(2, 3)))

    def _block_outputs(self, x_BCHW: Tensor) -> Iterator[Tensor]:
        x_BCHW = self.stem(x_BCHW)
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
            yield x_BCHW

    def fold(self) -> None:
        """Fold every batch norm; the network must be in evaluation mode."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()


@torch.no_grad()
def initialise_random(network: EfficientNet, seed: int = 0) -> None:
    """Untrained weights that keep activations in range, the same for every call."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0.0, math.sqrt(2.0 / fan_in), generator=generator)
            if module.bias is not None:
                module.bias.zero_()
