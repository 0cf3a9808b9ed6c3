"""Decoupled Dynamic Filters (CVPR 2021, arXiv 2104.14107) for the OpenMMLab ecosystem.

Importing the package imports no toolbox (mmpretrain, mmdet, mmseg) and registers nothing but its
name; classes are registered on first use of ``type='ddf_mm.…'`` or by importing
``ddf_mm.models``.
"""

from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from ddf_mm.version import __version__

try:
    from mmengine.config.utils import MODULE2PACKAGE
except ImportError:  # the functional API (ddf_mm.ops) needs torch only
    pass
else:
    # Lets mmengine resolve `_base_ = 'ddf_mm::…'` and `mmengine.hub` names; mmengine knows only
    # OpenMMLab's own packages otherwise. It looks in the folder of the distribution or, failing
    # that, of the module of this name. The distribution of an editable install lies elsewhere than
    # the package, and pip takes ddf_mm for its name, so a module of the package is named.
    MODULE2PACKAGE.setdefault("ddf_mm", "ddf_mm.version")
    # mmengine looks `mmseg::` up under the distribution name mmsegmentation, which the OneDL
    # packages do not use; the import name works for them.
    if find_spec("mmseg") is not None:
        try:
            distribution("mmsegmentation")
        except PackageNotFoundError:
            MODULE2PACKAGE["mmseg"] = "mmseg"

__all__ = ["__version__"]
