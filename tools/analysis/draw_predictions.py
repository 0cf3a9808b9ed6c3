#!/usr/bin/env python3
"""Draw the predictions of an mmdet or mmseg model on its first test images, on one sheet."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.registry import VISUALIZERS
from mmengine.structures import BaseDataElement
from PIL import Image

from ddf_mm import analysis
from ddf_mm.engine import checkpoints, cli, launch
from ddf_mm.utils import toolbox

MARGIN = 8


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="draw_predictions.py", description=__doc__)
    parser.add_argument("config", help="path of the config, or toolbox::path")
    parser.add_argument("checkpoint", help="path of the checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--num", type=int, default=8, help="images to draw; default: %(default)s")
    parser.add_argument("--columns", type=int, default=4, help="default: %(default)s")
    parser.add_argument(
        "--enlarge",
        type=int,
        default=3,
        help="factor by which images are enlarged; default: %(default)s",
    )
    parser.add_argument(
        "--score",
        type=float,
        default=0.5,
        help="least score of the predictions to draw; default: %(default)s",
    )
    parser.add_argument("--cfg-options", action=cli.ConfigOptions)
    args = parser.parse_args()
    for name in ("num", "columns", "enlarge"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def enlarge_maps(maps: torch.Tensor, times: int) -> torch.Tensor:
    """``Tensor[…, H, W]`` -> ``Tensor[…, times*H, times*W]``, by repeating pixels."""
    return maps.repeat_interleave(times, dim=-1).repeat_interleave(times, dim=-2)


def enlarge_predictions(sample: BaseDataElement, times: int) -> BaseDataElement:
    """Enlarges predictions of mmdet and mmseg, in place.

    Args:
        sample: a data sample with ``pred_instances`` or ``pred_sem_seg``.
        times: the factor.

    Returns:
        The sample.

    Raises:
        UserError: the sample has neither.
    """
    if "pred_instances" in sample:
        instances = sample.pred_instances
        instances.bboxes = instances.bboxes * times
        if "masks" in instances:
            instances.masks = enlarge_maps(instances.masks, times)
    elif "pred_sem_seg" in sample:
        labels = enlarge_maps(sample.pred_sem_seg.data, times)
        del sample.pred_sem_seg
        sample.set_field(type(sample.gt_sem_seg)(data=labels), "pred_sem_seg")
    else:
        raise cli.UserError("the model predicts neither pred_instances nor pred_sem_seg")
    return sample


def make_sheet(pictures: list[np.ndarray], columns: int) -> Image.Image:
    """Arranges pictures of one size on a white sheet, row by row."""
    height, width = (length + MARGIN for length in pictures[0].shape[:2])
    rows = -(-len(pictures) // columns)
    columns = min(columns, len(pictures))
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(Image.fromarray(picture), (column * width + MARGIN, row * height + MARGIN))
    return sheet


def main() -> None:
    """Draw a sheet."""
    args = parse_args()
    checkpoints.require_checkpoint(args.checkpoint, "checkpoint")
    cfg = launch.load_config(args.config, args.cfg_options)
    launch.require_fields(cfg, ("model", "test_dataloader", "visualizer"), "drawing")
    model = analysis.build_model(cfg)
    checkpoints.load_checkpoint(model, args.checkpoint)
    model.to(get_device())
    dataset = analysis.build_dataset(cfg, "test_dataloader")
    # Without backends, which would write further files.
    visualizer = VISUALIZERS.build(dict(cfg.visualizer, vis_backends=None))
    visualizer.dataset_meta = dataset.metainfo

    pictures = []
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "prediction.png"
        for index in range(min(args.num, len(dataset))):
            with cli.phase(f"reading the test image {index}"):
                data = dataset[index]
            with torch.no_grad():
                (sample,) = model.test_step(pseudo_collate([data]))
            picture = enlarge_maps(data["inputs"].flip(0), args.enlarge).permute(1, 2, 0)
            options = {} if toolbox(cfg) == "mmseg" else dict(pred_score_thr=args.score)
            visualizer.add_datasample(
                "prediction",
                np.ascontiguousarray(picture),
                enlarge_predictions(sample.cpu(), args.enlarge),
                draw_gt=False,
                # The visualizers write the same format, but their get_image() differ.
                out_file=str(drawn),
                **options,
            )
            pictures.append(np.asarray(Image.open(drawn).convert("RGB")))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    make_sheet(pictures, args.columns).save(args.out)
    print(f"predictions: {args.out}")


if __name__ == "__main__":
    cli.run(main, "draw_predictions.py")
