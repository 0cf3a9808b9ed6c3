"""The remainder of a batch norm that was folded into the layer before it."""

from __future__ import annotations

from torch import Tensor, nn


class Shift(nn.Module):
    """Adds one value per channel, then optionally applies ReLU.

    Args:
        bias: ``Tensor[C]``.
        relu: whether to apply ReLU.
    """

    def __init__(self, bias: Tensor, relu: bool = False) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """``Tensor[B, C, H, W]`` -> a tensor of the same shape and dtype."""
        out = x + self.bias.to(x.dtype)[:, None, None]
        return out.relu_() if self.relu else out

    def extra_repr(self) -> str:
        return f"{self.bias.numel()}, relu={self.relu}"
