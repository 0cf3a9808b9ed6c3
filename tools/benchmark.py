#!/usr/bin/env python3
"""Time the DDF operation, its layer and networks of it against what they replace.

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

``benchmark.py layer`` times the layers under the same names, with what generates their filters:
DDFPack, torch.nn.Conv2d, and an involution (ddf spatial, unfold spatial) that makes its filters by
two 1x1 convolutions. ``ddf modules`` is DDFPack with its modules one after the other.

``benchmark.py upsample`` times DDFUpPack, the same by one ddf a subpixel and a pixel shuffle
(composition), CARAFE with its defaults, and nearest neighbours.

``benchmark.py model`` times the networks of configs, files or ``mmpretrain::path``: predictions
from images to the head's outputs, or training steps from images to updated weights. It takes
whatever mmpretrain, mmdet and mmseg build.

The bytes that ddf has to move are those of every input, read once, and of every output, written
once; where a pass makes several gradients, as if by one kernel.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# The toolboxes and mmengine are imported by `layer` and `model` alone: `op` needs torch.
from ddf_mm.about import machine
from ddf_mm.ops import ddf, ddf_reference

SHAPES = [(8, 64, 56, 56), (8, 128, 28, 28), (8, 256, 14, 14), (8, 512, 7, 7), (1, 256, 100, 152)]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = ["float16", "bfloat16", "float32", "float64"]
PASSES = ["forward", "grad_features", "grad_filters", "backward", "forward+backward"]
PEERS = ["reference", "unfold", "depthwise conv", "dense conv", "ddf spatial", "unfold spatial"]
PEERS += ["carafe", "copy"]
LAYER_PEERS = ["ddf modules", "depthwise conv", "dense conv", "ddf spatial", "unfold spatial"]
UPSAMPLE_PEERS = ["composition", "carafe", "nearest"]
# What a ratio compares: name to numerator and denominator. Below 1 in the first and above 1 in the
# others is good for ddf.
RATIOS = {
    "ddf/conv": ("ddf", "depthwise conv"),
    "dense/ddf": ("dense conv", "ddf"),
    "unfold/ddf": ("unfold", "ddf"),
    "reference/ddf": ("reference", "ddf"),
    "unfold/ddf spatial": ("unfold spatial", "ddf spatial"),
    "carafe/ddf spatial": ("carafe", "ddf spatial"),
    "modules/ddf": ("ddf modules", "ddf"),
    "composition/ddf": ("composition", "ddf"),
    "carafe/ddf": ("carafe", "ddf"),
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


def time_calls(
    calls: dict[str, Call], repeats: int, device: str, cached: bool = True
) -> dict[str, Milliseconds]:
    """Times each call in ``repeats`` rounds, in which the calls take turns.

    ``cached``: whether what a call reads may lie in the caches, as it does where it is called
    again and again; what is larger than they are need not be asked for it.
    """
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = math.ceil(SHORTEST / min(seconds(call, 2 if cached else 1, device)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            if cached:
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


def peak_extra_bytes(call: Call, device: str) -> int:
    """Most memory that ``call`` held at one time, less what held its results.

    Results that are no tuple of tensors count as held on the way.

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
    tensors = results if isinstance(results, tuple) else ()
    return max(peak - before - sum(t.numel() * t.element_size() for t in tensors), 0)


def put_all(function: Callable[..., Iterable], args: tuple, queue: multiprocessing.Queue) -> None:
    queue.put(list(function(*args)))


def in_fresh_process(function: Callable[..., Iterable], *args: object) -> list:
    """What ``function`` yields, in a process of its own; empty, after a word, where that fails.

    Memory is measured so: on a CPU it is the process' resident memory, which sees the scratch of
    every library, so freed blocks must go back to the system at once: malloc is told to, and its
    settings are read when a process starts.
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
    """``sequence`` with a progress bar on stderr, where rich is installed (mmengine brings it)."""
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        return sequence
    return rich_track(sequence, "measuring", console=Console(stderr=True))


def write_json(args: argparse.Namespace, about: dict, rows: list[dict], **more: object) -> None:
    """Writes the report, where one is asked for."""
    if args.json:
        unsaid = ("run", "make_calls", "json", "plot")
        options = {name: value for name, value in vars(args).items() if name not in unsaid}
        report = {"machine": about, "rows": rows, **more, "options": options}
        args.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


def new_figure(panels: int, height: float):
    """A figure of panels below each other, and their axes."""
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
        inputs = [None if t is None else t.detach() for t in given]
        wrt = [t for t in inputs if t is not None][wanted]
        # Of these alone: a Function in Python makes the gradient of all that require one.
        for t in wrt if which != "forward" else ():
            t.requires_grad_()
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
    sets = [args.make_calls(case, args) for _ in range(sets_of_buffers(moved, args.device))]
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
    }
    if args.command == "op":
        row |= {"bytes": moved, "gb_per_s": moved / times["ddf"].least / 1e6}
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


def peaks(cases: list[Case], args: argparse.Namespace) -> Iterator[dict[str, int]]:
    """Peak extra bytes of each case: of ddf and unfold, or of all layers."""
    torch.set_num_threads(args.threads)
    if args.command == "op":
        args.peers = ["unfold"]
    # Libraries are loaded and threads started once, for a case too small to count.
    for call in args.make_calls(Case(cases[0].setting, (1, 8 * args.groups, 8, 8)), args).values():
        call()
    for case in cases:
        calls = args.make_calls(case, args)
        for call in calls.values():
            call()  # a pass that is a backward alone makes what it starts from
        yield {name: peak_extra_bytes(call, args.device) for name, call in calls.items()}


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
        measured = [f"{name} MB" for name in rows[0].get("peak_extra_bytes", {})]
        head = ["", *ratios, *["GB/s", "copy GB/s", "of copy"] * with_copy]
        table = [head + measured]
        for shape, row in zip(shapes, rows, strict=True):
            cells = [shape, *(f"{row['ratios'][name]:.2f}" for name in ratios)]
            if with_copy:
                cells += [f"{row[name]:.1f}" for name in ("gb_per_s", "copy_gb_per_s")]
                cells += [f"{row['of_copy_speed']:.2f}"]
            cells += [f"{size / 1e6:.2f}" for size in row.get("peak_extra_bytes", {}).values()]
            table.append(cells)
        last = ["geometric mean", *(f"{means[name]:.2f}" for name in ratios)]
        last += ["", "", f"{means['of_copy_speed']:.2f}"] if with_copy else []
        yield [*table, last + [""] * len(measured)]


def plot_op(groups: dict[Setting, list[dict]], title: str, path: Path) -> None:
    """Draws the times of all that was compared over ddf's, a panel for each setting."""
    figure, axes = new_figure(len(groups), 3.2)
    for axis, (setting, rows) in zip(axes, groups.items(), strict=True):
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
    axes[0].legend(ncols=len(names), fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.1))
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
    about = machine(args.device, args.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if args.command == "op" and "carafe" in args.peers and (reason := without_carafe(args)):
        print(f"carafe is left out: {reason}")
        args.peers = [name for name in args.peers if name != "carafe"]
    sys.stdout.flush()
    rows = [measure(case, args) for case in track(cases)]
    for row, extra in zip(rows, in_fresh_process(peaks, cases, args), strict=False):
        row["peak_extra_bytes"] = extra
    groups = {
        setting: [row for row, case in zip(rows, cases, strict=True) if case.setting == setting]
        for setting in settings
    }
    print(f"{args.which}; times are medians, in brackets the least; ratios are those of the least")
    for table in op_tables(groups):
        print_table(table)
        print()
    notes = ["GB/s: the least bytes to move over time"] if args.command == "op" else []
    print("; ".join([*notes, "MB: peak memory besides inputs and results"]))
    means = [{**asdict(setting), "ratios": means_of(group)} for setting, group in groups.items()]
    write_json(args, about, rows, geometric_means=means)
    if args.plot:
        title = f"{args.which}, {about['processor']}, torch {about['torch']}"
        plot_op(groups, title, args.plot)


# ------------------------------------------------------------------ the layer


def make_layers(case: Case, args: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """The layers that are compared, of the case's geometry."""
    from torch import nn

    from ddf_mm.layers import DDFPack

    channels, s = case.shape[1], case.setting
    k = s.kernel_size
    geometry = dict(stride=s.stride, padding=k // 2, bias=False)

    class Involution(nn.Module):
        """Filters of groups of channels at each pixel, made by two 1x1 convolutions."""

        def __init__(self, function: Callable[..., Tensor]) -> None:
            super().__init__()
            self.function = function
            # A quarter of the channels, as in the official involution.
            self.reduce = nn.Conv2d(channels, max(channels // 4, 1), 1, s.stride)
            self.span = nn.Conv2d(max(channels // 4, 1), s.groups * k * k, 1)

        def forward(self, x: Tensor) -> Tensor:
            filters = self.span(F.relu(self.reduce(x)))
            return self.function(x, None, filters, k, 1, s.stride)

    class ByModules(DDFPack):
        """The layer as its modules one after the other."""

        def _norms_to_fuse(self, x: Tensor) -> None:
            return None

    return {
        "ddf": DDFPack(channels, k, s.stride, head=s.groups),
        "ddf modules": ByModules(channels, k, s.stride, head=s.groups),
        "depthwise conv": nn.Conv2d(channels, channels, k, groups=channels, **geometry),
        "dense conv": nn.Conv2d(channels, channels, k, **geometry),
        "ddf spatial": Involution(ddf),
        "unfold spatial": Involution(by_unfold),
    }


def make_upsamplers(case: Case, args: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """The upsampling layers that are compared, for the case's features and kernel."""
    import ddf_mm.layers.carafe
    from ddf_mm.layers import DDFUpPack

    channels, k = case.shape[1], case.setting.kernel_size

    class Composition(DDFUpPack):
        """One DDF a subpixel, stacked and shuffled, as in the official code."""

        def forward(self, x: Tensor) -> Tensor:
            subpixels = []
            for channel, spatial in zip(self.channel_branch, self.spatial_branch, strict=True):
                channel_filter = channel(x).unflatten(1, (channels, k, k))
                subpixels.append(ddf(x, channel_filter, spatial(x), k))
            return F.pixel_shuffle(torch.stack(subpixels, 2).flatten(1, 2), args.scale)

    options = dict(kernel_size=k, scale_factor=args.scale, head=case.setting.groups)
    return {
        "ddf": DDFUpPack(channels, **options),
        "composition": Composition(channels, **options),
        "carafe": ddf_mm.layers.carafe.PortableCARAFEPack(channels, args.scale),
        "nearest": torch.nn.Upsample(scale_factor=args.scale),
    }


def make_layer_calls(case: Case, args: argparse.Namespace) -> dict[str, Call]:
    """What is timed, by name: predictions, or forward and backward passes."""
    torch.manual_seed(0)
    options = dict(device=args.device, dtype=getattr(torch, case.setting.dtype))
    layout = LAYOUTS[case.setting.layout]
    layers = {
        name: layer.to(**options).to(memory_format=layout)
        for name, layer in args.make_layers(case, args).items()
        if name == "ddf" or name in args.peers
    }
    x = torch.randn(case.shape, **options).contiguous(memory_format=layout)
    with torch.no_grad():
        grad = torch.randn_like(layers["ddf"](x)).contiguous(memory_format=layout)

    def call(layer: torch.nn.Module) -> Call:
        inputs = [x.detach().requires_grad_(), *layer.parameters()]

        def predict() -> tuple[Tensor]:
            with torch.no_grad():
                return (layer(x),)

        def train() -> tuple[Tensor, ...]:
            out = layer(inputs[0])
            return (out.detach(), *torch.autograd.grad(out, inputs, grad))

        return predict if args.which == "forward" else train

    return {name: call(layer) for name, layer in layers.items()}


# ------------------------------------------------------------------ networks


@dataclass(frozen=True)
class ModelSetting:
    """What is the same for all networks that are compared."""

    mode: str
    precision: str
    layout: str
    batch_size: int
    shape: tuple[int, ...] | None

    def __str__(self) -> str:
        shape = "" if self.shape is None else f", {' x '.join(map(str, self.shape))}"
        return f"{self.mode}, {self.precision}, {self.layout}, batch {self.batch_size}{shape}"


@dataclass
class Network:
    """A config's network, ready to run."""

    call: Call
    shape: tuple[int, int]
    parameters: int
    gmac: float


class Skeleton(torch.nn.Module):
    """What is left of a DDFPack that costs nothing: its stride."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride].contiguous() if self.stride > 1 else x


def make_skeleton(model: torch.nn.Module) -> None:
    """Replaces each DDFPack by an identity of the same stride."""
    from ddf_mm.layers import DDFPack

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, DDFPack):
                setattr(module, name, Skeleton(child.stride))


def fold_norms(model: torch.nn.Module) -> None:
    from ddf_mm.layers import switch_to_deploy

    switch_to_deploy(model.eval())


# What +NAME behind a config does to its network.
CHANGES = {"skeleton": make_skeleton, "folded": fold_norms}


def split_changes(name: str) -> tuple[str, list[str]]:
    """A config's own name, and the changes that it is to undergo.

    Raises:
        UserError: there is no such change.
    """
    from ddf_mm.engine.cli import UserError

    config, *changes = name.split("+")
    for change in changes:
        if change not in CHANGES:
            known = " and ".join(f"+{known}" for known in CHANGES)
            raise UserError(f"config {name!r}: no +{change}; there are {known}", exit_code=2)
    return config, changes


def make_network(name: str, setting: ModelSetting, args: argparse.Namespace) -> Network:
    """Builds a config's network and one call of it."""
    from mmengine.optim import build_optim_wrapper

    from ddf_mm import analysis
    from ddf_mm.engine import launch

    config, changes = split_changes(name)
    cfg = analysis.read_config(config, args.cfg_options)
    shape = analysis.image_shape(cfg, setting.shape)
    analysis.fit_to(cfg, shape)
    torch.manual_seed(0)
    model = analysis.build_model(cfg)
    model.init_weights()
    for change in changes:
        CHANGES[change](model)
    # Counted where the compiled ops are certain to be, and for one image.
    cost = analysis.count(model, analysis.example_batch(cfg, 1, shape))
    model = model.to(args.device, memory_format=LAYOUTS[setting.layout])
    batch = analysis.example_batch(cfg, setting.batch_size, shape)
    if args.compile:
        # As mmengine's Runner does.
        model.forward = torch.compile(model.forward)

    if setting.mode == "train":
        model.train()
        wrapper = cfg.get("optim_wrapper") or dict(optimizer=dict(type="SGD", lr=0.1))
        of_amp = ("loss_scale", "dtype", "use_fsdp")
        cfg.optim_wrapper = {name: value for name, value in wrapper.items() if name not in of_amp}
        cfg.optim_wrapper.type = "OptimWrapper"
        if setting.precision == "amp":
            launch.enable_amp(cfg)
        launch.adapt_to_device(cfg)
        optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        for group in optim_wrapper.param_groups:
            group["lr"] = 0.0  # so that every step computes the same

        def call() -> None:
            model.train_step(dict(batch), optim_wrapper)

    else:
        inputs, samples = analysis.preprocessed(model, batch)
        inputs = inputs.contiguous(memory_format=LAYOUTS[setting.layout])
        amp = setting.precision == "amp"
        dtype = torch.float16 if args.device == "cuda" else torch.bfloat16

        def call() -> object:
            with torch.no_grad(), torch.autocast(args.device, dtype, enabled=amp):
                return model(inputs, samples, mode="tensor")

    return Network(call, shape, cost.parameters, cost.total / 1e9)


def quiet_libraries() -> None:
    """No logs and warnings of the toolboxes within the tables."""
    import warnings

    from mmengine.logging import MMLogger

    MMLogger.get_instance("mmengine").setLevel("ERROR")
    warnings.filterwarnings("ignore")


def model_peaks(settings: list[ModelSetting], args: argparse.Namespace) -> Iterator[dict[str, int]]:
    """Peak extra bytes of each network, for each setting."""
    torch.set_num_threads(args.threads)
    quiet_libraries()
    for setting in settings:
        extra = {}
        for name in args.configs:
            call = make_network(name, setting, args).call
            for _ in range(2):  # the first one makes what stays, as an optimizer's momentum
                call()
            extra[name] = peak_extra_bytes(call, args.device)
        yield extra


def measure_models(setting: ModelSetting, args: argparse.Namespace) -> list[dict[str, object]]:
    """A row of the report for each network."""
    networks = {name: make_network(name, setting, args) for name in args.configs}
    calls = {name: network.call for name, network in networks.items()}
    times = time_calls(calls, args.repeats, args.device, cached=False)
    return [
        {
            "config": name,
            **asdict(setting),
            "shape": network.shape,
            "parameters": network.parameters,
            "gmac": network.gmac,
            "milliseconds": asdict(times[name]),
            "images_per_s": 1e3 * setting.batch_size / times[name].median,
            # Of the first config's network: what the others are compared with.
            "speed": times[args.configs[0]].least / times[name].least,
        }
        for name, network in networks.items()
    ]


def model_table(setting: ModelSetting, rows: list[dict], labels: list[str]) -> list[list[str]]:
    head = ["M params", "GMAC", "ms", "least ms", "images/s", "MB", "speed"]
    table = [[str(setting), "image", *head]]
    for label, row in zip(labels, rows, strict=True):
        times = row["milliseconds"]
        size = row.get("peak_extra_bytes")
        table.append(
            [
                label,
                "x".join(map(str, row["shape"])),
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['gmac']:.3g}",
                f"{times['median']:.1f}",
                f"{times['least']:.1f}",
                f"{row['images_per_s']:.2f}",
                "" if size is None else f"{size / 1e6:.0f}",
                f"{row['speed']:.2f}",
            ]
        )
    return table


def plot_models(
    groups: dict[ModelSetting, list[dict]], labels: list[str], title: str, path: Path
) -> None:
    """Draws the networks' times, median and least, a panel for each setting."""
    figure, axes = new_figure(len(groups), 0.8 + 0.4 * len(labels))
    for axis, (setting, rows) in zip(axes, groups.items(), strict=True):
        times = [row["milliseconds"] for row in rows]
        places = range(len(rows))
        bars = axis.barh(places, [t["median"] for t in times], 0.6, label="median")
        axis.bar_label(bars, [f"{t['median']:.1f}" for t in times], fontsize=8, padding=3)
        least = [t["least"] for t in times]
        axis.plot(least, places, "|", color="black", markersize=14, label="least")
        axis.set_yticks(places, labels)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set_xlabel("ms")
        axis.set_title(str(setting), fontsize=10)
    axes[0].legend(ncols=2, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def benchmark_models(args: argparse.Namespace) -> None:
    from ddf_mm.engine import cli

    cli.run(functools.partial(compare_models, args), "benchmark.py")


def compare_models(args: argparse.Namespace) -> None:
    from ddf_mm import analysis
    from ddf_mm.engine import cli

    torch.set_num_threads(args.threads)
    quiet_libraries()
    args.configs = list(dict.fromkeys(args.configs))
    for name in args.configs:  # a wrong one is told now, not minutes later
        config, changes = split_changes(name)
        if "folded" in changes and "train" in args.mode:
            raise cli.UserError(f"config {name!r} has no norms to train: leave out --mode train")
        analysis.read_config(config, args.cfg_options)
    settings = [
        ModelSetting(*values)
        for values in itertools.product(
            args.mode, args.precision, args.layout, args.batch_size, args.shape or [None]
        )
    ]
    about = machine(args.device, args.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    groups = {setting: measure_models(setting, args) for setting in track(settings)}
    if not args.no_memory:
        extra = in_fresh_process(model_peaks, settings, args)
        for rows, sizes in zip(groups.values(), extra, strict=False):
            for row in rows:
                row["peak_extra_bytes"] = sizes[row["config"]]
    labels = analysis.config_labels(args.configs)
    for setting, rows in groups.items():
        print_table(model_table(setting, rows, labels))
        print()
    print(
        "ms: median and least of all runs; GMAC: of one image; MB: peak memory besides the "
        "weights; speed: least time of the first config over the least of this"
    )
    write_json(args, about, [row for rows in groups.values() for row in rows])
    if args.plot:
        title = f"{about['processor']}, torch {about['torch']}"
        plot_models(groups, labels, title, args.plot)


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


def parse_image_shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not (1 <= len(sizes) <= 2 and all(size.isdigit() and int(size) for size in sizes)):
        raise argparse.ArgumentTypeError(f"{text!r} is not H or H,W, as in 224 or 800,1333")
    return tuple(map(int, sizes))


class LazyConfigOptions(argparse.Action):
    """The ``--cfg-options`` of all tools, without importing mmengine for what needs none."""

    def __call__(self, parser, namespace, values, option_string=None):
        from ddf_mm.engine.cli import ConfigOptions

        action = ConfigOptions(self.option_strings, self.dest, nargs=self.nargs)
        action(parser, namespace, values, option_string)


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
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    with_defaults = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    op = commands.add_parser("op", help="time the operation", **with_defaults)
    layer = commands.add_parser("layer", help="time the layer", **with_defaults)
    op.set_defaults(run=benchmark_op, make_calls=make_calls)
    of_layers = dict(run=benchmark_op, make_calls=make_layer_calls, which="forward")
    layer.set_defaults(make_layers=make_layers, **of_layers)
    upsample = commands.add_parser("upsample", help="time the upsampling layer", **with_defaults)
    upsample.set_defaults(make_layers=make_upsamplers, stride=[1], **of_layers)
    upsample.add_argument("--scale", type=parse_positive, default=2, help="factor of upsampling")
    for command in (op, layer, upsample):
        command.add_argument(
            "--shapes",
            type=parse_shape,
            nargs="+",
            default=SHAPES,
            metavar="B,C,H,W",
            help="of the features",
        )
        command.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
        command.add_argument(
            "--layout", choices=[*LAYOUTS, "both"], default="both", help="of all tensors"
        )
        command.add_argument("--kernel-size", type=parse_odd, nargs="+", default=[3], help="odd")
        if command is not upsample:
            command.add_argument("--stride", type=parse_positive, nargs="+", default=[1])
        command.add_argument(
            "--groups", type=parse_positive, default=1, help="of the spatial filter"
        )
    op.add_argument("--pass", dest="which", choices=PASSES, default="forward", help="what is timed")
    op.add_argument(
        "--backward",
        dest="which",
        action="store_const",
        const="forward+backward",
        help="the same as --pass forward+backward",
    )
    for command in (layer, upsample):
        command.add_argument(
            "--train",
            dest="which",
            action="store_const",
            const="forward+backward",
            help="forward and backward passes instead of predictions",
        )
    op.add_argument(
        "--peers", choices=PEERS, nargs="*", default=PEERS, help="what ddf is compared with"
    )
    layer.add_argument(
        "--peers",
        choices=LAYER_PEERS,
        nargs="*",
        default=LAYER_PEERS,
        help="what DDFPack is compared with",
    )
    upsample.add_argument(
        "--peers",
        choices=UPSAMPLE_PEERS,
        nargs="*",
        default=UPSAMPLE_PEERS,
        help="what DDFUpPack is compared with",
    )
    model = commands.add_parser("model", help="time the networks of configs", **with_defaults)
    model.set_defaults(run=benchmark_models)
    model.add_argument(
        "configs",
        nargs="+",
        metavar="config",
        help="path, or toolbox::path; +folded behind it folds the batch norms into the layers "
        "before them, +skeleton makes each DDFPack an identity of the same stride",
    )
    model.add_argument("--mode", choices=["eval", "train"], nargs="+", default=["eval"])
    model.add_argument(
        "--precision",
        choices=["fp32", "amp"],
        nargs="+",
        default=["fp32"],
        help="amp: bfloat16 on a CPU, float16 on a GPU",
    )
    model.add_argument("--layout", choices=list(LAYOUTS), nargs="+", default=["nchw"])
    model.add_argument("--batch-size", type=parse_positive, nargs="+", default=[1])
    model.add_argument(
        "--shape",
        type=parse_image_shape,
        nargs="+",
        metavar="H[,W]",
        help="of the images; if not given, what is usual in the config's toolbox",
    )
    model.add_argument("--compile", action="store_true", help="by torch.compile")
    model.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    model.add_argument(
        "--cfg-options", nargs="+", action=LazyConfigOptions, metavar="KEY=VALUE",
        help="override settings of the configs",
    )  # fmt: skip
    for command in (op, layer, upsample, model):
        add_common_options(command)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch sees none")
    for shape in getattr(args, "shapes", ()):
        if shape[1] % args.groups:
            parser.error(f"--groups {args.groups} must divide the {shape[1]} channels of --shapes")
    return args


if __name__ == "__main__":
    arguments = parse_args()
    arguments.run(arguments)
