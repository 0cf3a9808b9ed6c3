#!/usr/bin/env python3
"""Predict the speed of the CUDA kernels from what they were compiled to; nothing is measured.

    python benchmarks/predict_cuda.py [--shapes 2,256,200,304 ...] [--arch 90]

For each shape, dtype, memory format and pass: the kernels, the lanes that have work, the waves of
blocks, what bounds them (waits, issue slots, or bytes), and the predicted fraction of the bandwidth
of a copy, with H100's and H200's. Needs
cuda_gates.csv (check_cuda_build.py --update) and a C++ compiler. The model: a step of a hot loop
costs its issue slots, its waits for memory of LATENCY cycles, which the other warps of the
multiprocessor fill, or its bytes at the bandwidth of a copy, whichever is most; lanes without work
take issue slots and wait, but move no bytes; partly filled waves take their share. Partial sums are
written once and read once. Kernels without a hot loop that is measured, and the reductions, cost a
launch.
"""

import argparse
import csv
import math
import sys

from check_cuda_build import GATES, OUTPUTS, Kernel
from cuda_dispatch import LAYOUTS, Dispatch, Launch, Layer

SHAPES = [
    "2,256,200,304", "2,512,100,168", "32,64,56,56", "128,64,56,56", "32,256,56,56",
    "32,512,28,28", "32,256,14,14", "32,512,7,7",
]  # fmt: skip
GPUS = {"H100": 3.0e12, "H200": 4.3e12}  # bytes per second of a copy
MULTIPROCESSORS, CLOCK, LATENCY, LAUNCH_SECONDS = 132, 1.98e9, 700, 3e-6
SCHEDULERS, SHARED_BYTES = 4, 227 * 1024
# Elements that a kernel reads and writes for each output, and of the spatial filter.
ELEMENTS = {"backward_3x3": 3, "backward_3x3_channels_last": 3}


def seconds(launch: Launch, gates: dict[str, int] | None, layer: Layer, batch: int, size: int,
            bandwidth: float) -> tuple[float, str]:  # fmt: skip
    """The predicted time of a launch, and what explains it, or ""."""
    kernel = Kernel.of(launch.kernel)
    if gates is None or kernel.name not in OUTPUTS:
        return LAUNCH_SECONDS, ""
    block_warps = launch.threads // 32
    blocks = min(gates["warps"], SHARED_BYTES // max(launch.shared_bytes, 1) * block_warps)
    blocks = max(1, blocks // block_warps)
    waves = launch.blocks / (MULTIPROCESSORS * blocks)
    warps = min(blocks, math.ceil(launch.blocks / MULTIPROCESSORS)) * block_warps
    outputs = 32 * OUTPUTS[kernel.name](*kernel.numbers)  # of a step of a warp
    filters = layer.groups * layer.kernel_size**2 / layer.channels
    elements = ELEMENTS.get(kernel.name, 2) * (1 + filters)
    instructions = gates["instructions"]
    count = batch * layer.channels * math.ceil(layer.height / layer.stride)
    count *= math.ceil(layer.width / layer.stride)
    steps = count / outputs / launch.active_lanes
    moved = count * size * elements + 4 * launch.scratch_floats
    rates = {  # steps in a cycle
        # A step takes at least the latency of the loads for the next one.
        "waits": warps / max(gates["waits"] * LATENCY + instructions, LATENCY),
        "slots": SCHEDULERS / instructions,
        "bytes": bandwidth / MULTIPROCESSORS / CLOCK / (moved / steps),
    }
    bound = min(rates, key=lambda of: rates[of])
    full = waves / math.ceil(waves) if waves > 1 else 1
    why = f"{kernel.name} lanes {launch.active_lanes:.0%} waves {waves:.1f} {bound}"
    return steps / (MULTIPROCESSORS * rates[bound] * CLOCK) / full, why


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="B,C,H,W")
    parser.add_argument("--kernel-size", type=int, default=3)
    parser.add_argument("--arch", default="90", help="compute capability without the dot")
    args = parser.parse_args()
    with GATES.open(newline="") as file:
        (_, _, *names, _), *lines = csv.reader(file)
        known = {
            kernel: dict(zip(names, map(int, values), strict=True))
            for kernel, arch, *values in lines
            if arch == args.arch
        }
    print("predicted % of a copy's bandwidth".ljust(60), *(f"{gpu:>6}" for gpu in GPUS))
    with Dispatch() as dispatch:
        for shape in args.shapes:
            batch, channels, height, width = map(int, shape.split(","))
            k = args.kernel_size
            layer = Layer("ddf", channels, 1, height, width, k, 1, 1, 1, "mul", "both")
            elements = batch * height * width * (channels + k * k)
            for dtype, size in (("float32", 4), ("bfloat16", 2)):
                for layout in LAYOUTS:
                    for kind, times in (("forward", 2), ("backward", 3)):
                        launches = dispatch.launches(layer, kind, layout, dtype, batch)
                        found, notes = [], []
                        for bandwidth in GPUS.values():
                            each = [
                                seconds(run, known.get(str(Kernel.of(run.kernel))), layer, batch,
                                        size, bandwidth)
                                for run in launches
                            ]  # fmt: skip
                            floor = times * elements * size / bandwidth
                            partials = 4 * sum(run.scratch_floats for run in launches) / bandwidth
                            found.append(floor / (partials + sum(time for time, _ in each)))
                            notes = [why for _, why in each if why]
                        title = f"{shape:>15} {dtype:<8} {layout:<13} {kind:<8}"
                        percents = (f"{fraction:6.0%}" for fraction in found)
                        print(title.ljust(60), *percents, " ", "; ".join(notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
