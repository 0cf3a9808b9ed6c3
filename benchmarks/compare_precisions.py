#!/usr/bin/env python3
"""Train a config in float32, bfloat16 and float16 on a CPU and compare the metrics.

The exit status is 1 if the metric of a training is more than --margin below that of the first."""

import argparse
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from ddf_mm.engine import CPUAmpOptimWrapper, cli, launch
from ddf_mm.engine.cli import UserError

DTYPES = ("float32", "bfloat16", "float16")


@OPTIM_WRAPPERS.register_module()
class CPUHalfOptimWrapper(OptimWrapper):
    """float16 autocast with dynamic loss scaling on a CPU; mmengine supports it on GPUs only."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scaler = torch.amp.GradScaler("cpu")

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Autocast to float16."""
        with super().optim_context(model), torch.autocast("cpu", torch.float16):
            yield

    def backward(self, loss: torch.Tensor, **kwargs) -> None:
        """Gradients of the scaled loss, so that small values do not underflow in float16."""
        super().backward(self.scaler.scale(loss), **kwargs)

    def step(self, **kwargs) -> None:
        """A step with unscaled gradients, skipped if they are not finite."""
        self.scaler.unscale_(self.optimizer)
        if self.clip_grad_kwargs:
            self._clip_grad()
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()


WRAPPERS: dict[str, type[OptimWrapper]] = {
    "float32": OptimWrapper,
    "bfloat16": CPUAmpOptimWrapper,
    "float16": CPUHalfOptimWrapper,
}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="compare_precisions.py", description=__doc__)
    parser.add_argument("config", help="path of the config")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--metric", default="accuracy/top1", help="default: accuracy/top1")
    parser.add_argument("--margin", type=float, default=1.0, help="default: 1.0")
    parser.add_argument("--work-dir", default="work_dirs/precisions")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--cfg-options", action=cli.ConfigOptions)
    return parser.parse_args()


def train(args: argparse.Namespace, dtype: str) -> float:
    """The metric of the config's network on its test data, trained in ``dtype``, tested in
    float32."""
    work_dir = str(Path(args.work_dir, dtype))
    cfg = launch.load_config(args.config, args.cfg_options, work_dir)
    cfg.experiment_name = f"precision_{dtype}"
    cfg.optim_wrapper.type = WRAPPERS[dtype].__name__
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    launch.set_dataloader_defaults(cfg)
    runner = launch.build_runner(cfg)
    runner.train()
    metrics = runner.test()
    if args.metric not in metrics:
        raise UserError(
            f"--metric must be one of {', '.join(metrics)}, got {args.metric!r}", exit_code=2
        )
    return float(metrics[args.metric])


def main() -> None:
    """Train and compare."""
    args = parse_args()
    reached = {dtype: train(args, dtype) for dtype in args.dtypes}
    first = reached[args.dtypes[0]]
    for dtype, value in reached.items():
        print(f"{dtype}: {args.metric} {value:.2f} ({value - first:+.2f})")
    if args.json is not None:
        args.json.write_text(json.dumps({"config": Path(args.config).name, **reached}) + "\n")
    if min(reached.values()) < first - args.margin:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, "compare_precisions.py")
