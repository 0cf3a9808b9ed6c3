"""How many FLOPs the compiled ops count for in :mod:`torch.utils.flop_counter`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from ddf_mm.ops import library


def count_taps(out_shape: Sequence[int], kernel_size: int) -> int:
    """Taps of a dynamic filter: one multiply-add each, as those of a depthwise convolution.

    What combines the two filters is not counted, as biases and norms are not.

    Args:
        out_shape: [B, C, Ho, Wo] of the output.
        kernel_size: k.
    """
    return math.prod(out_shape) * kernel_size**2


def _forward_flops(features, channel, spatial, kernel_size, *args, out_shape, **kwargs) -> int:
    return 2 * count_taps(out_shape, kernel_size)


def _backward_flops(grad, features, channel, spatial, kernel_size, *args, **kwargs) -> int:
    # Three more options, then which gradients are wanted.
    wanted = args[3:6]
    given = (features, channel, spatial)
    count = sum(need and of is not None for need, of in zip(wanted, given, strict=True))
    return count * 2 * count_taps(grad, kernel_size)


def _pack_flops(features, channel, spatial, *args, out_shape, **kwargs) -> int:
    # The last options are kernel_size, dilation, stride and kernel_combine.
    return 2 * count_taps(out_shape, args[-4])


def register() -> None:
    """Tell the counter about the ops, if they are there."""
    if library.COMPILED:
        ops = torch.ops.ddf_mm
        register_flop_formula([ops.ddf, ops.ddf_up])(_forward_flops)
        register_flop_formula([ops.ddf_backward, ops.ddf_up_backward])(_backward_flops)
        register_flop_formula(ops.ddf_pack)(_pack_flops)
