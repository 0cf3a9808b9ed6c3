"""Models as files that other programs run: ONNX, and torch.export's programs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ddf_mm.contrib.pooling import MaximaOfSlices
from ddf_mm.engine.cli import UserError
from ddf_mm.ops.export import decompositions, onnx_translations

# Oldest opset that the exporter writes by itself; a newer one is converted from it.
MIN_OPSET = 18
# torch.export takes a size of 1 for a constant: maps of strides up to 128 keep two pixels a side.
_LEAST_TRACED = 256


class ImageScores(nn.Module):
    """A classifier of mmpretrain: images ``Tensor[B, C, H, W]``, as its data preprocessor makes
    them, -> scores before softmax, ``Tensor[B, classes]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, mode="tensor")


class ImageFeatures(nn.Module):
    """Backbone and neck of a model of any toolbox: such images -> feature maps, finest first, a
    ``Tensor[B, C_i, H_i, W_i]`` a level."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.neck = model.neck if getattr(model, "with_neck", False) else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.neck(self.backbone(images))
        return features if isinstance(features, tuple) else (features,)


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
    turned = Size(1, example.width, example.height)
    odd = Size(3, example.height // 2 + 17, example.width + 33)
    return [example, turned, odd] if dynamic else [example]


def export_program(
    model: nn.Module, size: Size, channels: int = 3, dynamic: bool = True, guarded: bool = False
) -> ExportedProgram:
    """What torch.export makes of a model of images ``Tensor[B, channels, H, W]`` in evaluation
    mode, traced with one size. B, H and W of a ``dynamic`` program are free, which is traced with
    larger images where these are small. A ``guarded`` one keeps strided max poolings, and their
    parity of sizes; ONNX, without guards, is faster so."""
    if dynamic:
        height, width = (max(side, _LEAST_TRACED) for side in (size.height, size.width))
        # Sizes that are the same are taken for one, too.
        size = Size(max(size.batch, 2), height, width + 32 * (width == height))
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},) if dynamic else None
    images = size.images(channels)
    pools = MaximaOfSlices() if dynamic and not guarded else contextlib.nullcontext()
    try:
        with torch.no_grad(), pools:
            return torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        if not dynamic:
            raise
        raise UserError(
            f"the model does not take images of every size: {error}; --static exports it for one"
        ) from error


def save_onnx(program: ExportedProgram, path: Path, opset: int = MIN_OPSET) -> int:
    """Write a program in operators of ONNX's standard of a version; return their number."""
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
    """Write a program in torch.export's own format; return the number of its operators.

    Whoever loads it has to ``import ddf_mm.ops`` for the compiled ops, unless it is ``portable``.
    """
    if portable and (table := decompositions()):
        program = program.run_decompositions(table)
    torch.export.save(program, path)
    return sum(node.op == "call_function" for node in program.graph.nodes)


def onnx_session(path: Path, threads: int = 0) -> Any:
    """A session of ONNX Runtime on the CPU; with ``threads=0`` it chooses their number."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def load_onnx(path: Path, threads: int = 0) -> Callable[[Tensor], Sequence[Tensor]]:
    """A function that runs a file of :func:`save_onnx`; arguments of :func:`onnx_session`."""
    session = onnx_session(path, threads)
    (given,) = session.get_inputs()
    return lambda images: [
        torch.from_numpy(out) for out in session.run(None, {given.name: images.numpy()})
    ]


def load_program(path: Path) -> Callable[[Tensor], Tensor | Sequence[Tensor]]:
    """A function that runs a file of :func:`save_program`."""
    program = torch.export.load(path).module()
    return torch.no_grad()(lambda images: program(images))


def largest_error(run: Callable, model: nn.Module, images: Tensor) -> float:
    """The largest difference between what a file and the model compute, over the largest absolute
    value of the same output; infinite where an output has another shape, or is not finite."""
    with torch.no_grad():
        got, wanted = (
            (out,) if isinstance(out, Tensor) else out for out in (run(images), model(images))
        )
    if [out.shape for out in got] != [out.shape for out in wanted]:
        return float("inf")
    errors = [
        float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny))
        for a, b in zip(got, wanted, strict=True)
    ]
    # NaN compares as no number does.
    return max(errors) if all(error < float("inf") for error in errors) else float("inf")
