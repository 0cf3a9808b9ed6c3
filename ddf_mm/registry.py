"""Registries of scope ``ddf_mm``, children of mmengine's root registries.

They make ``type='ddf_mm.DDFResNet'`` resolvable from every scope without ``custom_imports``:
mmengine imports ``<scope>.registry`` when it meets a scope, and the modules in ``locations`` when
it looks up a name there. The classes are registered once, in the root registries, which every
child registry falls back to; so plain ``type='DDFResNet'`` works from the mmpretrain, mmdet and
mmseg scopes once ``ddf_mm.models`` is imported.
"""

from __future__ import annotations

from typing import Any

from mmengine import registry as root
from mmengine.model import PretrainedInit
from mmengine.registry import Registry

_SCOPE = "ddf_mm"
# Without a location mmengine would call `ddf_mm.utils.register_all_modules`.
_NO_LOCATION = ["ddf_mm.registry"]


class _Registry(Registry):
    """Looks up names with its own scope as plain names, which the root registries hold."""

    def get(self, key: str) -> Any:
        """The class that ``key`` names."""
        scope, name = self.split_scope_key(key)
        is_own = scope == self.scope and "." not in name
        return super().get(name if is_own else key)


def _child(parent: Registry, locations: list[str] = _NO_LOCATION) -> Registry:
    """The child of ``parent`` in scope ``ddf_mm``, which exists already after a reload."""
    existing = parent.children.get(_SCOPE)
    if existing is not None:
        return existing
    return _Registry(parent.name, parent=parent, scope=_SCOPE, locations=locations)


MODELS = _child(root.MODELS, ["ddf_mm.layers", "ddf_mm.models"])
DATASETS = _child(root.DATASETS, ["ddf_mm.datasets"])
OPTIM_WRAPPERS = _child(root.OPTIM_WRAPPERS, ["ddf_mm.engine"])
HOOKS = _child(root.HOOKS, ["ddf_mm.engine"])
METRICS = _child(root.METRICS, ["ddf_mm.engine"])
TRANSFORMS = _child(root.TRANSFORMS, ["ddf_mm.datasets"])

# A config read through `ddf_mm::` has `_scope_='ddf_mm'` in every dict. A child of each root
# registry avoids mmengine's "Failed to search registry" warning for them.
RUNNERS = _child(root.RUNNERS)
RUNNER_CONSTRUCTORS = _child(root.RUNNER_CONSTRUCTORS)
LOOPS = _child(root.LOOPS)
STRATEGIES = _child(root.STRATEGIES)
DATA_SAMPLERS = _child(root.DATA_SAMPLERS)
MODEL_WRAPPERS = _child(root.MODEL_WRAPPERS)
WEIGHT_INITIALIZERS = _child(root.WEIGHT_INITIALIZERS)
OPTIMIZERS = _child(root.OPTIMIZERS)
OPTIM_WRAPPER_CONSTRUCTORS = _child(root.OPTIM_WRAPPER_CONSTRUCTORS)
PARAM_SCHEDULERS = _child(root.PARAM_SCHEDULERS)
EVALUATOR = _child(root.EVALUATOR)
TASK_UTILS = _child(root.TASK_UTILS)
VISUALIZERS = _child(root.VISUALIZERS)
VISBACKENDS = _child(root.VISBACKENDS)
LOG_PROCESSORS = _child(root.LOG_PROCESSORS)
INFERENCERS = _child(root.INFERENCERS)
FUNCTIONS = _child(root.FUNCTIONS)


def resolve(cfg: dict, registry: Registry) -> Any:
    """The class or function that ``cfg['type']`` is or names.

    Args:
        cfg: a config with a ``type``: a class or function; its plain name, a name with a scope
            (``'mmengine.Pretrained'``) or with a module (``'mmengine.model.PretrainedInit'``, as
            dumped configs have it).
        registry: the root registry to look in, one of ``mmengine.registry``.

    Returns:
        The class or function, or ``None`` if there is none of this name.
    """
    kind = cfg.get("type")
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(cfg.get("_scope_")) as current:
        try:
            return current.get(kind)
        except Exception:  # mmengine reports it when it builds the config
            return None


def name_pretrained(init_cfg: dict | list[dict] | None) -> dict | list[dict] | None:
    """``init_cfg`` with each ``PretrainedInit`` named ``'Pretrained'``, however it was written.

    mmengine's ``BaseModule`` recognizes by this name alone what it must load last, after the other
    initializations of the module and its children.
    """
    if isinstance(init_cfg, (list, tuple)):
        return [_name_pretrained(cfg) for cfg in init_cfg]
    return init_cfg if init_cfg is None else _name_pretrained(init_cfg)


def _name_pretrained(cfg: dict) -> dict:
    if isinstance(cfg, dict) and resolve(cfg, root.WEIGHT_INITIALIZERS) is PretrainedInit:
        return {**cfg, "type": "Pretrained"}
    return cfg
