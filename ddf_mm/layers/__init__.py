"""DDF layers; importing the package registers the MMCV layers `DDF` and `DDFUp`."""

from ddf_mm.layers import complexity
from ddf_mm.layers.conv import DDFConv2d
from ddf_mm.layers.family import CARAFE, Involution
from ddf_mm.layers.filter_norm import FilterNorm
from ddf_mm.layers.fold import fuse_ddf_bn, switch_to_deploy
from ddf_mm.layers.pack import DDFPack, DDFUpPack

complexity.register()

__all__ = [
    "CARAFE",
    "DDFConv2d",
    "DDFPack",
    "DDFUpPack",
    "FilterNorm",
    "Involution",
    "fuse_ddf_bn",
    "switch_to_deploy",
]
