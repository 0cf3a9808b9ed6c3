"""The layers of CARAFE and involution, with the filters that they generate, on any device."""

from __future__ import annotations

from mmcv.cnn import ConvModule
from mmengine.model import normal_init, xavier_init
from mmengine.registry import MODELS
from torch import Tensor, nn

from ddf_mm.ops import ddf, ddf_up
from ddf_mm.ops.checks import check_int, check_kernel_size


@MODELS.register_module("DDFCARAFE")
class CARAFE(nn.Module):
    """CARAFE's upsampler (arXiv 1905.02188) by :func:`~ddf_mm.ops.ddf_up`.

    Arguments, parameter names and initialization are those of ``mmcv.ops.CARAFEPack``, whose
    weights it loads. Registered as the upsample layer ``DDFCARAFE``; in place of
    mmcv's ``carafe``, as for mmdet's ``FPN_CARAFE``, by importing :mod:`ddf_mm.layers.carafe`.

    Args:
        channels: channels C of the input and output; ``up_group`` divides them.
        scale_factor: upsampling factor s.
        up_kernel: size k of the generated filters, odd.
        up_group: filter groups.
        encoder_kernel: size of the convolution that generates the filters, odd.
        encoder_dilation: its dilation.
        compressed_channels: its input channels.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
    ) -> None:
        nn.Module.__init__(self)  # PortableCARAFEPack has mmcv's layer as a second base
        self.channels = check_int("channels", channels, 1)
        self.scale_factor = check_int("scale_factor", scale_factor, 1)
        self.up_kernel = check_kernel_size(up_kernel, "up_kernel")
        self.up_group = check_int("up_group", up_group, 1)
        self.encoder_kernel = check_kernel_size(encoder_kernel, "encoder_kernel")
        self.encoder_dilation = check_int("encoder_dilation", encoder_dilation, 1)
        self.compressed_channels = check_int("compressed_channels", compressed_channels, 1)
        if channels % up_group:
            raise ValueError(
                f"up_group must divide channels, got up_group {up_group}, channels {channels}"
            )
        self.channel_compressor = nn.Conv2d(channels, compressed_channels, 1)
        self.content_encoder = nn.Conv2d(
            compressed_channels,
            up_kernel**2 * up_group * scale_factor**2,
            encoder_kernel,
            padding=(encoder_kernel - 1) * encoder_dilation // 2,
            dilation=encoder_dilation,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Initializes the convolutions as mmcv's layer does."""
        xavier_init(self.channel_compressor, distribution="uniform")
        normal_init(self.content_encoder, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """``Tensor[B, C, H, W]`` -> ``Tensor[B, C, s*H, s*W]``."""
        logits = self.content_encoder(self.channel_compressor(x))
        k, s, g = self.up_kernel, self.scale_factor, self.up_group
        # The encoder has the subpixels in each tap; ddf_up takes them before, as a view.
        taps = logits.unflatten(1, (g, k * k, s * s)).softmax(dim=2)
        return ddf_up(x, None, taps.flatten(1, 2).transpose(1, 2), k, s)


@MODELS.register_module("DDFInvolution")
class Involution(nn.Module):
    """Involution (arXiv 2103.06255) by :func:`~ddf_mm.ops.ddf`.

    Arguments and parameter names are those of the layer ``involution`` of the official code
    (d-li14/involution), so that the layers of official RedNet checkpoints load. Its groups have 16
    channels, and the bottleneck of its filter branch a quarter of the channels.

    Args:
        channels: channels C of the input and output.
        kernel_size: size k of the generated filters, odd; 7 in RedNet's blocks.
        stride: stride of the windows.
        group_channels: channels that share a filter; divides C.
        reduction_ratio: C over the channels of the bottleneck.
        norm_cfg: config of the bottleneck's norm layer.
        dilation: distance between neighbouring taps, which the official layer lacks.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        stride: int = 1,
        group_channels: int = 16,
        reduction_ratio: int = 4,
        norm_cfg: dict | None = dict(type="BN"),  # noqa: B006
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.channels = check_int("channels", channels, 1)
        self.kernel_size = check_kernel_size(kernel_size)
        self.stride = check_int("stride", stride, 1)
        self.dilation = check_int("dilation", dilation, 1)
        self.group_channels = check_int("group_channels", group_channels, 1)
        if channels % group_channels:
            raise ValueError(
                f"group_channels must divide channels, got group_channels {group_channels}, "
                f"channels {channels}"
            )
        self.groups = channels // group_channels
        reduced = max(channels // check_int("reduction_ratio", reduction_ratio, 1), 1)
        self.conv1 = ConvModule(channels, reduced, 1, norm_cfg=norm_cfg)
        self.conv2 = ConvModule(reduced, kernel_size**2 * self.groups, 1, act_cfg=None)
        if stride > 1:
            self.avgpool = nn.AvgPool2d(stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``Tensor[B, C, H, W]`` -> ``Tensor[B, C, floor(H/stride), floor(W/stride)]``, the
        official size."""
        guide = x if self.stride == 1 else self.avgpool(x)
        filters = self.conv2(self.conv1(guide))
        return ddf(x, None, filters, self.kernel_size, self.dilation, self.stride)
