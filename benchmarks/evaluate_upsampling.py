#!/usr/bin/env python3
"""Compare a joint upsampling network with interpolation: a table of RMSE, and a picture."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: a server has no display
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from mmengine.evaluator import Evaluator
from mmengine.structures import PixelData
from torch import Tensor
from torch.utils.data import DataLoader

from ddf_mm.engine import checkpoints, cli, launch

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="evaluate_upsampling.py", description=__doc__)
    parser.add_argument("config", help="path of a config whose model is a DDFUpNet")
    parser.add_argument("checkpoint", help="path of the checkpoint")
    parser.add_argument("--out", type=Path, help="PNG to write")
    parser.add_argument("--json", type=Path, help="JSON file to write the table to")
    parser.add_argument(
        "--num", type=int, default=3, help="scenes in the picture; default: %(default)s"
    )
    parser.add_argument("--cfg-options", action=cli.ConfigOptions)
    args = parser.parse_args()
    if args.num < 1:
        parser.error(f"--num must be at least 1, got {args.num}")
    return args


def upsamplers(model: torch.nn.Module) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The upsamplers to compare, by name: functions of the maps and guides of a batch."""

    def interpolate(mode: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda maps, guide: F.interpolate(maps, scale_factor=model.scale_factor, mode=mode)

    return {mode: interpolate(mode) for mode in INTERPOLATIONS} | {type(model).__name__: model}


@torch.no_grad()
def evaluate(upsample: Callable, dataloader: DataLoader, evaluator_cfg: dict) -> dict[str, float]:
    """The metrics of a config's evaluator for one upsampler."""
    evaluator = Evaluator(evaluator_cfg)
    for batch in dataloader:
        maps = upsample(batch["inputs"], batch["guide"])
        for sample, upsampled in zip(batch["data_samples"], maps, strict=True):
            sample.pred_map = PixelData(data=upsampled)
        evaluator.process(batch["data_samples"], batch)
    return evaluator.evaluate(len(dataloader.dataset))


@torch.no_grad()
def draw(functions: dict[str, Callable], samples: list[dict]) -> plt.Figure:
    """A row for each sample: guide, low-resolution map, upsampled maps, and ground truth."""
    titles = ["guide", "low resolution", *functions, "truth"]
    figure, axes = plt.subplots(
        len(samples),
        len(titles),
        figsize=(2 * len(titles), 2.1 * len(samples)),
        layout="constrained",
        squeeze=False,
    )
    for row, sample in zip(axes, samples, strict=True):
        low, guide = sample["inputs"][None], sample["guide"][None]
        truth = sample["data_samples"].gt_map.data[0]
        upsampled = [function(low, guide)[0, 0] for function in functions.values()]
        row[0].imshow(sample["guide"].permute(1, 2, 0) / 255)
        for axis, depth in zip(row[1:], [low[0, 0], *upsampled, truth], strict=True):
            axis.imshow(depth, cmap="viridis_r", vmin=truth.min(), vmax=truth.max())
        for axis in row:
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    return figure


def main() -> None:
    """Print a table, draw a picture."""
    args = parse_args()
    checkpoints.require_checkpoint(args.checkpoint, "checkpoint")
    cfg = launch.load_config(args.config, args.cfg_options)
    launch.require_fields(cfg, ("model", "test_dataloader", "test_evaluator"), "an evaluation")
    cfg.load_from = args.checkpoint
    runner = launch.build_runner(cfg)
    runner.load_or_resume()
    model = runner.model.cpu().eval()
    if not hasattr(model, "scale_factor"):
        raise cli.UserError(f"{args.config}: the model {type(model).__name__} has no scale_factor")
    dataloader = runner.build_dataloader(cfg.test_dataloader)

    functions = upsamplers(model)
    table = {
        name: evaluate(function, dataloader, cfg.test_evaluator)
        for name, function in functions.items()
    }
    metrics = list(next(iter(table.values())))
    print(f"| x{model.scale_factor} | {' | '.join(metrics)} |")
    print(f"|---|{'--:|' * len(metrics)}")
    for name, values in table.items():
        print(f"| {name} | {' | '.join(f'{values[metric]:.2f}' for metric in metrics)} |")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(dict(config=args.config, metrics=table), indent=2) + "\n")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        samples = [dataloader.dataset[i] for i in range(min(args.num, len(dataloader.dataset)))]
        draw(functions, samples).savefig(args.out, dpi=110)
        print(f"picture: {args.out}")


if __name__ == "__main__":
    cli.run(main, "evaluate_upsampling.py")
