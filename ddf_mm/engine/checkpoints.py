"""Loading checkpoints. Local files are loaded without executing code that they contain."""

import errno
import itertools
import os
import os.path as osp
import pickle
from collections.abc import Sequence

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader, load_state_dict
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from ddf_mm.contrib import safe_load
from ddf_mm.contrib.checkpoint_form import OneCheckpointForm
from ddf_mm.engine.cli import UserError, phase, summarize

_SHOWN_NAMES = 3


def require_checkpoint(path: str, option: str) -> None:
    """Raise :class:`UserError` early if the checkpoint given by the command line option ``option``
    is not a file. URLs and other paths with a scheme are left to mmengine."""
    if "://" not in path and not osp.isfile(osp.expanduser(path)):
        raise UserError(
            f"{option} {path!r} is not a file (current folder: {os.getcwd()!r})", exit_code=2
        )


def load_from_local_file(filename: str, map_location=None, more_types: Sequence[type] = ()) -> dict:
    """Load a local checkpoint without executing code that it contains. Raises :class:`UserError` if
    it is not a checkpoint, or has objects of other types than ``contrib.safe_load`` allows and the
    harmless ``more_types``."""
    path = osp.expanduser(filename)
    if not osp.isfile(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), filename)
    try:
        checkpoint = safe_load.load(path, map_location, more_types)
    except pickle.UnpicklingError as error:
        raise UserError(f"{filename!r} {error}") from error
    weights = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise UserError(
            f"{filename!r} contains a {type(checkpoint).__name__}, but a checkpoint is a dict of "
            "weights by name, or a dict with such a dict under 'state_dict'"
        )
    return checkpoint


def load_safely() -> None:
    """Make mmengine load local checkpoints by :func:`load_from_local_file` in this process."""
    CheckpointLoader.register_scheme("", load_from_local_file, force=True)


def require_weights(model: nn.Module, weights: dict) -> str:
    """List in one line which weights are missing, unexpected or of another size; empty if none.
    Raises :class:`UserError` if a weight is not a tensor, or is an integer where the model has a
    floating-point number or vice versa, which PyTorch would convert silently."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    for name, own in itertools.chain(model.named_parameters(), model.named_buffers()):
        if (value := weights.get(name)) is None:
            continue
        given = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        if not isinstance(value, torch.Tensor) or (
            value.is_floating_point() != own.is_floating_point()
        ):
            raise UserError(
                f"the checkpoint does not match the model: {name} is {given}, where the model has "
                f"{own.dtype}"
            )
    given, own = (
        {n: getattr(v, "shape", ()) for n, v in w.items()} for w in (weights, model.state_dict())
    )
    mismatch = {
        # mmengine accepts checkpoints without these counters.
        "missing": [n for n in own if n not in given and "num_batches_tracked" not in n],
        "unexpected": [name for name in given if name not in own],
        "of another size": [n for n, shape in own.items() if given.get(n, shape) != shape],
    }
    return summarize(mismatch, _SHOWN_NAMES)


class WeightsCheck(OneCheckpointForm):
    """Applies :func:`require_weights` to every checkpoint that a runner loads."""

    mismatch = ""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check the weights before they are copied into the model."""
        super().after_load_checkpoint(runner, checkpoint)
        self.mismatch = require_weights(runner.model, checkpoint["state_dict"])


def require_matching_checkpoint(runner: Runner) -> None:
    """Make a ``Runner`` or ``FlexibleRunner`` with a :class:`WeightsCheck` raise :class:`UserError`
    for a checkpoint that does not match its model; by default it only warns."""
    load = runner.load_checkpoint
    check = next(hook for hook in runner.hooks if isinstance(hook, WeightsCheck))

    def load_checkpoint(filename: str, **kwargs):
        try:
            return load(filename, **{**kwargs, "strict": True})
        except RuntimeError as error:
            raise _refusal(filename, check.mismatch or error) from error

    runner.load_checkpoint = load_checkpoint


def load_checkpoint(model: nn.Module, filename: str, allow_partial: bool | None = None) -> dict:
    """Load a checkpoint into a model without a runner and without executing code that it contains.

    Raises :class:`UserError` if the names do not match, unless ``allow_partial``; it is None if the
    tool has no such option, which the message then does not mention.
    """
    load_safely()
    with phase(f"loading the checkpoint {filename!r}"):
        checkpoint = CheckpointLoader.load_checkpoint(filename, map_location="cpu", logger="silent")
    weights = checkpoint.get("state_dict", checkpoint)
    consume_prefix_in_state_dict_if_present(weights, "module.")
    mismatch = require_weights(model, weights)
    try:
        load_state_dict(model, weights, not allow_partial)
    except RuntimeError as error:
        raise _refusal(filename, mismatch or error, allow_partial is not None) from error
    return checkpoint


def _refusal(filename: str, reason: object, has_option: bool = True) -> UserError:
    hint = "; --allow-partial loads the weights that match" if has_option else ""
    return UserError(f"checkpoint {filename!r} does not match the model: {reason}{hint}")
