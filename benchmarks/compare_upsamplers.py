#!/usr/bin/env python3
"""Train the digit-scenes recipes with each upsampler of the neck and seed; tabulate the metrics.

The script may be interrupted and started again: finished runs are not repeated, an interrupted one
is resumed.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from ddf_mm.engine import cli

ROOT = Path(__file__).resolve().parents[1]
# Names of the necks in the file names of the configs, and in the table.
NECKS = {"fpn": "FPN (nearest)", "fpn-carafe": "FPN_CARAFE", "ddfup-fpn": "DDFUpFPN"}
CONFIGS = {
    "detection": "mask-rcnn_ddf-mul-r26_{neck}_digit-scenes.py",
    "segmentation": "fpn_ddf-mul-r26_{neck}_digit-scenes.py",
}
# Factors that convert the metrics to percent.
METRICS = {
    "detection": {
        "coco/bbox_mAP": 100,
        "coco/bbox_mAP_50": 100,
        "coco/segm_mAP": 100,
        "coco/segm_mAP_50": 100,
    },
    "segmentation": {"mIoU": 1, "mAcc": 1, "aAcc": 1},
}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="compare_upsamplers.py", description=__doc__)
    parser.add_argument(
        "--tasks", nargs="+", choices=list(CONFIGS), default=list(CONFIGS), help="default: both"
    )
    parser.add_argument(
        "--necks", nargs="+", choices=list(NECKS), default=list(NECKS), help="default: all three"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("work_dirs/upsamplers"), help="default: %(default)s"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("work_dirs/upsamplers/upsamplers.json"),
        help="JSON file to write; the table is written to the same path with the suffix .md; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="passed to train.py and test.py",
    )
    return parser.parse_args()


def run_tool(name: str, *arguments: object) -> None:
    """Run one of the tools, which reports its own errors."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise cli.UserError(f"{name} ended with status {code} for {arguments[0]}")


def measure(config: Path, work_dir: Path, seed: int, options: list[str]) -> dict[str, float]:
    """Train and test a config with a seed, unless the metrics exist.

    Args:
        config: the config.
        work_dir: folder of the run.
        seed: seed of the training.
        options: ``KEY=VALUE`` settings of the config.

    Returns:
        The metrics of test.py.
    """
    metrics = work_dir / "metrics.json"
    common = ["--work-dir", work_dir, *(["--cfg-options", *options] if options else [])]
    if not metrics.is_file():
        run_tool("train.py", config, "--seed", seed, "--resume", *common)
        checkpoint = (work_dir / "last_checkpoint").read_text().strip()
        unfinished = work_dir / "unfinished.json"
        run_tool(
            "test.py", config, checkpoint, "--out", unfinished, "--out-item", "metrics", *common
        )
        unfinished.rename(metrics)
    return json.loads(metrics.read_text())


def tabulate(results: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """A Markdown table for each task: mean and standard deviation over the seeds, in percent.

    Args:
        results: metrics by task, neck and seed.

    Returns:
        The tables.
    """
    lines = []
    for task, necks in results.items():
        names = METRICS[task]
        lines += [f"| {task} | seeds | {' | '.join(names)} |", f"|---|--:|{'--:|' * len(names)}"]
        for neck, seeds in necks.items():
            cells = [NECKS[neck], str(len(seeds))]
            for name, factor in names.items():
                values = [factor * metrics[name] for metrics in seeds.values()]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run the missing trainings and write the table."""
    args = parse_args()
    results: dict = {}
    for task in args.tasks:
        for neck in args.necks:
            name = CONFIGS[task].format(neck=neck)
            for seed in args.seeds:
                work_dir = args.work_dir / Path(name).stem / f"seed{seed}"
                metrics = measure(ROOT / "configs" / task / name, work_dir, seed, args.cfg_options)
                kept = {metric: metrics[metric] for metric in METRICS[task]}
                results.setdefault(task, {}).setdefault(neck, {})[str(seed)] = kept
    table = tabulate(results)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    args.out.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    cli.run(main, "compare_upsamplers.py")
