"""The official network, written with torchvision and unfold, for what is compared with it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import nn
from torchvision.models import resnet50


class OfficialFilterNorm(nn.Module):
    def __init__(self, filters, learned):
        super().__init__()
        gain = math.sqrt(2) / 3
        self.std = nn.Parameter(torch.randn(filters * 9) * gain) if learned else gain

    def forward(self, x):
        b = x.shape[0]
        if isinstance(self.std, nn.Parameter):
            taps = x.reshape(b, -1, 9)
            scale = self.std.reshape(1, -1, 9)
        else:
            taps = x.reshape(b, 9, *x.shape[2:]).movedim(1, -1)
            scale = self.std
        normed = (taps - taps.mean(-1, keepdim=True)) / (taps.std(-1, keepdim=True) + 1e-10)
        normed = normed * scale
        return normed if isinstance(self.std, nn.Parameter) else normed.movedim(-1, 1)


class OfficialPack(nn.Module):
    """The official layer, in its names, on the unfold formula."""

    def __init__(self, channels, stride, combine):
        super().__init__()
        self.stride, self.combine = stride, combine
        squeezed = max(int(channels * 0.2), 1)
        self.spatial_branch = nn.Sequential(
            nn.Conv2d(channels, 9, 1, stride=stride), OfficialFilterNorm(1, learned=False)
        )
        self.channel_branch = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, channels * 9, 1),
            OfficialFilterNorm(channels, learned=True),
        )

    def forward(self, x):
        spatial = self.spatial_branch(x)[:, None]
        channel = self.channel_branch(x)[..., None, None]
        patches = F.unfold(x, 3, padding=1, stride=self.stride)
        patches = patches.reshape(*x.shape[:2], 9, *spatial.shape[-2:])
        weight = channel * spatial if self.combine == "mul" else channel + spatial
        return (patches * weight).sum(2)


def official(combine, make=resnet50):
    """A network with statistics as training leaves them."""
    torch.manual_seed(0)
    model = make()
    for module in list(model.modules()):
        if hasattr(module, "conv2"):
            conv = module.conv2
            module.conv2 = OfficialPack(conv.in_channels, conv.stride[0], combine)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 96, 96))
    return model.eval()


def classifier(depth, combine):
    """The same network as a classifier of mmpretrain."""
    return MODELS.build(
        dict(
            type="mmpretrain.ImageClassifier",
            backbone=dict(type="ddf_mm.DDFResNet", depth=depth, kernel_combine=combine),
            neck=dict(type="mmpretrain.GlobalAveragePooling"),
            head=dict(type="mmpretrain.LinearClsHead", num_classes=1000, in_channels=2048),
        )
    ).eval()
