"""Decoupled Dynamic Filters (CVPR 2021, arXiv 2104.14107) for the OpenMMLab ecosystem.

Importing the package imports no toolbox (mmpretrain, mmdet, mmseg) and registers no class; classes
are registered on first use of ``type='ddf_mm.…'`` or by importing ``ddf_mm.models``.
"""

from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from ddf_mm.version import __version__

try:
    from mmengine.config.utils import MODULE2PACKAGE
except ImportError:  # ddf_mm.ops needs torch only
    pass
else:
    # mmengine resolves `_base_ = 'ddf_mm::…'` and `mmengine.hub` names of packages in this table,
    # in the folder of the distribution of that name or else of the module. A module is named here,
    # because the distribution of an editable install is in another folder than the package.
    MODULE2PACKAGE.setdefault("ddf_mm", "ddf_mm.version")
    # mmengine looks up `mmseg::` by the distribution name mmsegmentation, which the OneDL packages
    # do not have; for them the import name works.
    if find_spec("mmseg") is not None:
        try:
            distribution("mmsegmentation")
        except PackageNotFoundError:
            MODULE2PACKAGE["mmseg"] = "mmseg"

__all__ = ["__version__"]
