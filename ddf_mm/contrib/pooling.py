"""Max pooling in ``torch.export`` programs with dynamic image sizes.

For PyTorch: superfluous once ``torch.export.export`` traces ``max_pool2d`` with a stride without
guards on the parity of dynamic sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class MaximaOfSlices(TorchFunctionMode):
    """Computes max pooling as the maximum of slices, first of the rows, then of the columns.

    PyTorch's output size of a strided pooling adds a guard on the parity of the input size. The
    values are the same, and on a CPU this is faster.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.max_pool2d or kwargs.get("return_indices"):
            return func(*args, **kwargs)
        return _max_pool2d(*args, **kwargs)


def _max_pool2d(
    x: Tensor, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, **_
) -> Tensor:
    if ceil_mode:
        return nn.functional.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    sides = [
        value if isinstance(value, Sequence) else (value, value)
        for value in (kernel_size, stride or kernel_size, padding, dilation)
    ]
    for dim, (k, s, p, d) in zip((-2, -1), zip(*sides, strict=True), strict=True):
        last = (x.shape[dim] + 2 * p - d * (k - 1) - 1) // s * s
        if p:
            margins = (p, p) if dim == -1 else (0, 0, p, p)
            x = nn.functional.pad(x, margins, value=float("-inf"))
        after = (slice(None),) * (-1 - dim)
        windows = (x[(..., slice(i * d, i * d + last + 1, s), *after)] for i in range(k))
        x = functools.reduce(torch.maximum, windows)
    return x
