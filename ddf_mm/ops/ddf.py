"""The DDF operation and its upsampling form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ddf_mm.ops import library
from ddf_mm.ops.checks import check_ddf, check_ddf_up
from ddf_mm.ops.reference import ddf_formula, ddf_up_formula


@library.with_formula
def ddf(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    kernel_size: int = 3,
    dilation: int = 1,
    stride: int = 1,
    kernel_combine: str = "mul",
) -> Tensor:
    r"""Applies a decoupled dynamic filter: one k x k filter a channel times (or plus) one a pixel.

    .. math::
        y_{b,c,i,j} = \sum_{t} x_{b,c,\, i s + d (t_y - \lfloor k/2 \rfloor),\,
        j s + d (t_x - \lfloor k/2 \rfloor)} \left( F^{ch}_{b,c,t} \circ
        F^{sp}_{b,\, \gamma(c),\, t,\, i,\, j} \right)

    with the taps :math:`t = (t_y, t_x)` of a k x k window, stride s, dilation d, zero padding of
    d*(k-1)/2, :math:`\circ` multiplication or addition, and :math:`\gamma(c)` the filter group
    of channel c. Arguments have the order and meaning of the official op (theFoxofSky/ddfnet,
    ddf/ddf.py); the paper is arXiv 2104.14107.

    Sums are kept in float32 for float16 and bfloat16. Under ``torch.autocast`` the tensors are
    cast to the autocast dtype first, as a convolution's are.

    A compiled op serves where there is one (see :func:`ddf_mm.ops.backend_info`), the formula in
    plain PyTorch elsewhere, under torch.func's transforms and in forward-mode differentiation.

    Args:
        features: ``Tensor[B, C, H, W]`` of float16, bfloat16, float32 or float64, contiguous or
            channels_last; B may be 0.
        channel_filter: ``Tensor[B, C, k, k]``, or ``None`` for a filter that changes nothing:
            ones for ``'mul'``, zeros for ``'add'`` (a filter as in CARAFE and involution).
        spatial_filter: ``Tensor[B, g*k*k, Ho, Wo]`` with g filter groups ("heads") that share
            the channels evenly and in order, or ``None`` likewise (a filter as in WeightNet).
            Ho = ceil(H / stride); floor, as the official op wants it, is taken too.
        kernel_size: k, odd.
        dilation: distance in pixels between neighbouring taps.
        stride: distance in pixels between neighbouring windows.
        kernel_combine: ``'mul'`` or ``'add'``.

    Returns:
        ``Tensor[B, C, Ho, Wo]`` of the dtype and memory format of ``features``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong value, shape or device.

    Example:
        >>> x = torch.randn(2, 16, 15, 20)
        >>> per_channel, per_pixel = torch.randn(2, 16, 3, 3), torch.randn(2, 9, 8, 10)
        >>> ddf(x, per_channel, per_pixel, kernel_size=3, stride=2).shape
        torch.Size([2, 16, 8, 10])
    """
    tensors = features, channel_filter, spatial_filter
    options = kernel_size, dilation, stride, kernel_combine
    if has_torch_function_variadic(*tensors):  # torch.fx records the call
        return handle_torch_function(ddf, tensors, *tensors, *options)
    features, channel_filter, spatial_filter = library.autocast_inputs(*tensors)
    geometry = check_ddf(features, channel_filter, spatial_filter, *options)
    if library.serves(features):
        return torch.ops.ddf_mm.ddf(features, channel_filter, spatial_filter, *options)
    library.warn_about_reference(features.device.type)
    return ddf_formula(features, channel_filter, spatial_filter, geometry)


@library.with_formula
def ddf_up(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    kernel_size: int = 3,
    scale_factor: int = 2,
    dilation: int = 1,
    kernel_combine: str = "mul",
) -> Tensor:
    r"""Upsamples with decoupled dynamic filters: s*s of them, one for each subpixel.

    Output pixel (s*i + p, s*j + q) is the DDF of :func:`ddf` at pixel (i, j) with the filters of
    subpixel r = s*p + q (`DDFUpPack` in the official ddf/ddf.py). The compiled op writes the
    upsampled features directly; sums, autocast and what serves where are as for :func:`ddf`.

    Args:
        features: ``Tensor[B, C, H, W]``, as for :func:`ddf`.
        channel_filter: ``Tensor[B, s*s, C, k, k]``, or ``None``.
        spatial_filter: ``Tensor[B, s*s, g*k*k, H, W]``, or ``None``.
        kernel_size: k, odd.
        scale_factor: s, the factor of upsampling.
        dilation: distance in pixels between neighbouring taps.
        kernel_combine: ``'mul'`` or ``'add'``.

    Returns:
        ``Tensor[B, C, s*H, s*W]`` of the dtype and memory format of ``features``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong value, shape or device.

    Example:
        >>> x = torch.randn(2, 16, 7, 5)
        >>> ddf_up(x, torch.randn(2, 4, 16, 3, 3), torch.randn(2, 4, 9, 7, 5)).shape
        torch.Size([2, 16, 14, 10])
    """
    tensors = features, channel_filter, spatial_filter
    options = kernel_size, scale_factor, dilation, kernel_combine
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(ddf_up, tensors, *tensors, *options)
    features, channel_filter, spatial_filter = library.autocast_inputs(*tensors)
    geometry = check_ddf_up(features, channel_filter, spatial_filter, *options)
    if library.serves(features):
        return torch.ops.ddf_mm.ddf_up(features, channel_filter, spatial_filter, *options)
    library.warn_about_reference(features.device.type)
    return ddf_up_formula(features, channel_filter, spatial_filter, geometry)
