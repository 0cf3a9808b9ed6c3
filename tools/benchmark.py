#!/usr/bin/env python3
"""Time the DDF operation against what it replaces.

``benchmark.py op`` times, taking turns within one run so that a machine's moods hit all alike:

    ddf                ddf_mm.ops.ddf, by whatever serves it here (see ddf_mm.ops.backend_info)
    reference          the formula tap by tap in plain PyTorch
    unfold             the formula by torch.nn.functional.unfold
    depthwise conv     torch.nn.functional.conv2d (oneDNN, cuDNN) of the same geometry, with one
                       filter a channel for the whole batch
    dense conv         the convolution between all channels that a DDF takes the place of
    ddf spatial        ddf without a channel filter, which is an involution
    unfold spatial     the same by torch.nn.functional.unfold
    carafe             the same by mmcv.ops.carafe, where mmcv has it for the device and dtype, with
                       stride 1
    copy               a copy of as many bytes as ddf has to move; on a GPU of 256 MiB at least

The bytes that ddf has to move are those of every input, read once, and of every output, written
once; where a pass makes several gradients, as if by one kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_mm.ops import backend_info, ddf, ddf_reference
from ddf_mm.version import __version__

SHAPES = [(8, 64, 56, 56), (8, 128, 28, 28), (8, 256, 14, 14), (8, 512, 7, 7), (1, 256, 100, 152)]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = ["float16", "bfloat16", "float32", "float64"]
PASSES = ["forward", "grad_features", "grad_filters", "backward", "forward+backward"]
PEERS = ["reference", "unfold", "depthwise conv", "dense conv", "ddf spatial", "unfold spatial"]
PEERS += ["carafe", "copy"]
# What a ratio compares: name to numerator and denominator. Below 1 in the first and above 1 in the
# others is good for ddf.
RATIOS = {
    "ddf/conv": ("ddf", "depthwise conv"),
    "dense/ddf": ("dense conv", "ddf"),
    "unfold/ddf": ("unfold", "ddf"),
    "reference/ddf": ("reference", "ddf"),
    "unfold/ddf spatial": ("unfold spatial", "ddf spatial"),
    "carafe/ddf spatial": ("carafe", "ddf spatial"),
}
# Shorter measurements are repeated until they take this long, in seconds.
SHORTEST = 0.005
# A GPU reaches its copy speed on copies that move this many bytes.
LARGE_COPY = 2**28

Call = Callable[[], object]


# ------------------------------------------------------------------ timing, for every command


def seconds(call: Call, count: int, device: str) -> list[float]:
    """Times of single calls, out of ``count``.

    On a GPU it is the mean of calls in a row, since each is launched while the one before runs.
    """
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
    """Of all measurements: the least, to which whatever else the machine did only adds, and the
    median."""

    least: float
    median: float

    def over(self, count: float) -> Milliseconds:
        return Milliseconds(self.least / count, self.median / count)


def time_calls(calls: dict[str, Call], repeats: int, device: str) -> dict[str, Milliseconds]:
    """Times each call in ``repeats`` rounds, in which the calls take turns."""
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = math.ceil(SHORTEST / min(seconds(call, 2, device)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()  # brings its own data into the caches, which the last one's fill
            times[name] += seconds(call, counts[name], device)
    return {
        name: Milliseconds(1e3 * min(values), 1e3 * statistics.median(values))
        for name, values in times.items()
    }


def captured(calls: Sequence[Call]) -> Call:
    """The calls, one after the other, as a CUDA graph: what the GPU takes, and not Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Autograd runs a backward on the stream of its forward, which a capture has to be on too.
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
    """How many sets of ``size`` bytes have to take turns so that no cache serves them on a GPU.

    On a CPU it is 1: the caches are part of what is compared there.
    """
    if device != "cuda":
        return 1
    return max(1, math.ceil(3 * torch.cuda.get_device_properties().L2_cache_size / size))


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


def track(sequence: Sequence) -> Iterable:
    """``sequence`` with a progress bar on stderr, where rich is installed (mmengine brings it)."""
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        return sequence
    return rich_track(sequence, "measuring", console=Console(stderr=True))


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def print_table(rows: list[list[str]]) -> None:
    """Prints columns that are aligned to the right; the first row is the head."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


# ------------------------------------------------------------------ the operation


@dataclass(frozen=True)
class Setting:
    """What is the same for all shapes that one mean is taken over."""

    layout: str
    dtype: str
    kernel_size: int
    stride: int
    groups: int

    def __str__(self) -> str:
        groups = f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.layout} {self.dtype} k{self.kernel_size} s{self.stride}{groups}"


@dataclass(frozen=True)
class Case:
    setting: Setting
    shape: tuple[int, ...]

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The sizes of the tensors that the operation reads and writes, and of the conv weights."""
        batch, channels, height, width = self.shape
        s = self.setting
        k, out = s.kernel_size, (-(-height // s.stride), -(-width // s.stride))
        return {
            "features": self.shape,
            "channel_filter": (batch, channels, k, k),
            "spatial_filter": (batch, s.groups * k * k, *out),
            "output": (batch, channels, *out),
            "depthwise": (channels, 1, k, k),
            "dense": (channels, channels, k, k),
        }

    def bytes_moved(self, which: str) -> int:
        """Least bytes that the pass reads and writes."""
        n = {name: math.prod(size) for name, size in self.sizes().items()}
        x, out = n["features"], n["output"]
        filters = n["channel_filter"] + n["spatial_filter"]
        elements = {
            "forward": x + filters + out,
            "grad_features": out + filters + x,
            "grad_filters": out + x + 2 * filters,
            "backward": out + x + 2 * filters + x,
        }
        elements["forward+backward"] = elements["forward"] + elements["backward"]
        return elements[which] * getattr(torch, self.setting.dtype).itemsize


def by_unfold(
    x: Tensor, cf: Tensor | None, sf: Tensor, k: int, dilation: int, stride: int
) -> Tensor:
    """The formula by im2col."""
    batch, channels = x.shape[:2]
    groups = sf.shape[1] // (k * k)
    columns = F.unfold(x, k, dilation, dilation * (k // 2), stride)
    windows = columns.view(batch, groups, channels // groups, k * k, *sf.shape[2:])
    weight = sf.view(batch, groups, 1, k * k, *sf.shape[2:])
    if cf is not None:
        weight = weight * cf.view(batch, groups, channels // groups, k * k, 1, 1)
    return (windows * weight).sum(3).view(batch, channels, *sf.shape[2:])


def by_convolution(x: Tensor, weight: Tensor, k: int, dilation: int, stride: int) -> Tensor:
    padding = dilation * (k // 2)
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(x, weight, None, stride, padding, dilation, groups)


def by_carafe(x: Tensor, sf: Tensor, k: int, dilation: int, stride: int) -> Tensor:
    from mmcv.ops import carafe

    return carafe(x, sf, k, sf.shape[1] // (k * k), 1)


def without_carafe(args: argparse.Namespace) -> str:
    """Why mmcv's carafe cannot be timed; empty where it can."""
    if max(args.stride) > 1:
        return "it has no stride"
    try:
        for name in args.dtype:
            options = dict(device=args.device, dtype=getattr(torch, name), requires_grad=True)
            x, sf = torch.ones(1, 2, 3, 3, **options), torch.ones(1, 9, 3, 3, **options)
            by_carafe(x, sf, 3, 1, 1).sum().backward()
    except (ImportError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return ""


def make_calls(case: Case, args: argparse.Namespace) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """What is timed, by name; each call returns all tensors that it is asked to make."""
    s = case.setting
    which = args.which
    layout = LAYOUTS[s.layout]
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(size, device=args.device, dtype=getattr(torch, s.dtype))
        for name, size in case.sizes().items()
    }
    # Filters of a channel are small, and have no layout of their own.
    x, sf, grad = (
        tensors[name].contiguous(memory_format=layout)
        for name in ("features", "spatial_filter", "output")
    )
    cf, depthwise, dense = (tensors[name] for name in ("channel_filter", "depthwise", "dense"))

    # The place of a tensor among the arguments decides which gradient is whose: features are first.
    wanted = {"grad_features": slice(0, 1), "grad_filters": slice(1, None)}.get(which, slice(None))

    def passes(function: Callable[..., Tensor], *given: Tensor | None):
        """A call of the pass that is asked for."""
        inputs = [
            None if t is None else t.detach().requires_grad_(which != "forward") for t in given
        ]
        wrt = [t for t in inputs if t is not None][wanted]
        options = (s.kernel_size, 1, s.stride)
        result = None

        def forward() -> tuple[Tensor]:
            with torch.no_grad():
                return (function(*inputs, *options),)

        def backward() -> tuple[Tensor, ...]:
            nonlocal result
            if result is None:
                result = function(*inputs, *options)
            return torch.autograd.grad(result, wrt, grad, retain_graph=True)

        def both() -> tuple[Tensor, ...]:
            out = function(*inputs, *options)
            return (out.detach(), *torch.autograd.grad(out, wrt, grad))

        return {"forward": forward, "forward+backward": both}.get(which, backward)

    calls = {
        "ddf": passes(ddf, x, cf, sf),
        "reference": passes(ddf_reference, x, cf, sf),
        "unfold": passes(by_unfold, x, cf, sf),
        "depthwise conv": passes(by_convolution, x, depthwise),
        "dense conv": passes(by_convolution, x, dense),
        "ddf spatial": passes(ddf, x, None, sf),
        "unfold spatial": passes(by_unfold, x, None, sf),
        "carafe": passes(by_carafe, x, sf),
    }
    return {name: call for name, call in calls.items() if name == "ddf" or name in args.peers}


def copy_call(size: int, device: str) -> Call:
    """A copy that moves ``size`` bytes: reads a half of them and writes the other."""
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    return functools.partial(torch.empty_like(source).copy_, source)


def measure(case: Case, args: argparse.Namespace) -> dict[str, object]:
    """A row of the report."""
    moved = case.bytes_moved(args.which)
    sets = [make_calls(case, args) for _ in range(sets_of_buffers(moved, args.device))]
    calls: dict[str, Call] = dict(sets[0])
    if args.device == "cuda":
        # One call stands for one of each set.
        calls = {name: captured([some[name] for some in sets]) for name in calls}
    copied = max(moved, LARGE_COPY) if args.device == "cuda" else moved
    if "copy" in args.peers:
        calls["copy"] = copy_call(copied, args.device)
    times = time_calls(calls, args.repeats, args.device)
    # Of one call of ddf, and of a copy of as many bytes as it moves.
    times = {
        name: value.over(copied / moved if name == "copy" else len(sets))
        for name, value in times.items()
    }
    row = {
        "shape": case.shape,
        **asdict(case.setting),
        "milliseconds": {name: asdict(value) for name, value in times.items()},
        "bytes": moved,
        "gb_per_s": moved / times["ddf"].least / 1e6,
    }
    if "copy" in times:
        row["copy_gb_per_s"] = moved / times["copy"].least / 1e6
        row["of_copy_speed"] = row["gb_per_s"] / row["copy_gb_per_s"]
    for key, statistic in (("ratios", "least"), ("ratios_of_medians", "median")):
        row[key] = {
            name: getattr(times[over], statistic) / getattr(times[under], statistic)
            for name, (over, under) in RATIOS.items()
            if over in times and under in times
        }
    return row


def measure_memory(
    cases: list[Case], args: argparse.Namespace, queue: multiprocessing.Queue
) -> None:
    """Puts the peak extra bytes of each case's ddf and unfold on ``queue``."""
    torch.set_num_threads(args.threads)
    args.peers = ["unfold"]
    # Libraries are loaded and threads started once, for a case too small to count.
    for call in make_calls(Case(cases[0].setting, (1, 8, 8, 8)), args).values():
        call()
    for case in cases:
        calls = make_calls(case, args)
        for call in calls.values():
            call()  # a pass that is a backward alone makes what it starts from
        queue.put({name: peak_extra_bytes(call, args.device) for name, call in calls.items()})


def memory(cases: list[Case], args: argparse.Namespace) -> Iterator[dict[str, int]]:
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


def means_of(rows: list[dict]) -> dict[str, float]:
    """Geometric means over shapes of all that is a ratio."""
    means = {
        name: geometric_mean(row["ratios"][name] for row in rows) for name in rows[0]["ratios"]
    }
    if "of_copy_speed" in rows[0]:
        means["of_copy_speed"] = geometric_mean(row["of_copy_speed"] for row in rows)
    return means


def op_tables(groups: dict[Setting, list[dict]]) -> Iterator[list[list[str]]]:
    """For each setting: the least and median times, then what is compared."""
    for setting, rows in groups.items():
        shapes = [",".join(map(str, row["shape"])) for row in rows]
        names = list(rows[0]["milliseconds"])
        head = [f"{setting}: ms", *names]
        yield [head] + [
            [shape]
            + [
                f"{value['median']:.3f} ({value['least']:.3f})"
                for value in row["milliseconds"].values()
            ]
            for shape, row in zip(shapes, rows, strict=True)
        ]
        means = means_of(rows)
        ratios = list(rows[0]["ratios"])
        with_copy = "of_copy_speed" in rows[0]
        with_memory = "peak_extra_bytes" in rows[0]
        head = ["", *ratios, *["GB/s", "copy GB/s", "of copy"] * with_copy]
        table = [head + ["ddf MB", "unfold MB"] * with_memory]
        for shape, row in zip(shapes, rows, strict=True):
            cells = [shape, *(f"{row['ratios'][name]:.2f}" for name in ratios)]
            if with_copy:
                cells += [f"{row[name]:.1f}" for name in ("gb_per_s", "copy_gb_per_s")]
                cells += [f"{row['of_copy_speed']:.2f}"]
            cells += [f"{size / 1e6:.2f}" for size in row.get("peak_extra_bytes", {}).values()]
            table.append(cells)
        last = ["geometric mean", *(f"{means[name]:.2f}" for name in ratios)]
        last += ["", "", f"{means['of_copy_speed']:.2f}"] if with_copy else []
        yield [*table, last + ["", ""] * with_memory]


def plot_op(groups: dict[Setting, list[dict]], title: str, path: Path) -> None:
    """Draws the times of all that was compared over ddf's, a panel for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(groups), figsize=(11, 1 + 3.2 * len(groups)), squeeze=False, layout="constrained"
    )
    for axis, (setting, rows) in zip(axes[:, 0], groups.items(), strict=True):
        names = [name for name in rows[0]["milliseconds"] if name != "ddf"]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            times = [row["milliseconds"] for row in rows]
            heights = [t[name]["least"] / t["ddf"]["least"] for t in times]
            places = [n + (i - (len(names) - 1) / 2) * width for n in range(len(rows))]
            # Bars grow from 1, upwards where ddf is the faster one.
            bars = axis.bar(places, [h - 1 for h in heights], width, bottom=1, label=name)
            axis.bar_label(
                bars, [f"{h:.2g}" if h < 10 else f"{h:.0f}" for h in heights], fontsize=7, padding=1
            )
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log")
        axis.margins(x=0.01, y=0.15)
        axis.set_xticks(range(len(rows)), [" x ".join(map(str, row["shape"])) for row in rows])
        axis.set_ylabel("time / time of ddf\n(above 1: ddf is faster)")
        axis.set_title(str(setting), fontsize=10)
    axes[0, 0].legend(ncols=len(names), fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.1))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def benchmark_op(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    layouts = list(LAYOUTS) if args.layout == "both" else [args.layout]
    settings = [
        Setting(*values, args.groups)
        for values in itertools.product(layouts, args.dtype, args.kernel_size, args.stride)
    ]
    cases = [Case(setting, shape) for setting in settings for shape in args.shapes]
    about = machine(args)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if "carafe" in args.peers and (reason := without_carafe(args)):
        print(f"carafe is left out: {reason}")
        args.peers = [name for name in args.peers if name != "carafe"]
    sys.stdout.flush()
    rows = [measure(case, args) for case in track(cases)]
    with contextlib.suppress(StopIteration):
        extra = memory(cases, args)
        for row in rows:
            row["peak_extra_bytes"] = next(extra)
    groups = {
        setting: [row for row, case in zip(rows, cases, strict=True) if case.setting == setting]
        for setting in settings
    }
    print(f"{args.which}; times are medians, in brackets the least; ratios are those of the least")
    for table in op_tables(groups):
        print_table(table)
        print()
    print("GB/s: the least bytes to move over time; MB: peak memory besides inputs and results")
    if args.json:
        report = {"machine": about, "rows": rows}
        report["geometric_means"] = [
            {**asdict(setting), "ratios": means_of(group)} for setting, group in groups.items()
        ]
        report["options"] = {
            name: value for name, value in vars(args).items() if name not in ("run", "json", "plot")
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        title = f"{args.which}, {about['processor']}, torch {about['torch']}"
        plot_op(groups, title, args.plot)


# ------------------------------------------------------------------ the command line


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


def add_common_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    command.add_argument(
        "--threads", type=parse_positive, default=torch.get_num_threads(), help="of the CPU"
    )
    command.add_argument(
        "--repeats", type=parse_positive, default=10, help="rounds in which all take turns"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw them there, as PNG")


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
    op.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    op.add_argument("--layout", choices=[*LAYOUTS, "both"], default="both", help="of all tensors")
    op.add_argument("--kernel-size", type=parse_odd, nargs="+", default=[3], help="odd")
    op.add_argument("--stride", type=parse_positive, nargs="+", default=[1])
    op.add_argument("--groups", type=parse_positive, default=1, help="of the spatial filter")
    op.add_argument("--pass", dest="which", choices=PASSES, default="forward", help="what is timed")
    op.add_argument(
        "--backward",
        dest="which",
        action="store_const",
        const="forward+backward",
        help="the same as --pass forward+backward",
    )
    op.add_argument(
        "--peers", choices=PEERS, nargs="*", default=PEERS, help="what ddf is compared with"
    )
    add_common_options(op)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        op.error("--device cuda needs a CUDA device, and torch sees none")
    for shape in args.shapes:
        if shape[1] % args.groups:
            op.error(f"--groups {args.groups} must divide the {shape[1]} channels of --shapes")
    return args


if __name__ == "__main__":
    arguments = parse_args()
    arguments.run(arguments)
