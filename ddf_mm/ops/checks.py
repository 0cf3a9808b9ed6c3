"""Validation of the arguments of the operations, done once, at the Python entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Integral, Real
from reprlib import repr as shortened
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_T = TypeVar("_T")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMBINES = ("mul", "add")
PADDINGS = ("zeros", "reflect", "replicate", "valid")
AUTOCAST_RULE = "torch.autocast casts the tensors of a call only if none of them is float64"


class Geometry(NamedTuple):
    """Options and sizes of a call of ddf, or of one subpixel of ddf_up.

    The channels C share the spatial filters: C = groups * group_channels.
    """

    kernel_size: int
    dilation: int
    stride: int
    kernel_combine: str
    height: int  # of the output; for ddf_up divided by the scale factor
    width: int
    groups: int
    group_channels: int
    scale_factors: tuple[int, int] = (1, 1)  # of the height and the width
    is_valid: bool = False  # whether there is no padding

    @property
    def output_size(self) -> tuple[int, int]:
        return self.scale_factors[0] * self.height, self.scale_factors[1] * self.width


def untraced(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Disables torch.jit's tracer in a function that branches on sizes.

    In the tracer sizes are tensors: it would record each comparison of them and warn that the trace
    may not generalize to other sizes.
    """

    @wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        state = torch._C._get_tracing_state()
        if state is None:
            return function(*args, **kwargs)
        torch._C._set_tracing_state(None)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_tracing_state(state)

    return wrapper


@untraced
def shape_of(tensor: Tensor) -> torch.Size:
    """The shape as ints, which torch.jit's tracer would make tensors."""
    return tensor.shape


def check_int(name: str, value: int, minimum: int | None = None) -> int:
    """``value`` as an int; raises unless it is an integer, of Python or numpy, >= ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{name} must be an int, got {_given(value)}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if value >= 2**63:
        raise ValueError(f"{name} must be less than 2**63, got {value}")
    return value if isinstance(value, int) else int(value)


def check_kernel_size(kernel_size: int, name: str = "kernel_size", minimum: int = 1) -> int:
    """``kernel_size`` as an int; raises unless it is an odd integer of at least ``minimum``."""
    kernel_size = check_int(name, kernel_size, minimum)
    if kernel_size % 2 == 0:
        raise ValueError(
            f"{name} must be odd, so that a window has a centre; got {kernel_size} (a filter of "
            f"{kernel_size} x {kernel_size} taps is one of {kernel_size + 1} x {kernel_size + 1} "
            "whose first or last row and column are zeros: torch.nn.functional.pad adds them)"
        )
    return kernel_size


def check_scale_factors(scale_factor: int | Sequence[int]) -> tuple[int, int]:
    """The scale factors of the height and the width; raises unless ``scale_factor`` is one
    positive integer for both, or two."""
    if isinstance(scale_factor, str) or not isinstance(scale_factor, Sequence):
        factor = check_int("scale_factor", scale_factor, 1)
        return factor, factor
    factors = check_ints("scale_factor", scale_factor, "of height and width", 1)
    if len(factors) != 2:
        raise ValueError(
            f"scale_factor must be an int or two, of height and width, got {scale_factor!r}"
        )
    return factors[0], factors[1]


def check_ints(name: str, values: Sequence[int], of: str, minimum: int | None = None) -> list[int]:
    """``values`` as a list of ints; raises unless it is a sequence whose items pass check_int."""
    check_sequence(name, values, of)
    return [check_int(f"{name}[{i}]", value, minimum) for i, value in enumerate(values)]


def check_sequence(name: str, values: Sequence, of: str) -> None:
    """Raises unless ``values`` is a list, tuple or other sequence; ``of`` describes its items."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a list or tuple, {of}, got {_given(values)}")


def check_dict(name: str, value: dict | None, of: str, optional: bool = True) -> None:
    """Raises unless ``value`` is a dict, or None if ``optional``; ``of`` describes its items."""
    if not isinstance(value, dict) and not (optional and value is None):
        or_none = ", or None" if optional else ""
        raise TypeError(f"{name} must be a dict, {of}{or_none}, got {_given(value)}")


def _given(value: object) -> str:
    return f"{shortened(value)} of type {type(value).__name__}"


def check_number(name: str, value: float) -> None:
    """Raises unless ``value`` is a real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name} must be a number, got {_given(value)}")


def check_combine(kernel_combine: str) -> None:
    """Raises unless ``kernel_combine`` is one of ``COMBINES``."""
    if kernel_combine not in COMBINES:
        names = " or ".join(map(repr, COMBINES))
        raise ValueError(f"kernel_combine must be {names}, got {kernel_combine!r}")


def check_tensor(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Raises unless ``tensor`` is a dense floating-point tensor of ``like``'s dtype and device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name} must be one of {names}, got {tensor.dtype}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} must be a dense tensor, of layout torch.strided, got {kind}")
    if like is None:
        return
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{name} must have the dtype of features, {like.dtype}, got {tensor.dtype} "
            f"({AUTOCAST_RULE})"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the device of features, {like.device}, got {tensor.device}"
        )


@untraced
def check_features(features: Tensor, name: str = "features") -> None:
    """Raises unless ``features`` is a floating-point ``Tensor[B, C, H, W]``, C, H, W > 0."""
    check_tensor(name, features)
    if features.dim() != 4:
        raise ValueError(
            f"{name} must be a Tensor[B, C, H, W], got {features.dim()} dimensions, "
            f"shape {list(features.shape)}"
        )
    if 0 in features.shape[1:]:
        raise ValueError(
            f"{name} must have at least one channel, row and column (only the batch may be "
            f"empty), got shape {list(features.shape)}"
        )


def check_groups(spatial_channels: int, kernel_size: int, channels: int, name: str) -> int:
    """Filter groups g of a spatial filter with ``g * k * k`` channels; raises if g is no integer or
    does not divide the channels of features."""
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


def strided_size(size: int, stride: int) -> int:
    """Number of the rows or columns 0, stride, 2 * stride, ... of ``size``."""
    # Written like the output size of a convolution, so that symbolic sizes compare without a guard.
    return (size - 1) // stride + 1


@untraced
def check_ddf(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    kernel_size: int,
    dilation: int,
    stride: int,
    kernel_combine: str,
    is_valid: bool = False,
) -> Geometry:
    """Checks the arguments of :func:`ddf_mm.ops.ddf`; ``is_valid``: with padding ``'valid'``.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: wrong value, shape or device of an argument.
    """
    check_kernel_size(kernel_size)
    check_int("dilation", dilation, 1)
    check_int("stride", stride, 1)
    check_combine(kernel_combine)
    options = kernel_size, dilation, stride, kernel_combine
    check_features(features)
    _, channels, height, width = features.shape
    extent = _valid_extent(features, kernel_size, dilation) if is_valid else 0
    ceil_h, ceil_w = strided_size(height - extent, stride), strided_size(width - extent, stride)
    groups = _check_filters(features, channel_filter, spatial_filter, kernel_size)
    if spatial_filter is None:
        return Geometry(*options, ceil_h, ceil_w, groups, channels // groups, is_valid=is_valid)

    out_h, out_w = spatial_filter.shape[2:]
    if is_valid and (out_h, out_w) != (ceil_h, ceil_w):
        raise ValueError(
            f"spatial_filter must be a Tensor[B, groups*k*k, Ho, Wo] of {ceil_h}x{ceil_w} pixels "
            f"without padding, got shape {list(spatial_filter.shape)}"
        )
    # The official op requires the floor, which omits the last window of an odd size. torch.compile
    # evaluates `in` wrongly for a number and symbolic sizes.
    if not is_valid and not (
        (out_h == ceil_h or out_h == height // stride)
        and (out_w == ceil_w or out_w == width // stride)
    ):
        raise ValueError(
            f"spatial_filter must be {ceil_h}x{ceil_w} pixels, features' {height}x{width} over "
            f"stride {stride} rounded up (or rounded down: {height // stride}x"
            f"{width // stride}), got {out_h}x{out_w}"
        )
    if 0 in (out_h, out_w):
        raise ValueError(f"spatial_filter must have at least one pixel, got {out_h}x{out_w}")
    return Geometry(*options, out_h, out_w, groups, channels // groups, is_valid=is_valid)


@untraced
def check_ddf_up(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    kernel_size: int,
    scale_factor: int | Sequence[int],
    dilation: int,
    kernel_combine: str,
    is_valid: bool = False,
) -> Geometry:
    """Checks the arguments of :func:`ddf_mm.ops.ddf_up`; ``is_valid``: with padding ``'valid'``.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: wrong value, shape or device of an argument.
    """
    check_kernel_size(kernel_size)
    factors = check_scale_factors(scale_factor)
    check_int("dilation", dilation, 1)
    check_combine(kernel_combine)
    check_features(features)
    groups = _check_filters(features, channel_filter, spatial_filter, kernel_size, factors)
    _, channels, height, width = features.shape
    if is_valid:
        extent = _valid_extent(features, kernel_size, dilation)
        height, width = height - extent, width - extent
    if spatial_filter is not None and tuple(spatial_filter.shape[3:]) != (height, width):
        which = " whose windows lie in them" if is_valid else ""
        raise ValueError(
            f"spatial_filter must have the {height}x{width} pixels of features{which}, got "
            f"{spatial_filter.shape[3]}x{spatial_filter.shape[4]}"
        )
    options = kernel_size, dilation, 1, kernel_combine
    return Geometry(*options, height, width, groups, channels // groups, factors, is_valid)


def _valid_extent(features: Tensor, kernel_size: int, dilation: int) -> int:
    """The rows, and columns, by which padding ``'valid'`` makes the output smaller."""
    extent = dilation * (kernel_size - 1)
    height, width = features.shape[2:]
    if min(height, width) <= extent:
        raise ValueError(
            f"features must have more than dilation * (kernel_size - 1) = {extent} rows and "
            f"columns for padding 'valid', got {height}x{width}"
        )
    return extent


def _check_filters(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    kernel_size: int,
    scale_factors: tuple[int, int] | None = None,
) -> int:
    """Checks the filters except the spatial size; returns the number of filter groups."""
    batch, channels = features.shape[:2]
    if channel_filter is None and spatial_filter is None:
        raise ValueError(
            "channel_filter and spatial_filter are both None; at least one must be given"
        )
    # The filters of ddf_up have a dimension of subpixels after the batch.
    subpixels = () if scale_factors is None else (scale_factors[0] * scale_factors[1],)
    axis = "" if scale_factors is None else f"{_subpixels(scale_factors)}, "
    if channel_filter is not None:
        check_tensor("channel_filter", channel_filter, like=features)
        expected = (batch, *subpixels, channels, kernel_size, kernel_size)
        if tuple(channel_filter.shape) != expected:
            raise ValueError(
                f"channel_filter must be a Tensor[B, {axis}C, k, k] = {list(expected)} to match "
                f"features {list(features.shape)}{_scaled(scale_factors)} and kernel_size "
                f"{kernel_size}, got {list(channel_filter.shape)}"
            )
    if spatial_filter is None:
        return 1
    check_tensor("spatial_filter", spatial_filter, like=features)
    shape = spatial_filter.shape
    at = 1 + len(subpixels)
    if len(shape) != at + 3 or shape[0] != batch or (subpixels and shape[1] != subpixels[0]):
        size = "H, W" if subpixels else "Ho, Wo"
        raise ValueError(
            f"spatial_filter must be a Tensor[B, {axis}groups*k*k, {size}] with B = {batch}, the "
            f"batch of features{_scaled(scale_factors)}, got shape {list(spatial_filter.shape)}"
        )
    return check_groups(shape[at], kernel_size, channels, "spatial_filter")


def _subpixels(scale_factors: tuple[int, int]) -> str:
    return "s*s" if scale_factors[0] == scale_factors[1] else "sh*sw"


def _scaled(scale_factors: tuple[int, int] | None) -> str:
    if scale_factors is None:
        return ""
    rows, columns = scale_factors
    factor = rows if rows == columns else scale_factors
    return f", {_subpixels(scale_factors)} = {rows * columns} for scale_factor {factor}"
