"""DDFResNet for images of 32 x 32 pixels."""

from __future__ import annotations

from mmcv.cnn import build_conv_layer
from mmengine.registry import MODELS
from torch import nn

from ddf_mm.models.ddf_resnet import DDFResNet


@MODELS.register_module()
class DDFResNet_CIFAR(DDFResNet):
    """DDFResNet with the stem of mmpretrain's ``ResNet_CIFAR``, for small images.

    A 3x3 convolution with stride 1 replaces the 7x7 one with stride 2 and the pooling, so that the
    stages have 1, 1/2, 1/4 and 1/8 of the image's rows and columns. Parameters have the names of
    ``ResNet_CIFAR``.

    Args:
        args, kwargs: those of :class:`DDFResNet`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, or ``deep_stem``.

    Example:
        >>> backbone = DDFResNet_CIFAR(50, out_indices=(0, 3))
        >>> [tuple(x.shape) for x in backbone(torch.randn(1, 3, 32, 32))]
        [(1, 256, 32, 32), (1, 2048, 4, 4)]
    """

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        if self.deep_stem:
            raise ValueError("deep_stem must be False: DDFResNet_CIFAR has a stem of its own")
        super()._make_stem_layer(in_channels, stem_channels)
        self.conv1 = build_conv_layer(
            self.conv_cfg, in_channels, stem_channels, kernel_size=3, padding=1, bias=False
        )
        self.maxpool = nn.Identity()
