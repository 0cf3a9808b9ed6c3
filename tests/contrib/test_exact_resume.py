from __future__ import annotations

from types import SimpleNamespace

import torch
from mmengine.fileio import get_file_backend
from mmengine.hooks import CheckpointHook

from ddf_mm.contrib import exact_resume


def test_old_checkpoints_stay_until_the_hooks_after_saving(tmp_path):
    old = tmp_path / "epoch_1.pth"
    old.touch()
    checkpoints, keep = CheckpointHook(), exact_resume.KeepUntilSaved()
    checkpoints.file_backend = get_file_backend(str(old))
    keep.before_train(SimpleNamespace(hooks=[checkpoints, keep]))
    assert checkpoints.file_backend.isfile(str(old))
    for after in (keep.after_train_iter, keep.after_train_epoch, keep.after_val_epoch):
        old.touch()
        checkpoints.file_backend.remove(str(old))
        assert old.exists()
        after(None, *([0] if after == keep.after_train_iter else []))
        assert not old.exists()


def test_random_state_of_another_number_of_processes():
    hook = exact_resume.RandomState(resume=True)
    hook.after_load_checkpoint(None, dict(random_state=[exact_resume._random_state()] * 2))
    warnings = []
    logger = SimpleNamespace(warning=warnings.append)
    before = torch.get_rng_state()
    torch.rand(1)
    hook.before_train_epoch(SimpleNamespace(world_size=3, rank=0, logger=logger))
    assert len(warnings) == 1 and "of 2 processes, not of 3" in warnings[0]
    assert not torch.equal(torch.get_rng_state(), before)
    hook.before_train_epoch(SimpleNamespace(world_size=2, rank=1, logger=logger))
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_of_another_run_bring_no_random_state():
    hook = exact_resume.RandomState()
    hook.after_load_checkpoint(None, dict(random_state=[exact_resume._random_state()]))
    assert hook.states is None
