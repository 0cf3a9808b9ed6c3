"""Resumes an interrupted training so that its results are those of an uninterrupted one.

For mmengine: :class:`KeepUntilSaved` is superfluous once ``CheckpointHook._save_checkpoint``
removes old checkpoints after it has written the new one, :class:`RandomState` once
``Runner.save_checkpoint`` saves and ``Runner.resume`` restores the states of the random number
generators, :class:`TrainingStateCheck` once the latter rejects checkpoints without a training state
and does not execute the config in them, :func:`latest_checkpoint` once
``mmengine.runner.find_latest_checkpoint`` checks that the file exists and is complete.
"""

from __future__ import annotations

import logging
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

# File names of mmengine's checkpoints of a training.
_CHECKPOINT = re.compile(r"(epoch|iter)_\d+\.pth")
_POINTER = "last_checkpoint"


def latest_checkpoint(work_dir: str) -> str | None:
    """The checkpoint from which a training in a work folder is resumed.

    It is the one that mmengine's file ``last_checkpoint`` names, preferably in the folder itself;
    if that file is incomplete, the newest complete checkpoint in the folder.

    Args:
        work_dir: The work folder.

    Returns:
        Its path; None if the folder has no checkpoint.

    Raises:
        ValueError: There are checkpoints, or one is named, but none is complete.
    """
    folder = Path(work_dir)
    pointer = folder / _POINTER
    named = pointer.read_text().strip() if pointer.is_file() else ""
    if "://" in named:
        return named
    found = [path for path in folder.glob("*.pth") if _CHECKPOINT.fullmatch(path.name)]
    candidates = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    problem = f"{named} is not complete"
    if named:
        candidates.insert(0, Path(named))
        if Path(named).parent.resolve() != folder.resolve():
            # In a folder that was moved or copied, last_checkpoint has the old path.
            problem = f"{_POINTER} names a file in another folder, {named}"
            candidates.insert(0, folder / Path(named).name)
        elif not Path(named).exists():
            problem = f"{named} does not exist"
    for path in candidates:
        # The central directory of torch's zip archive is at its end, so that a truncated file is
        # not a zip file.
        if path.is_file() and zipfile.is_zipfile(path):
            if named and path != Path(named):
                print_log(
                    f"{problem}; resuming from {path}", logger="current", level=logging.WARNING
                )
            return str(path)
    if found:
        raise ValueError(
            f"--resume found no complete checkpoint in {work_dir!r}, only the incomplete "
            f"{', '.join(sorted(path.name for path in found))}; remove it to start from the "
            "beginning"
        )
    if named:
        raise ValueError(
            f"--resume found no checkpoint in {work_dir!r}, and {problem}; remove {_POINTER} to "
            "start from the beginning"
        )
    return None


class TrainingStateCheck(Hook):
    """Rejects resuming from a checkpoint that has weights only.

    It also removes the config from the checkpoint: mmengine, which reads the number of GPUs of old
    configs from it, would execute any Python code in it.

    Raises:
        ValueError: After such a checkpoint has been read, before anything of it is used.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check the fields that :meth:`mmengine.runner.Runner.resume` reads next."""
        meta = checkpoint.get("meta")
        meta = meta if isinstance(meta, dict) else {}
        meta.pop("config", None)
        missing = [f"meta.{key}" for key in ("epoch", "iter") if key not in meta]
        if "message_hub" not in checkpoint:
            missing.append("message_hub")
        if missing:
            raise ValueError(
                f"--resume needs a checkpoint of a training run, but this one lacks "
                f"{', '.join(missing)}: start from its weights with --cfg-options load_from=…"
            )


class _RemovesLater:
    """Wraps a file backend and defers removals until :meth:`flush`."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._outdated: list[tuple[Any, tuple]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, *args: str) -> None:
        self._outdated.append((self._backend.remove, args))

    def rmtree(self, *args: str) -> None:
        self._outdated.append((self._backend.rmtree, args))

    def flush(self) -> None:
        while self._outdated:
            function, args = self._outdated.pop()
            function(*args)


class KeepUntilSaved(Hook):
    """Makes mmengine's CheckpointHook remove an old checkpoint after it has written the new one.

    By default it removes the old one first, and a process that is killed in between leaves none.
    """

    priority = "LOWEST"  # after the CheckpointHook

    def before_train(self, runner: Runner) -> None:
        """Replace the file backend of the hooks."""
        self.storages = []
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook):
                hook.file_backend = _RemovesLater(hook.file_backend)
                self.storages.append(hook.file_backend)

    def _flush(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        for storage in self.storages:
            storage.flush()

    # After a checkpoint of an iteration or of an epoch, and after a new best one.
    after_train_iter = after_train_epoch = after_val_epoch = _flush


class RandomState(Hook):
    """Saves the states of the random number generators in each checkpoint and restores them.

    An epoch starts with the state at the end of the previous one, whether or not the training was
    interrupted or validated in between. Worker processes of data loaders that live for several
    epochs (``persistent_workers``) have their own generators, which are neither saved nor restored.

    Args:
        resume: Whether to restore the state from the checkpoint that is loaded.
    """

    priority = "LOW"  # before the CheckpointHook
    key = "random_state"

    def __init__(self, resume: bool = False) -> None:
        self.resume = resume
        self.states: list[dict] | None = None

    def before_train_epoch(self, runner: Runner) -> None:
        """Restore the state at the end of the last epoch."""
        if self.states is None:
            return
        if len(self.states) == runner.world_size:
            _set_random_state(self.states[runner.rank])
        else:
            runner.logger.warning(
                f"the checkpoint has the random states of {len(self.states)} processes, not of "
                f"{runner.world_size}; they are not restored"
            )

    def after_train_epoch(self, runner: Runner) -> None:
        """Record the states of all processes."""
        self.states = all_gather_object(_random_state())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Save the states, unless no epoch has ended yet."""
        if self.states is not None:
            checkpoint[self.key] = self.states

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Read the states if the training is resumed."""
        if self.resume:
            self.states = checkpoint.get(self.key)


def _random_state() -> dict:
    """The states of all generators, in types that ``torch.load(weights_only=True)`` accepts."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = dict(
        python=random.getstate(),
        numpy=(kind, keys.tolist(), position, has_gauss, gauss),
        torch=torch.get_rng_state(),
    )
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    # The checkpoint may have been loaded with a map_location.
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
