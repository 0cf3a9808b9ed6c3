"""The DDF operations in plain PyTorch: the specification every faster path is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_mm.ops.checks import check_ddf_arguments, check_ddf_up_arguments


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float32 for 16-bit inputs, the input's own otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def layout_of(tensor: Tensor) -> torch.memory_format:
    """``torch.channels_last`` for a tensor that is stored so and not also contiguous."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def ddf_reference(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    kernel_size: int = 3,
    dilation: int = 1,
    stride: int = 1,
    kernel_combine: str = "mul",
) -> Tensor:
    """DDF by the formula, one filter tap after the other, in differentiable PyTorch calls.

    Takes the arguments of :func:`ddf_mm.ops.ddf`, has its semantics and raises its errors; runs
    on every device and supports any order of differentiation. It reads no autocast state.
    """
    out_h, out_w, groups = check_ddf_arguments(
        features, channel_filter, spatial_filter, kernel_size, dilation, stride, kernel_combine
    )
    batch, channels, height, width = features.shape
    dtype = accumulate_dtype(features.dtype)
    # From there on no tap but the centre reaches the features: padding by more has no effect.
    dilation = min(dilation, max(height, width))
    # No feature has so many rows, but the strides of a view of every stride-th one could overflow.
    stride = min(stride, 2**40)

    # The window of the last output starts at (out - 1) * stride, so the padding that the
    # features lack there may be more or less than dilation * (k // 2).
    before = dilation * (kernel_size // 2)
    reach = dilation * (kernel_size - 1) + 1
    pad_h = max((out_h - 1) * stride + reach - before - height, 0)
    pad_w = max((out_w - 1) * stride + reach - before - width, 0)
    padded = F.pad(features.to(dtype), (before, pad_w, before, pad_h))
    padded = padded.unflatten(1, (groups, channels // groups))

    taps = kernel_size * kernel_size
    # [B, g, C/g, k*k] and [B, g, k*k, Ho, Wo]
    channel_taps = spatial_taps = None
    if channel_filter is not None:
        channel_taps = channel_filter.to(dtype).reshape(batch, groups, channels // groups, taps)
    if spatial_filter is not None:
        spatial_taps = spatial_filter.to(dtype).unflatten(1, (groups, taps))

    out = None
    for tap in range(taps):
        top, left = (tap // kernel_size) * dilation, (tap % kernel_size) * dilation
        window = padded[
            ...,
            top : top + (out_h - 1) * stride + 1 : stride,
            left : left + (out_w - 1) * stride + 1 : stride,
        ]
        if channel_taps is None:
            weight = spatial_taps[:, :, tap, None]
        else:
            weight = channel_taps[..., tap, None, None]
            if spatial_taps is not None:
                spatial = spatial_taps[:, :, tap, None]
                weight = weight * spatial if kernel_combine == "mul" else weight + spatial
        term = window * weight
        out = term if out is None else out + term

    out = out.flatten(1, 2).to(features.dtype)
    return out.contiguous(memory_format=layout_of(features))


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
    batch, total = x.shape[:2]
    out = x.to(accumulate_dtype(x.dtype))
    if batch:  # var_mean warns about an empty batch
        taps = out.unflatten(1, (filters, total // filters))
        variance, average = torch.var_mean(taps, dim=2, keepdim=True)
        # sqrt has no finite slope at 0; `where` on both sides keeps that out of the gradient.
        is_constant = variance == 0
        deviation = torch.where(is_constant, 1, variance).sqrt()
        out = torch.where(is_constant, 0, (taps - average) / (deviation + eps)).flatten(1, 2)

    per_tap = (1, total) + (1,) * (x.dim() - 2)
    out = out * (std.reshape(per_tap) if isinstance(std, Tensor) else std)
    if mean is not None:
        out = out + (mean.reshape(per_tap) if isinstance(mean, Tensor) else mean)
    return out.to(x.dtype)


def ddf_up_reference(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    kernel_size: int = 3,
    scale_factor: int = 2,
    dilation: int = 1,
    kernel_combine: str = "mul",
) -> Tensor:
    """DDF upsampling by :func:`ddf_reference`, one subpixel after the other, and a pixel shuffle.

    Takes the arguments of :func:`ddf_mm.ops.ddf_up` and is to it what :func:`ddf_reference` is to
    :func:`ddf_mm.ops.ddf`.
    """
    check_ddf_up_arguments(
        features,
        channel_filter,
        spatial_filter,
        kernel_size,
        scale_factor,
        dilation,
        kernel_combine,
    )
    subpixels = [
        ddf_reference(
            features,
            None if channel_filter is None else channel_filter[:, r],
            None if spatial_filter is None else spatial_filter[:, r],
            kernel_size,
            dilation,
            1,
            kernel_combine,
        )
        for r in range(scale_factor * scale_factor)
    ]
    out = F.pixel_shuffle(torch.stack(subpixels, dim=2).flatten(1, 2), scale_factor)
    return out.contiguous(memory_format=layout_of(features))
