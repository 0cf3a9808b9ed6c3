"""Datasets and transforms; importing the package registers them.

:class:`DigitsDataset` needs mmpretrain and is left out where that is not installed.
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
        # Asked for by name, it says what is missing.
        if name == "DigitsDataset":
            from ddf_mm.datasets.digits import DigitsDataset

            return DigitsDataset
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["DigitsDataset", "GuidedUpsamplingDataset", "LoadMap", "PackGuidedUpsampling"]
