"""mmengine's runners, whose steps are marked as phases so that error messages name them."""

from __future__ import annotations

import functools
import os.path as osp
from collections.abc import Callable
from typing import Any

from mmengine.dataset import Compose
from mmengine.model.weight_init import PretrainedInit

from ddf_mm.engine.cli import TRACEBACK_VARIABLE, UserError, phase
from ddf_mm.utils import leaf_datasets, type_name

# Methods of Runner, of FlexibleRunner, or of the latter's strategies.
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
_DATA = dict(train="training data", val="validation data", test="test data")


def _within(function: Callable, doing: str, about: str = "", steps: bool = False) -> Callable:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with phase(doing, about, steps):
            return function(*args, **kwargs)

    return run


def data_sources(dataloader: object) -> str:
    """The paths in the config of a data loader, for error messages."""
    keys = ("data_root", "ann_file", "data_prefix")
    leaves = leaf_datasets(dataloader.get("dataset")) if isinstance(dataloader, dict) else ()
    given = [(leaf, [f"{key}={leaf[key]!r}" for key in keys if leaf.get(key)]) for leaf in leaves]
    return "; ".join(f"{type_name(leaf)}: {', '.join(files)}" for leaf, files in given if files)


class _RunnerPhases:
    """Phases whose description depends on the runner's attributes or arguments."""

    def _build_loop(self, what: str, loop: Any) -> Any:
        sources = data_sources(getattr(self, f"_{what}_dataloader"))
        with phase(f"building the {_DATA[what]}", sources):
            loop = getattr(super(), f"build_{what}_loop")(loop)
        doing = ("training", "", True) if what == "train" else ("evaluating", sources)
        loop.run = _within(loop.run, *doing)
        return loop

    build_train_loop = functools.partialmethod(_build_loop, "train")
    build_val_loop = functools.partialmethod(_build_loop, "val")
    build_test_loop = functools.partialmethod(_build_loop, "test")

    def build_strategy(self, *args, **kwargs):
        strategy = super().build_strategy(*args, **kwargs)
        strategy.__class__ = _with_phases(type(strategy))
        return strategy

    def load_or_resume(self):
        with phase(f"loading the checkpoint {self._load_from or self.work_dir!r}"):
            super().load_or_resume()

    def save_checkpoint(self, out_dir, filename, *args, **kwargs):
        with phase(f"writing {osp.join(out_dir, filename)!r}"):
            super().save_checkpoint(out_dir, filename, *args, **kwargs)


def _with_phases(cls: type, *mixins: type) -> type:
    phases = {
        name: _within(getattr(cls, name), doing)
        for name, doing in _PHASES.items()
        if hasattr(cls, name)
    }
    return type(cls.__name__, (*mixins, cls), phases)


def runner_with_phases(cls: type) -> type:
    """A subclass, of the same name, of ``Runner``, ``FlexibleRunner`` or a user's runner, whose
    errors name the step that failed."""
    return _with_phases(cls, _RunnerPhases)


@functools.cache
def name_files() -> None:
    """Make errors name the pretrained weights or the image that could not be loaded. The image is
    named in the error's text, which is all that a data loader's worker process passes on."""
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
