#!/usr/bin/env python3
"""Time the DDF operation against what it replaces.

``benchmark.py op`` times, taking turns within one run so that a machine's moods hit all alike:

    ddf             ddf_mm.ops.ddf, by whatever serves it here (see ddf_mm.ops.backend_info)
    reference       the formula tap by tap in plain PyTorch
    unfold          the formula by torch.nn.functional.unfold
    depthwise conv  torch.nn.functional.conv2d (oneDNN, cuDNN) of the same geometry, with one
                    filter a channel for the whole batch
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_mm.ops import backend_info, ddf, ddf_reference
from ddf_mm.version import __version__

SHAPES = [(8, 64, 56, 56), (8, 128, 28, 28), (8, 256, 14, 14), (8, 512, 7, 7), (1, 256, 100, 152)]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Shorter measurements are repeated until they take this long, in seconds.
SHORTEST = 0.005


def by_unfold(x: Tensor, cf: Tensor, sf: Tensor, k: int, dilation: int, stride: int) -> Tensor:
    """The formula by im2col, for one filter group."""
    batch, channels = x.shape[:2]
    columns = F.unfold(x, k, dilation, dilation * (k // 2), stride)
    windows = columns.view(batch, channels, k * k, *sf.shape[2:])
    return (windows * cf.view(batch, channels, k * k, 1, 1) * sf.unsqueeze(1)).sum(2)


def by_convolution(x: Tensor, weight: Tensor, k: int, dilation: int, stride: int) -> Tensor:
    padding = dilation * (k // 2)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups=x.shape[1])


def make_calls(
    shape: tuple[int, ...], layout: str, args: argparse.Namespace
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """What is timed, by name; each call returns all tensors that it is asked to make."""
    batch, channels, height, width = shape
    k, stride = args.kernel_size, args.stride
    options = dict(device=args.device, dtype=getattr(torch, args.dtype))
    torch.manual_seed(0)
    out = -(-height // stride), -(-width // stride)
    x, cf, sf, weight = (
        torch.randn(size, **options).requires_grad_(args.backward)
        for size in (shape, (batch, channels, k, k), (batch, k * k, *out), (channels, 1, k, k))
    )
    x, sf = (
        t.detach().contiguous(memory_format=LAYOUTS[layout]).requires_grad_(args.backward)
        for t in (x, sf)
    )
    grad = torch.randn(batch, channels, *out, **options).contiguous(memory_format=LAYOUTS[layout])

    def call(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(args.backward):
            result = function(*inputs, k, 1, stride)
        return (result, *torch.autograd.grad(result, inputs, grad)) if args.backward else (result,)

    return {
        "ddf": functools.partial(call, ddf, x, cf, sf),
        "reference": functools.partial(call, ddf_reference, x, cf, sf),
        "unfold": functools.partial(call, by_unfold, x, cf, sf),
        "depthwise conv": functools.partial(call, by_convolution, x, weight),
    }


def seconds(call: Callable[[], object], count: int, device: str) -> float:
    """The time of one call, out of ``count``.

    On a CPU that is the least, since whatever else the machine does only adds. On a GPU it is the
    mean of calls in a row, since each is launched while the one before runs.
    """
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count
    best = math.inf
    for _ in range(count):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def time_calls(
    calls: dict[str, Callable[[], object]], repeats: int, device: str
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round; the calls take turns."""
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = math.ceil(SHORTEST / seconds(call, 2, device))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()  # brings its own data into the caches, which the last one's fill
            times[name].append(1e3 * seconds(call, counts[name], device))
    return times


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (highest) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def peak_extra_bytes(call: Callable[[], tuple[Tensor, ...]], device: str) -> int:
    """Most memory that ``call`` held at one time, less what held its results.

    Raises:
        OSError: the kernel does not tell.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
        before = resident("VmRSS")
    results = call()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    return max(peak - before - sum(t.numel() * t.element_size() for t in results), 0)


def measure_memory(
    cases: list[tuple[tuple[int, ...], str]], args: argparse.Namespace, queue: multiprocessing.Queue
) -> None:
    """Puts the peak extra bytes of each case's ddf and unfold on ``queue``."""
    torch.set_num_threads(args.threads)
    compared = ("ddf", "unfold")
    # Libraries are loaded and threads started once, for a case too small to count.
    for name in compared:
        make_calls((1, 8, 8, 8), "nchw", args)[name]()
    for shape, layout in cases:
        calls = make_calls(shape, layout, args)
        queue.put({name: peak_extra_bytes(calls[name], args.device) for name in compared})


def memory(
    cases: list[tuple[tuple[int, ...], str]], args: argparse.Namespace
) -> Iterator[dict[str, int]]:
    """Peak extra bytes of ddf and unfold, for each case, in a process of its own.

    On a CPU that is the process' resident memory, which sees the scratch of every library, so
    freed blocks must go back to the system at once: malloc is told to, and its settings are read
    when a process starts.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    os.environ["MALLOC_TRIM_THRESHOLD_"] = "0"
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure_memory, args=(cases, args, queue))
    process.start()
    process.join()
    if process.exitcode:
        print("peak memory: not measured, see the error above", file=sys.stderr)
        return
    for _ in cases:
        yield queue.get()


def processor(device: str) -> str:
    """The name of the CPU's or GPU's model."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(args: argparse.Namespace) -> dict[str, object]:
    info = backend_info()
    return {
        "processor": processor(args.device),
        "threads": args.threads,
        "ddf": info.get(args.device, info["default"]),
        "ddf_mm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
    }


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def ratios(best: dict[str, float]) -> dict[str, float]:
    """What is compared; below 1 in the first and above 1 in the others is good for ddf."""
    return {
        "ddf/conv": best["ddf"] / best["depthwise conv"],
        "unfold/ddf": best["unfold"] / best["ddf"],
        "reference/ddf": best["reference"] / best["ddf"],
    }


def print_table(rows: list[dict], means: dict[str, dict[str, float]]) -> None:
    names, compared = list(rows[0]["milliseconds"]), list(rows[0]["ratios"])
    with_memory = "peak_extra_bytes" in rows[0]
    head = ["shape", "layout", *(f"{name} ms" for name in names), *compared]
    table = [head + ["ddf MB", "unfold MB"] * with_memory]
    for row in rows:
        times = [f"{min(row['milliseconds'][name]):.3f}" for name in names]
        ratio = [f"{row['ratios'][name]:.2f}" for name in compared]
        extra = [f"{b / 1e6:.2f}" for b in row.get("peak_extra_bytes", {}).values()]
        table.append([",".join(map(str, row["shape"])), row["layout"], *times, *ratio, *extra])
    for layout, mean in means.items():
        ratio = [f"{mean[name]:.2f}" for name in compared]
        table.append(
            ["geometric mean", layout, *[""] * len(names), *ratio, *["", ""][: 2 * with_memory]]
        )
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def benchmark_op(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    layouts = list(LAYOUTS) if args.layout == "both" else [args.layout]
    cases = [(shape, layout) for layout in layouts for shape in args.shapes]
    about = machine(args)
    what = "forward and backward" if args.backward else "forward"
    print(f"{what}, {args.dtype}, kernel size {args.kernel_size}, stride {args.stride}")
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    rows = []
    for number, (shape, layout) in enumerate(cases, 1):
        print(f"{number}/{len(cases)}: {shape} {layout}", file=sys.stderr)
        times = time_calls(make_calls(shape, layout, args), args.repeats, args.device)
        best = {name: min(values) for name, values in times.items()}
        rows.append(
            {"shape": shape, "layout": layout, "milliseconds": times, "ratios": ratios(best)}
        )
    for row, extra in zip(rows, memory(cases, args), strict=False):
        row["peak_extra_bytes"] = extra
    means = {
        layout: {
            name: geometric_mean([row["ratios"][name] for row in rows if row["layout"] == layout])
            for name in rows[0]["ratios"]
        }
        for layout in layouts
    }
    print_table(rows, means)
    print(f"times are the least of {args.repeats}; MB: peak memory besides inputs and results")
    if args.json:
        report = {"machine": about, "rows": rows, "geometric_means": means}
        report["options"] = {k: v for k, v in vars(args).items() if k not in ("run", "json")}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def parse_shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,C,H,W, as in 8,64,56,56")
    return sizes


def parse_positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def parse_odd(text: str) -> int:
    if parse_positive(text) % 2 == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not odd")
    return int(text)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    op = commands.add_parser(
        "op", help="time the operation", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    op.set_defaults(run=benchmark_op)
    op.add_argument(
        "--shapes",
        type=parse_shape,
        nargs="+",
        default=SHAPES,
        metavar="B,C,H,W",
        help="of the features",
    )
    op.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32", "float64"], default="float32"
    )
    op.add_argument("--layout", choices=[*LAYOUTS, "both"], default="both", help="of all tensors")
    op.add_argument("--kernel-size", type=parse_odd, default=3, help="odd")
    op.add_argument("--stride", type=parse_positive, default=1)
    op.add_argument(
        "--backward", action="store_true", help="time forward plus backward, with every gradient"
    )
    op.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    op.add_argument(
        "--threads", type=parse_positive, default=torch.get_num_threads(), help="of the CPU"
    )
    op.add_argument(
        "--repeats", type=parse_positive, default=10, help="rounds, of which the best counts"
    )
    op.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there too")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        op.error("--device cuda needs a CUDA device, and torch sees none")
    return args


if __name__ == "__main__":
    arguments = parse_args()
    arguments.run(arguments)
