#!/usr/bin/env python3
"""Draw the spatial and channel filters that a DDF network generates for one image."""

import argparse
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: a server has no display
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.gridspec import GridSpecFromSubplotSpec, SubplotSpec
from matplotlib.ticker import MaxNLocator
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, MODELS, TRANSFORMS, init_default_scope
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from ddf_mm.engine import cli, launch
from ddf_mm.layers import DDFPack

POINT_COLORS = ("#ffb000", "#00c2a8", "#ff5fa2", "#6f8cff", "#b6e300", "#ff7b3a")
DEFAULT_POINTS = 4
FILTER_CMAP, DISTANCE_CMAP = "RdBu_r", "viridis"
ARROWS = "↖↑↗←·→↙↓↘"
_STAGE = re.compile(r"(?:^|\.)layer(\d+)\.")


@dataclass
class Filters:
    """The filters of one image in one layer.

    Attributes:
        spatial: ``float[k, k, H, W]``, the taps of every pixel (of the first filter group).
        channel: ``float[C, k, k]``, the taps of every channel.
        groups: filter groups of the layer.
    """

    spatial: np.ndarray
    channel: np.ndarray
    groups: int

    @property
    def distance(self) -> np.ndarray:
        """``float[H, W]``: how far each pixel's filter is from the mean over the image.

        FilterNorm gives all filters of a layer the same norm, so that says nothing; the distance
        is zero everywhere for a filter that does not depend on the place.
        """
        deviation = self.spatial - self.spatial.mean(axis=(2, 3), keepdims=True)
        return np.sqrt((deviation**2).sum(axis=(0, 1)))


def parse_point(text: str) -> tuple[int, int]:
    """``"x,y"`` -> (x, y)."""
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form x,y with two whole numbers")
    return int(match[1]), int(match[2])


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="visualize_filters.py", description=__doc__)
    parser.add_argument("config", help="path of the config")
    parser.add_argument("checkpoint", help="path or address of the checkpoint")
    parser.add_argument(
        "image", help="path of an image, or dataset:INDEX for one of the config's test images"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("filters.png"), help="PNG to write; default: %(default)s"
    )
    parser.add_argument(
        "--stages",
        type=int,
        nargs="+",
        metavar="N",
        help="stages to draw, the first is 1; of each, the last DDF layer; default: all",
    )
    parser.add_argument(
        "--points",
        type=parse_point,
        nargs="+",
        metavar="X,Y",
        help="pixels of the network's input whose filters to draw; default: the "
        f"{DEFAULT_POINTS} whose filters differ most in the first stage drawn",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=cli.ConfigOptions,
        metavar="KEY=VALUE",
        help="override settings of the config",
    )
    return parser.parse_args()


def find_layers(model: nn.Module, stages: list[int] | None) -> dict[int, DDFPack]:
    """The last DDF layer of each stage of a ResNet.

    Args:
        model: a model that holds a ResNet, whose stages are named ``layer1``, ``layer2``, ….
        stages: numbers of the stages to take, or ``None`` for all that have DDF layers.

    Returns:
        Layers by number of the stage, ascending.

    Raises:
        UserError: the model, or a stage to take, has none.
    """
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, DDFPack) and (match := _STAGE.search(name)):
            layers[int(match[1])] = module
    if not layers:
        raise cli.UserError("the model has no DDF layers in stages named layer1, layer2, …")
    if stages is None:
        stages = sorted(layers)
    missing = sorted(set(stages) - set(layers))
    if missing:
        raise cli.UserError(
            f"--stages {' '.join(map(str, missing))}: no DDF layers there; the model has them in "
            f"{', '.join(map(str, sorted(layers)))}",
            exit_code=2,
        )
    return {stage: layers[stage] for stage in sorted(set(stages))}


def load_weights(model: nn.Module, path: str) -> dict:
    """Load a checkpoint, all of whose weights and no others the model must have.

    Args:
        model: the model.
        path: path or address of the checkpoint.

    Returns:
        The checkpoint.

    Raises:
        UserError: it cannot be read or is one of another model.
    """
    CheckpointLoader.register_scheme("", launch.load_from_local_file, force=True)
    try:
        return load_checkpoint(model, path, map_location="cpu", strict=True, logger="silent")
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" …")
        raise cli.UserError(f"checkpoint {path!r} is not one of the model: {reason}") from error


def load_image(cfg: Config, image: str) -> dict:
    """One image through the config's test pipeline.

    Args:
        cfg: the config.
        image: a path, or ``dataset:INDEX``.

    Returns:
        What the pipeline returns: ``inputs`` and ``data_samples``.

    Raises:
        UserError: no such image.
    """
    dataset_cfg = cfg.test_dataloader.dataset
    if image.startswith("dataset:"):
        index = image.removeprefix("dataset:")
        if not index.isdecimal():
            raise cli.UserError(
                f"image {image!r} must be dataset:INDEX with a whole number", exit_code=2
            )
        dataset = DATASETS.build(dataset_cfg)
        if int(index) >= len(dataset):
            raise cli.UserError(
                f"image {image!r}: the test dataset has {len(dataset)} images, the last is "
                f"dataset:{len(dataset) - 1}",
                exit_code=2,
            )
        return dataset[int(index)]

    if not Path(image).is_file():
        raise cli.UserError(
            f"image {image!r} is neither a file nor dataset:INDEX (current folder: "
            f"{str(Path.cwd())!r})",
            exit_code=2,
        )
    steps = list(dataset_cfg.pipeline)
    # A dataset in memory, like the digits, hands over pixels and its pipeline reads no files.
    if not steps or not steps[0]["type"].endswith("LoadImageFromFile"):
        steps.insert(0, dict(type="LoadImageFromFile"))
    data = Compose([TRANSFORMS.build(step) for step in steps])(dict(img_path=image))
    if data is None:
        raise cli.UserError(f"image {image!r} does not pass the config's test pipeline")
    return data


@torch.no_grad()
def capture_filters(
    model: nn.Module, data: dict, layers: dict[int, DDFPack]
) -> tuple[dict[int, Filters], object]:
    """Run the model on an image and keep the filters that its layers generate.

    Args:
        model: the model, in evaluation mode.
        data: what :func:`load_image` returns.
        layers: layers by number of the stage.

    Returns:
        Filters by number of the stage, and the prediction.
    """
    raw: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for stage, layer in layers.items():
        for branch in ("spatial_branch", "channel_branch"):

            def keep(module, inputs, output, key=(stage, branch)):
                raw[key] = output.detach().float().cpu()

            handles.append(getattr(layer, branch).register_forward_hook(keep))
    try:
        prediction = model.test_step(pseudo_collate([data]))[0]
    finally:
        for handle in handles:
            handle.remove()

    filters = {}
    for stage, layer in layers.items():
        spatial, channel = raw[stage, "spatial_branch"][0], raw[stage, "channel_branch"][0]
        k = round((channel.numel() / layer.in_channels) ** 0.5)
        filters[stage] = Filters(
            spatial=spatial.unflatten(0, (layer.head, k, k))[0].numpy(),
            channel=channel.reshape(layer.in_channels, k, k).numpy(),
            groups=layer.head,
        )
    return filters, prediction


def choose_points(filters: Filters, height: int, width: int) -> list[tuple[int, int]]:
    """Pixels with filters that differ much.

    The first is the pixel whose filter is farthest from the mean over the image; each next one is
    the farthest from those chosen.

    Args:
        filters: filters of a layer.
        height: height of the network's input.
        width: width of the network's input.

    Returns:
        Up to ``DEFAULT_POINTS`` points (x, y) of the input, in the centres of filters' cells.
    """
    rows, columns = filters.spatial.shape[-2:]
    taps = filters.spatial.reshape(-1, rows * columns).T
    nearest = filters.distance.ravel()
    chosen = []
    for _ in range(min(DEFAULT_POINTS, rows * columns)):
        index = int(nearest.argmax())
        distance = np.linalg.norm(taps - taps[index], axis=1)
        nearest = distance if not chosen else np.minimum(nearest, distance)
        chosen.append(index)
    return [
        (int((i % columns + 0.5) * width / columns), int((i // columns + 0.5) * height / rows))
        for i in chosen
    ]


def describe_prediction(prediction: object, classes: tuple[str, ...] | None) -> str:
    """``"predicted 3 (98.7 %), true 3"``, as far as a prediction of mmpretrain says so."""
    label, score = getattr(prediction, "pred_label", None), getattr(prediction, "pred_score", None)
    if label is None or score is None or label.numel() != 1:
        return ""

    def name(index: int) -> str:
        return str(classes[index]) if classes else f"class {index}"

    text = f"predicted {name(int(label))} ({100 * float(score[int(label)]):.1f} %)"
    truth = getattr(prediction, "gt_label", None)
    return text if truth is None or truth.numel() != 1 else f"{text}, true {name(int(truth))}"


def _plain(axis: plt.Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])


def _badge(axis: plt.Axes, x: float, y: float, i: int, **kwargs) -> None:
    """The letter of the i-th point."""
    axis.text(
        x,
        y,
        chr(ord("A") + i),
        ha="center",
        va="center",
        fontsize=9,
        fontweight="bold",
        bbox=dict(
            boxstyle="circle,pad=0.2",
            facecolor=POINT_COLORS[i % len(POINT_COLORS)],
            edgecolor="black",
            linewidth=0.8,
        ),
        **kwargs,
    )


def _draw_tap_maps(figure: plt.Figure, cell: SubplotSpec, spatial: np.ndarray, limit: float):
    """The map of each tap over the image, where the tap is in the window."""
    k = spatial.shape[0]
    grid = GridSpecFromSubplotSpec(k, k, cell, wspace=0.06, hspace=0.06)
    for i in range(k):
        for j in range(k):
            axis = figure.add_subplot(grid[i, j])
            drawn = axis.imshow(spatial[i, j], cmap=FILTER_CMAP, vmin=-limit, vmax=limit)
            _plain(axis)
    return drawn


def _draw_point_filters(
    figure: plt.Figure,
    cell: SubplotSpec,
    spatial: np.ndarray,
    limit: float,
    points: list[tuple[int, int]],
    size: tuple[int, int],
) -> None:
    """The k x k filter at each point."""
    height, width = size
    rows, columns = spatial.shape[-2:]
    across = 2 if len(points) <= 4 else 3
    grid = GridSpecFromSubplotSpec(
        -(-len(points) // across), across, cell, wspace=0.16, hspace=0.16
    )
    for i, (x, y) in enumerate(points):
        axis = figure.add_subplot(grid[i // across, i % across])
        taps = spatial[:, :, y * rows // height, x * columns // width]
        axis.imshow(taps, cmap=FILTER_CMAP, vmin=-limit, vmax=limit)
        _plain(axis)
        for spine in axis.spines.values():
            spine.set(color=POINT_COLORS[i % len(POINT_COLORS)], linewidth=3)
        _badge(axis, 0, 1, i, transform=axis.transAxes)


def draw(
    image: np.ndarray,
    filters: dict[int, Filters],
    points: list[tuple[int, int]],
    title: str,
) -> plt.Figure:
    """Draw a row of panels for each stage.

    Args:
        image: ``uint8[H, W, 3]``, RGB, as the network reads it.
        filters: filters by number of the stage.
        points: pixels (x, y) of the image.
        title: title of the figure.

    Returns:
        The figure.
    """
    height, width = image.shape[:2]
    # Inches; rows and columns have fixed sizes so that text keeps its room however many there are.
    row, top, bottom = 3.1, 1.3, 0.65
    tall = row * len(filters) + top + bottom
    figure = plt.figure(figsize=(16.5, tall))
    grid = figure.add_gridspec(
        len(filters),
        5,
        width_ratios=(1, 1.12, 1.12, 1.0, 1.2),
        left=0.045,
        right=0.955,
        top=1 - top / tall,
        bottom=bottom / tall,
        wspace=0.3,
        hspace=0.24,
    )
    figure.suptitle(title, fontsize=17, y=1 - 0.28 / tall, va="top")
    headings = (
        "input",
        "where the spatial filter departs\nfrom its mean over the image",
        "spatial filters:\na map for each tap of the window",
        "spatial filters\nat the marked pixels",
        "channel filters:\na row for each channel",
    )

    def heading(axis_or_cell: SubplotSpec, column: int) -> None:
        box = axis_or_cell.get_position(figure)
        figure.text(
            (box.x0 + box.x1) / 2,
            box.y1 + 0.12 / tall,
            headings[column],
            ha="center",
            va="bottom",
            fontsize=12.5,
        )

    for r, (stage, stage_filters) in enumerate(filters.items()):
        spatial, channel = stage_filters.spatial, stage_filters.channel
        k, (rows, columns) = len(spatial), spatial.shape[-2:]
        # Symmetric, so that white is zero; one outlier must not wash all others out.
        spatial_limit = float(np.quantile(np.abs(spatial), 0.995)) or 1.0
        channel_limit = float(np.quantile(np.abs(channel), 0.995)) or 1.0
        if r == 0:
            for column in range(5):
                heading(grid[r, column], column)

        axis = figure.add_subplot(grid[r, 0])
        axis.imshow(image, interpolation="nearest")
        _plain(axis)
        # The cells of the input that share a filter.
        for i in range(1, columns):
            axis.axvline(i * width / columns - 0.5, color="white", alpha=0.25, linewidth=0.7)
        for i in range(1, rows):
            axis.axhline(i * height / rows - 0.5, color="white", alpha=0.25, linewidth=0.7)
        for i, (x, y) in enumerate(points):
            _badge(axis, x, y, i)
        axis.set_ylabel(f"stage {stage}", fontsize=15, fontweight="bold", labelpad=10)
        axis.set_xlabel(f"{width} x {height} pixels", fontsize=10.5)

        axis = figure.add_subplot(grid[r, 1])
        drawn = axis.imshow(
            stage_filters.distance,
            cmap=DISTANCE_CMAP,
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        )
        # The outline of what is in the image, to tell the places.
        gray = image.mean(axis=2)
        if gray.max() > gray.min():
            axis.contour(gray, levels=[(gray.max() + gray.min()) / 2], colors="white", linewidths=1)
        for i, (x, y) in enumerate(points):
            _badge(axis, x, y, i)
        _plain(axis)
        groups = f", group 1 of {stage_filters.groups}" if stage_filters.groups > 1 else ""
        axis.set_xlabel(f"{columns} x {rows} filters{groups}", fontsize=10.5)
        figure.colorbar(drawn, ax=axis, fraction=0.046, pad=0.04)

        drawn = _draw_tap_maps(figure, grid[r, 2], spatial, spatial_limit)
        _draw_point_filters(figure, grid[r, 3], spatial, spatial_limit, points, (height, width))
        box = grid[r, 2].get_position(figure)
        bar = figure.add_axes((box.x1 + 0.006, box.y0, 0.0075, box.height))
        figure.colorbar(drawn, cax=bar, extend="both", ticks=MaxNLocator(5))

        axis = figure.add_subplot(grid[r, 4])
        drawn = axis.imshow(
            channel.reshape(len(channel), -1),
            cmap=FILTER_CMAP,
            vmin=-channel_limit,
            vmax=channel_limit,
            aspect="auto",
            interpolation="nearest",
        )
        axis.set_xticks(
            range(k * k),
            list(ARROWS) if k == 3 else [f"{i},{j}" for i in range(k) for j in range(k)],
            fontsize=11 if k == 3 else 5,
            rotation=0 if k == 3 else 90,
        )
        axis.set_ylabel(f"{len(channel)} channels", fontsize=10.5)
        if r == len(filters) - 1:
            axis.set_xlabel("tap, by its place in the window", fontsize=10.5)
        figure.colorbar(
            drawn, ax=axis, fraction=0.046, pad=0.04, extend="both", ticks=MaxNLocator(5)
        )
    return figure


def main() -> None:
    """Draw the filters."""
    args = parse_args()
    cfg = launch.load_config(args.config, args.cfg_options)
    launch.require_fields(cfg, ("model", "test_dataloader"), "drawing filters")
    launch.require_checkpoint(args.checkpoint, "checkpoint")
    init_default_scope(cfg.get("default_scope", "mmengine"))

    if "data_preprocessor" in cfg and isinstance(cfg.data_preprocessor, dict):
        cfg.model.setdefault("data_preprocessor", cfg.data_preprocessor)
    model = MODELS.build(cfg.model)
    layers = find_layers(model, args.stages)
    checkpoint = load_weights(model, args.checkpoint)
    model.eval()
    data = load_image(cfg, args.image)

    # mm's loaders give BGR.
    image = data["inputs"].flip(0).permute(1, 2, 0).numpy().astype(np.uint8)
    height, width = image.shape[:2]
    for x, y in args.points or ():
        if x >= width or y >= height:
            raise cli.UserError(
                f"--points {x},{y} is outside the network's input of {width} x {height} pixels",
                exit_code=2,
            )

    filters, prediction = capture_filters(model, data, layers)
    points = args.points or choose_points(next(iter(filters.values())), height, width)
    classes = checkpoint.get("meta", {}).get("dataset_meta", {}).get("classes")
    parts = (
        "Decoupled dynamic filters",
        args.image if args.image.startswith("dataset:") else Path(args.image).name,
        describe_prediction(prediction, classes),
    )
    figure = draw(image, filters, points, "  ·  ".join(part for part in parts if part))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=100)
    print(f"filters: {args.out}")


if __name__ == "__main__":
    cli.run(main, "visualize_filters.py")
