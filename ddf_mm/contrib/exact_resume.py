"""What an interrupted training needs besides mmengine's checkpoints to go on as if it had not been.

For mmengine: :class:`KeepUntilSaved` is superfluous once ``CheckpointHook._save_checkpoint``
removes after it has written, :class:`RandomState` once ``Runner.save_checkpoint`` saves and
``Runner.resume`` restores the states of the random number generators, :class:`TrainingStateCheck`
once the latter refuses what it cannot go on from and runs no config, :func:`latest_checkpoint` once
``mmengine.runner.find_latest_checkpoint`` looks at files and not only at their names.
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

# mmengine's names of checkpoints that hold the state of a training.
_CHECKPOINT = re.compile(r"(epoch|iter)_\d+\.pth")
_POINTER = "last_checkpoint"


def latest_checkpoint(work_dir: str) -> str | None:
    """The checkpoint that a training in a work folder goes on from.

    It is the one that mmengine's ``last_checkpoint`` names, by preference in the folder itself, or,
    where that one is not whole, the newest whole one in the folder.

    Args:
        work_dir: The work folder.

    Returns:
        Its path; None if the folder has none, and the training starts from the beginning.

    Raises:
        ValueError: There are checkpoints, or one is named, but none is whole.
    """
    folder = Path(work_dir)
    pointer = folder / _POINTER
    named = pointer.read_text().strip() if pointer.is_file() else ""
    if "://" in named:
        return named
    found = [path for path in folder.glob("*.pth") if _CHECKPOINT.fullmatch(path.name)]
    candidates = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    problem = f"{named} is not whole"
    if named:
        candidates.insert(0, Path(named))
        if Path(named).parent.resolve() != folder.resolve():
            # A folder that was moved or copied keeps the old name; its own file is the right one.
            problem = f"{_POINTER} names a file in another folder, {named}"
            candidates.insert(0, folder / Path(named).name)
        elif not Path(named).exists():
            problem = f"{named} does not exist"
    for path in candidates:
        # The directory of the zip archive that torch writes is at its end.
        if path.is_file() and zipfile.is_zipfile(path):
            if named and path != Path(named):
                print_log(
                    f"{problem}; resuming from {path}", logger="current", level=logging.WARNING
                )
            return str(path)
    if found:
        raise ValueError(
            f"--resume found no whole checkpoint in {work_dir!r}, only what is left of "
            f"{', '.join(sorted(path.name for path in found))}; remove it to start anew"
        )
    if named:
        raise ValueError(
            f"--resume found no checkpoint in {work_dir!r}, and {problem}; remove {_POINTER} to "
            "start anew"
        )
    return None


class TrainingStateCheck(Hook):
    """Refuses to resume from a checkpoint that holds weights only.

    It also takes the config out of the checkpoint: mmengine, which looks in it for how many GPUs
    there were in configs of old, would run whatever Python stands there.

    Raises:
        ValueError: Once such a checkpoint has been read, before anything is taken from it.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check what :meth:`mmengine.runner.Runner.resume` is about to read."""
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
    """A storage whose files stay until :meth:`flush`; otherwise the storage that it is made of."""

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
    """Lets mmengine's CheckpointHook remove an old checkpoint after it has written the new one.

    By itself it removes them first, and a process that is killed in between leaves none.
    """

    priority = "LOWEST"  # after the CheckpointHook

    def before_train(self, runner: Runner) -> None:
        """Take the removal of files from the hook."""
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
    """Saves the state of the random numbers with each checkpoint, and goes on with it.

    The state at the end of an epoch is that at the start of the next one, whether the training was
    interrupted in between or not, and whether it validated or not. Processes of data loaders that
    live for several epochs (``persistent_workers``) keep random numbers of their own, which are
    neither saved nor restored.

    Args:
        resume: Whether to take the state from the checkpoint that is loaded.
    """

    priority = "LOW"  # before the CheckpointHook
    key = "random_state"

    def __init__(self, resume: bool = False) -> None:
        self.resume = resume
        self.states: list[dict] | None = None

    def before_train_epoch(self, runner: Runner) -> None:
        """Go on where the last epoch stopped."""
        if self.states is None:
            return
        if len(self.states) == runner.world_size:
            _set_random_state(self.states[runner.rank])
        else:
            runner.logger.warning(
                f"the checkpoint has the random numbers of {len(self.states)} processes, not of "
                f"{runner.world_size}; they start anew"
            )

    def after_train_epoch(self, runner: Runner) -> None:
        """Note where this epoch stopped, in each process."""
        self.states = all_gather_object(_random_state())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Save it, if an epoch has ended yet."""
        if self.states is not None:
            checkpoint[self.key] = self.states

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Read it."""
        if self.resume:
            self.states = checkpoint.get(self.key)


def _random_state() -> dict:
    """The state of every generator, in types that load without unpickling code."""
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
    # Loading a checkpoint may have put them on another device.
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
