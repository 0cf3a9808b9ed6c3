"""CARAFE (arXiv 1905.02188) on the devices for which mmcv has no kernel, such as a CPU.

Importing this module puts it in the place of mmcv's upsample layer ``carafe``. It is not imported
with ``ddf_mm.layers``: it needs mmcv's compiled ops, and is there to compare with.
"""

from __future__ import annotations

from mmcv.ops.carafe import CARAFEPack
from mmengine.registry import MODELS
from torch import Tensor

from ddf_mm.ops import ddf_up


@MODELS.register_module("carafe", force=True)
class PortableCARAFEPack(CARAFEPack):
    """mmcv's ``CARAFEPack``, whose op is DDF-Up without channel filters outside of CUDA."""

    def feature_reassemble(self, x: Tensor, mask: Tensor) -> Tensor:
        """Upsamples features ``Tensor[B, C, H, W]`` by filters ``Tensor[B, g*k*k, s*H, s*W]``."""
        if x.is_cuda:
            return super().feature_reassemble(x, mask)
        s = self.scale_factor
        # [B, g*k*k, H, s, W, s] -> [B, s*s, g*k*k, H, W]
        subpixels = mask.unflatten(3, (-1, s)).unflatten(2, (-1, s))
        filters = subpixels.permute(0, 3, 5, 1, 2, 4).flatten(1, 2).contiguous()
        return ddf_up(x, None, filters, self.up_kernel, s)
