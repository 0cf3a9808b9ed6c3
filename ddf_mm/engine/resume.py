"""Which checkpoint an interrupted training goes on from, and whether it can."""

from __future__ import annotations

import logging
import re
import zipfile
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from ddf_mm.engine.cli import UserError

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
        UserError: There are checkpoints, or one is named, but none is whole.
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
        raise UserError(
            f"--resume found no whole checkpoint in {work_dir!r}, only what is left of "
            f"{', '.join(sorted(path.name for path in found))}; remove it to start anew"
        )
    if named:
        raise UserError(
            f"--resume found no checkpoint in {work_dir!r}, and {problem}; remove {_POINTER} to "
            "start anew"
        )
    return None


class TrainingStateCheck(Hook):
    """Refuses to resume from a checkpoint that holds weights only.

    It also takes the config out of the checkpoint: mmengine, which looks in it for how many GPUs
    there were in configs of old, would run whatever Python stands there.

    Raises:
        UserError: Once such a checkpoint has been read, before anything is taken from it.
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
            raise UserError(
                f"--resume needs a checkpoint of a training run, but this one lacks "
                f"{', '.join(missing)}: start from its weights with --cfg-options load_from=…"
            )
