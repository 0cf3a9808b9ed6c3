#!/usr/bin/env python3
"""Compare the speed of the DDF operation, its layers and its networks with alternatives.

``benchmark.py op`` times the following, interleaved so that changes of the machine's load affect
all alike:

    ddf                ddf_mm.ops.ddf, compiled or not (see ddf_mm.ops.backend_info)
    reference          the formula tap by tap in plain PyTorch
    unfold             the formula by torch.nn.functional.unfold
    depthwise conv     torch.nn.functional.conv2d (oneDNN, cuDNN) of the same geometry, with one
                       filter per channel for the whole batch
    dense conv         the full convolution that a DDF replaces
    ddf spatial        ddf without a channel filter, which is an involution
    unfold spatial     the same by torch.nn.functional.unfold
    carafe             the same by mmcv.ops.carafe, if mmcv supports the device and dtype; stride 1
                       only
    copy               a copy that moves as many bytes as ddf; on a GPU at least 256 MiB

``benchmark.py layer`` times the layers of the same names, including the generation of their
filters: DDFPack, torch.nn.Conv2d, and an involution (ddf spatial, unfold spatial) that generates
its filters by two 1x1 convolutions. ``ddf modules`` is DDFPack computed module by module.

``benchmark.py upsample`` times DDFUpPack, its composition of one ddf per subpixel and a pixel
shuffle, CARAFE with its defaults, and nearest-neighbour interpolation.

``benchmark.py family`` times the operations of ddf_mm.ops.family (carafe, involution, ...) beside
torch.nn.functional.unfold and each original's own formulation in PyTorch.

``benchmark.py model`` times the networks of configs, files or ``mmpretrain::path``: inference from
images to the head's outputs, or training steps from images to updated weights. It supports all
models of mmpretrain, mmdet and mmseg. Two-stage detectors get the same proposals, whatever their
weights. Backbone and neck are also timed alone.

The bytes that ddf moves are those of every input, read once, and of every output, written once;
a pass with several gradients is counted as one kernel.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch

# mmengine and the toolboxes are imported for `model` only; the other commands need torch only.
from ddf_mm.benchmark import family, operation, timing
from ddf_mm.benchmark.timing import LAYOUTS

SHAPES = [(8, 64, 56, 56), (8, 128, 28, 28), (8, 256, 14, 14), (8, 512, 7, 7), (1, 256, 100, 152)]
DTYPES = ["float16", "bfloat16", "float32", "float64"]
PASSES = ["forward", "grad_features", "grad_filters", "backward", "forward+backward"]
PEERS = ["reference", "unfold", "depthwise conv", "dense conv", "ddf spatial", "unfold spatial"]
PEERS += ["carafe", "copy"]
LAYER_PEERS = ["ddf modules", "depthwise conv", "dense conv", "ddf spatial", "unfold spatial"]
UPSAMPLE_PEERS = ["composition", "carafe", "nearest"]


def parse_shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,C,H,W, as in 8,64,56,56")
    return sizes


def parse_positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def parse_image_shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not (1 <= len(sizes) <= 2 and all(size.isdigit() and int(size) for size in sizes)):
        raise argparse.ArgumentTypeError(f"{text!r} is not H or H,W, as in 224 or 800,1333")
    return tuple(map(int, sizes))


class LazyConfigOptions(argparse.Action):
    """``--cfg-options`` as in all tools, but imports mmengine only if it is used."""

    def __call__(self, parser, namespace, values, option_string=None):
        from ddf_mm.engine.cli import ConfigOptions

        action = ConfigOptions(self.option_strings, self.dest, nargs=self.nargs)
        action(parser, namespace, values, option_string)


def parse_odd(text: str) -> int:
    if parse_positive(text) % 2 == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not odd")
    return int(text)


def add_common_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    command.add_argument(
        "--threads", type=parse_positive, default=torch.get_num_threads(), help="of the CPU"
    )
    command.add_argument(
        "--repeats", type=parse_positive, default=10, help="rounds; in each, all calls are timed"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write all results to this file")


def benchmark_models(args: argparse.Namespace) -> None:
    from ddf_mm.benchmark import networks
    from ddf_mm.engine import cli

    cli.run(functools.partial(networks.benchmark_models, args), "benchmark.py")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    with_defaults = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    op = commands.add_parser("op", help="time the operation", **with_defaults)
    layer = commands.add_parser("layer", help="time the layer", **with_defaults)
    op.set_defaults(run=operation.benchmark_op, make_calls=operation.make_calls)
    of_layers = dict(
        run=operation.benchmark_op, make_calls=operation.make_layer_calls, which="forward"
    )
    layer.set_defaults(make_layers=operation.make_layers, **of_layers)
    upsample = commands.add_parser("upsample", help="time the upsampling layer", **with_defaults)
    upsample.set_defaults(make_layers=operation.make_upsamplers, stride=[1], **of_layers)
    upsample.add_argument("--scale", type=parse_positive, default=2, help="factor of upsampling")
    for command in (op, layer, upsample):
        command.add_argument(
            "--shapes",
            type=parse_shape,
            nargs="+",
            default=SHAPES,
            metavar="B,C,H,W",
            help="of the features",
        )
        command.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
        command.add_argument(
            "--layout", choices=[*LAYOUTS, "both"], default="both", help="of all tensors"
        )
        command.add_argument("--kernel-size", type=parse_odd, nargs="+", default=[3], help="odd")
        if command is not upsample:
            command.add_argument("--stride", type=parse_positive, nargs="+", default=[1])
        command.add_argument(
            "--groups", type=parse_positive, default=1, help="of the spatial filter"
        )
    op.add_argument("--pass", dest="which", choices=PASSES, default="forward", help="what is timed")
    op.add_argument(
        "--backward",
        dest="which",
        action="store_const",
        const="forward+backward",
        help="the same as --pass forward+backward",
    )
    for command in (layer, upsample):
        command.add_argument(
            "--train",
            dest="which",
            action="store_const",
            const="forward+backward",
            help="forward and backward passes instead of predictions",
        )
    for command, peers in ((op, PEERS), (layer, LAYER_PEERS), (upsample, UPSAMPLE_PEERS)):
        command.add_argument(
            "--peers", choices=peers, nargs="*", default=peers, help="alternatives to time"
        )
    model = commands.add_parser("model", help="time the networks of configs", **with_defaults)
    model.set_defaults(run=benchmark_models)
    model.add_argument(
        "configs",
        nargs="+",
        metavar="config",
        help="path, or toolbox::path; with +folded appended, the batch norms are folded into the "
        "preceding layers; with +skeleton, each DDFPack becomes an identity of the same stride",
    )
    model.add_argument("--mode", choices=["eval", "train"], nargs="+", default=["eval"])
    model.add_argument(
        "--precision",
        choices=["fp32", "amp"],
        nargs="+",
        default=["fp32"],
        help="amp: bfloat16 on a CPU, float16 on a GPU",
    )
    model.add_argument("--layout", choices=list(LAYOUTS), nargs="+", default=["nchw"])
    model.add_argument("--batch-size", type=parse_positive, nargs="+", default=[1])
    model.add_argument(
        "--shape",
        type=parse_image_shape,
        nargs="+",
        metavar="H[,W]",
        help="of the images; default: the usual size of the config's toolbox",
    )
    model.add_argument("--compile", action="store_true", help="use torch.compile")
    model.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    model.add_argument(
        "--cfg-options", nargs="+", action=LazyConfigOptions, metavar="KEY=VALUE",
        help="override settings of the configs",
    )  # fmt: skip
    members = commands.add_parser("family", help="time the family of ddf", **with_defaults)
    members.set_defaults(run=family.benchmark_family)
    members.add_argument(
        "--members", choices=list(family.MEMBERS), nargs="+", default=list(family.MEMBERS)
    )
    members.add_argument("--backward", action="store_true", help="with the backward pass")
    for command in (op, layer, upsample, model):
        add_common_options(command)
        command.add_argument("--plot", type=Path, metavar="FILE", help="draw them there, as PNG")
    add_common_options(members)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, but torch finds none")
    for shape in getattr(args, "shapes", ()):
        if shape[1] % args.groups:
            parser.error(f"--groups {args.groups} must divide the {shape[1]} channels of --shapes")
    return args


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.device == "cpu":
        timing.hold_heap()
    arguments.run(arguments)
