#!/usr/bin/env python3
"""Count the bank conflicts of the CUDA kernels in shared memory, on the host.

    python benchmarks/bank_conflicts.py

Runs the kernels of every layer of the recipes, and of larger windows and small filter groups, for
the addresses that the lanes of a warp access together (banks/cuda_on_host.h); no GPU is needed.
Prints, for each access in the source, how many times as long conflicts make it: at most, and on
average in the layer where that is worst.
"""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from cuda_dispatch import LAYOUTS, Dispatch, Launch, Layer, recipes

PASSES = ("forward", "backward", "pack", "grad_features", "grad_filters")


def layers() -> list[Layer]:
    found = [of for of, _ in recipes()]
    for k in (3, 5, 7):
        for groups in (1, 4, 16):
            for width in (28, 29):
                found.append(Layer("ddf", 64, groups, 28, width, k, 1, 1, 1, "mul", "both"))
    # The gates are for `mul` alone.
    return sorted({of._replace(combine="mul") for of in found})


def launches() -> tuple[dict[str, list[Launch]], dict[int, str]]:
    """Launches of each kernel, and the places of the source of their accesses by address."""
    found = defaultdict(list)
    with Dispatch(banks=True) as dispatch:
        for layer in layers():
            for layout in LAYOUTS:
                for kind in PASSES[:2] if layer.op == "ddf_up" else PASSES:
                    for launch in dispatch.launches(layer, kind, layout):
                        found[launch.kernel].append(launch)
        addresses = sorted({p.address for of in found.values() for run in of for p in run.patterns})
        named = subprocess.run(
            ["addr2line", "-i", "-a", "-e", dispatch.library, *map(hex, addresses)],
            text=True,
            capture_output=True,
            check=True,
        ).stdout
    places: dict[int, str] = {}
    for text in named.removeprefix("0x").split("\n0x"):
        address, *lines = text.splitlines()
        outer = [Path(line.split()[0]).name for line in lines if "cuda_on_host.h" not in line]
        places[int(address, 16)] = outer[0]
    return found, places


def bank_conflicts() -> dict[str, tuple[float, float]]:
    """Of each kernel, the worst conflict of one access, and the average of the worst layer."""
    found, _ = launches()
    return {
        kernel: (
            max((p.worst for run in of for p in run.patterns), default=1.0),
            max(
                (
                    sum(p.wavefronts for p in run.patterns) / sum(p.least for p in run.patterns)
                    for run in of
                    if run.patterns
                ),
                default=1.0,
            ),
        )
        for kernel, of in found.items()
    }


def main() -> int:
    found, places = launches()
    for kernel, of in sorted(found.items()):
        for address in sorted({p.address for run in of for p in run.patterns}):
            here = [p for run in of for p in run.patterns if p.address == address]
            worst, mean = max(p.worst for p in here), max(p.wavefronts / p.least for p in here)
            print(f"{kernel:<90} {places[address]:<40} {worst:5.1f} {mean:5.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
