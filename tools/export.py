#!/usr/bin/env python3
"""Export a model of any toolbox on mmengine to ONNX, to torch.export's format, or to both.

A classifier of mmpretrain is exported from images to logits, of any other model the backbone and
neck, from images to feature maps. The images are the output of the config's data preprocessor
(float32, normalized). Each file is loaded and compared with the model at several sizes; if the
results differ, it is not written."""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ddf_mm import about, analysis
from ddf_mm.contrib.whole_files import whole_file
from ddf_mm.engine import checkpoints, cli, export, launch
from ddf_mm.engine.cli import UserError
from ddf_mm.engine.export import Size
from ddf_mm.layers import switch_to_deploy
from ddf_mm.utils import toolbox

# Of the largest value of an output; the largest error of a DDF-ResNet-50 in float16 was 8e-4.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3}
SUFFIXES = {"onnx": ".onnx", "torch.export": ".pt2"}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="export.py", description=__doc__)
    parser.add_argument("config", help="path of the config, or toolbox::path")
    parser.add_argument("checkpoint", nargs="?", help="default: random weights")
    parser.add_argument(
        "--format", choices=[*SUFFIXES, "both"], default="onnx", help="default: onnx"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="STEM",
        help="path of the files without the suffixes .onnx and .pt2; default: the config's name, "
        "in the current folder",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(224, 224),
        metavar=("H", "W"),
        help="size of the images for tracing and timing; default: 224 224",
    )
    parser.add_argument(
        "--batch", type=int, default=1, help="number of images for tracing and timing; default: 1"
    )
    parser.add_argument(
        "--static", action="store_true", help="export for images of --batch and --size only"
    )
    parser.add_argument(
        "--opset", type=int, default=export.MIN_OPSET, help=f"default: {export.MIN_OPSET}"
    )
    parser.add_argument(
        "--elementwise",
        action="store_true",
        help="write ONNX files with more and simpler operators, which OpenVINO runs faster, and "
        "ONNX Runtime slower",
    )
    parser.add_argument(
        "--portable",
        action="store_true",
        help="write PyTorch's own operators instead of ddf_mm's compiled op to a .pt2 file; "
        "ONNX files always have standard operators",
    )
    parser.add_argument(
        "--fold",
        action="store_true",
        help="fold the batch norms into convolutions and DDF layers first; the files are "
        "compared with the unfolded model",
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="write float16 weights, for float16 images and outputs; the files are compared with "
        "the float32 model",
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="accept a checkpoint that does not match the model exactly",
    )
    parser.add_argument(
        "--benchmark",
        nargs="?",
        const=10,
        type=int,
        metavar="RUNS",
        help="time each file and PyTorch, interleaved, RUNS times; default: 10",
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--cfg-options", action=cli.ConfigOptions)
    args = parser.parse_args()
    for name, value, least in (
        ("--size", min(args.size), 1),
        ("--batch", args.batch, 1),
        ("--opset", args.opset, export.MIN_OPSET),
        ("--benchmark", args.benchmark, 1),
    ):
        if value is not None and value < least:
            parser.error(f"{name} must be at least {least}, got {value}")
    return args


def load_model(args: argparse.Namespace) -> tuple[nn.Module, int]:
    """The part of the config's model to export, and the channels of its images."""
    cfg = launch.load_config(args.config, args.cfg_options)
    launch.require_fields(cfg, ("model",), "an export")
    model = analysis.build_model(cfg)
    if args.checkpoint is not None:
        checkpoints.load_checkpoint(model, args.checkpoint, args.allow_partial)
    if not hasattr(model, "backbone"):
        raise UserError(f"{args.config} has a {type(model).__name__}, which has no backbone")
    is_classifier = toolbox(cfg) == "mmpretrain" and getattr(model, "with_head", False)
    part = (export.ImageScores if is_classifier else export.ImageFeatures)(model)
    return part.eval(), analysis.image_channels(cfg)


def folded(model: nn.Module) -> nn.Module:
    """A copy of the model with its batch norms folded."""
    try:
        return switch_to_deploy(copy.deepcopy(model))
    except ValueError as error:
        raise UserError(f"--fold: {error}") from error


def check(
    run: Callable, model: nn.Module, sizes: list[Size], channels: int, tolerance: float
) -> float:
    """The largest error of a file over several sizes; raises :class:`UserError` if it exceeds the
    tolerance."""
    errors = {}
    for size in sizes:
        try:
            errors[size] = export.largest_error(run, model, size.images(channels))
        except Exception as error:
            raise UserError(
                f"the file does not run with images of {size}: {error}; --static exports it for "
                "one size, a larger --size checks it with other sizes"
            ) from error
        if not errors[size] <= tolerance:
            raise UserError(
                f"the results of the file differ from the model's: the error is "
                f"{errors[size]:.1e} for images of {size}, and {tolerance:.0e} is allowed; "
                "nothing was written"
            )
    return max(errors.values())


def run_in(dtype: torch.dtype, run: Callable, images: Tensor) -> Tensor | Sequence[Tensor]:
    """The outputs of a file for images that are rounded to its dtype."""
    return run(images.to(dtype))


def benchmark(functions: dict[str, Callable], images: Tensor, runs: int) -> dict[str, float]:
    """Median milliseconds of each function, interleaved so that load affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(runs + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function(images)
            if turn:  # the first run is a warm-up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def main() -> None:
    """Export, check and time."""
    args = parse_args()
    stem = args.out or Path(Path(args.config).stem)
    if not stem.parent.is_dir():
        raise UserError(f"--out {str(stem)!r} is in a folder that does not exist", exit_code=2)
    if args.checkpoint is not None:
        checkpoints.require_checkpoint(args.checkpoint, "checkpoint")
    model, channels = load_model(args)
    size = Size(args.batch, *args.size)
    sizes = export.check_sizes(size, not args.static)

    functions: dict[str, Callable] = {"pytorch": torch.no_grad()(model.forward)}
    exported = model
    if args.fold:
        exported = folded(model)
        functions["pytorch folded"] = torch.no_grad()(exported.forward)
    dtype = torch.float16 if args.half else torch.float32
    if args.half:
        exported = copy.deepcopy(exported).half()
    report: dict[str, dict] = {}
    for kind, suffix in SUFFIXES.items():
        if args.format not in (kind, "both"):
            continue
        path = stem.with_name(stem.name + suffix)
        is_onnx = kind == "onnx"
        program = export.export_program(exported, size, channels, not args.static, guarded=is_onnx)
        with whole_file(path) as part:
            if is_onnx:
                operators = export.save_onnx(program, part, args.opset, args.elementwise)
                load = partial(export.load_onnx, threads=torch.get_num_threads())
            else:
                operators = export.save_program(program, part, args.portable)
                load = export.load_program
            run = partial(run_in, dtype, load(part))
            error = check(run, model, sizes, channels, TOLERANCES[dtype])
        functions[kind] = run
        report[kind] = dict(file=path.name, operators=operators, error=error)
        print(f"{path}: {operators} operators, largest error {error:.1e} over images of", end=" ")
        print(", ".join(map(str, sizes)))
    result = dict(
        config=Path(args.config).name, size=str(size), files=report, machine=about.machine()
    )
    if args.benchmark is not None:
        times = benchmark(functions, size.images(channels), args.benchmark)
        result |= dict(milliseconds=times)
        print(f"milliseconds for {size}, {torch.get_num_threads()} threads:", end=" ")
        print(", ".join(f"{name} {value:.1f}" for name, value in times.items()))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, "export.py")
