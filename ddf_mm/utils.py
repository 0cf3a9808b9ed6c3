"""What mmengine's hub asks of a package, this package's place in mmpretrain's model zoo, and what
configs of any toolbox and style are asked."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

TOOLBOXES = ("mmpretrain", "mmdet", "mmseg")


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


def toolbox(cfg: dict) -> str | None:
    """The toolbox that a config is for: its default_scope, or else where its model's class is
    from, which a config in pure Python names itself."""
    scope = cfg.get("default_scope")
    kind = (cfg.get("model") or {}).get("type", "")
    package = (kind if isinstance(kind, str) else kind.__module__).partition(".")[0]
    return package if scope not in TOOLBOXES and package in TOOLBOXES else scope


def type_name(cfg: dict, default: str = "") -> str:
    """The class name that a config's ``type`` stands for, without scope or module."""
    kind = cfg.get("type", default)
    return kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__


def dicts_with(value: object, key: str) -> Iterator[dict]:
    """All dicts below a config node that have a key."""
    if isinstance(value, dict):
        if key in value:
            yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from dicts_with(item, key)


def leaf_datasets(dataset: object) -> Iterator[dict]:
    """The configs of the datasets that read samples, within those that wrap or join others."""
    if isinstance(dataset, (list, tuple)):
        for part in dataset:
            yield from leaf_datasets(part)
    elif isinstance(dataset, dict):
        inner = dataset.get("dataset") or dataset.get("datasets")
        yield from leaf_datasets(inner) if inner else [dataset]
