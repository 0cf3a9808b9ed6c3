"""CARAFE (arXiv 1905.02188) on devices for which mmcv has no kernel, for comparison.

Importing this module replaces mmcv's upsample layer ``carafe``. ``ddf_mm.layers`` does not import
it, since it needs mmcv's compiled ops.
"""

from __future__ import annotations

from mmcv.ops.carafe import CARAFEPack
from mmengine.registry import MODELS
from torch import Tensor

from ddf_mm.ops import ddf_up


@MODELS.register_module("carafe", force=True)
class PortableCARAFEPack(CARAFEPack):
    """mmcv's ``CARAFEPack``, which uses DDF-Up without channel filters except on CUDA."""

    def feature_reassemble(self, x: Tensor, mask: Tensor) -> Tensor:
        """Upsamples features ``Tensor[B, C, H, W]`` with filters ``Tensor[B, g*k*k, s*H, s*W]``."""
        if x.is_cuda:
            return super().feature_reassemble(x, mask)
        s = self.scale_factor
        # [B, g*k*k, H, s, W, s] -> [B, s*s, g*k*k, H, W]
        subpixels = mask.unflatten(3, (-1, s)).unflatten(2, (-1, s))
        filters = subpixels.permute(0, 3, 5, 1, 2, 4).flatten(1, 2).contiguous()
        return ddf_up(x, None, filters, self.up_kernel, s)
