"""Block sizes that users set: they reach the launch, end with their block, and wrong ones are named."""

from __future__ import annotations

import pytest
import torch

import iumad_kernels
from iumad_kernels import triton
from iumad_kernels.triton.tuning import tuned


def test_it_reaches_the_launch_and_ends():
    sizes = {"BLOCK_P": 64, "BLOCK_C": 16, "num_warps": 4}
    with triton.override("depthwise_conv2d", BLOCK_P=32, num_warps=2):
        assert tuned("depthwise_conv2d", sizes) == {"BLOCK_P": 32, "BLOCK_C": 16, "num_warps": 2}
        with triton.override("depthwise_conv2d", BLOCK_P=8):
            assert tuned("depthwise_conv2d", sizes) == {"BLOCK_P": 8, "BLOCK_C": 16, "num_warps": 2}
        assert tuned("depthwise_conv2d", sizes)["BLOCK_P"] == 32
        assert tuned("anomaly_map", sizes) == sizes
    assert tuned("depthwise_conv2d", sizes) == sizes


@pytest.mark.parametrize(
    ("op", "sizes", "message"),
    [
        ("convolution", {}, "unknown op 'convolution': one of selective_scan"),
        ("selective_scan", {"BLOCK_Q": 16}, "selective_scan has no 'BLOCK_Q' to set: BLOCK_D, num_warps"),
        ("selective_scan", {"BLOCK_D": 24}, "BLOCK_D = 24, expected a power of two"),
        ("cross_attention", {"num_stages": 0}, "num_stages = 0"),
    ],
)
def test_wrong_sizes_are_named(op, sizes, message):
    with pytest.raises(ValueError, match=message), triton.override(op, **sizes):
        pass


def test_attention_with_small_blocks(triton_device):
    q = torch.randn(1, 1, 40, 8, device=triton_device)
    want = iumad_kernels.cross_attention(q, q, q)
    with triton.override("cross_attention", BLOCK_Q=16):
        got = iumad_kernels.cross_attention(q, q, q)
    torch.testing.assert_close(got, want)
