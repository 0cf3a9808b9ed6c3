#!/usr/bin/env python3
"""Tabulate the time per pixel in reports of ``benchmark.py op|layer|model --json``, by image size.

    cost_per_pixel.py FILE.json ... [--out TABLE.md] [--plot FILE.png]

If the cost is linear in batch and image size, the numbers of a column are equal; its last row is
the maximum over the minimum. Times are minima in nanoseconds per pixel of the input; for operation
and layer, per pixel and channel.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

Size = tuple[int, int, int]


def times_of(report: dict) -> dict[str, dict[Size, float]]:
    """Nanoseconds per pixel of everything in the report, by (batch, height, width)."""
    times: dict[str, dict[Size, float]] = defaultdict(dict)
    command = report["options"].get("command", "op")
    for row in report["rows"]:
        if command == "model":
            config, plus, changes = row["config"].partition("+")
            size = (row["batch_size"], *row["shape"])
            name = f"{Path(config).stem}{plus}{changes}, {row['mode']}"
            found, channels = {name: row["milliseconds"]}, 1
        else:
            batch, channels, *image = row["shape"]
            size = (batch, *image)
            found = {f"{command}: {name}": t for name, t in row["milliseconds"].items()}
        pixels = size[0] * size[1] * size[2]
        for name, milliseconds in found.items():
            nanoseconds = 1e6 * milliseconds["least"] / (pixels * channels)
            times[f"{name}, {row['layout']}"][size] = nanoseconds
    return times


def merged(reports: list[dict]) -> dict[str, dict[Size, float]]:
    times: dict[str, dict[Size, float]] = defaultdict(dict)
    for report in reports:
        for name, found in times_of(report).items():
            times[name] |= found
    return times


def spread(values: dict[Size, float]) -> float:
    return max(values.values()) / min(values.values())


def by_image(size: Size) -> tuple[int, int]:
    batch, height, width = size
    return height * width, batch


def markdown(reports: list[dict]) -> str:
    """The machines and commands of the reports, and the table."""
    lines: list[str] = []
    for report in reports:
        about = dict(report["machine"])
        command = about.pop("command")
        lines += ["- " + ", ".join(f"{key} {value}" for key, value in about.items()), ""]
        lines += [f"      {command}", ""]
    times = merged(reports)
    sizes = sorted({size for values in times.values() for size in values}, key=by_image)
    lines += [f"| batch, image | {' | '.join(times)} |", "|---" * (len(times) + 1) + "|"]
    for size in sizes:
        cells = [f"{t[size]:.3g}" if size in t else "" for t in times.values()]
        lines.append(f"| {size[0]}, {size[1]} x {size[2]} | {' | '.join(cells)} |")
    lines.append(f"| most over least | {' | '.join(f'{spread(t):.2f}' for t in times.values())} |")
    return "\n".join(lines) + "\n"


def plot(reports: list[dict], path: Path) -> None:
    """Draws the time per pixel, relative to the median, over the number of pixels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(10, 6), layout="constrained")
    for name, values in merged(reports).items():
        sizes = sorted(values, key=lambda size: size[0] * size[1] * size[2])
        middle = sorted(values.values())[len(values) // 2]
        pixels = [b * height * width for b, height, width in sizes]
        axis.plot(pixels, [values[size] / middle for size in sizes], "o-", label=name)
    axis.axhspan(0.8, 1.2, color="gray", alpha=0.15, label="within 20 %")
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("pixels of the batch")
    axis.set_ylabel("time per pixel, over the median size's")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, metavar="TABLE.md", help="default: print the table")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the table")
    args = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in args.reports]
    table = markdown(reports)
    if args.out:
        args.out.write_text(table)
    else:
        print(table, end="")
    if args.plot:
        plot(reports, args.plot)


if __name__ == "__main__":
    main()
