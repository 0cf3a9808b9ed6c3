"""Translation of the compiled ops for export: to ONNX operators and to PyTorch's own."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


def onnx_translations(elementwise: bool = False) -> dict[Any, Callable]:
    """Translations of the compiled ops for ``torch.onnx.export(custom_translation_table=…)``.

    For each column of taps an elementwise and a matrix product, fast in ONNX Runtime, or, if
    ``elementwise``, two products and a sum for each tap (:func:`ddf_mm.ops.ddf_reference`), which
    other runtimes fuse, as OpenVINO does. The number of operators is independent of the size of the
    image. Convolutions of one pixel, as in channel branches, become matrix products.

    Returns:
        The table; empty if there are no compiled ops, in which case the formula is exported.

    Raises:
        ModuleNotFoundError: onnxscript is not installed.
    """
    if not library.COMPILED:
        return {}

    # The exporter reads these signatures.
    def ddf(
        features: Any,
        channel_filter: Any,
        spatial_filter: Any,
        kernel_size: int,
        dilation: int,
        stride: int,
        kernel_combine: str,
    ) -> Any:
        groups = 1 if spatial_filter is None else spatial_filter.shape[1] // kernel_size**2
        filters = [(channel_filter, spatial_filter)]
        options = kernel_size, dilation, stride, kernel_combine, groups, elementwise
        return _onnx_taps(features, filters, *options)[0]

    def ddf_up(
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
        filters = [
            (of_subpixel(channel_filter, r), of_subpixel(spatial_filter, r))
            for r in range(scale_factor**2)
        ]
        options = kernel_size, dilation, 1, kernel_combine, groups, elementwise
        subpixels = _onnx_taps(features, filters, *options)
        return op.DepthToSpace(op.Concat(*subpixels, axis=1), blocksize=scale_factor, mode="DCR")

    return {
        torch.ops.ddf_mm.ddf.default: ddf,
        torch.ops.ddf_mm.ddf_up.default: ddf_up,
        torch.ops.ddf_mm.filter_norm.default: _onnx_filter_norm,
        torch.ops.aten.conv2d.default: _onnx_conv2d,
        torch.ops.aten.relu.default: _onnx_relu,
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


def _onnx_filter_norm(x: Any, filters: int, std: Any, mean: Any, scale: float, eps: float) -> Any:
    from onnxscript import ir
    from onnxscript import opset18 as op

    def vector(value: float) -> Any:
        return op.Constant(value=ir.tensor([value], ir.DataType.FLOAT if wide else x.dtype))

    wide = x.dtype.itemsize < 4
    taps = x.shape[1] // filters
    has_pixels = any(n != 1 for n in x.shape[2:])
    source = _unflattened(x)
    convolution = source.meta.get(_CONVOLUTION)
    if convolution is not None:
        source = convolution.centered(filters)
    source = source.meta.get(_FLAT, source)
    out = op.Cast(source, to=_FLOAT) if wide else source
    shape, axis = [taps, 1, 1], _ints(1)
    if filters > 1 or not has_pixels:
        # Without a last axis of size 1, with which ONNX Runtime takes norms slowly.
        out = _reshape(out, 0, filters, taps, *[-1] * has_pixels)
        shape, axis = [filters, taps, *[1] * has_pixels], _ints(2)
    if convolution is None:
        out = op.Sub(out, op.ReduceMean(out, axis))
    # scale / (deviation + eps), both terms times the root. Exporters would remove a sum with a
    # small scalar, and constant filters would be 0 / 0.
    root = (taps - 1) ** 0.5
    norm = op.Add(op.ReduceL2(out, axis), vector(max(eps, 1e-20) * root))
    if std is None:
        out = op.Mul(out, op.Div(vector(scale * root), norm))
    else:
        factors = _reshape(op.Mul(std, vector(scale * root)), *shape)
        out = op.Mul(op.Div(out, norm), factors)
    if mean is not None:
        out = op.Add(out, _reshape(mean, *shape))
    if not has_pixels:
        out = _reshape(out, 0, -1, *x.shape[2:])
    elif filters > 1:
        out = op.Reshape(out, op.Shape(source))
    return op.CastLike(out, x) if wide else out


# What translations note about a value of the exporter, in its `meta`.
_CONVOLUTION = "ddf_mm.convolution"  # the _Convolution that computes it
_FLAT = "ddf_mm.flat"  # of a value [B, C, 1, 1]: the same as [B, C]
_SUM = "ddf_mm.sum"  # of a rectified sum: its terms [B, C, H, W] and [C, 1, 1]


@dataclass(frozen=True)
class _Convolution:
    apply: Callable[[Any, Any], Any]  # to a weight and a bias
    weight: Any
    bias: Any

    def centered(self, filters: int) -> Any:
        """The output minus the mean over the taps of each of ``filters`` filters, by weights and a
        bias of zero mean. In float64, so that those of equal taps become exactly 0."""
        from onnxscript import ir
        from onnxscript import opset18 as op

        def centered(value: Any) -> Any:
            taps = _reshape(value, filters, value.shape[0] // filters, -1)
            taps = op.Cast(taps, to=ir.DataType.DOUBLE)
            taps = op.Sub(taps, op.ReduceMean(taps, _ints(1)))
            return op.CastLike(_reshape(taps, *value.shape), value)

        return self.apply(centered(self.weight), None if self.bias is None else centered(self.bias))


def _of_pixels(flat: Any) -> Any:
    """``flat`` of shape ``[B, C]`` as ``[B, C, 1, 1]``."""
    from onnxscript import opset18 as op

    out = op.Unsqueeze(flat, _ints(2, 3))
    out.meta[_FLAT] = flat
    return out


def _unflattened(x: Any) -> Any:
    """What ``x`` of shape ``[B, C]`` was before a pixel's two dimensions were removed."""
    node = x.producer()
    is_view = node is not None and node.op_type == "Reshape"
    return node.inputs[0] if is_view and node.inputs[0].shape == (*x.shape, 1, 1) else x


def _onnx_relu(x: Any) -> Any:
    from onnxscript import opset18 as op

    if _FLAT in x.meta:  # next to a matrix product, of which runtimes make one operator
        return _of_pixels(op.Relu(x.meta[_FLAT]))
    out = op.Relu(x)
    node = x.producer()
    is_sum = node is not None and node.op_type == "Add" and len(x.shape) == 4
    if is_sum and [term.shape for term in node.inputs] == [x.shape, (x.shape[1], 1, 1)]:
        out.meta[_SUM] = node.inputs
    return out


def _onnx_conv2d(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Any:
    """A convolution as ONNX Runtime computes it fastest.

    Of one pixel, as in channel branches, it is a matrix product, which reads the weights faster,
    and a mean before it is a pooling, in the format of convolutions. A kernel of one pixel reads
    ``relu(x + shift)`` as ``max(x, -shift)``; the rest, ``shift``, is in its bias.
    """
    from onnxscript import opset18 as op

    def apply(weight: Any, bias: Any) -> Any:
        if is_pixel:
            return _of_pixels(op.Gemm(flat, op.Flatten(weight), bias, transB=1))
        pads = [*padding, *padding]
        return op.Conv(
            images, weight, bias, strides=stride, pads=pads, dilations=dilation, group=groups
        )

    is_product = groups == 1 and not any(padding) and weight.shape[2:] == (1, 1)
    is_pixel = is_product and x.shape[-2:] == (1, 1)
    if len(x.shape) == 3:
        images = op.Unsqueeze(x, _ints(0))
        flat = op.Flatten(images) if is_pixel else None
        return op.Squeeze(apply(weight, bias), _ints(0))
    images, source = x, x.producer()
    if is_pixel and _FLAT not in x.meta:
        is_mean = source is not None and source.op_type == "ReduceMean"
        if is_mean and source.inputs[0].shape[:2] == x.shape[:2]:
            images = op.GlobalAveragePool(source.inputs[0])
        # Kept, since onnxscript 0.7 loses the shape of a second operator like it.
        x.meta[_FLAT] = op.Flatten(images)
    elif not is_pixel and is_product and _SUM in x.meta and x.dtype.itemsize >= 4:
        term, shift = x.meta[_SUM]
        images = op.Max(term, op.Neg(shift))
        rest = _reshape(op.MatMul(op.Flatten(weight), op.Flatten(shift)), -1)
        bias = rest if bias is None else op.Add(bias, rest)
    flat = x.meta.get(_FLAT)
    out = apply(weight, bias)
    if groups == 1:
        out.meta[_CONVOLUTION] = _Convolution(apply, weight, bias)
    return out


def _onnx_taps(
    features: Any,
    filters: Sequence[tuple[Any, Any]],
    kernel_size: int,
    dilation: int,
    stride: int,
    kernel_combine: str,
    groups: int,
    elementwise: bool,
) -> list[Any]:
    """DDF of ``features`` with each pair of a channel and a spatial filter (or ``None``), one
    column of taps after another.

    With stride 1 the taps of all columns read the same rows of features: the spatial filter is
    moved to the pixels that they read, and the sums are moved back.
    """
    from onnxscript import opset18 as op

    dtype = features.dtype
    wide = dtype is not None and dtype.itemsize < 4

    def widened(value: Any) -> Any:
        return op.Cast(value, to=_FLOAT) if wide else value

    channels = features.shape[1] // groups
    offsets = [dilation * (tap - kernel_size // 2) for tap in range(kernel_size)]
    is_sum = kernel_combine == "add" and None not in filters[0]
    # Sums of filters and strides are not faster by products in ONNX Runtime.
    by_products = not (elementwise or stride > 1 or is_sum)
    # Groups are merged into the batch, so that all tensors have four dimensions; in a shape, 0
    # copies the input's dimension.
    x = _reshape(features, -1, channels, 0, 0) if groups > 1 else features
    if by_products:
        rows = [_onnx_stack(widened(x), offsets)] * kernel_size
    elif stride == 1:
        wide_x = widened(x)
        rows = [[_moved(wide_x, -offset, axis=2) for offset in offsets]] * kernel_size
    else:
        if (spatial_filter := filters[0][1]) is None:
            size = op.Div(op.Add(op.Shape(x, start=2), _ints(stride - 1)), _ints(stride))
        else:  # may have one row or column fewer
            size = op.Shape(spatial_filter, start=2)
        phases = _onnx_phases(x, dtype, channels, kernel_size, dilation, stride)
        phases = {first: widened(phase) for first, phase in phases.items()}
        rows = _onnx_strided_rows(phases, size, kernel_size, dilation, stride)
        offsets = [0] * kernel_size

    outs = []
    for channel_filter, spatial_filter in filters:
        per_channel: Any = [None] * kernel_size
        per_pixel: Any = [None] * kernel_size
        if channel_filter is not None:
            weights = widened(channel_filter)
            weights = _reshape(weights, -1, channels, kernel_size, kernel_size)
            per_channel = _split(weights, 3, kernel_size)
        if spatial_filter is not None:
            weights = widened(spatial_filter)
            if groups > 1:
                weights = _reshape(weights, -1, kernel_size**2, 0, 0)
            taps = range(kernel_size**2)
            per_pixel = [
                _moved(op.Gather(weights, _ints(*taps[column::kernel_size]), axis=1), offset)
                for column, offset in enumerate(offsets)
            ]
        columns = zip(rows, per_channel, per_pixel, strict=True)
        if by_products:
            sums = [_onnx_product(*column, kernel_size) for column in columns]
            # What leaves a row on one side enters the next one on the other side, where the moved
            # spatial filter, if there is one, is 0.
            if spatial_filter is None:
                sums = [op.Reshape(value, op.Shape(x)) for value in sums]
        else:
            sums = [_onnx_sum(*column, is_sum) for column in columns]
        sums = [_moved(value, -offset) for value, offset in zip(sums, offsets, strict=True)]
        out = functools.reduce(op.Add, sums)
        if by_products:
            out = op.Reshape(out, op.Shape(features))
        elif groups > 1:
            out = _reshape(out, -1, channels * groups, 0, 0)
        outs.append(op.CastLike(out, features) if wide else out)
    return outs


def _onnx_product(stack: Any, of_channel: Any, of_pixel: Any, kernel_size: int) -> Any:
    """The sum ``[B, C, 1, H*W]`` over a column of taps by a matrix product of the channel filter
    ``[B, C, k, 1]`` with the weighted inputs, stacked to ``[B, C, k, H*W]``; the spatial filter is
    ``[B, k, H, W]``."""
    from onnxscript import opset18 as op

    if of_pixel is not None:
        stack = op.Mul(stack, _reshape(of_pixel, 0, 1, kernel_size, -1))
    if of_channel is None:
        return op.ReduceSum(stack, _ints(2))
    return op.MatMul(_reshape(of_channel, 0, 0, 1, -1), stack)


def _onnx_sum(inputs: Sequence[Any], of_channel: Any, of_pixel: Any, is_sum: bool) -> Any:
    """The sum over a column of taps of ``k`` inputs ``[B, C, H, W]``, term by term."""
    from onnxscript import opset18 as op

    sides = list[Sequence[Any]]()
    if of_channel is not None:
        sides.append(_split(of_channel, 2, len(inputs)))
    if of_pixel is not None:
        sides.append(_split(of_pixel, 1, len(inputs)))
    terms = []
    for term, *weights in zip(inputs, *sides, strict=True):
        if is_sum:
            weights = [op.Add(*weights)]
        terms.append(functools.reduce(op.Mul, weights, term))
    return functools.reduce(op.Add, terms)


def _ints(*values: int) -> Any:
    from onnxscript import opset18 as op

    return op.Constant(value_ints=values)


def _reshape(value: Any, *shape: int) -> Any:
    from onnxscript import opset18 as op

    return op.Reshape(value, _ints(*shape))


def _split(value: Any, axis: int, parts: int) -> Sequence[Any]:
    from onnxscript import opset18 as op

    return [value] if parts == 1 else op.Split(value, axis=axis, num_outputs=parts)


def _moved(value: Any, amount: int, axis: int = 3) -> Any:
    """``value`` of four axes, moved up along one of them; zeros enter."""
    from onnxscript import opset18 as op

    def padded(before: int, after: int) -> Any:
        pads = [0] * 8
        pads[axis], pads[axis + 4] = before, after
        return op.Pad(value, _ints(*pads))

    if abs(amount) <= 1:
        return padded(amount, -amount) if amount else value
    # There may be fewer rows or columns than that, which negative pads do not allow.
    before, after = max(amount, 0), max(-amount, 0)
    ends = _ints(after), _ints(-before or _TO_THE_END)
    return op.Slice(padded(before, after), *ends, _ints(axis))


def _onnx_stack(x: Any, offsets: Sequence[int]) -> Any:
    """``x`` with its rows moved by minus each offset, stacked to ``[B, C, k, H*W]``."""
    from onnxscript import opset18 as op

    def rows(first: int, last: int) -> Any:
        return op.Slice(x, _ints(first), _ints(last), _ints(2))

    if offsets[0] == -1:  # in ONNX Runtime faster than moved copies
        zeros = _moved(rows(0, 1), 1, axis=2)
        parts = [zeros, rows(0, -1), x, rows(1, _TO_THE_END), zeros]
    else:
        parts = [_moved(x, -offset, axis=2) for offset in offsets]
    return _reshape(op.Concat(*parts, axis=2), 0, 0, len(offsets), -1)


def _onnx_strided_rows(
    phases: Mapping[tuple[int, int], Any], size: Any, kernel_size: int, dilation: int, stride: int
) -> list[list[Any]]:
    """For each column of taps, what its taps read for each pixel of an output of the given size."""
    from onnxscript import opset18 as op

    def rows(row: int, column: int) -> Any:
        first = _ints(row // stride, column // stride)
        phase = phases[row % stride, column % stride]
        return op.Slice(phase, first, op.Add(size, first), _ints(2, 3))

    positions = range(0, kernel_size * dilation, dilation)
    return [[rows(row, column) for row in positions] for column in positions]


def _onnx_phases(
    x: Any, dtype: Any, channels: int, kernel_size: int, dilation: int, stride: int
) -> dict[tuple[int, int], Any]:
    """The padded features at every ``stride``-th row and column, from each first row and column
    that a tap has. Depthwise convolutions take ONNX Runtime much less time than strided slices."""
    from onnxscript import ir
    from onnxscript import opset18 as op

    before = dilation * (kernel_size // 2)
    after = before + stride - 1
    firsts = sorted({tap * dilation % stride for tap in range(kernel_size)})
    phases = {}
    for row, column in itertools.product(firsts, firsts):
        one = torch.zeros(1, 1, stride, stride)
        one[..., row, column] = 1
        phases[row, column] = op.Conv(
            x,
            op.Expand(op.Constant(value=ir.tensor(one.tolist(), dtype)), _ints(channels, 1, 1, 1)),
            group=channels,
            pads=[before, before, after, after],
            strides=[stride, stride],
        )
    return phases
