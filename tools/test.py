#!/usr/bin/env python3
"""Evaluate a checkpoint with a config of mmpretrain, mmdet, mmseg or any toolbox on mmengine."""

import argparse
import os
import time

import mmengine

from ddf_mm.engine import checkpoints, cli, evaluation, launch

METRIC_SUFFIXES = (".json", ".yaml", ".yml", ".pkl", ".pickle")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="test.py", description=__doc__)
    parser.add_argument("config", help="path of the config, or toolbox::path")
    parser.add_argument("checkpoint", help="path or URL of the checkpoint")
    parser.add_argument(
        "--out",
        help="where to write results: predictions to a .pkl file or, with mmseg's metrics, to a "
        "folder; metrics to a .json, .yaml or .pkl file",
    )
    parser.add_argument(
        "--out-item",
        choices=["metrics", "pred"],
        help="what to write to --out; default: pred",
    )
    parser.add_argument("--show", action="store_true", help="show each prediction in a window")
    parser.add_argument(
        "--show-dir",
        help="folder for pictures of the predictions; with mmdet, a relative path is below "
        "<work-dir>/<timestamp>",
    )
    parser.add_argument(
        "--interval", type=int, default=1, help="draw every INTERVAL-th sample (mmpretrain)"
    )
    parser.add_argument(
        "--wait-time", type=float, default=2, help="seconds for which --show displays a window"
    )
    parser.add_argument(
        "--tta",
        action="store_true",
        help="test-time augmentation with the config's tta_model and tta_pipeline; mmpretrain and "
        "mmdet configs without them get flips",
    )
    parser.add_argument(
        "--amp", action="store_true", help="mixed precision: float16 on a GPU, bfloat16 on a CPU"
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="accept a checkpoint that does not match the model exactly",
    )
    cli.add_common_arguments(parser)
    args = parser.parse_args()
    if args.out is None and args.out_item is not None:
        parser.error("--out-item needs --out")
    if args.out_item == "metrics" and not args.out.endswith(METRIC_SUFFIXES):
        parser.error(f"--out {args.out!r} must end with {', '.join(METRIC_SUFFIXES)} for metrics")
    return args


def main() -> None:
    """Evaluate."""
    args = parse_args()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    checkpoints.require_checkpoint(args.checkpoint, "checkpoint")
    cfg = launch.load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    launch.require_fields(cfg, ("model", "test_dataloader", "test_cfg", "test_evaluator"), "a test")
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.amp:
        evaluation.enable_amp(cfg)
    if args.show or args.show_dir is not None:
        evaluation.enable_visualization(
            cfg, args.show, args.show_dir, args.wait_time, args.interval
        )
    if args.tta:
        evaluation.enable_tta(cfg)
    out_predictions = args.out is not None and args.out_item != "metrics"
    if out_predictions and not args.out.endswith((".pkl", ".pickle")):
        evaluation.write_predictions_to_folder(cfg, args.out)
    launch.set_dataloader_defaults(cfg, not args.no_pin_memory, not args.no_persistent_workers)

    runner = launch.build_runner(cfg)
    if not args.allow_partial:
        checkpoints.require_matching_checkpoint(runner)
    if out_predictions and args.out.endswith((".pkl", ".pickle")):
        runner.register_hook(evaluation.DumpPredictions(cfg, args.out))
    start = time.time()
    metrics = runner.test()
    if args.out_item == "metrics" and cli.rank() == 0:
        with cli.phase(f"writing --out {args.out!r}"):
            mmengine.dump(metrics, args.out)
    for option, path in (("--out", args.out), ("--show-dir", args.show_dir)):
        if path is not None:
            evaluation.require_written(runner, option, path, start)


if __name__ == "__main__":
    cli.run(main, "test.py")
