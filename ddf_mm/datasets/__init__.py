"""Datasets and transforms; importing the package registers them.

:class:`DigitsDataset` needs mmpretrain and is not registered without it.
"""

from importlib.util import find_spec

from ddf_mm.datasets.guided_upsampling import (
    GuidedUpsamplingDataset,
    LoadMap,
    PackGuidedUpsampling,
)

if find_spec("mmpretrain") is not None:
    from ddf_mm.datasets.digits import DigitsDataset
else:

    def __getattr__(name: str):
        # The import raises an error that names the missing package.
        if name == "DigitsDataset":
            from ddf_mm.datasets.digits import DigitsDataset

            return DigitsDataset
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["DigitsDataset", "GuidedUpsamplingDataset", "LoadMap", "PackGuidedUpsampling"]
