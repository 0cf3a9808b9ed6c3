"""FLOPs that torch's counter sees in the compiled ops."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddf_mm.ops import backend_info, ddf

pytestmark = pytest.mark.skipif(
    backend_info()["cpu"] != "compiled", reason="the formula in plain PyTorch has no FLOP count"
)
TAPS = 2 * 6 * 4 * 5 * 9


def count(needs=(False, False, False), channel=True):
    x = torch.randn(2, 6, 7, 9, requires_grad=needs[0])
    cf = torch.randn(2, 6, 3, 3, requires_grad=needs[1]) if channel else None
    sf = torch.randn(2, 9, 4, 5, requires_grad=needs[2])
    with FlopCounterMode(display=False) as counter:
        out = ddf(x, cf, sf, stride=2)
        if any(needs):
            out.sum().backward()
    return {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}


def test_forward_counts_a_multiply_add_for_each_tap():
    assert count() == {"ddf_mm.ddf": 2 * TAPS}


@pytest.mark.parametrize(
    "needs, channel, gradients",
    [((1, 1, 1), True, 3), ((0, 1, 0), True, 1), ((1, 0, 1), True, 2), ((1, 0, 1), False, 2)],
)
def test_backward_counts_the_gradients_asked_for(needs, channel, gradients):
    found = count([bool(need) for need in needs], channel)
    assert found == {"ddf_mm.ddf": 2 * TAPS, "ddf_mm.ddf_backward": gradients * 2 * TAPS}
