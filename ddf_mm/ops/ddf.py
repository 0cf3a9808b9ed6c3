"""The DDF operation and its upsampling variant."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ddf_mm.ops import library, self_check
from ddf_mm.ops.checks import (
    PADDINGS,
    Geometry,
    check_ddf,
    check_ddf_up,
    check_features,
    check_int,
    check_kernel_size,
    shape_of,
    strided_size,
)
from ddf_mm.ops.reference import by_subpixel, ddf_formula, ddf_up_formula


@library.with_formula
def ddf(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    kernel_size: int = 3,
    dilation: int = 1,
    stride: int = 1,
    kernel_combine: str = "mul",
    padding: str = "zeros",
) -> Tensor:
    r"""Applies decoupled dynamic filters: a k x k filter per channel times (or plus) one per pixel.

    .. math::
        y_{b,c,i,j} = \sum_{t} x_{b,c,\, i s + d (t_y - \lfloor k/2 \rfloor),\,
        j s + d (t_x - \lfloor k/2 \rfloor)} \left( F^{ch}_{b,c,t} \circ
        F^{sp}_{b,\, \gamma(c),\, t,\, i,\, j} \right)

    with the taps :math:`t = (t_y, t_x)` of a k x k window, stride s, dilation d, zero padding of
    d*(k-1)/2, :math:`\circ` multiplication or addition, and :math:`\gamma(c)` the filter group
    of channel c. Arguments have the order and meaning of the official op (theFoxofSky/ddfnet,
    ddf/ddf.py); the paper is arXiv 2104.14107.

    Sums are accumulated in float32 for float16 and bfloat16. Under ``torch.autocast`` the tensors
    are cast to the autocast dtype first, like those of a convolution.

    The compiled op is used if there is one (see :func:`ddf_mm.ops.backend_info`); otherwise, under
    torch.func's transforms and in forward-mode differentiation, the formula in plain PyTorch.

    Args:
        features: ``Tensor[B, C, H, W]`` of float16, bfloat16, float32 or float64, contiguous or
            channels_last; B may be 0.
        channel_filter: ``Tensor[B, C, k, k]``, or ``None`` for the neutral filter: ones for
            ``'mul'``, zeros for ``'add'`` (spatial filters only, as in CARAFE and involution).
            A filter of batch 1 is used for all images of the batch; so is a spatial one.
        spatial_filter: ``Tensor[B, g*k*k, Ho, Wo]`` with g filter groups ("heads"), each for C/g
            consecutive channels, or ``None`` for the neutral filter (channel filters only, as in
            WeightNet). Ho = ceil(H / stride); floor(H / stride), which the official op requires,
            is accepted too.
        kernel_size: k, odd.
        dilation: distance in pixels between neighbouring taps.
        stride: distance in pixels between neighbouring windows.
        kernel_combine: ``'mul'`` or ``'add'``.
        padding: what lies outside the features: ``'zeros'``, their reflection (``'reflect'``) or
            their outermost pixels (``'replicate'``), as in :func:`torch.nn.functional.pad`; or
            ``'valid'``, which computes only the pixels whose windows lie in the features: of
            Hp x Wp features that are Ho = (Hp - d*(k-1) - 1) // stride + 1 rows. On a CPU it
            copies nothing; on other devices, and if compiled by torch.compile, it computes the
            pixels of the zero-padded features, for which spatial filters get a rim of zeros, and
            returns a view.

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
        return handle_torch_function(ddf, tensors, *tensors, *options, *_unless_zeros(padding))
    tensors = _prepared(*tensors, kernel_size, dilation, padding)
    call = *tensors, *options
    geometry = check_ddf(*call, is_valid=padding != "zeros")
    return _filtered("ddf", tensors, options, geometry)


def _unless_zeros(padding: str) -> tuple[str, ...]:
    """The argument, unless it has its default."""
    return () if padding == "zeros" else (padding,)


def _prepared(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    kernel_size: int,
    dilation: int,
    padding: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The tensors cast by autocast, with filters of batch 1 expanded to the batch of the features.

    Features are padded, but not with zeros, which ops and formulas do by themselves: all other
    paddings are ``'valid'`` from here on. The other checks come later.
    """
    if padding not in PADDINGS:
        names = ", ".join(map(repr, PADDINGS))
        raise ValueError(f"padding must be one of {names}, got {padding!r}")
    if padding in ("reflect", "replicate"):
        check_features(features)
        reach = check_int("dilation", dilation, 1) * (check_kernel_size(kernel_size) // 2)
        height, width = shape_of(features)[2:]
        if padding == "reflect" and min(height, width) <= reach:
            raise ValueError(
                f"features must have more than dilation * (kernel_size // 2) = {reach} rows and "
                f"columns for padding 'reflect', got {height}x{width}"
            )
        # Before the cast, because autocast pads in float32.
        features = F.pad(features, (reach,) * 4, mode=padding)
    features, channel_filter, spatial_filter = library.autocast_inputs(
        features, channel_filter, spatial_filter
    )
    if not _is_usual(features) or shape_of(features)[0] == 1:
        return features, channel_filter, spatial_filter
    return features, _expand(channel_filter, features), _expand(spatial_filter, features)


def _expand(filters: Tensor | None, features: Tensor) -> Tensor | None:
    if filters is None or not _is_usual(filters) or shape_of(filters)[0] != 1:
        return filters
    return filters.expand(features.shape[0], *filters.shape[1:])


def _is_usual(tensor: Tensor) -> bool:
    """Whether a tensor has a batch; the checks refuse others."""
    return isinstance(tensor, Tensor) and not tensor.is_nested and tensor.dim() > 1


def _filtered(
    name: str,
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    options: tuple[int, int, int, str],
    geometry: Geometry,
) -> Tensor:
    """The result of ``ddf`` or ``ddf_up``, called ``name``, for checked arguments: of the compiled
    op if it can be used, otherwise of the formula."""
    features, call = tensors[0], (*tensors, *options)
    # torch.compile of torch 2.15 takes the __name__ of a decorated function for its wrapper's, and
    # cannot look up an op by its name.
    is_up = name == "ddf_up"
    if library.serves(features):
        ops = torch.ops.ddf_mm
        if geometry.is_valid:
            if _has_ops_for_valid(features):
                return (ops.ddf_up_valid if is_up else ops.ddf_valid)(*call)
            return _by_rim_of_zeros(ddf_up if is_up else ddf, *tensors, options, geometry)
        if self_check.passes(name, *call):
            return (ops.ddf_up if is_up else ops.ddf)(*call)
    library.warn_about_reference(features.device.type)
    return (ddf_up_formula if is_up else ddf_formula)(*tensors, geometry)


def _has_ops_for_valid(features: Tensor) -> bool:
    """Whether the ops for padding ``'valid'`` are used; exporters know only the others."""
    return features.device.type == "cpu" and not torch.compiler.is_compiling()


def _by_rim_of_zeros(
    function: Callable[..., Tensor],
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    options: tuple,
    geometry: Geometry,
) -> Tensor:
    """Padding ``'valid'`` by zero padding, for spatial filters with a rim of zeros."""
    stride, reach = geometry.stride, geometry.dilation * (geometry.kernel_size // 2)
    # The centre of the first window, reach, must be one of the pixels 0, stride, 2 * stride, ...
    if shift := -reach % stride:
        features = F.pad(features, (shift, 0, shift, 0))
    first = (reach + shift) // stride
    if spatial_filter is not None:
        rows, columns = (strided_size(size, stride) - first for size in features.shape[2:])
        after = rows - geometry.height, columns - geometry.width
        spatial_filter = F.pad(spatial_filter, (first, after[1], first, after[0]))
    out = function(features, channel_filter, spatial_filter, *options)
    # Not output_size: torch.compile of torch 2.10 knows no properties of named tuples.
    rows, columns = geometry.scale_factors
    bottom, right = first + geometry.height, first + geometry.width
    return out[:, :, rows * first : rows * bottom, columns * first : columns * right]


@library.with_formula
def ddf_up(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    kernel_size: int = 3,
    scale_factor: int | Sequence[int] = 2,
    dilation: int = 1,
    kernel_combine: str = "mul",
    padding: str = "zeros",
) -> Tensor:
    r"""Upsamples with s*s decoupled dynamic filters, one for each subpixel.

    Output pixel (s*i + p, s*j + q) is the DDF of :func:`ddf` at pixel (i, j) with the filters of
    subpixel r = s*p + q (`DDFUpPack` in the official ddf/ddf.py). The compiled op writes the
    upsampled features directly. Accumulation, autocast, filters of batch 1 and the choice between
    the compiled op and the formula are as for :func:`ddf`.

    Args:
        features: ``Tensor[B, C, H, W]``, as for :func:`ddf`.
        channel_filter: ``Tensor[B, s*s, C, k, k]``, or ``None``.
        spatial_filter: ``Tensor[B, s*s, g*k*k, H, W]``, or ``None``.
        kernel_size: k, odd.
        scale_factor: s, the factor of upsampling; or two, of the height and the width, of which
            s*s above is the product and r = sw*p + q. With two that differ each subpixel is a call
            of :func:`ddf`, before a pixel shuffle.
        dilation: distance in pixels between neighbouring taps.
        kernel_combine: ``'mul'`` or ``'add'``.
        padding: as for :func:`ddf`; with ``'valid'`` H and W of the spatial filters and the result
            are those of the features less d*(k-1).

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
        return handle_torch_function(ddf_up, tensors, *tensors, *options, *_unless_zeros(padding))
    tensors = _prepared(*tensors, kernel_size, dilation, padding)
    call = *tensors, *options
    geometry = check_ddf_up(*call, is_valid=padding != "zeros")
    factor, of_width = geometry.scale_factors
    if factor != of_width and library.serves(tensors[0]):
        subpixel = functools.partial(
            ddf,
            kernel_size=kernel_size,
            dilation=dilation,
            kernel_combine=kernel_combine,
            padding="valid" if geometry.is_valid else "zeros",
        )
        return by_subpixel(subpixel, *tensors, geometry)
    options = kernel_size, factor, dilation, kernel_combine
    return _filtered("ddf_up", tensors, options, geometry)
