#!/usr/bin/env python3
"""Draw images of a classification config's dataset, as read and after each step of its pipeline.

For detection and segmentation use the browse_dataset.py of mmdet and mmseg, which works with
configs of this package."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: a server has no display
import matplotlib.pyplot as plt
import numpy as np
from mmengine.dataset import BaseDataset

from ddf_mm import analysis
from ddf_mm.engine import cli, launch
from ddf_mm.engine.cli import UserError
from ddf_mm.utils import toolbox
from ddf_mm.visualization import picture


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="browse_dataset.py", description=__doc__)
    parser.add_argument("config", help="path of the config, or toolbox::path")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument(
        "--phase",
        choices=["train", "val", "test"],
        default="train",
        help="which dataset of the config; default: %(default)s",
    )
    parser.add_argument("--num", type=int, default=4, help="images to draw; default: %(default)s")
    parser.add_argument("--first", type=int, default=0, help="index of the first image")
    parser.add_argument("--cfg-options", action=cli.ConfigOptions)
    args = parser.parse_args()
    for name, least in [("num", 1), ("first", 0)]:
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    return args


def original(dataset: object, index: int) -> tuple[BaseDataset, int]:
    """The dataset that reads an image, inside wrappers that concatenate, repeat or split datasets,
    and the image's index in it."""
    while hasattr(dataset, "_get_ori_dataset_idx"):
        # The dataset of a fold is already the subset that the index refers to.
        is_fold = type(dataset).__name__ == "KFoldDataset"
        found = index if is_fold else dataset._get_ori_dataset_idx(index)
        if isinstance(found, tuple):
            dataset, index = dataset.datasets[found[0]], found[1]
        else:
            dataset, index = dataset.dataset, found
    if not isinstance(dataset, BaseDataset):
        raise UserError(
            f"drawing needs a dataset with a pipeline, or a wrapper that concatenates, repeats or "
            f"splits such datasets, got a {type(dataset).__name__}"
        )
    return dataset, index


def pictures_of(dataset: BaseDataset, index: int) -> list[tuple[str, np.ndarray]]:
    """The image ``index`` of a dataset as read and after each step of its pipeline."""
    data = dataset.get_data_info(index)
    pictures = [("original", data["img"])] if "img" in data else []
    for transform in dataset.pipeline.transforms:
        data = transform(data)
        if isinstance(data, dict) and "img" in data:
            pictures.append((type(transform).__name__, np.array(data["img"])))
    return pictures


def label_of(dataset: BaseDataset, index: int) -> str:
    """The names of the image's classes, or their indices if the dataset has no names."""
    classes = dataset.metainfo.get("classes")
    labels = dataset.get_data_info(index).get("gt_label", ())
    labels = np.atleast_1d(np.asarray(labels, int))
    return ", ".join(str(classes[i]) if classes else str(i) for i in labels)


def main() -> None:
    """Draw."""
    args = parse_args()
    cfg = launch.load_config(args.config, args.cfg_options)
    loader = f"{args.phase}_dataloader"
    launch.require_fields(cfg, (loader,), "browsing")
    scope = toolbox(cfg)
    if scope != "mmpretrain":
        raise UserError(
            f"{args.config!r} must have the default_scope 'mmpretrain', got {scope!r}; for mmdet "
            "and mmseg use their own analysis_tools/browse_dataset.py",
            exit_code=2,
        )
    dataset = analysis.build_dataset(cfg, loader)
    indices = range(args.first, min(args.first + args.num, len(dataset)))
    if not indices:
        raise UserError(f"--first {args.first} is beyond the {len(dataset)} images", exit_code=2)

    samples = [original(dataset, index) for index in indices]
    with cli.phase(f"reading the images of {loader}"):
        rows = [pictures_of(*sample) for sample in samples]
    if not any(rows):
        raise UserError(f"no step of the pipeline of {loader}.dataset returns an image, 'img'")
    # to_rgb converts from BGR.
    is_bgr = bool(analysis.data_preprocessor(cfg).get("to_rgb"))
    size = (len(rows), max(map(len, rows)))
    figure, axes = plt.subplots(*size, figsize=(2 * size[1], 2.2 * size[0]), squeeze=False)
    for index, sample, row, line in zip(indices, samples, rows, axes, strict=True):
        for axis, (name, pixels) in zip(line, row, strict=False):
            height, width = pixels.shape[:2]
            axis.imshow(picture(pixels, is_bgr))
            axis.set_title(f"{name}\n{height} x {width}", fontsize=8)
        line[0].set_ylabel(f"{index}: {label_of(*sample)}", fontsize=8)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=100)
    print(f"pictures: {args.out}")


if __name__ == "__main__":
    cli.run(main, "browse_dataset.py")
