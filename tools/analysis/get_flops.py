#!/usr/bin/env python3
"""Count the parameters and multiply-adds of models, beside the same models with a ResNet.

One image goes through each model; what its convolutions, matrix products and dynamic filters cost
is counted op by op. Pooling, norms, activations and the combination of the two filters of a DDF
are not counted."""

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from ddf_mm.engine import cli, launch
from ddf_mm.engine.cli import UserError
from ddf_mm.ops import backend_info

# Height and width of the image that each toolbox's results are usually given for.
SHAPES = dict(mmpretrain=(224, 224), mmdet=(800, 1333), mmseg=(512, 1024))
DDF_ARGUMENTS = ("kernel_combine", "head", "kernel_size", "se_ratio", "stage_with_ddf", "expansion")


@dataclass
class Cost:
    """What one image costs, in multiply-adds, and the model's parameters."""

    parameters: int
    taps: int
    others: int


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="get_flops.py", description=__doc__)
    parser.add_argument("configs", nargs="+", metavar="config", help="path of a config")
    parser.add_argument(
        "--shape",
        type=int,
        nargs="+",
        metavar="N",
        help="height and width of the image, or one number for both; default: "
        + ", ".join(f"{h} {w} for {scope}" for scope, (h, w) in SHAPES.items()),
    )
    parser.add_argument("--no-resnet", action="store_true", help="leave the ResNet twins out")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=cli.ConfigOptions,
        metavar="KEY=VALUE",
        help="override settings of the configs",
    )
    args = parser.parse_args()
    if args.shape is not None and (len(args.shape) > 2 or min(args.shape) < 1):
        parser.error(f"--shape takes one or two positive numbers, got {args.shape}")
    return args


def with_resnet(cfg: Config) -> Config | None:
    """The config with the ResNet of the same depth; None if it has no DDFResNet, or none of a
    depth that ResNet comes in."""
    backbone = cfg.model.get("backbone", {})
    if backbone.get("type") != "DDFResNet" or backbone.get("depth") not in (50, 101, 152):
        return None
    twin = copy.deepcopy(cfg)
    twin.model.backbone.type = "ResNet"
    for name in DDF_ARGUMENTS:
        twin.model.backbone.pop(name, None)
    return twin


def image_and_samples(
    scope: str | None, shape: tuple[int, int]
) -> tuple[torch.Tensor, list | None]:
    image = torch.randn(1, 3, *shape)
    if scope != "mmdet":
        return image, None
    from mmdet.structures import DetDataSample

    meta = dict(
        img_shape=shape,
        ori_shape=shape,
        pad_shape=shape,
        batch_input_shape=shape,
        scale_factor=(1.0, 1.0),
    )
    return image, [DetDataSample(metainfo=meta)]


def measure(cfg: Config, shape: tuple[int, int]) -> Cost:
    """Count what one image of ``shape`` costs."""
    model = launch.build_model(cfg)
    image, samples = image_and_samples(cfg.get("default_scope"), shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image, samples, mode="tensor")
    counts = counter.get_flop_counts()["Global"]
    taps = sum(count for op, count in counts.items() if str(op).startswith("ddf_mm."))
    # A multiply-add is two of the counter's operations.
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        taps=taps // 2,
        others=(sum(counts.values()) - taps) // 2,
    )


def main() -> None:
    """Count and print."""
    args = parse_args()
    if backend_info()["cpu"] != "compiled":
        raise UserError(
            "dynamic filters are counted in the compiled ops, which are not there: "
            f"{backend_info()['why']}"
        )
    table = Table(caption="GMAC: 1e9 multiply-adds for one image; taps: of dynamic filters")
    table.add_column("model")
    for name in ("image", "parameters", "GMAC", "taps", "GMAC to ResNet"):
        table.add_column(name, justify="right")
    for path in args.configs:
        cfg = launch.load_config(path, args.cfg_options)
        launch.require_fields(cfg, ("model",), "counting")
        scope = cfg.get("default_scope")
        height, *width = args.shape or SHAPES.get(scope, (224, 224))
        shape = (height, *(width or [height]))
        costs = {Path(path).stem: measure(copy.deepcopy(cfg), shape)}
        twin = None if args.no_resnet else with_resnet(cfg)
        if twin is not None:
            costs[f"  with ResNet-{cfg.model.backbone.depth}"] = measure(twin, shape)
        totals = [cost.taps + cost.others for cost in costs.values()]
        for name, cost in costs.items():
            total = cost.taps + cost.others
            ratio = f"{total / totals[-1]:.2f}" if len(totals) > 1 else ""
            table.add_row(
                name,
                f"{shape[0]}x{shape[1]}",
                f"{cost.parameters / 1e6:.2f} M",
                f"{total / 1e9:.2f}",
                f"{cost.taps / 1e9:.3f}",
                ratio,
            )
    # No wrapping where the output is a file, whose width is unknown.
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)


if __name__ == "__main__":
    cli.run(main, "get_flops.py")
