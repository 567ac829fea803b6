"""Modules built on the ops."""

from iumad_kernels.nn.cross_attention import CrossAttention
from iumad_kernels.nn.information_bottleneck import BottleneckOutput, InformationBottleneck

__all__ = ["BottleneckOutput", "CrossAttention", "InformationBottleneck"]
