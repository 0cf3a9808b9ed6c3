"""Checks of the operation's arguments, made once, at the Python entry."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMBINES = ("mul", "add")


def check_int(name: str, value: int, minimum: int) -> None:
    """Raises unless ``value`` is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_kernel_size(kernel_size: int, name: str = "kernel_size", minimum: int = 1) -> None:
    """Raises unless ``kernel_size`` is an odd integer of at least ``minimum``."""
    check_int(name, kernel_size, minimum)
    if kernel_size % 2 == 0:
        raise ValueError(f"{name} must be odd, so that a window has a centre; got {kernel_size}")


def check_combine(kernel_combine: str) -> None:
    """Raises unless ``kernel_combine`` is ``'mul'`` or ``'add'``."""
    if kernel_combine not in COMBINES:
        raise ValueError(f"kernel_combine must be 'mul' or 'add', got {kernel_combine!r}")


def check_tensor(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Raises unless ``tensor`` is a floating-point tensor, of ``like``'s dtype and device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name} must be one of {names}, got {tensor.dtype}")
    if like is None:
        return
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{name} must have the dtype of features, {like.dtype}, got {tensor.dtype} "
            "(under torch.autocast the operation casts all of them itself)"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the device of features, {like.device}, got {tensor.device}"
        )


def check_features(features: Tensor) -> None:
    """Raises unless ``features`` is a floating-point ``Tensor[B, C, H, W]``, C, H, W > 0."""
    check_tensor("features", features)
    if features.dim() != 4:
        raise ValueError(
            f"features must be a Tensor[B, C, H, W], got {features.dim()} dimensions, "
            f"shape {list(features.shape)}"
        )
    if 0 in features.shape[1:]:
        raise ValueError(
            "features must have at least one channel, row and column (only the batch may be "
            f"empty), got shape {list(features.shape)}"
        )


def check_groups(spatial_channels: int, kernel_size: int, channels: int, name: str) -> int:
    """Filter groups g of a spatial filter with ``g * k * k`` channels; raises if none fits."""
    taps = kernel_size * kernel_size
    groups = spatial_channels // taps
    if groups < 1 or spatial_channels % taps:
        raise ValueError(
            f"{name} must have groups * kernel_size**2 channels, a multiple of {taps} with "
            f"kernel_size {kernel_size}, got {spatial_channels}"
        )
    if channels % groups:
        raise ValueError(
            f"{name} has {spatial_channels} channels, that is {groups} filter groups of {taps} "
            f"taps, which must divide the {channels} channels of features"
        )
    return groups


def check_ddf_arguments(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    kernel_size: int,
    dilation: int,
    stride: int,
    kernel_combine: str,
) -> tuple[int, int, int]:
    """Checks the arguments of :func:`ddf_mm.ops.ddf`.

    Returns:
        (Ho, Wo, g): rows and columns of the output, and the filter groups.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: wrong value, shape or device of an argument.
    """
    check_kernel_size(kernel_size)
    check_int("dilation", dilation, 1)
    check_int("stride", stride, 1)
    check_combine(kernel_combine)
    check_features(features)
    batch, channels, height, width = features.shape
    if channel_filter is None and spatial_filter is None:
        raise ValueError(
            "channel_filter and spatial_filter are both None; at least one must be given"
        )
    if channel_filter is not None:
        check_tensor("channel_filter", channel_filter, like=features)
        expected = (batch, channels, kernel_size, kernel_size)
        if tuple(channel_filter.shape) != expected:
            raise ValueError(
                f"channel_filter must be a Tensor[B, C, k, k] = {list(expected)} to match "
                f"features {list(features.shape)} and kernel_size {kernel_size}, "
                f"got {list(channel_filter.shape)}"
            )
    # Written as a convolution's output size is, so that symbolic sizes compare without a guard.
    ceil_h, ceil_w = (height - 1) // stride + 1, (width - 1) // stride + 1
    if spatial_filter is None:
        return ceil_h, ceil_w, 1

    check_tensor("spatial_filter", spatial_filter, like=features)
    if spatial_filter.dim() != 4 or spatial_filter.shape[0] != batch:
        raise ValueError(
            f"spatial_filter must be a Tensor[B, groups*k*k, Ho, Wo] with B = {batch}, the batch "
            f"of features, got shape {list(spatial_filter.shape)}"
        )
    groups = check_groups(spatial_filter.shape[1], kernel_size, channels, "spatial_filter")
    out_h, out_w = spatial_filter.shape[2:]
    # The floor is what the official op takes; it drops the last window of an odd size.
    if out_h not in (ceil_h, height // stride) or out_w not in (ceil_w, width // stride):
        raise ValueError(
            f"spatial_filter must be {ceil_h}x{ceil_w} pixels, features' {height}x{width} over "
            f"stride {stride} rounded up (or rounded down: {height // stride}x"
            f"{width // stride}), got {out_h}x{out_w}"
        )
    if 0 in (out_h, out_w):
        raise ValueError(f"spatial_filter must have at least one pixel, got {out_h}x{out_w}")
    return out_h, out_w, groups


def check_ddf_up_arguments(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    kernel_size: int,
    scale_factor: int,
    dilation: int,
    kernel_combine: str,
) -> None:
    """Checks the arguments of :func:`ddf_mm.ops.ddf_up`.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: wrong value, shape or device of an argument.
    """
    check_kernel_size(kernel_size)
    check_int("scale_factor", scale_factor, 1)
    check_features(features)
    subpixels = scale_factor * scale_factor
    filters = {"channel_filter": channel_filter, "spatial_filter": spatial_filter}
    for name, given in filters.items():
        if given is None:
            continue
        check_tensor(name, given)
        if given.dim() != 5 or given.shape[1] != subpixels:
            shape = "B, s*s, C, k, k" if name == "channel_filter" else "B, s*s, g*k*k, H, W"
            raise ValueError(
                f"{name} must be a Tensor[{shape}] with s*s = {subpixels} for scale_factor "
                f"{scale_factor}, got shape {list(given.shape)}"
            )
    # The subpixels' filters have one shape.
    first = (None if given is None else given[:, 0] for given in filters.values())
    check_ddf_arguments(features, *first, kernel_size, dilation, 1, kernel_combine)
