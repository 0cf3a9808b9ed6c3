"""FLOP formulas of the compiled ops for :mod:`torch.utils.flop_counter`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ddf_mm.ops import library

Shape = Sequence[int]


def count_taps(out_shape: Shape, kernel_size: int) -> int:
    """Number of taps of a dynamic filter, one multiply-add each, as in a depthwise convolution.

    The combination of the two filters is not counted, like biases and norms.

    Args:
        out_shape: [B, C, Ho, Wo] of the output.
        kernel_size: k.
    """
    return math.prod(out_shape) * kernel_size**2


def _forward_flops(
    features: Shape,
    channel: Shape | None,
    spatial: Shape | None,
    kernel_size: int,
    *args: object,
    out_shape: Shape,
    **kwargs: object,
) -> int:
    return 2 * count_taps(out_shape, kernel_size)


def _backward_flops(
    grad: Shape,
    features: Shape,
    channel: Shape | None,
    spatial: Shape | None,
    kernel_size: int,
    *args: object,
    **kwargs: object,
) -> int:
    # Three more options precede the flags for the gradients that are needed.
    needed = args[3:6]
    given = (features, channel, spatial)
    count = sum(bool(need) and of is not None for need, of in zip(needed, given, strict=True))
    return count * 2 * count_taps(grad, kernel_size)


def _pack_flops(
    features: Shape,
    channel: Shape,
    spatial: Shape,
    *args: Any,
    out_shape: Shape,
    **kwargs: object,
) -> int:
    # The last options are kernel_size, dilation, stride and kernel_combine.
    return 2 * count_taps(out_shape, args[-4])


def _softmax_flops(
    features: Shape, logits: Shape, kernel_size: int, *args: object, out_shape: Shape, **kw: object
) -> int:
    return 2 * count_taps(out_shape, kernel_size)


def register() -> None:
    """Registers the formulas if the ops are compiled."""
    if library.COMPILED:
        ops = torch.ops.ddf_mm
        for name in ("ddf", "ddf_valid", "ddf_up", "ddf_up_valid"):
            register_flop_formula(getattr(ops, name))(_forward_flops)
            register_flop_formula(getattr(ops, f"{name}_backward"))(_backward_flops)
        register_flop_formula(ops.ddf_pack)(_pack_flops)
        register_flop_formula(ops.ddf_softmax)(_softmax_flops)
