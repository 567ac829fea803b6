"""Modules built on the ops."""

from iumad_kernels.nn.cross_attention import CrossAttention

__all__ = ["CrossAttention"]
