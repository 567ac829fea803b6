"""Modules built on the ops: parameters and projections around one kernel each."""

from iumad_kernels.nn.cross_attention import CrossAttention
from iumad_kernels.nn.information_bottleneck import BottleneckOutput, InformationBottleneck
from iumad_kernels.nn.selective_scan import SelectiveScan, SelectiveScan2d

__all__ = ["BottleneckOutput", "CrossAttention", "InformationBottleneck", "SelectiveScan", "SelectiveScan2d"]
