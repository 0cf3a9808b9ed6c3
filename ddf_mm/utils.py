"""Registration in mmengine's hub and mmpretrain's model zoo, and queries of configs of any toolbox
and style."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

TOOLBOXES = ("mmpretrain", "mmdet", "mmseg")


def register_all_modules() -> None:
    """Register all classes of the package, and its classifiers in mmpretrain's model zoo.

    ``mmengine.hub.get_model('ddf_mm::…')`` calls it. Afterwards ``mmpretrain.list_models('ddf*')``
    lists the classifiers of ``configs/classification``, and mmpretrain's ``get_model`` and
    inferencers accept their names. The default scope is not changed, since the models need the
    scopes of mmpretrain, mmdet and mmseg.

    Raises:
        ImportError, AssertionError: the installed mmpretrain does not work with the installed mmcv
            or mmengine.
    """
    for name in ("layers", "models", "datasets", "engine"):
        import_module(f"ddf_mm.{name}")
    if find_spec("mmpretrain") is not None:
        _register_classifiers()


@cache  # mmpretrain refuses to register a name twice
def _register_classifiers() -> None:
    from mmpretrain import ModelHub

    mim = Path(__file__).parent / ".mim"
    # Not the whole model index, which has detectors and segmentors too.
    ModelHub.register_model_index(
        mim / "configs" / "classification" / "metafile.yml", config_prefix=mim
    )


def toolbox(cfg: dict) -> str | None:
    """The toolbox of a config: its default_scope or, if this names none, the package of its model's
    class, which a pure Python config contains."""
    scope = cfg.get("default_scope")
    kind = (cfg.get("model") or {}).get("type", "")
    package = (kind if isinstance(kind, str) else kind.__module__).partition(".")[0]
    return package if scope not in TOOLBOXES and package in TOOLBOXES else scope


def type_name(cfg: dict, default: str = "") -> str:
    """The class name of a config's ``type``, without scope or module."""
    kind = cfg.get("type", default)
    return kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__


def dicts_with(value: object, key: str) -> Iterator[dict]:
    """All dicts at or below a config node that have a key."""
    if isinstance(value, dict):
        if key in value:
            yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from dicts_with(item, key)


def name_ops(model: object) -> None:
    """Give the ops that mmdet and mmcv look up in ``mmcv.ops`` by their names these names, where a
    dumped config in pure Python has dotted ones."""
    for key in ("roi_layer", "nms"):
        for part in dicts_with(model, key):
            if isinstance(part[key], dict) and isinstance(part[key].get("type"), str):
                part[key]["type"] = type_name(part[key])


def leaf_datasets(dataset: object) -> Iterator[dict]:
    """The configs of the datasets that read samples, within dataset wrappers."""
    if isinstance(dataset, (list, tuple)):
        for part in dataset:
            yield from leaf_datasets(part)
    elif isinstance(dataset, dict):
        inner = dataset.get("dataset") or dataset.get("datasets")
        yield from leaf_datasets(inner) if inner else [dataset]
