"""Compares the speed of the DDF operation and its layers with alternatives."""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_mm.about import machine
from ddf_mm.benchmark.timing import (
    LAYOUTS,
    Call,
    captured,
    geometric_mean,
    in_fresh_process,
    new_figure,
    peak_extra_bytes,
    print_table,
    sets_of_buffers,
    time_calls,
    track,
    write_json,
)
from ddf_mm.ops import ddf, ddf_reference
from ddf_mm.ops.checks import strided_size

# Numerator and denominator of each ratio. ddf is faster if ddf/conv is below 1 and the others are
# above 1.
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
# Copies of this many bytes reach the memory bandwidth of a GPU.
LARGE_COPY = 2**28


@dataclass(frozen=True)
class Setting:
    """Settings common to all shapes whose mean is reported."""

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
        """Shapes of the tensors that the operation reads and writes, and of the conv weights."""
        batch, channels, height, width = self.shape
        s = self.setting
        k = s.kernel_size
        out = strided_size(height, s.stride), strided_size(width, s.stride)
        return {
            "features": self.shape,
            "channel_filter": (batch, channels, k, k),
            "spatial_filter": (batch, s.groups * k * k, *out),
            "output": (batch, channels, *out),
            "depthwise": (channels, 1, k, k),
            "dense": (channels, channels, k, k),
        }

    def bytes_moved(self, which: str) -> int:
        """Least number of bytes that the pass reads and writes."""
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
    """Reason why mmcv's carafe cannot be timed; empty if it can."""
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
    """The calls to time, by name; each returns all tensors that its pass computes."""
    s = case.setting
    which = args.which
    layout = LAYOUTS[s.layout]
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(size, device=args.device, dtype=getattr(torch, s.dtype))
        for name, size in case.sizes().items()
    }
    # Channel filters are contiguous in both memory formats.
    x, sf, grad = (
        tensors[name].contiguous(memory_format=layout)
        for name in ("features", "spatial_filter", "output")
    )
    cf, depthwise, dense = (tensors[name] for name in ("channel_filter", "depthwise", "dense"))

    # The first argument is the features, the others are the filters.
    wanted = {"grad_features": slice(0, 1), "grad_filters": slice(1, None)}.get(which, slice(None))

    def passes(function: Callable[..., Tensor], *given: Tensor | None):
        """A call of the requested pass."""
        inputs = [None if t is None else t.detach() for t in given]
        wrt = [t for t in inputs if t is not None][wanted]
        # Only these: autograd functions in Python compute the gradients of all that require one.
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
    """A copy that moves ``size`` bytes: it reads one half and writes the other."""
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    return functools.partial(torch.empty_like(source).copy_, source)


def measure(case: Case, args: argparse.Namespace) -> dict[str, object]:
    """Measures a case; a row of the report."""
    moved = case.bytes_moved(args.which)
    sets = [args.make_calls(case, args) for _ in range(sets_of_buffers(moved, args.device))]
    calls: dict[str, Call] = dict(sets[0])
    if args.device == "cuda":
        # One graph has a call for each set.
        calls = {name: captured([some[name] for some in sets]) for name in calls}
    copied = max(moved, LARGE_COPY) if args.device == "cuda" else moved
    if "copy" in args.peers:
        calls["copy"] = copy_call(copied, args.device)
    times = time_calls(calls, args.repeats, args.device)
    # Per call of ddf, and per copy of as many bytes as it moves.
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
    row["ratios"] = {
        name: times[over].least / times[under].least
        for name, (over, under) in RATIOS.items()
        if over in times and under in times
    }
    return row


def peaks(cases: list[Case], args: argparse.Namespace) -> Iterator[dict[str, int]]:
    """Peak extra memory in bytes of each case: of ddf and unfold, or of all layers."""
    torch.set_num_threads(args.threads)
    if args.command == "op":
        args.peers = ["unfold"]
    # A small case first, to load libraries and start threads.
    for call in args.make_calls(Case(cases[0].setting, (1, 8 * args.groups, 8, 8)), args).values():
        call()
    for case in cases:
        calls = args.make_calls(case, args)
        for call in calls.values():
            call()  # the first call of a backward pass also runs the forward pass
        yield {name: peak_extra_bytes(call, args.device) for name, call in calls.items()}


def means_of(rows: list[dict]) -> dict[str, float]:
    """Geometric means of the ratios over the shapes."""
    means = {
        name: geometric_mean(row["ratios"][name] for row in rows) for name in rows[0]["ratios"]
    }
    if "of_copy_speed" in rows[0]:
        means["of_copy_speed"] = geometric_mean(row["of_copy_speed"] for row in rows)
    return means


def op_tables(groups: dict[Setting, list[dict]]) -> Iterator[list[list[str]]]:
    """For each setting a table of median and minimum times and a table of ratios."""
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
    """Draws the times relative to ddf's, one panel for each setting."""
    figure, axes = new_figure(len(groups), 3.2)
    for axis, (setting, rows) in zip(axes, groups.items(), strict=True):
        names = [name for name in rows[0]["milliseconds"] if name != "ddf"]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            times = [row["milliseconds"] for row in rows]
            heights = [t[name]["least"] / t["ddf"]["least"] for t in times]
            places = [n + (i - (len(names) - 1) / 2) * width for n in range(len(rows))]
            # Bars start at 1 and point upwards if ddf is faster.
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


def make_layers(case: Case, args: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """The layers to compare, with the geometry of the case."""
    from torch import nn

    from ddf_mm.layers import DDFPack

    channels, s = case.shape[1], case.setting
    k = s.kernel_size
    geometry = dict(stride=s.stride, padding=k // 2, bias=False)

    class Involution(nn.Module):
        """Spatial filters of groups of channels, generated by two 1x1 convolutions."""

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
        """The layer computed module by module."""

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
    """The upsampling layers to compare, for the case's channels and kernel size."""
    from ddf_mm.layers import CARAFE, DDFUpPack

    channels, k = case.shape[1], case.setting.kernel_size

    class Composition(DDFUpPack):
        """One DDF per subpixel, stack and pixel shuffle, as in the official code."""

        def forward(self, x: Tensor) -> Tensor:
            subpixels = []
            for channel, spatial in zip(self.channel_branch, self.spatial_branch, strict=True):
                channel_filter = channel(x).unflatten(1, (channels, k, k))
                subpixels.append(ddf(x, channel_filter, spatial(x), k))
            return F.pixel_shuffle(torch.stack(subpixels, 2).flatten(1, 2), args.scale)

    if args.device == "cuda":  # mmcv has kernels there
        from mmcv.ops import CARAFEPack as CARAFE

    options = dict(kernel_size=k, scale_factor=args.scale, head=case.setting.groups)
    return {
        "ddf": DDFUpPack(channels, **options),
        "composition": Composition(channels, **options),
        "carafe": CARAFE(channels, args.scale),
        "nearest": torch.nn.Upsample(scale_factor=args.scale),
    }


def make_layer_calls(case: Case, args: argparse.Namespace) -> dict[str, Call]:
    """The calls to time, by name: inference, or forward and backward passes."""
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
