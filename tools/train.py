#!/usr/bin/env python3
"""Train a model from a config of mmpretrain, mmdet, mmseg or any other toolbox on mmengine."""

import argparse
import os

from ddf_mm.contrib import exact_resume
from ddf_mm.engine import checkpoints, cli, launch


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="train.py", description=__doc__)
    parser.add_argument("config", help="path of the config, or toolbox::path")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="resume from a checkpoint; with 'auto' or no argument, from the latest one in the "
        "work folder",
    )
    parser.add_argument(
        "--amp",
        action="store_true",
        help="mixed precision: float16 with dynamic loss scaling, or bfloat16 on a CPU",
    )
    parser.add_argument(
        "--no-validate", action="store_true", help="do not evaluate checkpoints while training"
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate by the batch size over auto_scale_lr.base_batch_size",
    )
    parser.add_argument("--seed", type=int, help="seed of all random number generators")
    parser.add_argument(
        "--deterministic", action="store_true", help="use deterministic algorithms only"
    )
    cli.add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Train."""
    args = parse_args()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if args.resume not in (None, "auto"):
        checkpoints.require_checkpoint(args.resume, "--resume")
    cfg = launch.load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    launch.require_fields(
        cfg, ("model", "train_dataloader", "train_cfg", "optim_wrapper"), "training"
    )
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        launch.enable_amp(cfg)
    if args.auto_scale_lr:
        launch.enable_auto_scale_lr(cfg)
    randomness = dict(dict(seed=None), **cfg.get("randomness", {}))
    if args.seed is not None:
        randomness.update(seed=args.seed)
    if args.deterministic:
        randomness.update(deterministic=True)
    cfg.randomness = randomness
    if args.resume is not None:
        auto = args.resume == "auto"
        with cli.phase(f"looking for the latest checkpoint in {cfg.work_dir!r}"):
            found = exact_resume.latest_checkpoint(cfg.work_dir) if auto else args.resume
        # A job may always be started with --resume: the first time it uses the config's load_from.
        cfg.resume = found is not None
        cfg.load_from = found or cfg.get("load_from")
    launch.set_dataloader_defaults(cfg, not args.no_pin_memory, not args.no_persistent_workers)

    runner = launch.build_runner(cfg)
    if cfg.get("resume"):
        runner.register_hook(exact_resume.TrainingStateCheck())
    runner.register_hook(exact_resume.RandomState(resume=cfg.get("resume", False)))
    runner.register_hook(exact_resume.KeepUntilSaved())
    runner.train()


if __name__ == "__main__":
    cli.run(main, "train.py")
