"""What the tests of the ops share: inputs in every layout, and bounds of rounding errors."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_mm.ops import backend_info, ddf, ddf_reference

Inputs = Sequence[Tensor | None]
# Test ids of layouts.
by_name = dict(ids=lambda f: f.__name__)


def short(value: object) -> str:
    """Test ids without 'torch.'."""
    return str(value).removeprefix("torch.").removesuffix("_format")


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def channel_slice(tensor: Tensor) -> Tensor:
    """The last channels of a wider channels_last tensor."""
    batch, channels, height, width = tensor.shape
    wide = channels_last(tensor.new_full((batch, channels + 4, height, width), float("nan")))
    return wide[:, 4:].copy_(tensor)


def every_other(tensor: Tensor) -> Tensor:
    """A view with gaps in the channels and the columns."""
    batch, channels, height, width = tensor.shape
    wide = tensor.new_full((batch, 2 * channels, height, 2 * width), float("nan"))
    return wide[:, 1::2, :, ::2].copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    """A view whose rows are the fastest dimension."""
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def misaligned(tensor: Tensor) -> Tensor:
    """A contiguous view that starts one element into its memory."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor)


DEFINITIONS = {"mul": operator.mul, "add": operator.add}  # of the combine modes
# For each combine mode one whose gradients, of absolute values, are at least as large.
LARGER_TERMS = {"mul": "mul", "add": "add"}


def larger_terms(options: tuple) -> tuple:
    """``options`` with the combine mode, if any, that has larger terms."""
    return tuple(LARGER_TERMS.get(option, option) for option in options)


LAYOUTS = [contiguous, channels_last, every_other, transposed, misaligned, channel_slice]
DENSE = LAYOUTS[:2]


def make(
    batch: int = 2,
    channels: int = 4,
    size: tuple[int, int] = (5, 6),
    k: int = 3,
    groups: int = 1,
    stride: int = 1,
    which: str = "both",
    floor: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    requires_grad: bool = False,
    scale: int | None = None,
) -> list[Tensor | None]:
    """Random features and filters, drawn alike for every dtype and device.

    Args:
        which: the filters that are given: both, channel or spatial.
        floor: rounds the output's size down, as the official op does.
        scale: makes filters for ddf_up.
    """
    out = [n // stride if floor else -(-n // stride) for n in size]
    filters = (batch,) if scale is None else (batch, scale**2)
    shapes = [
        (batch, channels, *size),
        None if which == "spatial" else (*filters, channels, k, k),
        None if which == "channel" else (*filters, groups * k * k, *out),
    ]
    return [
        None
        if shape is None
        else torch.randn(shape, dtype=torch.float64)
        .to(dtype=dtype, device=device)
        .requires_grad_(requires_grad)
        for shape in shapes
    ]


def by_unfold(
    x: Tensor,
    cf: Tensor | None,
    sf: Tensor | None,
    k: int = 3,
    dilation: int = 1,
    stride: int = 1,
    combine: str = "mul",
) -> Tensor:
    """The operation by im2col, which shares neither code nor idea with the reference."""
    batch, channels, height, width = x.shape
    ceil = -(-height // stride), -(-width // stride)
    columns = F.unfold(x, k, dilation, dilation * (k // 2), stride)
    groups = 1 if sf is None else sf.shape[1] // k**2
    windows = columns.view(batch, groups, channels // groups, k * k, *ceil)
    weights = []
    if cf is not None:
        weights.append(cf.reshape(batch, groups, channels // groups, k * k, 1, 1))
    if sf is not None:
        windows = windows[..., : sf.shape[2], : sf.shape[3]]
        weights.append(sf.reshape(batch, groups, 1, k * k, *sf.shape[2:]))
    weight = weights[0] if len(weights) == 1 else None
    if weight is None:
        weight = DEFINITIONS[combine](*weights)
    return (windows * weight).sum(3).flatten(1, 2)


def value_and_gradients(
    function: Callable[..., Tensor],
    tensors: Inputs,
    grad: Tensor,
    options: tuple,
    needed: Sequence[bool] = (True, True, True),
) -> list[Tensor | None]:
    """The output of ``function`` and the gradients of the needed tensors; None for the others."""
    inputs = [
        None if t is None else t.detach().requires_grad_(need)
        for t, need in zip(tensors, needed, strict=True)
    ]
    out = function(*inputs, *options)
    asked = [t for t in inputs if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(out, asked, grad) if asked else ())
    return [
        out.detach(),
        *(next(grads) if t is not None and t.requires_grad else None for t in inputs),
    ]


NAMES = ("output", "grad_features", "grad_channel", "grad_spatial")


def check_against(
    oracle: Callable[..., Tensor],
    tensors: Inputs,
    options: tuple,
    grad: Tensor,
    function: Callable[..., Tensor] = ddf,
    needed: Sequence[bool] = (True, True, True),
) -> None:
    """Output and gradients are within the rounding errors of sums of that many terms."""
    k = options[0]
    features, _, spatial = tensors
    dtype = features.dtype
    got = value_and_gradients(function, tensors, grad, options, needed)
    exact = [None if t is None else t.double() for t in tensors]
    want = value_and_gradients(oracle, exact, grad.double(), options, needed)
    # The sums of the terms' absolute values.
    sizes = [None if t is None else t.abs() for t in exact]
    size = value_and_gradients(oracle, sizes, grad.double().abs(), larger_terms(options), needed)

    groups = 1 if spatial is None else spatial.shape[1] // k**2
    terms = (k * k, k * k, grad.shape[2] * grad.shape[3], features.shape[1] // groups)
    sum_dtype = torch.float32 if dtype.itemsize == 2 else dtype
    stored = torch.finfo(dtype)
    for name, g, w, s, n in zip(NAMES, got, want, size, terms, strict=True):
        assert (g is None) == (w is None), name
        if g is None:
            continue
        assert g.dtype == dtype and g.shape == w.shape, name
        allowed = (n + 3) * torch.finfo(sum_dtype).eps / 2 * s
        if sum_dtype != dtype:
            allowed = allowed + 0.51 * stored.eps * w.abs() + stored.smallest_normal * stored.eps
        error = (g.double() - w).abs()
        worst = (error - allowed).max().item() if error.numel() else 0.0
        assert worst <= 0, (
            f"{name} is off by up to {error.max().item():.3g}: shape {list(features.shape)}, "
            f"options {options}"
        )


def check_against_reference(
    tensors: Inputs, options: tuple, grad_layout: Callable[[Tensor], Tensor] = contiguous
) -> None:
    with torch.no_grad():
        shape = ddf_reference(*tensors, *options).shape
    grad = grad_layout(torch.randn(shape, dtype=torch.float64).to(tensors[0]))
    check_against(ddf_reference, tensors, options, grad)


def require_compiled(device: str) -> None:
    """Skips a test where ``device`` has no compiled ops; DDF_MM_REQUIRE_OPS=1 makes that fail."""
    info = backend_info()
    if info[device].startswith("compiled"):
        return
    if os.environ.get("DDF_MM_REQUIRE_OPS") == "1":
        pytest.fail(f"DDF_MM_REQUIRE_OPS=1, but {device} has the reference: {info['why']}")
    pytest.skip(f"no compiled ops for {device}: {info['why']}")


def smaller_instruction_sets() -> list[str]:
    """Values of DDF_MM_CPU_ISA for the smaller instruction sets of this processor."""
    sets = {"AVX512": ["avx2", "baseline"], "AVX2": ["baseline"]}
    return sets.get(torch.backends.cpu.get_cpu_capability(), [])
