"""FilterNorm as a layer."""

from __future__ import annotations

import torch
from mmengine.utils.dl_utils.parrots_wrapper import _InstanceNorm
from torch import Tensor, nn
from torch.nn.init import calculate_gain

from ddf_mm.ops.checks import check_int, check_kernel_size
from ddf_mm.ops.filter_norm import FILTER_TYPES, filter_norm


class FilterNorm(_InstanceNorm):
    """Filter normalization with the scale that preserves the variance of the features.

    See :func:`ddf_mm.ops.filter_norm` for the formula and the shapes. Arguments and parameter
    names are those of the official layer (theFoxofSky/ddfnet, ddf/ddf.py).

    It is an instance norm over the taps of each filter, without running statistics. It subclasses
    PyTorch's so that the optimizer constructors of mmengine and the toolboxes apply
    ``norm_decay_mult`` to its parameters.

    Args:
        in_channels: number of filters in the input's channels.
        kernel_size: k; a filter has k*k taps.
        filter_type: ``'spatial'`` or ``'channel'``.
        nonlinearity: activation after the filtered features; the scale is its gain
            (``torch.nn.init.calculate_gain``) over k.
        running_std: learn the scale, one value per tap (parameter ``std``, initialized normally
            with the fixed scale as standard deviation).
        running_mean: learn a shift, one value per tap (parameter ``mean``).
    """

    track_running_stats = False  # read when a state dict is loaded

    def __init__(
        self,
        in_channels: int,
        kernel_size: int,
        filter_type: str,
        nonlinearity: str = "linear",
        running_std: bool = False,
        running_mean: bool = False,
    ) -> None:
        # Not _InstanceNorm's, whose weight, bias and running_mean have other meanings.
        nn.Module.__init__(self)
        in_channels = check_int("in_channels", in_channels, 1)
        kernel_size = check_kernel_size(kernel_size, minimum=3)
        if filter_type not in FILTER_TYPES:
            raise ValueError(f"filter_type must be 'spatial' or 'channel', got {filter_type!r}")
        try:
            gain = calculate_gain(nonlinearity)
        except ValueError as error:
            raise ValueError(
                "nonlinearity must be a name that torch.nn.init.calculate_gain takes, as 'relu' "
                f"or 'linear', got {nonlinearity!r}"
            ) from error
        self.in_channels = in_channels
        self.kernel_size = kernel_size
        self.filter_type = filter_type
        self.running_std = running_std
        self.running_mean = running_mean
        self.scale = gain / kernel_size
        taps = in_channels * kernel_size**2
        if running_std:
            self.std = nn.Parameter(torch.empty(taps))
        else:
            self.std = self.scale
        if running_mean:
            self.mean = nn.Parameter(torch.empty(taps))
        else:
            self.mean = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes the learned scale and shift as the official layer does."""
        if self.running_std:
            nn.init.normal_(self.std, std=self.scale)
        if self.running_mean:
            nn.init.normal_(self.mean)

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes raw filters ``Tensor[B, in_channels*k*k, …]``."""
        return filter_norm(x, self.in_channels, self.filter_type, self.std, self.mean)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, kernel_size={self.kernel_size}, "
            f"filter_type={self.filter_type!r}, running_std={self.running_std}, "
            f"running_mean={self.running_mean}"
        )
