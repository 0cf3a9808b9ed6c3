"""Models as files that other programs run: ONNX, and torch.export's programs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode

from ddf_mm.engine.cli import UserError
from ddf_mm.ops import library

# Oldest opset that the exporter writes by itself; a newer one is converted from it.
MIN_OPSET = 18
_TO_THE_END = torch.iinfo(torch.int64).max


class ImageScores(nn.Module):
    """A classifier of mmpretrain, less its data preprocessor: images -> scores before softmax."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """``Tensor[B, C, H, W]`` -> ``Tensor[B, classes]``."""
        return self.model(images, mode="tensor")


class ImageFeatures(nn.Module):
    """Backbone and neck of a model of any toolbox: images -> feature maps, finest first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.neck = model.neck if getattr(model, "with_neck", False) else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """``Tensor[B, C, H, W]`` -> a ``Tensor[B, C_i, H_i, W_i]`` a level."""
        features = self.neck(self.backbone(images))
        return features if isinstance(features, tuple) else (features,)


def onnx_translations() -> dict[Any, Callable]:
    """How ``torch.onnx.export(custom_translation_table=…)`` writes the compiled ops in ONNX.

    One tap after the other, as :func:`ddf_mm.ops.ddf_reference` computes: four standard operators a
    tap, whatever the size of the image. ONNX Runtime takes as long for a stack of all windows that
    is multiplied and summed at once, which needs k*k times the memory.

    Returns:
        The table; empty where there are no compiled ops, whose place the formula then takes.

    Raises:
        ModuleNotFoundError: onnxscript is not installed.
    """
    if not hasattr(torch.ops.ddf_mm, "ddf"):
        return {}
    return {
        torch.ops.ddf_mm.ddf.default: _onnx_ddf,
        torch.ops.ddf_mm.ddf_up.default: _onnx_ddf_up,
    }


def _onnx_ddf(
    features,
    channel_filter,
    spatial_filter,
    kernel_size: int = 3,
    dilation: int = 1,
    stride: int = 1,
    mul: bool = True,
):
    groups = 1 if spatial_filter is None else spatial_filter.shape[1] // kernel_size**2
    filters = (channel_filter, spatial_filter)
    return _onnx_taps(features, *filters, kernel_size, dilation, stride, mul, groups)


def _onnx_taps(
    features, channel_filter, spatial_filter, kernel_size, dilation, stride, mul, groups
):
    from onnxscript import opset18 as op

    channels = features.shape[1]
    taps = kernel_size**2
    before = dilation * (kernel_size // 2)

    def constant(*values: int):
        return op.Constant(value_ints=values)

    def reshape(value, *shape: int):
        return op.Reshape(value, constant(*shape))

    def split(value, axis: int):
        return op.Split(value, axis=axis, num_outputs=taps)

    # Groups join the batch, so that everything has four dimensions; a 0 keeps a dimension.
    dtype = features.dtype
    wide = dtype is not None and dtype.itemsize < 4
    tensors = [
        value if value is None or not wide else op.Cast(value, to=1)
        for value in (features, channel_filter, spatial_filter)
    ]
    x, per_channel, per_pixel = tensors
    if groups > 1:
        x = reshape(x, -1, channels // groups, 0, 0)
    padded = op.Pad(x, constant(0, 0, before, before, 0, 0, before, before))
    if per_channel is not None:
        per_channel = split(reshape(per_channel, -1, channels // groups, taps, 1), 2)
    if per_pixel is not None:
        size = op.Shape(per_pixel, start=2) if stride > 1 else None
        per_pixel = split(reshape(per_pixel, -1, taps, 0, 0) if groups > 1 else per_pixel, 1)

    out = None
    for tap in range(taps):
        first = [tap // kernel_size * dilation, tap % kernel_size * dilation]
        if per_pixel is not None and stride > 1:
            # A spatial filter may have one row or column less than the strided windows.
            last = op.Add(op.Mul(op.Sub(size, constant(1)), constant(stride)), constant(1))
            last = op.Add(last, constant(*first))
        else:
            last = constant(*(n - 2 * before or _TO_THE_END for n in first))
        term = op.Slice(padded, constant(*first), last, constant(2, 3), constant(stride, stride))
        given = [side[tap] for side in (per_channel, per_pixel) if side is not None]
        if mul or len(given) == 1:
            for weight in given:
                term = op.Mul(term, weight)
        else:
            term = op.Mul(term, op.Add(*given))
        out = term if out is None else op.Add(out, term)
    if groups > 1:
        out = reshape(out, -1, channels, 0, 0)
    return op.CastLike(out, features) if wide else out


def _onnx_ddf_up(
    features,
    channel_filter,
    spatial_filter,
    kernel_size: int = 3,
    scale_factor: int = 2,
    dilation: int = 1,
    mul: bool = True,
):
    from onnxscript import opset18 as op

    def of_subpixel(filters, r: int):
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
            mul,
            groups,
        )
        for r in range(scale_factor**2)
    ]
    return op.DepthToSpace(op.Concat(*subpixels, axis=1), blocksize=scale_factor, mode="DCR")


@dataclass(frozen=True)
class Size:
    """Sizes of the images that a file is checked and timed with."""

    batch: int
    height: int
    width: int

    def images(self, channels: int) -> Tensor:
        """Normally distributed pixels, as those that a data preprocessor makes."""
        return torch.randn(self.batch, channels, self.height, self.width)

    def __str__(self) -> str:
        return f"{self.batch} x {self.height} x {self.width}"


def check_sizes(example: Size, dynamic: bool) -> list[Size]:
    """Sizes to check a file of ``example`` with: others too if it has dynamic ones."""
    if not dynamic:
        return [example]
    return [
        example,
        Size(1, example.width, example.height),
        Size(3, example.height // 2 + 17, example.width + 33),
    ]


class _MaximaOfSlices(TorchFunctionMode):
    """Max poolings as maxima of slices, first of the rows, then of the columns.

    PyTorch's rule of the size of a strided pooling ties a program to odd or to even sizes. The
    values are the same, and on a CPU they come sooner.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.max_pool2d or kwargs.get("return_indices"):
            return func(*args, **kwargs)
        return _max_pool2d(*args, **kwargs)


def _max_pool2d(
    x: Tensor, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, **_
) -> Tensor:
    if ceil_mode:
        return nn.functional.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    sides = [
        value if isinstance(value, Sequence) else (value, value)
        for value in (kernel_size, stride or kernel_size, padding, dilation)
    ]
    for dim, (k, s, p, d) in zip((-2, -1), zip(*sides, strict=True), strict=True):
        last = (x.shape[dim] + 2 * p - d * (k - 1) - 1) // s * s
        if p:
            margins = (p, p) if dim == -1 else (0, 0, p, p)
            x = nn.functional.pad(x, margins, value=float("-inf"))
        after = (slice(None),) * (-1 - dim)
        windows = (x[(..., slice(i * d, i * d + last + 1, s), *after)] for i in range(k))
        x = functools.reduce(torch.maximum, windows)
    return x


def export_program(
    model: nn.Module,
    size: Size,
    channels: int = 3,
    dynamic: bool = True,
    guarded: bool = False,
) -> ExportedProgram:
    """What torch.export makes of a model of images.

    Args:
        model: Takes ``Tensor[B, channels, H, W]``; in evaluation mode.
        size: Sizes to trace it with.
        channels: Channels of the images.
        dynamic: Whether B, H and W of the program are free.
        guarded: Keep strided max poolings as they are. The program then refuses sizes that are
            even where the given one is odd after the same halvings, or the reverse; ONNX, which
            has no such guards, is faster with them.

    Raises:
        UserError: Something in the model fixes one of the dynamic sizes.
    """
    if dynamic:
        # Sizes that differ and are not 1, which torch.export takes for what they are otherwise.
        width = size.width + 32 * (size.width == size.height)
        size = Size(max(size.batch, 2), size.height, width)
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    pools = _MaximaOfSlices() if dynamic and not guarded else contextlib.nullcontext()
    try:
        with torch.no_grad(), pools:
            return torch.export.export(
                model,
                (size.images(channels),),
                dynamic_shapes=(free,) if dynamic else None,
                strict=False,
            )
    except torch._dynamo.exc.UserError as error:
        raise UserError(
            f"the model does not take images of every size: {error}; --static exports it for one"
        ) from error


def save_onnx(program: ExportedProgram, path: Path, opset: int = MIN_OPSET) -> int:
    """Write a program as ONNX.

    Args:
        program: Of :func:`export_program`.
        path: Where.
        opset: Version of ONNX's standard operators, which are all that the file uses.

    Returns:
        The number of operators in it.

    Raises:
        UserError: The model needs an operator that ONNX does not have.
    """
    onnx_program = torch.onnx.export(
        program,
        input_names=["images"],
        opset_version=opset,
        custom_translation_table=onnx_translations(),
        verbose=False,
    )
    nodes = list(onnx_program.model.graph.all_nodes())
    foreign = {node.op_identifier() for node in nodes if node.domain not in ("", "ai.onnx")}
    if foreign:
        raise UserError(f"ONNX has no standard operators for {', '.join(map(str, foreign))}")
    onnx_program.save(path)
    return len(nodes)


def save_program(program: ExportedProgram, path: Path, portable: bool = False) -> int:
    """Write a program in torch.export's own format.

    Args:
        program: Of :func:`export_program`.
        path: Where; ends with ``.pt2``.
        portable: Write the formula in PyTorch's own operators in place of the compiled ops, which
            whoever loads the file has to ``import ddf_mm.ops`` for.

    Returns:
        The number of operators in it.
    """
    if portable and library.FORMULAS:
        formulas = {op.default: formula for op, formula in library.FORMULAS.items()}
        program = program.run_decompositions(formulas)
    torch.export.save(program, path)
    return sum(node.op == "call_function" for node in program.graph.nodes)


def onnx_session(path: Path, threads: int = 0) -> Any:
    """A session of ONNX Runtime on the CPU.

    Args:
        path: The ONNX file.
        threads: Threads of an operator; 0 leaves it to ONNX Runtime.

    Raises:
        ModuleNotFoundError: onnxruntime is not installed.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def load_onnx(path: Path, threads: int = 0) -> Callable[[Tensor], Sequence[Tensor]]:
    """A function that runs a file of :func:`save_onnx`; arguments of :func:`onnx_session`."""
    session = onnx_session(path, threads)
    (given,) = session.get_inputs()

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(out) for out in session.run(None, {given.name: images.numpy()})]

    return run


def load_program(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """A function that runs a file of torch.export."""
    module = torch.export.load(path).module()

    def run(images: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            out = module(images)
        return (out,) if isinstance(out, Tensor) else out

    return run


def largest_error(
    run: Callable[[Tensor], Sequence[Tensor]], model: nn.Module, images: Tensor
) -> float:
    """The largest difference between what a file and the model compute.

    Returns:
        The absolute difference over the largest absolute value of the same output; infinite where
        an output has another shape, or is not finite.
    """
    with torch.no_grad():
        wanted = model(images)
    wanted = (wanted,) if isinstance(wanted, Tensor) else wanted
    got = run(images)
    if [out.shape for out in got] != [out.shape for out in wanted]:
        return float("inf")
    errors = [
        float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny))
        for a, b in zip(got, wanted, strict=True)
    ]
    # NaN compares as no number does.
    return max(errors) if all(error < float("inf") for error in errors) else float("inf")
