"""CARAFE (arXiv 1905.02188) in the place of mmcv's, whose kernels run on CUDA devices only.

Importing this module registers :class:`~ddf_mm.layers.CARAFE` as the upsample layer ``carafe``, for
mmdet's ``FPN_CARAFE`` and other users of that name. ``ddf_mm.layers`` does not import it.
mmcv's compiled ops are not needed.
"""

from __future__ import annotations

from mmengine.registry import MODELS

from ddf_mm.layers.family import CARAFE

# FPN_CARAFE initializes the layers that are instances of mmcv's class.
try:
    from mmcv.ops.carafe import CARAFEPack
except ImportError:
    CARAFEPack = None


_BASES = (CARAFE,) if CARAFEPack is None else (CARAFE, CARAFEPack)


@MODELS.register_module("carafe", force=True)
class PortableCARAFEPack(*_BASES):  # type: ignore[misc]
    """:class:`~ddf_mm.layers.CARAFE`, and an instance of mmcv's layer where there is one."""
