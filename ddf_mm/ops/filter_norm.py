"""Filter normalization of DDF (arXiv 2104.14107; `FilterNorm` in the official ddf/ddf.py)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ddf_mm.ops import library, self_check
from ddf_mm.ops.checks import check_int, check_number, check_tensor, shape_of, untraced
from ddf_mm.ops.reference import accumulate_dtype, filter_norm_reference

FILTER_TYPES = ("spatial", "channel")
EPS = 1e-10  # of the official layer


@library.with_formula
def filter_norm(
    x: Tensor,
    in_channels: int,
    filter_type: str,
    std: float | Tensor = 1.0,
    mean: float | Tensor | None = None,
    eps: float = EPS,
) -> Tensor:
    r"""Standardizes every generated filter over its taps, then scales and shifts it.

    .. math:: \hat h = \alpha \, \frac{h - \mu(h)}{\delta(h) + \epsilon} + \beta

    where :math:`\mu` and :math:`\delta` are the mean and the unbiased standard deviation of the
    k*k taps of one filter: of one pixel's filter for ``'spatial'``, of one channel's for
    ``'channel'``. They are computed in float32 for 16-bit inputs, also under autocast. A filter
    whose taps are all equal becomes ``mean``, with a zero gradient through the standardization.

    Args:
        x: raw filters, ``Tensor[B, in_channels*k*k, H, W]`` for ``'spatial'``;
            ``Tensor[B, in_channels*k*k]``, optionally with trailing dimensions of size 1,
            for ``'channel'``.
        in_channels: number of filters in x's channels: the filter groups for ``'spatial'``, the
            feature channels for ``'channel'``.
        filter_type: ``'spatial'`` or ``'channel'``.
        std: alpha, a number or a ``Tensor[in_channels*k*k]``.
        mean: beta, likewise, or ``None`` for 0.
        eps: added to the standard deviation.

    Returns:
        The normalized filters, of x's dtype: x's shape for ``'spatial'``,
        ``Tensor[B, in_channels*k*k]`` for ``'channel'``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong value, shape or device.

    Example:
        >>> logits = torch.randn(2, 9, 14, 14)
        >>> filter_norm(logits, 1, "spatial").mean(dim=1).abs().max() < 1e-6
        tensor(True)
    """
    if has_torch_function_variadic(x, std, mean):  # torch.fx records the call
        options = in_channels, filter_type, std, mean, eps
        return handle_torch_function(filter_norm, (x, std, mean), x, *options)
    in_channels = _check(x, in_channels, filter_type, eps)
    if filter_type == "channel":
        x = x.flatten(1)
    std = _as_parameter("std", std, x)
    mean = None if mean is None else _as_parameter("mean", mean, x)
    # Compilers fuse the formula with adjacent operations, and traces need standard operators; an
    # exported program keeps the compiled operation, which :mod:`ddf_mm.ops.export` translates.
    if library.serves(x) and not _needs_formula():
        call = _arguments_of_op(x, in_channels, std, mean, eps)
        if self_check.passes("filter_norm", *call):
            return torch.ops.ddf_mm.filter_norm(*call)
    return filter_norm_reference(x, in_channels, std, mean, eps)


def _needs_formula() -> bool:
    if torch.compiler.is_dynamo_compiling():  # to which is_exporting() is always true
        return True
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return torch.jit.is_tracing()


def _arguments_of_op(
    x: Tensor, filters: int, std: float | Tensor, mean: float | Tensor | None, eps: float
) -> tuple[Tensor, int, Tensor | None, Tensor | None, float, float]:
    scale, factors = (1.0, std) if isinstance(std, Tensor) else (std, None)
    if mean is not None and not isinstance(mean, Tensor):
        mean = x.new_full((x.shape[1],), mean, dtype=accumulate_dtype(x.dtype))
    return x, filters, factors, mean, scale, eps


@untraced
def _check(x: Tensor, in_channels: int, filter_type: str, eps: float) -> int:
    """``in_channels`` as an int; raises if the arguments are invalid."""
    check_tensor("x", x)
    in_channels = check_int("in_channels", in_channels, 1)
    check_number("eps", eps)
    if filter_type not in FILTER_TYPES:
        raise ValueError(f"filter_type must be 'spatial' or 'channel', got {filter_type!r}")
    if filter_type == "spatial" and x.dim() != 4:
        raise ValueError(
            "x must be a Tensor[B, in_channels*k*k, H, W] for filter_type 'spatial', got shape "
            f"{list(x.shape)}"
        )
    if filter_type == "channel" and (x.dim() < 2 or any(s != 1 for s in x.shape[2:])):
        raise ValueError(
            "x must be a Tensor[B, in_channels*k*k], optionally with trailing dimensions of size "
            f"1, for filter_type 'channel', got shape {list(x.shape)}"
        )
    total = x.shape[1]
    if total % in_channels or total // in_channels < 2:
        raise ValueError(
            "x must have in_channels * kernel_size**2 channels, with at least 2 taps per filter "
            f"for in_channels {in_channels}, got {total}"
        )
    return in_channels


def _as_parameter(name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number unchanged; a tensor as one value per tap, in the dtype of the computation."""
    if not isinstance(value, Tensor):
        check_number(name, value)
        return value
    check_tensor(name, value)
    total = shape_of(x)[1]
    if value.dim() and shape_of(value) != (total,):
        raise ValueError(
            f"{name} must be a number or a Tensor[{total}], one value per channel of x, "
            f"got shape {list(value.shape)}"
        )
    # A scalar tensor may be on the CPU, as in all PyTorch operations.
    if value.device != x.device:
        if value.dim() or value.device.type != "cpu":
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")
        value = value.to(x.device)
    return value.to(accumulate_dtype(x.dtype)).expand(total)
