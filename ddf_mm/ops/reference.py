"""The DDF operations in plain PyTorch, against which every faster implementation is tested."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_mm.ops.checks import Geometry, check_ddf, check_ddf_up, shape_of, untraced


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32 for 16-bit inputs, otherwise that of the input."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@untraced
def layout_of(tensor: Tensor) -> torch.memory_format:
    """``torch.channels_last`` for a tensor in that format, or a slice of such a tensor, that is not
    contiguous as well."""
    # torch.vmap does not support is_contiguous for channels_last.
    if tensor.is_contiguous() or torch._C._are_functorch_transforms_active():
        return torch.contiguous_format
    if tensor.dim() != 4 or tensor.shape[1] == 1:
        return torch.contiguous_format
    least = 1
    for i in (1, 3, 2, 0):
        size, stride = tensor.shape[i], tensor.stride(i)
        if size == 1:
            continue
        if stride != 1 if i == 1 else stride < least:
            return torch.contiguous_format
        least = stride * size
    return torch.channels_last


def split_channels(x: Tensor, *sizes: int) -> Tensor:
    """``x.unflatten(1, sizes)``, which ONNX lacks before opset 13."""
    return x.reshape(x.shape[0], *sizes, *x.shape[2:])


def ddf_reference(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    kernel_size: int = 3,
    dilation: int = 1,
    stride: int = 1,
    kernel_combine: str = "mul",
    is_valid: bool = False,
) -> Tensor:
    """DDF by its formula, tap by tap, in differentiable PyTorch operations.

    Arguments, result and errors are those of :func:`ddf_mm.ops.ddf`, with ``is_valid`` for padding
    ``'valid'``. It runs on every device, supports derivatives of any order and ignores autocast.
    """
    options = kernel_size, dilation, stride, kernel_combine
    geometry = check_ddf(features, channel_filter, spatial_filter, *options, is_valid)
    return ddf_formula(features, channel_filter, spatial_filter, geometry)


# ddf with padding 'valid'.
ddf_valid_reference = functools.partial(ddf_reference, is_valid=True)


def ddf_formula(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """:func:`ddf_reference` for validated arguments of the given geometry.

    A trace is valid for other sizes: paddings and slices are constants, and all that depends on a
    size is computed from that tensor's shape. All operations exist in ONNX since opset 11.
    """
    kernel_size, dilation, stride = geometry.kernel_size, geometry.dilation, geometry.stride
    taps, groups, group_channels = kernel_size**2, geometry.groups, geometry.group_channels
    dtype = accumulate_dtype(features.dtype)
    sizes = features.shape[2:]
    # With a larger dilation all taps except the centre read zeros, so it can be limited. Dynamic
    # sizes, of tracers and exporters, are not ints.
    if all(isinstance(size, int) for size in sizes):
        dilation = min(dilation, max(sizes))
    # No tensor has that many rows; the strides of a view with a larger step could overflow.
    stride = min(stride, 2**40)

    extent = dilation * (kernel_size - 1)
    padded = features.to(dtype)
    if not geometry.is_valid:
        padded = F.pad(padded, (extent // 2,) * 4)
    # The rows and columns that each tap reads.
    offsets = range(0, extent + 1, dilation)
    if spatial_filter is None or stride == 1:
        windows = [[slice(first, first - extent or None, stride) for first in offsets]] * 2
    else:  # the filter has the size of the output, which may be rounded down
        spans = [(size - 1) * stride + 1 for size in spatial_filter.shape[2:]]
        windows = [[slice(first, first + span, stride) for first in offsets] for span in spans]
    if groups > 1:
        padded = split_channels(padded, groups, group_channels)

    # The weights of each tap: [B, C, 1, 1] and [B, 1, Ho, Wo], or with groups [B, g, C/g, 1, 1]
    # and [B, g, 1, Ho, Wo].
    per_channel = per_pixel = [None] * taps
    if channel_filter is not None:
        weights = channel_filter.to(dtype).flatten(2)[..., None]
        if groups > 1:
            weights = split_channels(weights, groups, group_channels)
        per_channel = weights.split(1, -2)
    if spatial_filter is not None:
        weights = spatial_filter.to(dtype)
        if groups > 1:
            weights = split_channels(weights, groups, taps)
        per_pixel = weights.split(1, -3)

    out: Any = None
    for (rows, columns), of_channel, of_pixel in zip(
        product(*windows), per_channel, per_pixel, strict=True
    ):
        weight = of_pixel if of_channel is None else of_channel
        if of_channel is not None and of_pixel is not None:
            weight = weight * of_pixel if geometry.kernel_combine == "mul" else weight + of_pixel
        term = padded[..., rows, columns] * weight
        out = term if out is None else out + term

    if groups > 1:
        out = out.flatten(1, 2)
    return out.to(features.dtype).contiguous(memory_format=layout_of(features))


def filter_norm_reference(
    x: Tensor,
    filters: int,
    std: float | Tensor = 1.0,
    mean: float | Tensor | None = None,
    eps: float = 1e-10,
) -> Tensor:
    """Filter normalization by the formula, in differentiable PyTorch calls.

    Args:
        x: ``Tensor[B, filters*taps, …]``.
        filters: number of filters in x's channels.
        std: a number, or a ``Tensor[filters*taps]`` of ``accumulate_dtype(x.dtype)``.
        mean: likewise, or ``None``.
        eps: as for :func:`ddf_mm.ops.filter_norm`.

    Returns:
        A tensor of x's shape and dtype.
    """
    batch, total = shape_of(x)[:2]
    out = x.to(accumulate_dtype(x.dtype))
    if batch:  # var_mean warns about an empty batch
        taps = split_channels(out, filters, total // filters)
        variance, average = torch.var_mean(taps, dim=2, keepdim=True)
        # The slope of sqrt is infinite at 0; `where` on both sides keeps that out of the gradient.
        is_constant = variance == 0
        deviation = torch.where(is_constant, 1, variance).sqrt()
        out = torch.where(is_constant, 0, (taps - average) / (deviation + eps)).flatten(1, 2)

    per_tap = (1, total) + (1,) * (x.dim() - 2)
    out = out * (std.reshape(per_tap) if isinstance(std, Tensor) else std)
    if mean is not None:
        out = out + (mean.reshape(per_tap) if isinstance(mean, Tensor) else mean)
    return out.to(x.dtype)


def filter_norm_op_reference(
    x: Tensor, filters: int, std: Tensor | None, mean: Tensor | None, scale: float, eps: float
) -> Tensor:
    """:func:`filter_norm_reference` with the arguments of ``torch.ops.ddf_mm.filter_norm``."""
    return filter_norm_reference(x, filters, scale if std is None else std * scale, mean, eps)


def ddf_pack_reference(
    features: Tensor,
    raw_channel: Tensor,
    raw_spatial: Tensor,
    channel_std: Tensor | None,
    channel_scale: float,
    spatial_scale: float,
    eps: float,
    bias: Tensor | None,
    relu: bool,
    kernel_size: int,
    dilation: int,
    stride: int,
    kernel_combine: str,
) -> Tensor:
    """``torch.ops.ddf_mm.ddf_pack`` by its formula: DDF with the FilterNorm of both filters, plus a
    bias, through a ReLU."""
    channels, groups = features.shape[1], raw_spatial.shape[1] // kernel_size**2
    channel = filter_norm_op_reference(
        raw_channel.flatten(1), channels, channel_std, None, channel_scale, eps
    ).reshape(raw_channel.shape)
    spatial = filter_norm_op_reference(raw_spatial, groups, None, None, spatial_scale, eps)
    out = ddf_reference(features, channel, spatial, kernel_size, dilation, stride, kernel_combine)
    if bias is not None:
        out = out + bias.to(out.dtype)[:, None, None]
    return out.relu() if relu else out


def ddf_up_reference(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    kernel_size: int = 3,
    scale_factor: int | Sequence[int] = 2,
    dilation: int = 1,
    kernel_combine: str = "mul",
    is_valid: bool = False,
) -> Tensor:
    """DDF upsampling by its formula: :func:`ddf_reference` for each subpixel, and a pixel shuffle.

    Arguments, result and errors are those of :func:`ddf_mm.ops.ddf_up`, with ``is_valid`` for
    padding ``'valid'``; otherwise as :func:`ddf_reference`.
    """
    options = kernel_size, scale_factor, dilation, kernel_combine
    geometry = check_ddf_up(features, channel_filter, spatial_filter, *options, is_valid)
    return ddf_up_formula(features, channel_filter, spatial_filter, geometry)


# ddf_up with padding 'valid'.
ddf_up_valid_reference = functools.partial(ddf_up_reference, is_valid=True)


def ddf_up_formula(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """:func:`ddf_up_reference` for validated arguments of the given geometry."""
    tensors = features, channel_filter, spatial_filter
    return by_subpixel(functools.partial(ddf_formula, geometry=geometry), *tensors, geometry)


def by_subpixel(
    function: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """DDF upsampling by a function that computes DDF, of each subpixel, and a pixel shuffle."""
    subpixels = [
        function(
            features,
            None if channel_filter is None else channel_filter[:, r],
            None if spatial_filter is None else spatial_filter[:, r],
        )
        for r in range(math.prod(geometry.scale_factors))
    ]
    rows, columns = geometry.scale_factors
    if layout_of(features) is not torch.channels_last:
        return shuffle_pixels(torch.stack(subpixels, dim=2), rows, columns)
    # The same with the channels last, which stay adjacent.
    by_pixel = torch.stack([subpixel.permute(0, 2, 3, 1) for subpixel in subpixels], dim=3)
    by_row = by_pixel.reshape(*by_pixel.shape[:3], rows, columns, by_pixel.shape[4]).transpose(2, 3)
    return by_row.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def shuffle_pixels(subpixels: Tensor, rows: int, columns: int) -> Tensor:
    """``Tensor[B, C, rows*columns, H, W]`` -> ``Tensor[B, C, rows*H, columns*W]``."""
    # PyTorch has no gradient of the pixel shuffle of an empty batch.
    if rows == columns and shape_of(subpixels)[0]:
        return F.pixel_shuffle(subpixels.flatten(1, 2), rows)
    by_row = subpixels.reshape(*subpixels.shape[:2], rows, columns, *subpixels.shape[3:])
    return by_row.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
