"""Backbone, neck and network with DDF, registered with mmengine; needs mmengine and mmcv only."""

import ddf_mm.layers  # noqa: F401  (registers layers that configs of these models may name)
from ddf_mm.models.ddf_resnet import DDFBottleneck, DDFResNet
from ddf_mm.models.ddf_resnet_cifar import DDFResNet_CIFAR
from ddf_mm.models.ddf_up_fpn import DDFUpFPN
from ddf_mm.models.ddf_up_net import DDFUpNet

__all__ = ["DDFBottleneck", "DDFResNet", "DDFResNet_CIFAR", "DDFUpFPN", "DDFUpNet"]
