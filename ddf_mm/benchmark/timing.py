"""Measures time and memory of interleaved calls, and reports both."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils._pytree import tree_leaves

from ddf_mm.contrib.memory import keep_memory

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Calls are repeated within a measurement until it takes at least this many seconds.
SHORTEST = 0.005

Call = Callable[[], object]
Key = TypeVar("Key")


def seconds(call: Call, count: int, device: str) -> list[float]:
    """Times of ``count`` calls in seconds; on a GPU, where launches overlap with the previous call,
    only their mean."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return [start.elapsed_time(end) / 1e3 / count]
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


@dataclass(frozen=True)
class Milliseconds:
    """Minimum, which other processes of the machine disturb least, and median of measurements."""

    least: float
    median: float

    def over(self, count: float) -> Milliseconds:
        return Milliseconds(self.least / count, self.median / count)


def time_calls(
    calls: dict[Key, Call], repeats: int, device: str, cached: bool = True
) -> dict[Key, Milliseconds]:
    """Times each call in ``repeats`` rounds; in a round the calls are interleaved.

    ``cached``: whether a call's data should be in the caches, as in repeated calls. It is
    unnecessary if the data exceed the caches.
    """
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = math.ceil(SHORTEST / min(seconds(call, 2 if cached else 1, device)))
    times: dict[Key, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            if cached:
                call()  # replaces the previous call's data in the caches by its own
            times[name] += seconds(call, counts[name], device)
    return {
        name: Milliseconds(1e3 * min(values), 1e3 * statistics.median(values))
        for name, values in times.items()
    }


def captured(calls: Sequence[Call]) -> Call:
    """A CUDA graph of the calls in sequence, to measure the time of the GPU without Python's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Autograd runs the backward pass on the stream of the forward pass, which must be captured.
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


def sets_of_buffers(size: int, device: str) -> int:
    """Number of sets of ``size`` bytes to alternate so that on a GPU they exceed the L2 cache.

    On a CPU it is 1, since use of the caches is part of the comparison there.
    """
    if device != "cuda":
        return 1
    return max(1, math.ceil(3 * torch.cuda.get_device_properties().L2_cache_size / size))


def hold_heap() -> None:
    """Makes glibc keep its memory, and 1 GiB of it resident. Otherwise it is chance which of the
    timed calls wait for page faults: it depends on where in the heap their results lie."""
    if keep_memory():
        torch.empty(2**30, dtype=torch.uint8).fill_(1)


def resident(field: str) -> int:
    """Bytes of VmRSS (current) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def peak_extra_bytes(call: Call, device: str) -> int:
    """Peak memory of ``call`` in bytes, without the memory of its results.

    Results other than tensors in nested tuples, lists and dictionaries are included.

    Raises:
        OSError: /proc lacks the peak memory.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
        before = resident("VmRSS")
    results = call()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    returned = sum(t.nbytes for t in tree_leaves(results) if isinstance(t, torch.Tensor))
    return max(peak - before - returned, 0)


def put_all(function: Callable[..., Iterable], args: tuple, queue: multiprocessing.Queue) -> None:
    queue.put(list(function(*args)))


def in_fresh_process(function: Callable[..., Iterable], *args: object) -> list:
    """The items that ``function`` yields in a new process; empty, with a message, if it fails.

    For measurements of memory: on a CPU it is the resident memory of the process, which includes
    temporary buffers of all libraries. Therefore malloc must return freed blocks to the system at
    once, and it reads the settings for this when a process starts.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    os.environ["MALLOC_TRIM_THRESHOLD_"] = "0"
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=put_all, args=(function, args, queue))
    process.start()
    process.join()
    if process.exitcode:
        print("peak memory: not measured, see the error above", file=sys.stderr)
        return []
    return queue.get()


def track(sequence: Sequence) -> Iterable:
    """``sequence`` with a progress bar on stderr if rich (a dependency of mmengine) is there."""
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        return sequence
    return rich_track(sequence, "measuring", console=Console(stderr=True))


def write_json(args: argparse.Namespace, about: dict, rows: list[dict], **more: object) -> None:
    """Writes the report if ``--json`` is given."""
    if args.json:
        omitted = ("run", "make_calls", "json", "plot")
        options = {name: value for name, value in vars(args).items() if name not in omitted}
        report = {"machine": about, "rows": rows, **more, "options": options}
        args.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


def new_figure(panels: int, height: float):
    """A figure with panels below each other, and their axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        panels, figsize=(11, 1 + height * panels), squeeze=False, layout="constrained"
    )
    return figure, axes[:, 0]


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def print_table(rows: list[list[str]]) -> None:
    """Prints right-aligned columns; the first row is the header."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
