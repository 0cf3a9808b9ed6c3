"""mmengine's runners, told apart into the phases that an error ends a tool with."""

from __future__ import annotations

import functools
import os.path as osp
from collections.abc import Callable, Iterator
from typing import Any

from mmengine.dataset import Compose
from mmengine.model.weight_init import PretrainedInit

from ddf_mm.engine.cli import TRACEBACK_VARIABLE, UserError, phase

# Of Runner, of FlexibleRunner, or of the latter's strategies.
_PHASES = {
    "setup_env": "setting up the environment",
    "build_model": "building the model",
    "_init_model_weights": "initializing the model",
    "build_optim_wrapper": "building the optimizer",
    "build_param_scheduler": "building the parameter schedulers",
    "build_evaluator": "building the evaluator",
    "build_visualizer": "building the visualizer",
    "register_hooks": "building the hooks",
}


def _within(function: Callable, doing: str, steps: bool = False) -> Callable:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with phase(doing, steps=steps):
            return function(*args, **kwargs)

    return run


def _datasets(node: object) -> Iterator[str]:
    """What the config of a data loader says of where its data are."""
    if isinstance(node, dict):
        given = {
            key: node[key] for key in ("data_root", "ann_file", "data_prefix") if node.get(key)
        }
        if given:
            kind = node.get("type")
            kind = kind if isinstance(kind, str) else getattr(kind, "__name__", "data set")
            yield f"{kind}: {', '.join(f'{key}={value!r}' for key, value in given.items())}"
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from _datasets(child)


class _Phases:
    """What the phases of a runner need to know of it."""

    def _build(self, build: Callable, loop: Any, what: str) -> Any:
        files = "; ".join(_datasets(getattr(self, f"_{what}_dataloader")))
        name = {"train": "training", "val": "validation"}.get(what, what)
        with phase(f"building the {name} data", files):
            loop = build(loop)
        is_training = what == "train"
        loop.run = _within(loop.run, name if is_training else "evaluating", steps=is_training)
        return loop

    def build_train_loop(self, loop):
        return self._build(super().build_train_loop, loop, "train")

    def build_val_loop(self, loop):
        return self._build(super().build_val_loop, loop, "val")

    def build_test_loop(self, loop):
        return self._build(super().build_test_loop, loop, "test")

    def build_strategy(self, *args, **kwargs):
        strategy = super().build_strategy(*args, **kwargs)
        strategy.__class__ = with_phases(type(strategy), ())
        return strategy

    def load_or_resume(self):
        with phase(f"loading the checkpoint {self._load_from or self.work_dir!r}"):
            super().load_or_resume()

    def save_checkpoint(self, out_dir, filename, *args, **kwargs):
        with phase(f"writing {osp.join(out_dir, filename)!r}"):
            super().save_checkpoint(out_dir, filename, *args, **kwargs)


def with_phases(cls: type, mixins: tuple[type, ...] = (_Phases,)) -> type:
    """A runner's class with a phase around each of the things that it does.

    Args:
        cls: ``Runner``, ``FlexibleRunner`` or one of a user's.
        mixins: Not for callers.

    Returns:
        A subclass of the same name.
    """
    phases = {
        name: _within(getattr(cls, name), doing)
        for name, doing in _PHASES.items()
        if hasattr(cls, name)
    }
    return type(cls.__name__, (*mixins, cls), phases)


@functools.cache
def name_files() -> None:
    """Let errors name the weights that a model starts with, and the image that could not be read.

    The latter may happen in a process of a data loader, from which only text comes back.
    """
    initialize, transform = PretrainedInit.__call__, Compose.__call__

    def initialize_(self: PretrainedInit, module: Any) -> None:
        prefix = f" with the prefix {self.prefix!r}" if self.prefix is not None else ""
        name = type(module).__name__
        with phase(f"initializing {name} from the checkpoint {self.checkpoint!r}{prefix}"):
            initialize(self, module)

    def transform_(self: Compose, data: Any) -> Any:
        try:
            return transform(self, data)
        except Exception as error:
            path = data.get("img_path") if isinstance(data, dict) else None
            if path is None or isinstance(error, UserError):
                raise
            raise UserError(
                f"while reading the image {path!r}: {type(error).__name__}: {error} "
                f"({TRACEBACK_VARIABLE}=1 shows where)"
            ) from error

    PretrainedInit.__call__, Compose.__call__ = initialize_, transform_
