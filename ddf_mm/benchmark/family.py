"""The family of weight-dynamic depthwise operations, timed beside unfold and the originals."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_mm import ops
from ddf_mm.about import machine
from ddf_mm.benchmark.timing import (
    Call,
    in_fresh_process,
    peak_extra_bytes,
    print_table,
    time_calls,
    track,
    write_json,
)

STEPS = 24  # of CSPN


def windows(x: Tensor, k: int, padding: int) -> Tensor:
    """``Tensor[B, C, k*k, H, W]``, by im2col."""
    size = [s + 2 * padding - k + 1 for s in x.shape[2:]]
    return F.unfold(x, k, padding=padding).view(*x.shape[:2], k * k, *size)


def carafe_by_unfold(x: Tensor, masks: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    taps = masks.view(batch, 25, height, 2, width, 2).permute(0, 1, 3, 5, 2, 4).flatten(2, 3)
    out = (windows(x, 5, 2)[:, :, :, None] * taps[:, None]).sum(2)
    return F.pixel_shuffle(out.flatten(1, 2), 2)


def carafe_on_upsampled(x: Tensor, masks: Tensor) -> Tensor:
    """Of the features upsampled by nearest neighbours, with windows of dilation s: the usual
    implementation in PyTorch. On a GPU mmcv's kernel."""
    if x.is_cuda:
        from mmcv.ops import carafe

        return carafe(x, masks, 5, 1, 2)
    columns = F.unfold(F.interpolate(x, scale_factor=2), 5, dilation=2, padding=4)
    return torch.einsum("bcthw,bthw->bchw", columns.view(*x.shape[:2], 25, *masks.shape[2:]), masks)


def involution_by_unfold(x: Tensor, weight: Tensor) -> Tensor:
    """As the official naive layer."""
    batch, groups, k, _, height, width = weight.shape
    columns = F.unfold(x, k, padding=k // 2).view(batch, groups, -1, k * k, height, width)
    return (weight.view(batch, groups, 1, k * k, height, width) * columns).sum(3).flatten(1, 2)


def adaptive_conv_by_unfold(x: Tensor, filters: Tensor) -> Tensor:
    taps = filters.flatten(3).permute(0, 3, 1, 2)
    return (windows(x, filters.shape[3], 0) * taps[:, None]).sum(2)


def adaptive_conv_by_views(x: Tensor, filters: Tensor) -> Tensor:
    """Without the compiled extension: a contraction of strided windows."""
    k = filters.shape[3]
    return torch.einsum("bchwpq,bhwpq->bchw", x.unfold(2, k, 1).unfold(3, k, 1), filters)


def convex_by_unfold(flow: Tensor, mask: Tensor) -> Tensor:
    """As RAFT's own method."""
    batch, channels, height, width = flow.shape
    weights = mask.view(batch, 1, 9, 8, 8, height, width).softmax(2)
    columns = windows(8 * flow, 3, 1)[:, :, :, None, None]
    out = (weights * columns).sum(2).permute(0, 1, 4, 2, 5, 3)
    return out.reshape(batch, channels, 8 * height, 8 * width)


# The paddings that shift an image onto each of its 8 neighbours.
SHIFTS = [(1 - column, 1 + column, 1 - row, 1 + row) for row in (1, 0, -1) for column in (1, 0, -1)]
SHIFTS.remove((1, 1, 1, 1))


def shifted(x: Tensor) -> Tensor:
    return torch.stack([F.pad(x[:, [n % x.shape[1]]], pads) for n, pads in enumerate(SHIFTS)], 1)


def cspn_by_shifts(guidance: Tensor, depth: Tensor) -> Tensor:
    """As the official module: 8 shifted copies of the depth in each step."""
    weights = shifted(guidance)
    weights = weights / weights.abs().sum(1, keepdim=True)
    kept = (1 - weights.sum(1))[..., 1:-1, 1:-1] * depth
    for _ in range(STEPS):
        depth = (weights * shifted(depth)).sum(1)[..., 1:-1, 1:-1] + kept
    return depth


def cspn_by_unfold(guidance: Tensor, depth: Tensor) -> Tensor:
    weights = shifted(guidance)[:, :, 0, 1:-1, 1:-1].flip(1)
    weights = weights / weights.abs().sum(1, keepdim=True)
    kept = (1 - weights.sum(1, keepdim=True)) * depth
    filters = torch.cat([weights[:, :4], torch.zeros_like(depth), weights[:, 4:]], 1)[:, None]
    for _ in range(STEPS):
        depth = (windows(depth, 3, 1) * filters).sum(2) + kept
    return depth


def kernels_by_unfold(weights: Tensor, data: Tensor) -> Tensor:
    k = math.isqrt(weights.shape[1])
    return (windows(data, k, k // 2) * weights.softmax(1)[:, None]).sum(2)


def kernels_by_stack(weights: Tensor, data: Tensor) -> Tensor:
    """As kernel-prediction networks do: a stack of shifted images."""
    k = math.isqrt(weights.shape[1])
    padded, (height, width) = F.pad(data, (k // 2,) * 4), data.shape[2:]
    stack = [padded[..., i : i + height, j : j + width] for i in range(k) for j in range(k)]
    return (weights.softmax(1)[:, :, None] * torch.stack(stack, 1)).sum(1)


def upsampling_by_unfold(x: Tensor, filters: Tensor) -> Tensor:
    out = torch.einsum("bcthw,btrhw->bcrhw", windows(x, 5, 2), filters)
    return F.pixel_shuffle(out.flatten(1, 2), math.isqrt(filters.shape[2]))


def upsampling_by_convolution(x: Tensor, filters: Tensor) -> Tensor:
    """As BasicSR: windows by a convolution with unit kernels, and a matrix product a pixel."""
    batch, taps, subpixels, height, width = filters.shape
    unit = torch.eye(taps, dtype=x.dtype, device=x.device).view(taps, 1, 5, 5).repeat(3, 1, 1, 1)
    columns = F.conv2d(x, unit, padding=2, groups=3).view(batch, 3, taps, height, width)
    out = columns.permute(0, 3, 4, 1, 2) @ filters.permute(0, 3, 4, 1, 2)
    out = out.permute(0, 3, 4, 1, 2).reshape(batch, 3 * subpixels, height, width)
    return F.pixel_shuffle(out, math.isqrt(subpixels))


@dataclass(frozen=True)
class Member:
    """An operation of the family, and what it is compared with."""

    geometry: str
    sizes: list[tuple[int, ...]]  # of the inputs
    ours: Callable[..., Tensor]
    unfold: Callable[..., Tensor]
    original: Callable[..., Tensor] | None  # None: it is by unfold too


MEMBERS = {
    "carafe": Member(
        "256 channels of 50 x 76, k5, x2",
        [(1, 256, 50, 76), (1, 25, 100, 152)],
        lambda x, masks: ops.carafe(x, masks, 5),
        carafe_by_unfold,
        carafe_on_upsampled,
    ),
    "involution": Member(
        "batch 4, 128 channels of 28 x 28, k7, groups of 16",
        [(4, 128, 28, 28), (4, 8, 7, 7, 28, 28)],
        ops.involution,
        involution_by_unfold,
        None,
    ),
    "adaptive_conv": Member(
        "384 channels of 56 x 56, k7",
        [(1, 384, 62, 62), (1, 56, 56, 7, 7)],
        ops.adaptive_conv,
        adaptive_conv_by_unfold,
        adaptive_conv_by_views,
    ),
    "convex_upsample": Member(
        "flow of 55 x 128, k3, x8",
        [(1, 2, 55, 128), (1, 576, 55, 128)],
        ops.convex_upsample,
        convex_by_unfold,
        None,
    ),
    "cspn": Member(
        f"depth of 228 x 304, k3, {STEPS} steps",
        [(1, 8, 228, 304), (1, 1, 228, 304)],
        lambda guidance, depth: ops.cspn(guidance, depth, prop_time=STEPS),
        cspn_by_unfold,
        cspn_by_shifts,
    ),
    "apply_kernel": Member(
        "RGB of 128 x 128, k21",
        [(1, 441, 128, 128), (1, 3, 128, 128)],
        ops.apply_kernel,
        kernels_by_unfold,
        kernels_by_stack,
    ),
    "dynamic_upsampling": Member(
        "RGB of 64 x 112, k5, x4",
        [(1, 3, 64, 112), (1, 25, 16, 64, 112)],
        ops.dynamic_upsampling,
        upsampling_by_unfold,
        upsampling_by_convolution,
    ),
}


def make_inputs(member: Member, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    # Affinities and depths are positive, so that their sums are not near 0.
    return [torch.rand(size, device=device) for size in member.sizes]


def make_calls(member: Member, backward: bool, device: str) -> dict[str, Call]:
    inputs = make_inputs(member, device)
    with torch.no_grad():
        grad = torch.randn_like(member.ours(*inputs))

    def call(function: Callable[..., Tensor]) -> Call:
        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*inputs),)

        def both() -> tuple[Tensor, ...]:
            given = [x.detach().requires_grad_() for x in inputs]
            out = function(*given)
            return (out.detach(), *torch.autograd.grad(out, given, grad))

        return both if backward else forward

    functions = {"ddf_mm": member.ours, "unfold": member.unfold, "original": member.original}
    return {name: call(function) for name, function in functions.items() if function is not None}


def error_of(member: Member, device: str) -> float:
    """Largest difference of the values from those by unfold in float64, over the largest value."""
    inputs = make_inputs(member, device)
    expected = member.unfold(*(x.double() for x in inputs))
    return ((member.ours(*inputs) - expected).abs().max() / expected.abs().max()).item()


def least_milliseconds(calls: dict[str, Call], args: argparse.Namespace) -> dict[str, float]:
    """The least of all rounds, in which the calls take turns: on a CPU of the time that the
    process computed, to which other processes add little."""
    if args.device == "cuda":
        times = time_calls(calls, args.repeats, args.device)
        return {name: value.least for name, value in times.items()}
    least = dict.fromkeys(calls, math.inf)
    for call in calls.values():
        call()
    for _ in range(args.repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            least[name] = min(least[name], 1e3 * (time.process_time() - start))
    return least


def peaks(args: argparse.Namespace) -> Iterator[dict[str, int]]:
    """Peak extra bytes of each member."""
    torch.set_num_threads(args.threads)
    for name in args.members:
        calls = make_calls(MEMBERS[name], args.backward, args.device)
        for call in calls.values():
            call()
        yield {name: peak_extra_bytes(call, args.device) for name, call in calls.items()}


def benchmark_family(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    about = machine(args.device, args.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    sys.stdout.flush()
    rows = []
    for name in track(args.members):
        member = MEMBERS[name]
        calls = make_calls(member, args.backward, args.device)
        times = least_milliseconds(calls, args)
        rows.append(
            {
                "name": name,
                "geometry": member.geometry,
                "milliseconds": times,
                "error": error_of(member, args.device),
            }
        )
    for row, extra in zip(rows, in_fresh_process(peaks, args), strict=False):
        row["peak_extra_bytes"] = extra
    peers = ["ddf_mm", "unfold", "original"]
    head = [*peers, *(f"{name}/ddf_mm" for name in peers[1:]), "error", *(f"{n} MB" for n in peers)]
    table = [["ms", "geometry", *head]]
    for row in rows:
        times, extra = row["milliseconds"], row.get("peak_extra_bytes", {})
        cells = [f"{times[name]:.2f}" if name in times else "" for name in peers]
        cells += [
            f"{times[name] / times['ddf_mm']:.2f}" if name in times else "" for name in peers[1:]
        ]
        cells.append(f"{row['error']:.0e}")
        cells += [f"{extra[name] / 1e6:.1f}" if name in extra else "" for name in peers]
        table.append([row["name"], row["geometry"], *cells])
    print("forward and backward" if args.backward else "forward")
    print_table(table)
    print(
        "ms: least, on a CPU of the process' CPU time; error: of values, from float64 by unfold; "
        "MB: peak memory besides inputs and results; no original: it is by unfold"
    )
    write_json(args, about, rows)
