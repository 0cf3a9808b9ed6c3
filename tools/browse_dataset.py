#!/usr/bin/env python3
"""Draw images of a classification config's dataset, as read and after each step of its pipeline.

mmdet and mmseg have a browse_dataset.py of their own, which works with configs of this package."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: a server has no display
import matplotlib.pyplot as plt
import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, init_default_scope

from ddf_mm.engine import cli, launch
from ddf_mm.engine.cli import UserError


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="browse_dataset.py", description=__doc__)
    parser.add_argument("config", help="path of the config")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument(
        "--phase",
        choices=["train", "val", "test"],
        default="train",
        help="whose dataset; default: %(default)s",
    )
    parser.add_argument("--num", type=int, default=4, help="images to draw; default: %(default)s")
    parser.add_argument("--first", type=int, default=0, help="index of the first image")
    parser.add_argument("--cfg-options", nargs="+", action=cli.ConfigOptions, metavar="KEY=VALUE")
    args = parser.parse_args()
    for name, least in [("num", 1), ("first", 0)]:
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    return args


def pictures_of(dataset: BaseDataset, index: int) -> list[tuple[str, np.ndarray]]:
    """The image ``index`` of a dataset as read and after each step of its pipeline."""
    data = dataset.get_data_info(index)
    pictures = [("original", data["img"])] if "img" in data else []
    for transform in dataset.pipeline.transforms:
        data = transform(data)
        if "img" in data:
            pictures.append((type(transform).__name__, np.array(data["img"])))
    return pictures


def main() -> None:
    """Draw."""
    args = parse_args()
    cfg = launch.load_config(args.config, args.cfg_options)
    loader = f"{args.phase}_dataloader"
    launch.require_fields(cfg, (loader,), "browsing")
    scope = cfg.get("default_scope")
    if scope != "mmpretrain":
        raise UserError(
            f"{args.config!r} must have the default_scope 'mmpretrain', got {scope!r}; mmdet and "
            "mmseg have an analysis_tools/browse_dataset.py of their own",
            exit_code=2,
        )
    init_default_scope(scope)
    dataset = DATASETS.build(cfg[loader].dataset)
    if not isinstance(dataset, BaseDataset):
        raise UserError(
            f"{loader}.dataset must be a dataset with a pipeline, got a {type(dataset).__name__}"
        )
    indices = range(args.first, min(args.first + args.num, len(dataset)))
    if not indices:
        raise UserError(f"--first {args.first} is beyond the {len(dataset)} images", exit_code=2)

    rows = [pictures_of(dataset, index) for index in indices]
    # What to_rgb turns into RGB is BGR.
    channels = slice(None, None, -1 if cfg.data_preprocessor.get("to_rgb") else None)
    size = (len(rows), max(map(len, rows)))
    figure, axes = plt.subplots(*size, figsize=(2 * size[1], 2.2 * size[0]), squeeze=False)
    for index, row, line in zip(indices, rows, axes, strict=True):
        for axis, (name, picture) in zip(line, row, strict=False):
            height, width = picture.shape[:2]
            axis.imshow(picture[:, :, channels].astype(np.uint8))
            axis.set_title(f"{name}\n{height} x {width}", fontsize=8)
        label = dataset.get_data_info(index)["gt_label"]
        line[0].set_ylabel(f"{index}: {dataset.metainfo['classes'][label]}", fontsize=8)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=100)
    print(f"pictures: {args.out}")


if __name__ == "__main__":
    cli.run(main, "browse_dataset.py")
