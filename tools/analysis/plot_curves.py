#!/usr/bin/env python3
"""Draw the training curve of a run: the loss and the validation metrics over the epochs."""

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: a server has no display
import matplotlib.pyplot as plt

from ddf_mm.engine import cli

# Keys that mmengine's LoggerHook writes besides the metrics of a validation.
TIMING_KEYS = ("data_time", "time", "step")
LOSS_COLOR, METRIC_COLORS = "tab:orange", ("tab:blue", "tab:green", "tab:purple", "tab:brown")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="plot_curves.py", description=__doc__)
    parser.add_argument(
        "log",
        type=Path,
        help="scalars.json of mmengine's LocalVisBackend, or a work folder with such files, of "
        "which the latest is used",
    )
    parser.add_argument(
        "--out", type=Path, help="PNG to write; default: curve.png in the log's folder"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="KEY",
        help="metrics to draw, such as accuracy/top1; default: the first one in the log",
    )
    parser.add_argument("--title", help="default: the name of the log's folder")
    return parser.parse_args()


def find_log(path: Path) -> Path:
    """Find the log to draw.

    Args:
        path: a log, or a work folder with logs in ``<timestamp>/vis_data``.

    Returns:
        The path, or the latest log in the folder that has records of training.

    Raises:
        UserError: there is no such log.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise cli.UserError(f"log {str(path)!r} is neither a file nor a folder", exit_code=2)
    # The folders are named after the start time of the run.
    for log in sorted(path.glob("**/vis_data/scalars.json"), reverse=True):
        if read_log(log)[0]:
            return log
    raise cli.UserError(
        f"folder {str(path)!r} has no */vis_data/scalars.json with records of training: it must "
        "be the work folder of a run whose visualizer has LocalVisBackend"
    )


def read_log(path: Path) -> tuple[list[dict], list[dict]]:
    """The records of training, those with a loss, and of validation in a log.

    Args:
        path: a file of mmengine's LocalVisBackend, with one JSON record per line.

    Returns:
        The two lists, in the order of the log.

    Raises:
        UserError: the file is not such a log.
    """
    records = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise cli.UserError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise cli.UserError(f"{path}, line {number} must be a JSON object, got {line!r}")
        records.append(record)
    training = [record for record in records if "loss" in record and "step" in record]
    validation = [record for record in records if "loss" not in record and "step" in record]
    return training, validation


def choose_metrics(validation: list[dict], wanted: list[str] | None) -> list[str]:
    """The metrics to draw.

    Args:
        validation: records of validation.
        wanted: names of metrics, or ``None`` for the first in the log.

    Returns:
        Names of metrics in the log.

    Raises:
        UserError: a metric of ``wanted`` is not in the log.
    """
    known = []
    for record in validation:
        for key, value in record.items():
            if key not in TIMING_KEYS and key not in known and isinstance(value, (int, float)):
                known.append(key)
    if wanted is None:
        return known[:1]
    missing = [key for key in wanted if key not in known]
    if missing:
        raise cli.UserError(
            f"--metrics {' '.join(missing)}: not in the log, which has "
            f"{', '.join(known) or 'none'}",
            exit_code=2,
        )
    return wanted


def plot(
    training: list[dict], validation: list[dict], metrics: list[str], title: str
) -> plt.Figure:
    """Draw the loss on the left axis and the metrics on the right one.

    Args:
        training: records of training, at least one.
        validation: records of validation, whose ``step`` is in units of the x axis.
        metrics: names of the metrics to draw.
        title: title of the figure.

    Returns:
        The figure.
    """
    by_epoch = "epoch" in training[-1]
    steps = [record["step"] for record in training]
    if by_epoch:
        # The log does not have the number of iterations per epoch. Records at the end of an epoch
        # have the largest quotient, up to rounding.
        length = math.ceil(max(record["step"] / record["epoch"] for record in training))
        steps = [step / length for step in steps]

    figure, loss_axis = plt.subplots(figsize=(9, 5), layout="constrained")
    loss_axis.plot(
        steps,
        [record["loss"] for record in training],
        color=LOSS_COLOR,
        linewidth=1.8,
        label="training loss",
    )
    loss_axis.set_xlabel("epoch" if by_epoch else "iteration")
    loss_axis.set_ylabel("training loss", color=LOSS_COLOR)
    loss_axis.tick_params(axis="y", labelcolor=LOSS_COLOR)
    loss_axis.set_ylim(bottom=0)
    loss_axis.set_xlim(left=0)
    loss_axis.grid(alpha=0.3)
    lines = loss_axis.get_lines()

    if metrics:
        metric_axis = loss_axis.twinx()
        for i, metric in enumerate(metrics):
            points = [(record["step"], record[metric]) for record in validation if metric in record]
            color = METRIC_COLORS[i % len(METRIC_COLORS)]
            (line,) = metric_axis.plot(
                *zip(*points, strict=True),
                color=color,
                linewidth=1.8,
                marker="o",
                markersize=4,
                label=f"held-out {metric}",
            )
            lines = [*lines, line]
            # Above and to the left of the last point, where a rising curve leaves space.
            metric_axis.annotate(
                f"{points[-1][1]:.2f}",
                points[-1],
                xytext=(0, 7),
                textcoords="offset points",
                ha="right",
                color=color,
                fontweight="bold",
            )
        metric_axis.set_ylabel(", ".join(metrics), color=METRIC_COLORS[0])
        metric_axis.tick_params(axis="y", labelcolor=METRIC_COLORS[0])
        metric_axis.margins(y=0.1)
    loss_axis.set_title(title)
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    return figure


def main() -> None:
    """Draw a curve."""
    args = parse_args()
    log = find_log(args.log)
    training, validation = read_log(log)
    if not training:
        raise cli.UserError(f"{str(log)!r} has no record with a loss")
    metrics = choose_metrics(validation, args.metrics)
    out = args.out or log.parent / "curve.png"
    title = args.title
    if title is None:
        folder = args.log if args.log.is_dir() else log.parent
        title = folder.resolve().name
    figure = plot(training, validation, metrics, title)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print(f"curve: {out}")


if __name__ == "__main__":
    cli.run(main, "plot_curves.py")
