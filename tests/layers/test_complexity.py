"""mmengine's complexity analysis counts the operation."""

from __future__ import annotations

import pytest
import torch
from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer

from ddf_mm.layers import DDFPack, DDFUpPack
from ddf_mm.models import DDFResNet
from ddf_mm.ops import backend_info

pytestmark = pytest.mark.skipif(
    backend_info()["cpu"] != "compiled", reason="the formula in plain PyTorch is no single op"
)


def operation_flops(module, x) -> int:
    return FlopAnalyzer(module, (x,)).by_operator()["ddf"]


@pytest.mark.parametrize("kernel_size, stride", [(3, 1), (5, 2)])
def test_a_multiply_add_for_each_tap_of_each_output(kernel_size, stride):
    pack = DDFPack(8, kernel_size, stride)
    x = torch.randn(2, 8, 9, 7)
    outputs = 2 * 8 * -(-9 // stride) * -(-7 // stride)
    assert operation_flops(pack, x) == outputs * kernel_size**2
    assert ActivationAnalyzer(pack, (x,)).by_operator()["ddf"] == outputs


def test_upsampling_counts_each_output_once():
    assert operation_flops(DDFUpPack(8), torch.randn(1, 8, 6, 5)) == 8 * 12 * 10 * 9


def test_backbone_at_224():
    flops = FlopAnalyzer(DDFResNet(50), (torch.randn(1, 3, 224, 224),)).by_operator()
    # Outputs of the 3x3 layers of ResNet-50 at 224 x 224, by 9 taps.
    outputs = sum(
        n * c * s**2 for n, c, s in ((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7))
    )
    assert flops["ddf"] == outputs * 9
    assert flops["conv"] == pytest.approx(2.25e9, rel=0.01)
