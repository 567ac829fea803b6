"""Modules built on the ops: parameters and projections around one kernel each."""

from iumad_kernels.nn.anomaly_map import AnomalyMap
from iumad_kernels.nn.causal_conv1d import CausalConv1d
from iumad_kernels.nn.cross_attention import CrossAttention
from iumad_kernels.nn.depthwise_conv2d import DepthwiseConv2d
from iumad_kernels.nn.information_bottleneck import BottleneckOutput, InformationBottleneck
from iumad_kernels.nn.selective_scan import SelectiveScan, SelectiveScan2d

__all__ = [
    "AnomalyMap",
    "BottleneckOutput",
    "CausalConv1d",
    "CrossAttention",
    "DepthwiseConv2d",
    "InformationBottleneck",
    "SelectiveScan",
    "SelectiveScan2d",
]
