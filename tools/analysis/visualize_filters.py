#!/usr/bin/env python3
"""Draw the spatial and channel filters that a DDF network generates for one image.

Writes FILE.png (a row of panels for each layer), FILE_combined.png (the combined filters at a few
points) and FILE.html, a page with both pictures on which a click shows the filters of a pixel.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddf_mm import analysis, visualization
from ddf_mm.engine import checkpoints, cli, launch
from ddf_mm.visualization.filters import DEFAULT_POINTS, check_points


def parse_point(text: str) -> tuple[int, int]:
    """``"x,y"`` -> (x, y)."""
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form x,y with two whole numbers")
    return int(match[1]), int(match[2])


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="visualize_filters.py", description=__doc__)
    parser.add_argument("config", help="path of the config, or toolbox::path")
    parser.add_argument("checkpoint", help="path or URL of the checkpoint")
    parser.add_argument(
        "image", help="path of an image, or dataset:INDEX for one of the config's test images"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("filters.png"),
        metavar="FILE.png",
        help="picture to write; the other files are put in the same folder; default: %(default)s",
    )
    parser.add_argument(
        "--stages",
        type=int,
        nargs="+",
        metavar="N",
        help="stages of the ResNet, counted from 1, whose last DDF layer to draw",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        metavar="NAME",
        help="DDF layers to draw, such as neck.upsample_modules.0; default without --stages: all "
        "stages and every DDF layer outside them",
    )
    parser.add_argument(
        "--points",
        type=parse_point,
        nargs="+",
        metavar="X,Y",
        help="pixels of the network's input whose filters to draw; default: the "
        f"{DEFAULT_POINTS} whose filters differ most in the first layer drawn",
    )
    parser.add_argument("--cfg-options", action=cli.ConfigOptions)
    return parser.parse_args()


def describe_prediction(prediction: object, classes: tuple[str, ...] | None) -> str:
    """``"predicted 3 (98.7 %), true 3"`` for a prediction of mmpretrain; empty for others."""
    label, score = getattr(prediction, "pred_label", None), getattr(prediction, "pred_score", None)
    if label is None or score is None or label.numel() != 1:
        return ""

    def name(index: int) -> str:
        return str(classes[index]) if classes else f"class {index}"

    text = f"predicted {name(int(label))} ({100 * float(score[int(label)]):.1f} %)"
    truth = getattr(prediction, "gt_label", None)
    return text if truth is None or truth.numel() != 1 else f"{text}, true {name(int(truth))}"


def call_checked(function: Callable, *arguments: object) -> Any:
    """Call a function; report a ValueError about its arguments as an error of the command line."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise cli.UserError(str(error), exit_code=2) from error


def main() -> None:
    """Draw the filters."""
    args = parse_args()
    cfg = launch.load_config(args.config, args.cfg_options)
    launch.require_fields(cfg, ("model", "test_dataloader"), "drawing filters")
    checkpoints.require_checkpoint(args.checkpoint, "checkpoint")
    model = analysis.build_model(cfg)
    layers = call_checked(visualization.find_layers, model, args.stages, args.layers)
    checkpoint = checkpoints.load_checkpoint(model, args.checkpoint)
    data = analysis.load_image(cfg, args.image)
    image = call_checked(visualization.network_image, model, data)
    size = image.shape[:2]
    call_checked(check_points, args.points or (), *size)
    filters, prediction = visualization.capture_filters(model, data, layers)
    points = args.points or visualization.choose_points(next(iter(filters.values())), *size)

    classes = checkpoint.get("meta", {}).get("dataset_meta", {}).get("classes")
    parts = (
        "Decoupled dynamic filters",
        args.image if args.image.startswith("dataset:") else Path(args.image).name,
        describe_prediction(prediction, classes),
    )
    title = "  ·  ".join(part for part in parts if part)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figures = []
    for draw, path in (
        (visualization.draw_filters, args.out),
        (visualization.draw_combined, args.out.with_stem(f"{args.out.stem}_combined")),
    ):
        figures.append(draw(image, filters, points, title))
        figures[-1].savefig(path, dpi=100)
        print(f"filters: {path}")
    page = args.out.with_suffix(".html")
    visualization.write_page(page, image, filters, points, figures, title)
    print(f"page: {page}")


if __name__ == "__main__":
    cli.run(main, "visualize_filters.py")
