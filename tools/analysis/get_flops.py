#!/usr/bin/env python3
"""Count the parameters and multiply-adds of models and of the same models with a ResNet.

Each model is run with one image, and its convolutions, matrix products and dynamic filters are
counted. Pooling, norms, activations and the combination of the two filters of a DDF are not
counted."""

import argparse
import copy

from mmengine.config import Config
from mmengine.registry import MODELS
from rich.console import Console
from rich.table import Table

from ddf_mm import analysis
from ddf_mm.analysis import SHAPES, Cost
from ddf_mm.engine import cli, launch
from ddf_mm.models import DDFResNet, DDFResNet_CIFAR
from ddf_mm.utils import toolbox

DDF_ARGUMENTS = ("kernel_combine", "head", "kernel_size", "se_ratio", "stage_with_ddf", "expansion")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="get_flops.py", description=__doc__)
    parser.add_argument("configs", nargs="+", metavar="config", help="path, or toolbox::path")
    parser.add_argument(
        "--shape",
        type=int,
        nargs="+",
        metavar="N",
        help="height and width of the image, or one number for both; default: "
        + ", ".join(f"{h} {w} for {scope}" for scope, (h, w) in SHAPES.items()),
    )
    parser.add_argument("--no-resnet", action="store_true", help="omit the models with a ResNet")
    parser.add_argument("--cfg-options", action=cli.ConfigOptions)
    args = parser.parse_args()
    if args.shape is not None and (len(args.shape) > 2 or min(args.shape) < 1):
        parser.error(f"--shape takes one or two positive numbers, got {args.shape}")
    return args


def with_resnet(cfg: Config) -> Config | None:
    """The config with the ResNet of the same depth; None if it has no DDFResNet, or one of a depth
    that ResNet does not have."""
    backbone = cfg.model.get("backbone") or {}
    kind = launch.find_class(cfg, MODELS, backbone) if backbone else None
    if kind not in (DDFResNet, DDFResNet_CIFAR):
        return None
    if backbone.get("depth") not in (50, 101, 152):
        return None
    twin = copy.deepcopy(cfg)
    twin.model.backbone.type = f"{toolbox(cfg)}.{kind.__name__.removeprefix('DDF')}"
    for name in DDF_ARGUMENTS:
        twin.model.backbone.pop(name, None)
    return twin


def measure(cfg: Config, shape: tuple[int, int]) -> Cost:
    """Count the parameters and operations for one image of ``shape``."""
    analysis.fit_to(cfg, shape)
    model = analysis.build_model(cfg)
    return analysis.count(model, analysis.example_batch(cfg, 1, shape))


def main() -> None:
    """Count and print."""
    args = parse_args()
    table = Table(caption="GMAC: 1e9 multiply-adds for one image; taps: of dynamic filters")
    table.add_column("model")
    for name in ("image", "parameters", "GMAC", "taps", "GMAC to ResNet"):
        table.add_column(name, justify="right")
    for name, path in zip(analysis.config_labels(args.configs), args.configs, strict=True):
        cfg = analysis.read_config(path, args.cfg_options)
        shape = analysis.image_shape(cfg, args.shape)
        costs = {name: measure(copy.deepcopy(cfg), shape)}
        twin = None if args.no_resnet else with_resnet(cfg)
        if twin is not None:
            costs[f"  with ResNet-{cfg.model.backbone.depth}"] = measure(twin, shape)
        *_, last = costs.values()
        for label, cost in costs.items():
            ratio = f"{cost.total / last.total:.2f}" if len(costs) > 1 else ""
            table.add_row(
                label,
                f"{shape[0]}x{shape[1]}",
                f"{cost.parameters / 1e6:.2f} M",
                f"{cost.total / 1e9:.2f}",
                f"{cost.taps / 1e9:.3f}",
                ratio,
            )
    # A file has no width to wrap the table to.
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)


if __name__ == "__main__":
    cli.run(main, "get_flops.py")
