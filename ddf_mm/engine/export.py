"""Export of models to ONNX and to torch.export's format."""

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

# The opset that torch's exporter writes; newer ones are converted from it.
MIN_OPSET = 18
# Smallest image to trace with: torch.export treats a size of 1 as a constant, and at this size
# feature maps of strides up to 128 have at least 2 x 2 pixels.
_LEAST_TRACED = 256


class ImageScores(nn.Module):
    """A classifier of mmpretrain as a function from preprocessed images ``Tensor[B, C, H, W]`` to
    logits ``Tensor[B, classes]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, mode="tensor")


class ImageFeatures(nn.Module):
    """Backbone and neck of a model of any toolbox as a function from preprocessed images to feature
    maps, one ``Tensor[B, C_i, H_i, W_i]`` for each level, finest first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.neck = model.neck if getattr(model, "with_neck", False) else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.neck(self.backbone(images))
        return features if isinstance(features, tuple) else (features,)


@dataclass(frozen=True)
class Size:
    """Size of a batch of images to check or time an exported file with."""

    batch: int
    height: int
    width: int

    def images(self, channels: int) -> Tensor:
        """Standard normal pixels, similar to preprocessed images."""
        return torch.randn(self.batch, channels, self.height, self.width)

    def __str__(self) -> str:
        return f"{self.batch} x {self.height} x {self.width}"


def check_sizes(example: Size, dynamic: bool) -> list[Size]:
    """Sizes to check an exported file with: ``example``, and two more if its sizes are dynamic."""
    turned = Size(1, example.width, example.height)
    odd = Size(3, example.height // 2 + 17, example.width + 33)
    return [example, turned, odd] if dynamic else [example]


def export_program(
    model: nn.Module, size: Size, channels: int = 3, dynamic: bool = True, guarded: bool = False
) -> ExportedProgram:
    """Export a model of images ``Tensor[B, channels, H, W]``, of its parameters' dtype and in
    evaluation mode, by torch.export. If ``dynamic``, B, H and W are dynamic, and small images are
    traced larger. If ``guarded``, strided max poolings remain, faster, with guards on parity."""
    if dynamic:
        height, width = (max(side, _LEAST_TRACED) for side in (size.height, size.width))
        # torch.export would treat equal sizes as one dimension.
        size = Size(max(size.batch, 2), height, width + 32 * (width == height))
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},) if dynamic else None
    dtype = next((weight.dtype for weight in model.parameters()), torch.float32)
    images = size.images(channels).to(dtype)
    pools = MaximaOfSlices() if dynamic and not guarded else contextlib.nullcontext()
    try:
        with torch.no_grad(), pools:
            return torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        if not dynamic:
            raise
        raise UserError(
            f"the model cannot be exported for images of every size: {error}; --static exports it "
            "for one size"
        ) from error


def save_onnx(
    program: ExportedProgram, path: Path, opset: int = MIN_OPSET, elementwise: bool = False
) -> int:
    """Write a program as ONNX with standard operators of version ``opset``; return their number.

    For ``elementwise`` see :func:`ddf_mm.ops.export.onnx_translations`."""
    from onnxscript import optimizer

    onnx_program = torch.onnx.export(
        program,
        input_names=["images"],
        opset_version=opset,
        custom_translation_table=onnx_translations(elementwise),
        verbose=False,
    )
    # Weights that the translations computed, without limits on their size.
    limit = torch.iinfo(torch.int64).max
    optimizer.optimize(onnx_program.model, input_size_limit=limit, output_size_limit=limit)
    nodes = list(onnx_program.model.graph.all_nodes())
    foreign = {node.op_identifier() for node in nodes if node.domain not in ("", "ai.onnx")}
    if foreign:
        raise UserError(f"ONNX has no standard operators for {', '.join(map(str, foreign))}")
    onnx_program.save(path)
    return len(nodes)


def save_program(program: ExportedProgram, path: Path, portable: bool = False) -> int:
    """Write a program in torch.export's own format; return the number of its operators.

    Loading it requires ``import ddf_mm.ops``, unless ``portable`` replaces the compiled ops."""
    if portable and (table := decompositions()):
        program = program.run_decompositions(table)
    torch.export.save(program, path)
    return sum(node.op == "call_function" for node in program.graph.nodes)


def onnx_session(path: Path, threads: int = 0) -> Any:
    """A session of ONNX Runtime on the CPU; with ``threads=0`` it chooses the number of threads."""
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
    """The largest difference between the outputs of a file and of the model, relative to the
    largest absolute value of that output; infinite if a shape differs or a value is not finite."""
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
    # max() may ignore NaN, because its comparisons are false.
    return max(errors) if all(error < float("inf") for error in errors) else float("inf")
