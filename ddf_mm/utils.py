"""What mmengine's hub asks of a package, and this package's place in mmpretrain's model zoo."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path


def register_all_modules() -> None:
    """Register all classes of the package, and its classifiers in mmpretrain's model zoo.

    ``mmengine.hub.get_model('ddf_mm::…')`` calls it. After it ``mmpretrain.list_models('ddf*')``
    lists the classifiers of ``configs/classification``, and mmpretrain's ``get_model`` and
    inferencers take their names. It leaves the default scope as it is: the models are those of
    mmpretrain, mmdet and mmseg, whose scopes they need.

    Raises:
        ImportError, AssertionError: mmpretrain is installed but does not fit the installed mmcv or
            mmengine.
    """
    for name in ("layers", "models", "datasets", "engine"):
        import_module(f"ddf_mm.{name}")
    if find_spec("mmpretrain") is not None:
        _register_classifiers()


@cache  # mmpretrain refuses a name that it has
def _register_classifiers() -> None:
    from mmpretrain import ModelHub

    mim = Path(__file__).parent / ".mim"
    # Not the whole model index: mmpretrain would offer detectors and segmentors, too.
    ModelHub.register_model_index(
        mim / "configs" / "classification" / "metafile.yml", config_prefix=mim
    )
