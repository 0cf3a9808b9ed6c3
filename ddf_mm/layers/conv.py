"""DDF with the signature of Conv2d: the MMCV conv layer `DDF`."""

from __future__ import annotations

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ddf_mm.layers.pack import DDFPack
from ddf_mm.ops.checks import check_int, check_ints


@MODELS.register_module("DDF")
class DDFConv2d(DDFPack):
    """A :class:`DDFPack` with the signature and attributes of ``torch.nn.Conv2d``.

    Registered as the conv layer ``DDF``: ``build_conv_layer(dict(type='DDF'), …)``,
    ``ConvModule(…, conv_cfg=dict(type='DDF'))`` and ``dcn=dict(type='DDF')`` of mmdet's and
    mmseg's ResNets build it.

    DDF is depthwise and keeps the size up to its stride; other values of the arguments are errors.
    Parameters have the names of DDFPack, plus ``bias``.

    Args:
        in_channels: channels C of the input.
        out_channels: must equal ``in_channels``.
        kernel_size: k, odd, at least 3; an int or a pair of equal ints.
        stride: stride of the windows; an int or a pair of equal ints.
        padding: must be dilation * (k - 1) / 2, for which ``None`` and, with stride 1, ``'same'``
            stand.
        dilation: distance between neighbouring taps; an int or a pair of equal ints.
        groups: any divisor of C. Has no effect, since a depthwise filter never mixes groups; for
            filter groups see ``head``.
        bias: add a learned bias, one value per channel.
        padding_mode: must be ``'zeros'``.
        device: of the parameters.
        dtype: of the parameters.
        head: filter groups, see :class:`DDFPack`.
        se_ratio: width of the channel branch's bottleneck over C.
        nonlinearity: activation after the layer; sets FilterNorm's scale.
        kernel_combine: ``'mul'`` or ``'add'``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Example:
        >>> from mmcv.cnn import ConvModule
        >>> block = ConvModule(64, 64, 3, padding=1, conv_cfg=dict(type='DDF'),
        ...                    norm_cfg=dict(type='BN'))
        >>> block(torch.randn(2, 64, 28, 28)).shape
        torch.Size([2, 64, 28, 28])
    """

    transposed = False
    # Pairs, as those of Conv2d.
    kernel_size: tuple[int, int]  # type: ignore[assignment]
    stride: tuple[int, int]  # type: ignore[assignment]
    dilation: tuple[int, int]  # type: ignore[assignment]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        head: int = 1,
        se_ratio: float = 0.2,
        nonlinearity: str = "relu",
        kernel_combine: str = "mul",
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        k = _square("kernel_size", kernel_size)
        s = _square("stride", stride)
        d = _square("dilation", dilation)
        super().__init__(
            in_channels, k, s, d, head, se_ratio, nonlinearity, kernel_combine, init_cfg
        )
        in_channels = self.in_channels
        if check_int("out_channels", out_channels, 1) != in_channels:
            raise ValueError(
                "out_channels must equal in_channels, since DDF filters each channel by itself; "
                f"got in_channels {in_channels}, out_channels {out_channels}"
            )
        same = d * (k // 2)
        if isinstance(padding, str):
            keeps_size = padding == "same" and s == 1
        else:
            keeps_size = padding is None or _pair("padding", padding, 0) == [same, same]
        if not keeps_size:
            raise ValueError(
                f"padding must be {same}, that is dilation * (kernel_size - 1) / 2 (or 'same' "
                f"with stride 1), since DDF keeps the size up to its stride; got {padding!r}"
            )
        groups = check_int("groups", groups, 1)
        if in_channels % groups:
            raise ValueError(
                f"groups must divide in_channels, got groups {groups}, in_channels {in_channels}"
            )
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {padding_mode!r}")

        # The attributes of Conv2d that ConvModule and other code read from a conv layer.
        self.out_channels = in_channels
        self.kernel_size = (k, k)
        self.stride = (s, s)
        self.padding = (same, same)
        self.dilation = (d, d)
        self.output_padding = (0, 0)
        self.groups = groups
        self.padding_mode = padding_mode
        self.bias = nn.Parameter(torch.zeros(in_channels)) if bias else None
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``Tensor[B, C, H, W]`` -> ``Tensor[B, C, ceil(H/stride), ceil(W/stride)]``."""
        out = super().forward(x)
        if self.bias is None:
            return out
        return out + self.bias.to(out.dtype)[:, None, None]

    @property
    def _filter_arguments(self) -> tuple[int, int, int, str]:
        return self.kernel_size[0], self.dilation[0], self.stride[0], self.kernel_combine

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}, bias={self.bias is not None}"


def _pair(name: str, value: int | tuple[int, int], minimum: int) -> list[int]:
    if isinstance(value, (tuple, list)):
        return check_ints(name, value, "a pair of ints", minimum)
    return [check_int(name, value, minimum)] * 2


def _square(name: str, value: int | tuple[int, int]) -> int:
    """An int, or the int of a pair of equal ints."""
    pair = _pair(name, value, 1)
    if len(pair) != 2 or pair[0] != pair[1]:
        raise ValueError(f"{name} must be an int or a pair of equal ints, got {value!r}")
    return pair[0]
