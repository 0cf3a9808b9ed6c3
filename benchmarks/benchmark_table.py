#!/usr/bin/env python3
"""Convert reports of ``benchmark.py op|layer|model --json`` to Markdown tables.

    benchmark_table.py FILE.json ... [--out TABLE.md]

Each row is a shape, with the minimum time of each call in milliseconds and the ratios of the
report, or a network.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def network_of(row: dict) -> dict[str, str]:
    """The row of a network."""
    extra = row.get("peak_extra_bytes")
    config, plus, changes = row["config"].partition("+")
    parts = {f"{name} ms": f"{times['least']:.1f}" for name, times in row.get("parts", {}).items()}
    return {
        "config": Path(config).stem + plus + changes,
        **{name: str(row[name]) for name in ("mode", "precision", "layout", "batch_size")},
        "image": "x".join(map(str, row["shape"])),
        "M params": f"{row['parameters'] / 1e6:.2f}",
        "GMAC": f"{row['gmac']:.3g}",
        "ms": f"{row['milliseconds']['median']:.1f}",
        "least ms": f"{row['milliseconds']['least']:.1f}",
        **parts,
        "images/s": f"{row['images_per_s']:.2f}",
        "MB": "" if extra is None else f"{extra / 1e6:.0f}",
        "speed": f"{row['speed']:.2f}",
    }


def rows_of(report: dict) -> list[dict[str, str]]:
    """The rows of a report's table, as dicts by column."""
    # Old reports, from before there were several commands, lack "command".
    if report["options"].get("command") == "model":
        return [network_of(row) for row in report["rows"]]
    return [
        {
            "pass": report["options"]["which"],
            "dtype": row["dtype"],
            "kernel": str(row["kernel_size"]),
            "stride": str(row["stride"]),
            "shape": ",".join(map(str, row["shape"])),
            "layout": row["layout"],
            **{f"{name} ms": f"{t['least']:.4f}" for name, t in row["milliseconds"].items()},
            **{name: f"{value:.2f}" for name, value in row["ratios"].items()},
            "of copy speed": f"{row['of_copy_speed']:.2f}" if "of_copy_speed" in row else "",
        }
        for row in report["rows"]
    ]


def table_of(rows: list[dict[str, str]]) -> list[str]:
    columns = [
        c for c in dict.fromkeys(c for row in rows for c in row) if any(row.get(c) for row in rows)
    ]
    return [
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
        *(f"| {' | '.join(row.get(column, '') for column in columns)} |" for row in rows),
    ]


def markdown(reports: list[dict]) -> str:
    """A table for each report, with its command, and its machine if that is another one."""
    lines: list[str] = []
    last = None
    for report in reports:
        machine = dict(report["machine"])
        command = machine.pop("command")
        load = machine.pop("load", None)
        about = ", ".join(f"{key} {value}" for key, value in machine.items())
        if about != last:
            lines += [about, ""]
        last = about
        lines += [f"    {command}", "", *([] if load is None else [f"Load before: {load}", ""])]
        lines += [*table_of(rows_of(report)), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, metavar="TABLE.md", help="default: print the table")
    args = parser.parse_args()
    table = markdown([json.loads(path.read_text()) for path in args.reports])
    if args.out:
        args.out.write_text(table)
    else:
        print(table, end="")


if __name__ == "__main__":
    main()
