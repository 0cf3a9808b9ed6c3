"""Checkpoints: local ones are read without running code that they hold."""

import contextlib
import errno
import itertools
import os
import os.path as osp
import pickle
from collections.abc import Iterator, Sequence

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
    """Check the path of a checkpoint, which the command line calls ``option``, before anything slow
    happens. An address with a prefix is left to mmengine."""
    if "://" not in path and not osp.isfile(osp.expanduser(path)):
        raise UserError(
            f"{option} {path!r} is not a file (current folder: {os.getcwd()!r})", exit_code=2
        )


def load_from_local_file(filename: str, map_location=None, more_types: Sequence[type] = ()) -> dict:
    """Load a local checkpoint without running code that it holds: what ``contrib.safe_load`` reads,
    and more types that are harmless. Refuses what is no checkpoint, or holds anything else."""
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
            f"{filename!r} holds a {type(checkpoint).__name__}, but a checkpoint is a dict of "
            "weights by name, or one with such a 'state_dict'"
        )
    return checkpoint


def load_safely() -> None:
    """Let mmengine, in this process, load local checkpoints by :func:`load_from_local_file`."""
    CheckpointLoader.register_scheme("", load_from_local_file, force=True)


def require_weights(model: nn.Module, checkpoint: dict) -> None:
    """Check that a checkpoint holds numbers of the kind that a model, or a wrapped one, computes
    with: PyTorch would take integers for weights. Another precision of floating point is fine."""
    weights = checkpoint.get("state_dict", checkpoint)
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    for name, own in itertools.chain(model.named_parameters(), model.named_buffers()):
        value = weights.get(name, weights.get(f"module.{name}"))
        if value is None:
            continue
        given = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        if not isinstance(value, torch.Tensor) or (
            value.is_floating_point() != own.is_floating_point()
        ):
            raise UserError(
                f"the checkpoint does not match the model: {name} is {given}, where the model has "
                f"{own.dtype}"
            )


class WeightsCheck(OneCheckpointForm):
    """Checks every checkpoint that a runner loads by :func:`require_weights`."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check what is about to be copied into the model."""
        super().after_load_checkpoint(runner, checkpoint)
        require_weights(runner.model, checkpoint)


def require_matching_checkpoint(runner: Runner) -> None:
    """Let a ``Runner`` or ``FlexibleRunner`` refuse a checkpoint that does not fit its model, with
    what was missing, unexpected or of another size; by itself it only warns."""
    load = runner.load_checkpoint

    def load_checkpoint(filename: str, **kwargs):
        with _refusing_mismatch(filename):
            return load(filename, **{**kwargs, "strict": True})

    runner.load_checkpoint = load_checkpoint


def load_checkpoint(model: nn.Module, filename: str, allow_partial: bool | None = None) -> dict:
    """Load a checkpoint into a model without a runner, without running code that it holds.

    Names that do not fit are refused, or warned of with ``allow_partial``; that is None where the
    tool has no such option.
    """
    load_safely()
    with phase(f"loading the checkpoint {filename!r}"):
        checkpoint = CheckpointLoader.load_checkpoint(filename, map_location="cpu", logger="silent")
    weights = checkpoint.get("state_dict", checkpoint)
    consume_prefix_in_state_dict_if_present(weights, "module.")
    require_weights(model, checkpoint)
    with _refusing_mismatch(filename, has_option=allow_partial is not None):
        load_state_dict(model, weights, not allow_partial)
    return checkpoint


@contextlib.contextmanager
def _refusing_mismatch(filename: str, has_option: bool = True) -> Iterator[None]:
    """Say shortly what did not fit, where mmengine or torch list every name."""
    try:
        yield
    except RuntimeError as error:
        hint = "; --allow-partial goes on with what did match" if has_option else ""
        raise UserError(
            f"checkpoint {filename!r} does not match the model: {_summarize(str(error))}{hint}"
        ) from error


def _summarize(mismatch: str) -> str:
    """mmengine's list of mismatches, each kind cut to its first few names."""
    labels = {
        "missing keys in source state_dict: ": "missing",
        "unexpected key in source state_dict: ": "unexpected",
        "size mismatch for ": "of another size",
    }
    found: dict[str, list[str]] = {kind: [] for kind in labels.values()}
    for line in map(str.strip, mismatch.splitlines()):
        for start, kind in labels.items():
            if line.startswith(start):
                names = line.removeprefix(start)
                sizes = kind == "of another size"
                found[kind] += [names.split(":")[0]] if sizes else names.split(", ")
    return summarize(found, _SHOWN_NAMES) or mismatch
