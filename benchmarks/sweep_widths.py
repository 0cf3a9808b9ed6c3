#!/usr/bin/env python
"""Times ``ddf`` on a CPU at random widths, kernel sizes and image sizes, in both memory formats.

    sweep_widths.py [--cases 100] [--backward] [--seed 0]

Prints the cases with the largest ratios of channels_last over NCHW and of either over the formula
tap by tap (``ddf_reference``), whose tensors are NCHW. The three are timed in turn; times are the
least CPU time of the process with one thread.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable

import torch

from ddf_mm.ops import ddf, ddf_reference

# Output pixels times channels times taps of one call, at most.
MOST_PRODUCTS = 30e6
SHOWN = 10


def milliseconds(calls: list[Callable[[], object]], budget: float) -> list[float]:
    """The least CPU time of each call, in at least three rounds of all and for ``budget`` seconds
    each."""
    rounds: list[list[float]] = []
    while len(rounds) < 3 or sum(map(sum, rounds)) < budget * len(calls):
        times = []
        for call in calls:
            call()  # whatever ran before, its tensors are in the caches
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        rounds.append(times)
    return [1e3 * min(times) for times in zip(*rounds, strict=True)]


def draw(rng: random.Random) -> tuple[int, int, int, int, int]:
    """Channels, groups, kernel size, stride and size of a case."""
    while True:
        channels = rng.randint(1, 130)
        groups = rng.choice([g for g in range(1, channels + 1) if channels % g == 0 and g <= 32])
        kernel, stride = rng.choice(range(3, 22, 2)), rng.choice([1, 1, 1, 2])
        size = round(math.exp(rng.uniform(math.log(7), math.log(512))))
        if channels * kernel**2 * (size / stride) ** 2 <= MOST_PRODUCTS:
            return channels, groups, kernel, stride, size


def measure(case: tuple[int, int, int, int, int], backward: bool, budget: float) -> list[float]:
    """Milliseconds in NCHW, in channels_last and of the formula."""
    channels, groups, kernel, stride, size = case
    out = (size - 1) // stride + 1
    calls: list[Callable[[], object]] = []
    for function, memory_format in (
        (ddf, torch.contiguous_format),
        (ddf, torch.channels_last),
        (ddf_reference, torch.contiguous_format),
    ):
        features, spatial_filter, grad = (
            torch.randn(1, count, n, n).contiguous(memory_format=memory_format)
            for count, n in ((channels, size), (groups * kernel**2, out), (channels, out))
        )
        inputs = (features, torch.randn(1, channels, kernel, kernel), spatial_filter)
        for tensor in inputs:
            tensor.requires_grad_(backward)

        def call(function=function, inputs=inputs, grad=grad):
            output = function(*inputs, kernel, stride=stride)
            return torch.autograd.grad(output, inputs, grad) if backward else output

        calls.append(call)
    return milliseconds(calls, budget)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--backward", action="store_true", help="with the backward pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=0.05, help="seconds of each time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    rows = []
    for _ in range(args.cases):
        case = draw(rng)
        nchw, channels_last, formula = measure(case, args.backward, args.budget)
        rows.append((case, nchw, channels_last, formula))
    for title, ratio in (
        ("channels_last over NCHW", lambda row: row[2] / row[1]),
        ("slower format over the formula", lambda row: max(row[1], row[2]) / row[3]),
    ):
        rows.sort(key=ratio, reverse=True)
        print(f"\n{title}: median {ratio(rows[len(rows) // 2]):.2f}, largest:\n")
        print(
            "| channels | groups | kernel | stride | size | NCHW, ms | channels_last, ms |"
            " formula, ms | ratio |"
        )
        print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
        for row in rows[:SHOWN]:
            case, *times = row
            values = [*map(str, case), *(f"{t:.3f}" for t in times), f"{ratio(row):.2f}"]
            print("| " + " | ".join(values) + " |")


if __name__ == "__main__":
    main()
