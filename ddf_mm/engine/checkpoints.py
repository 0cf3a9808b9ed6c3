"""Checkpoints: local ones are read without running code that they hold."""

import errno
import itertools
import os
import os.path as osp
import pickle
import re
from collections.abc import Sequence

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from ddf_mm.engine.cli import UserError

# How torch names what it refuses to unpickle.
_REFUSED_GLOBAL = re.compile(r"unsupported (?:global: )?(?:GLOBAL|class) (\S+)", re.IGNORECASE)
_WEIGHTS_ONLY_PREAMBLE = re.compile(
    r"Weights only load failed\..*?WeightsUnpickler error: ", re.DOTALL
)


def require_checkpoint(path: str, option: str) -> None:
    """Check the path of a checkpoint before anything slow happens.

    Args:
        path (str): A local path, or an address with a prefix that mmengine resolves.
        option (str): How the command line calls it, for the error message.

    Raises:
        UserError: If it is a local path and no such file exists.
    """
    if "://" not in path and not osp.isfile(osp.expanduser(path)):
        raise UserError(
            f"{option} {path!r} is not a file (current folder: {os.getcwd()!r})", exit_code=2
        )


def load_from_local_file(filename: str, map_location=None, more_types: Sequence[type] = ()) -> dict:
    """Load a local checkpoint without running code that it holds.

    Tensors and the few harmless types that checkpoints of mmengine hold are read. mmengine's own
    loader falls back on unpickling anything.

    Args:
        filename (str): Path of the checkpoint.
        map_location: As :func:`torch.load` takes it.
        more_types (Sequence[type]): Harmless types to allow besides those of mmengine.

    Returns:
        dict: The checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If it is not a checkpoint, or holds something else that a pickle would run.
    """
    path = osp.expanduser(filename)
    if not osp.isfile(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), filename)
    allowed = torch.serialization.safe_globals([*_checkpoint_types(), *more_types])
    try:
        with allowed:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    # The bytes of a file that is no checkpoint can raise anything: they are read as a program.
    except Exception as error:
        refused = _REFUSED_GLOBAL.search(str(error))
        if refused:
            raise UserError(
                f"{filename!r} was not loaded: it holds {refused[1]}, which could run code; "
                "checkpoints may hold tensors, numbers and text only"
            ) from error
        message = _WEIGHTS_ONLY_PREAMBLE.sub("", str(error)).strip()
        reason = message.splitlines() or [type(error).__name__]
        raise UserError(
            f"{filename!r} is not a checkpoint that torch can read: {reason[0]}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(
            f"{filename!r} holds a {type(checkpoint).__name__}, but a checkpoint is a dict of "
            "weights, or one with a 'state_dict'"
        )
    return checkpoint


def load_safely() -> None:
    """Let mmengine, in this process, load local checkpoints by :func:`load_from_local_file`."""
    CheckpointLoader.register_scheme("", load_from_local_file, force=True)


def require_weights(model: nn.Module, checkpoint: dict) -> None:
    """Check that a checkpoint holds numbers of the kind that a model computes with.

    PyTorch would take integers for weights; another precision of floating point is fine.

    Args:
        model (nn.Module): The model, or a wrapper of it.
        checkpoint (dict): Weights by name, alone or as its ``state_dict``.

    Raises:
        UserError: If something under the name of a parameter or buffer is no tensor, or holds
            integers in place of floating-point numbers or the reverse.
    """
    weights = checkpoint.get("state_dict", checkpoint)
    model = model.module if is_model_wrapper(model) else model
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


class WeightsCheck(Hook):
    """Applies :func:`require_weights` to every checkpoint that a runner loads."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check what is about to be copied into the model."""
        require_weights(runner.model, checkpoint)


def _history_statistic(owner: type, name: str):
    """The ``getattr`` of checkpoints, which finds the statistics of the log's history only."""
    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise pickle.UnpicklingError(f"getattr({owner!r}, {name!r}) in a checkpoint")
    return getattr(owner, name)


def _checkpoint_types() -> list:
    """What a checkpoint of mmengine holds besides tensors: the history of the log, in numpy."""
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.int64, np.uint32)]
    methods = (_history_statistic, "builtins.getattr")
    return [HistoryBuffer, np.ndarray, np.dtype, reconstruct, scalar, *dtypes, methods]
