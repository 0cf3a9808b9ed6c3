"""DDF layers; importing the package registers `DDF` and `DDFUp` where MMCV looks layers up."""

import ddf_mm.layers.complexity  # noqa: F401  (FLOPs of the operation in mmengine's counts)
from ddf_mm.layers.conv import DDFConv2d
from ddf_mm.layers.filter_norm import FilterNorm
from ddf_mm.layers.pack import DDFPack, DDFUpPack

__all__ = ["DDFConv2d", "DDFPack", "DDFUpPack", "FilterNorm"]
