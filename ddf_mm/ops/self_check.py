"""Compares the compiled ops with their formulas on the CUDA device that calls them.

No test has seen every device, driver and compiler. So before the first call of an op on a device,
and of each kernel that the dispatch chooses for it, the op computes a small case like the call. If
the result is not that of the formula, or the kernel does not start, the formula is used for all
calls of the op on this device, and one warning says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ddf_mm.ops import library
from ddf_mm.ops.checks import strided_size
from ddf_mm.ops.reference import (
    ddf_pack_reference,
    ddf_reference,
    ddf_up_reference,
    filter_norm_op_reference,
    layout_of,
)

ENABLED = os.environ.get("DDF_MM_SELF_CHECK", "") != "0"
# Kept; detectors have images of all sizes.
MOST_CALLS = 4096
# Bound of the errors, in the dtype's epsilon, relative to the largest value.
_TOLERANCES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 64, torch.float64: 64}
_FORMULAS: dict[str, Callable[..., Tensor]] = {
    "ddf": ddf_reference,
    "ddf_up": ddf_up_reference,
    "ddf_pack": ddf_pack_reference,
    "filter_norm": filter_norm_op_reference,
}
# What passed: devices, ops and cases; the same with the arguments of calls, which are found faster.
# And why an op of a device did not pass.
_passed: set[tuple] = set()
_calls: set[tuple] = set()
_failures: dict[tuple[int, str], str] = {}


class _Small(NamedTuple):
    """A tensor of a small case."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.memory_format

    def make(self, seed: int) -> Tensor:
        # Numbers from -1 to 1 without a pattern, not drawn from torch's generators.
        number = torch.arange(math.prod(self.shape), dtype=torch.float64, device="cpu")
        values = (number * 12.9898 + seed).sin().mul(43758.5453).frac()
        return values.reshape(self.shape).to(self.dtype).contiguous(memory_format=self.layout)


@cache
def _names(op: str) -> tuple[str, ...]:
    """The names of an op's arguments."""
    schema = getattr(torch.ops.ddf_mm, op).default._schema
    return tuple(argument.name for argument in schema.arguments)


def _sizes_of_ddf(given: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Shapes of the tensors of a small case, and its numbers. Kernels are chosen by the kernel
    size, dilation and stride, and by whether channels of a group and columns are multiples of four;
    beyond these bounds of the numbers all calls have the generic kernels."""
    spatial = given["spatial_filter" if "spatial_filter" in given else "raw_spatial"]
    kernel_size = min(given["kernel_size"], 9)
    stride, scale = min(given.get("stride", 1), 3), min(given.get("scale_factor", 1), 3)
    groups = 1 if spatial is None else spatial.shape[-3] // given["kernel_size"] ** 2
    channels = 8 if given["features"].shape[1] // groups % 4 == 0 else 3
    groups = min(groups, 2)
    channels *= groups
    height, width = 9, 16 if given["features"].shape[3] % 4 == 0 else 15
    out = strided_size(height, stride), strided_size(width, stride)
    filters = (2, scale**2) if "scale_factor" in given else (2,)
    per_channel = *filters, channels, kernel_size, kernel_size
    per_pixel = *filters, groups * kernel_size**2, *out
    shapes = {
        "features": (2, channels, height, width),
        "channel_filter": per_channel,
        "raw_channel": per_channel,
        "spatial_filter": per_pixel,
        "raw_spatial": per_pixel,
        "channel_std": (channels * kernel_size**2,),
        "bias": (channels,),
        "grad": (2, channels, scale * out[0], scale * out[1]),
    }
    dilation = min(given["dilation"], 4)
    numbers = dict(kernel_size=kernel_size, dilation=dilation, stride=stride, scale_factor=scale)
    return shapes, numbers


def _sizes_of_filter_norm(
    given: dict[str, Any],
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    x, filters = given["x"], min(given["filters"], 2)
    taps = filters * min(x.shape[1] // given["filters"], 81)
    shape = 2, taps, *(max(1, min(size, 9)) for size in x.shape[2:])
    return dict(x=shape, grad=shape, std=(taps,), mean=(taps,)), dict(filters=filters)


def _small_case(op: str, *arguments: Any) -> tuple:
    """The arguments of a small case of an op: tensors of the dtypes and memory formats given, and
    the other arguments, within bounds. Equal if the calls run the same kernels."""
    given = dict(zip(_names(op), arguments, strict=True))
    sizes = _sizes_of_filter_norm if "filters" in given else _sizes_of_ddf
    shapes, numbers = sizes(given)

    def small(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return _Small(shapes[name], value.dtype, layout_of(value))
        if name == "eps":
            return 1e-10
        return 0.5 if isinstance(value, float) else numbers.get(name, value)

    return tuple(small(name, value) for name, value in given.items())


def _expected(op: str, given: dict[str, Any]) -> list[Tensor]:
    """The result of the formula, or the gradients that are needed, in float64."""
    exact = {n: v.double() if isinstance(v, Tensor) else v for n, v in given.items()}
    forward = op.removesuffix("_backward")
    formula, names = _FORMULAS[forward], _names(forward)
    if op == forward:
        return [formula(**exact)]
    if exact.get("need_mean"):
        exact["mean"] = exact["x"].new_zeros(exact["x"].shape[1])
    of = {"need_channel": "channel_filter", "need_spatial": "spatial_filter"}
    needed = [of.get(n, n.removeprefix("need_")) for n, v in exact.items() if v is True]
    with torch.enable_grad():
        leaves = [exact[name].requires_grad_() for name in needed if exact[name] is not None]
        out = formula(**{name: exact.get(name) for name in names})
        return list(torch.autograd.grad(out, leaves, exact["grad"]))


def check(op: str, device: torch.device, *arguments: Any) -> None:
    """Computes a small case like a call of an op on a device.

    Args:
        op: such as ``"ddf_backward"``.
        device: the device.
        arguments: those of the call; tensors may be on other devices.

    Raises:
        RuntimeError: the op fails, or its result is not that of the formula.
    """
    _check(op, device, _small_case(op, *arguments))


def _check(op: str, device: torch.device, case: tuple) -> None:
    # Not a part of what the caller records, differentiates or draws at random.
    with _disable_current_modes(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        made = [v.make(seed) if isinstance(v, _Small) else v for seed, v in enumerate(case)]
        there = [v.to(device) if isinstance(v, Tensor) else v for v in made]
        results = getattr(torch.ops.ddf_mm, op)(*there)
        results = [results] if isinstance(results, Tensor) else results
        # Gradients that are not needed are empty.
        got = [t.cpu() for t in results if t.numel()]
        expected = _expected(op, dict(zip(_names(op), made, strict=True)))
        for ours, of in zip(got, expected, strict=True):
            largest = of.abs().max().item()
            error = (ours.double() - of).abs().max().item() / largest
            # Neither is a NaN.
            if not error <= _TOLERANCES[ours.dtype] * torch.finfo(ours.dtype).eps:
                raise RuntimeError(
                    f"results differ from those of the formula by {error:.2g} times the largest"
                )


def passes(op: str, *arguments: Any) -> bool:
    """Whether a call of an op may use the compiled one: on CUDA devices, if what it computes of a
    small case like the call is what the formula gives. Warns once for each device and op if not.

    Raises:
        torch.OutOfMemoryError: the device has no memory for the small case.
    """
    device = arguments[0].device
    # Compilers and tracers would record the check.
    if device.type == "cpu" or not ENABLED or torch.compiler.is_compiling():
        return True
    if (device.index, op) in _failures:
        return False
    call = (
        device.index,
        op,
        *((a.dtype, a.shape, a.stride()) if isinstance(a, Tensor) else a for a in arguments),
    )
    try:
        if call in _calls:
            return True
    except TypeError:  # symbolic sizes, of a tracer, have no hash
        return True
    # The check needs results, which there are none of in a capture or for fake tensors.
    if (
        torch.jit.is_tracing()
        or not torch.cuda.is_available()
        or torch.cuda.is_current_stream_capturing()
    ):
        return True
    case = _small_case(op, *arguments)
    small_call = device.index, op, case
    try:
        if small_call not in _passed:
            _check(op, device, case)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if library.kernel_is_missing(device):
            raise  # handled by library.with_formula
        why = str(error).split("\n")[0]
        if _failures.setdefault((device.index, op), why) is why:
            _warn(op, device, case, why)
        return False
    if len(_calls) >= MOST_CALLS:
        _calls.clear()
    _calls.add(call)
    _passed.add(small_call)
    return True


class Failed(Exception):
    """An op did not pass its check."""


def run(op: str, *arguments: Any) -> Any:
    """The result of an op that :func:`passes`.

    Raises:
        Failed: it does not.
        torch.OutOfMemoryError: the device has no memory for the small case.
    """
    if not passes(op, *arguments):
        raise Failed(op)
    return getattr(torch.ops.ddf_mm, op)(*arguments)


def failures(index: int) -> str:
    """What failed on a device, "" if nothing did."""
    return "; ".join(f"{op}: {why}" for (at, op), why in _failures.items() if at == index)


def _warn(op: str, device: torch.device, case: tuple, why: str) -> None:
    values = [
        f"{name}={str(v.dtype).removeprefix('torch.')}{list(v.shape)} {v.layout}"
        if isinstance(v, _Small)
        else f"{name}={v!r}"
        for name, v in zip(_names(op), case, strict=True)
    ]
    library.warn(
        f"ddf_mm: the compiled op {op} failed its check on {library.described(device.index)} so "
        f"the several times slower formula in plain PyTorch is used for it: {why}. Please report "
        "this to the developers of ddf_mm, with what `python -m torch.utils.collect_env` prints "
        f"and the case: {', '.join(values)}. DDF_MM_SELF_CHECK=0 turns the check off, and the op "
        "is used."
    )
