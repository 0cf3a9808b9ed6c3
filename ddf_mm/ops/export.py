"""Translation of the compiled ops for export: to ONNX operators and to PyTorch's own."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ddf_mm.ops import library
from ddf_mm.ops.reference import (
    ddf_reference,
    ddf_up_reference,
    filter_norm_op_reference,
)

_FLOAT = 1  # onnx.TensorProto.FLOAT
_TO_THE_END = torch.iinfo(torch.int64).max


def onnx_translations() -> dict[Any, Callable]:
    """Translations of the compiled ops for ``torch.onnx.export(custom_translation_table=…)``.

    Computed tap by tap, as in :func:`ddf_mm.ops.ddf_reference`: three to four standard operators
    per tap, independent of the size of the image. A stack of all windows is not faster in ONNX
    Runtime and needs k*k times the memory; windows of flattened rows, which are contiguous, are
    not either. Blocks of channels that fit into a cache are 3 % faster there and a tenth slower in
    OpenVINO. Convolutions of one pixel, as in channel branches, become matrix products.

    Returns:
        The table; empty if there are no compiled ops, in which case the formula is exported.

    Raises:
        ModuleNotFoundError: onnxscript is not installed.
    """
    if not library.COMPILED:
        return {}
    return {
        torch.ops.ddf_mm.ddf.default: _onnx_ddf,
        torch.ops.ddf_mm.ddf_up.default: _onnx_ddf_up,
        torch.ops.ddf_mm.filter_norm.default: _onnx_filter_norm,
        torch.ops.aten.conv2d.default: _onnx_conv2d,
    }


def decompositions() -> dict[Any, Callable]:
    """Decompositions of the compiled ops into PyTorch's own operators, for
    ``ExportedProgram.run_decompositions``; empty if there are no compiled ops."""
    if not library.COMPILED:
        return {}
    ops = torch.ops.ddf_mm
    return {
        ops.ddf.default: ddf_reference,
        ops.ddf_up.default: ddf_up_reference,
        ops.filter_norm.default: filter_norm_op_reference,
    }


def _onnx_ddf(
    features: Any,
    channel_filter: Any,
    spatial_filter: Any,
    kernel_size: int,
    dilation: int,
    stride: int,
    kernel_combine: str,
) -> Any:
    groups = 1 if spatial_filter is None else spatial_filter.shape[1] // kernel_size**2
    filters = (channel_filter, spatial_filter)
    return _onnx_taps(features, *filters, kernel_size, dilation, stride, kernel_combine, groups)


def _onnx_filter_norm(x: Any, filters: int, std: Any, mean: Any, scale: float, eps: float) -> Any:
    from onnxscript import ir
    from onnxscript import opset18 as op

    def number(value: float) -> Any:
        return op.Constant(value=ir.tensor(value, ir.DataType.FLOAT if wide else x.dtype))

    wide = x.dtype.itemsize < 4
    raw = op.Cast(x, to=_FLOAT) if wide else x
    taps = x.shape[1] // filters
    axis = op.Constant(value_ints=[2 if filters > 1 else 1])
    if filters > 1:
        # Without a last axis of size 1, with which ONNX Runtime takes means slowly.
        pixels = [-1] if any(n != 1 for n in x.shape[2:]) else []
        raw = op.Reshape(raw, op.Constant(value_ints=[0, filters, taps, *pixels]))
    out = op.Sub(raw, op.ReduceMean(raw, axis))
    # scale / (deviation + eps) with all terms over eps, since exporters remove sums with eps, and
    # constant filters would be 0 / 0.
    eps = max(eps, 1e-20)
    deviation = op.Mul(op.ReduceL2(out, axis), number((taps - 1) ** -0.5 / eps))
    out = op.Mul(out, op.Div(number(scale / eps), op.Add(deviation, number(1.0))))
    if filters > 1:
        out = op.Reshape(out, op.Shape(x))
    per_tap = op.Constant(value_ints=[-1] + [1] * (len(x.shape) - 2))
    if std is not None:
        out = op.Mul(out, op.Reshape(std, per_tap))
    if mean is not None:
        out = op.Add(out, op.Reshape(mean, per_tap))
    return op.CastLike(out, x) if wide else out


def _onnx_conv2d(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Any:
    """A convolution; of one pixel, as in channel branches, a matrix product, for which ONNX Runtime
    reads the weights faster."""
    from onnxscript import opset18 as op

    is_pixel = (*x.shape[-2:], *weight.shape[2:]) == (1, 1, 1, 1)
    has_batch = len(x.shape) == 4
    first = op.Constant(value_ints=[0])
    if not has_batch:
        x = op.Unsqueeze(x, first)
    if is_pixel and groups == 1 and not any(padding):
        out = op.Gemm(op.Flatten(x), op.Flatten(weight), bias, transB=1)
        out = op.Unsqueeze(out, op.Constant(value_ints=[2, 3]))
    else:
        pads = [*padding, *padding]
        out = op.Conv(x, weight, bias, strides=stride, pads=pads, dilations=dilation, group=groups)
    return out if has_batch else op.Squeeze(out, first)


def _onnx_taps(
    features: Any,
    channel_filter: Any,
    spatial_filter: Any,
    kernel_size: int,
    dilation: int,
    stride: int,
    kernel_combine: str,
    groups: int,
) -> Any:
    from onnxscript import opset18 as op

    channels = features.shape[1]
    taps = kernel_size**2
    before = dilation * (kernel_size // 2)

    def constant(*values: int) -> Any:
        return op.Constant(value_ints=values)

    def reshape(value: Any, *shape: int) -> Any:
        return op.Reshape(value, constant(*shape))

    dtype = features.dtype
    wide = dtype is not None and dtype.itemsize < 4

    def widened(value: Any) -> Any:
        return op.Cast(value, to=_FLOAT) if wide else value

    def weighted(term: Any, *weights: Any) -> Any:
        if kernel_combine == "mul":
            return functools.reduce(op.Mul, weights, term)
        return op.Mul(term, functools.reduce(op.Add, weights))

    # Groups are merged into the batch, so that all tensors have four dimensions; in a shape, 0
    # copies the input's dimension.
    x = reshape(features, -1, channels // groups, 0, 0) if groups > 1 else features
    per_channel = per_pixel = None
    if channel_filter is not None:
        per_channel = reshape(widened(channel_filter), -1, channels // groups, taps, 1)
    if spatial_filter is not None:
        per_pixel = widened(spatial_filter)
        if groups > 1:
            per_pixel = reshape(per_pixel, -1, taps, 0, 0)
    if kernel_size == 3 and dilation == 1 and stride == 1:
        out = _onnx_3x3(widened(x), per_channel, per_pixel, weighted)
    else:
        if stride == 1:
            x = widened(x)
            phases = {(0, 0): op.Pad(x, constant(0, 0, before, before, 0, 0, before, before))}
        else:
            phases = _onnx_phases(x, dtype, channels // groups, kernel_size, dilation, stride)
            phases = {first: widened(phase) for first, phase in phases.items()}
            if spatial_filter is None:
                size = op.Div(op.Add(op.Shape(x, start=2), constant(stride - 1)), constant(stride))
            else:  # may have one row or column fewer
                size = op.Shape(spatial_filter, start=2)
        weights = []
        if per_channel is not None:
            weights.append(op.Split(per_channel, axis=2, num_outputs=taps))
        if per_pixel is not None:
            weights.append(op.Split(per_pixel, axis=1, num_outputs=taps))
        terms = []
        for tap in range(taps):
            at = [tap // kernel_size * dilation, tap % kernel_size * dilation]
            first = constant(*(n // stride for n in at))
            if stride == 1:
                last = constant(*(n - 2 * before or _TO_THE_END for n in at))
            else:
                last = op.Add(size, first)
            if stride == 1 and at == [before, before]:
                term = x
            else:
                phase = phases[at[0] % stride, at[1] % stride]
                term = op.Slice(phase, first, last, constant(2, 3))
            terms.append(weighted(term, *(side[tap] for side in weights)))
        # Only if all additions are last in the file, ONNX Runtime runs each one after its term.
        # Otherwise it computes all terms first, which do not fit into a cache.
        out = functools.reduce(op.Add, terms)
    if groups > 1:
        out = reshape(out, -1, channels, 0, 0)
    return op.CastLike(out, features) if wide else out


def _onnx_3x3(x: Any, per_channel: Any, per_pixel: Any, weighted: Callable[..., Any]) -> Any:
    """The sum over the taps for stride 1, where four tensors as large as ``x`` are moved, in place
    of one for each tap.

    The columns of ``x`` are moved before they are weighted. The three terms of a row of taps are
    added at the row of ``x`` that they read, with the spatial filter moved there, and their sum is
    moved to the row of the output.
    """
    from onnxscript import opset18 as op

    def moved(value: Any, rows: int, columns: int) -> Any:
        if not rows and not columns:
            return value
        pads = [0, 0, rows, columns, 0, 0, -rows, -columns]
        return op.Pad(value, op.Constant(value_ints=pads))

    offsets = (-1, 0, 1)
    columns = [moved(x, 0, -offset) for offset in offsets]
    weights: list[Any] = []
    if per_channel is not None:
        weights.append(op.Split(per_channel, axis=2, num_outputs=9))
    if per_pixel is not None:
        rows = op.Split(per_pixel, axis=1, num_outputs=3)
        rows = [moved(row, offset, 0) for row, offset in zip(rows, offsets, strict=True)]
        weights.append([tap for row in rows for tap in op.Split(row, axis=1, num_outputs=3)])
    terms = [weighted(columns[tap % 3], *(side[tap] for side in weights)) for tap in range(9)]
    # All additions last, as above.
    sums = [functools.reduce(op.Add, terms[first : first + 3]) for first in (0, 3, 6)]
    moves = [moved(row, -offset, 0) for row, offset in zip(sums, offsets, strict=True)]
    return functools.reduce(op.Add, moves)


def _onnx_phases(
    x: Any, dtype: Any, channels: int, kernel_size: int, dilation: int, stride: int
) -> dict[tuple[int, int], Any]:
    """The padded features at every ``stride``-th row and column, from each first row and column
    that a tap has. Depthwise convolutions take ONNX Runtime much less time than strided slices."""
    from onnxscript import ir
    from onnxscript import opset18 as op

    before = dilation * (kernel_size // 2)
    after = before + stride - 1
    shape = op.Constant(value_ints=[channels, 1, 1, 1])
    firsts = sorted({tap * dilation % stride for tap in range(kernel_size)})
    phases = {}
    for row, column in itertools.product(firsts, firsts):
        one = torch.zeros(1, 1, stride, stride)
        one[..., row, column] = 1
        phases[row, column] = op.Conv(
            x,
            op.Expand(op.Constant(value=ir.tensor(one.tolist(), dtype)), shape),
            group=channels,
            pads=[before, before, after, after],
            strides=[stride, stride],
        )
    return phases


def _onnx_ddf_up(
    features: Any,
    channel_filter: Any,
    spatial_filter: Any,
    kernel_size: int,
    scale_factor: int,
    dilation: int,
    kernel_combine: str,
) -> Any:
    from onnxscript import opset18 as op

    def of_subpixel(filters: Any, r: int) -> Any:
        return None if filters is None else op.Gather(filters, op.Constant(value_int=r), axis=1)

    groups = 1 if spatial_filter is None else spatial_filter.shape[2] // kernel_size**2
    subpixels = [
        _onnx_taps(
            features,
            of_subpixel(channel_filter, r),
            of_subpixel(spatial_filter, r),
            kernel_size,
            dilation,
            1,
            kernel_combine,
            groups,
        )
        for r in range(scale_factor**2)
    ]
    return op.DepthToSpace(op.Concat(*subpixels, axis=1), blocksize=scale_factor, mode="DCR")
