from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.fileio import get_file_backend
from mmengine.hooks import CheckpointHook

from ddf_mm.contrib import exact_resume


def save(folder: Path, name: str, age: float) -> Path:
    path = folder / name
    torch.save(dict(weight=torch.zeros(2)), path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_latest_checkpoint_is_the_one_that_mmengine_names(tmp_path):
    old, _ = save(tmp_path, "epoch_1.pth", 2), save(tmp_path, "epoch_2.pth", 1)
    (tmp_path / "last_checkpoint").write_text(str(old))
    assert exact_resume.latest_checkpoint(str(tmp_path)) == str(old)
    (tmp_path / "last_checkpoint").write_text("s3://bucket/epoch_7.pth")
    assert exact_resume.latest_checkpoint(str(tmp_path)) == "s3://bucket/epoch_7.pth"


@pytest.mark.parametrize("pointer", [None, "", "gone.pth", "epoch_3.pth"])
def test_latest_checkpoint_is_otherwise_the_newest_complete_one(tmp_path, pointer):
    save(tmp_path, "iter_10.pth", 3)
    newest = save(tmp_path, "epoch_2.pth", 2)
    part = save(tmp_path, "epoch_3.pth", 1)
    part.write_bytes(part.read_bytes()[:-50])
    # Not a checkpoint of the training: it has no state of the optimizer.
    save(tmp_path, "best_accuracy_epoch_2.pth", 0)
    if pointer is not None:
        (tmp_path / "last_checkpoint").write_text(pointer and str(tmp_path / pointer))
    assert exact_resume.latest_checkpoint(str(tmp_path)) == str(newest)


@pytest.mark.parametrize("there", [False, True], ids=["moved", "copied"])
@pytest.mark.parametrize("own", ["epoch_2.pth", "epoch_1.pth", None])
def test_a_pointer_to_another_folder(tmp_path, monkeypatch, there, own):
    """Preferred are the file of that name in the work folder, the named file, then the newest."""
    lines = []
    monkeypatch.setattr(exact_resume, "print_log", lambda line, **kwargs: lines.append(line))
    other, folder = tmp_path / "other", tmp_path / "work"
    for path in (other, folder):
        path.mkdir()
    (folder / "last_checkpoint").write_text(str(other / "epoch_2.pth"))
    if there:
        save(other, "epoch_2.pth", 0)
    if own:
        save(folder, own, 5)
    expected = other / "epoch_2.pth" if there else folder / "epoch_1.pth"
    expected = folder / own if own == "epoch_2.pth" else expected
    told = f"last_checkpoint names a file in another folder, {other / 'epoch_2.pth'}"
    if not there and not own:
        with pytest.raises(ValueError, match=f"no checkpoint in .*, and {told}; remove"):
            exact_resume.latest_checkpoint(str(folder))
        return
    assert exact_resume.latest_checkpoint(str(folder)) == str(expected)
    assert lines == ([f"{told}; resuming from {expected}"] if expected.parent == folder else [])


def test_no_checkpoint_or_only_incomplete_ones(tmp_path):
    assert exact_resume.latest_checkpoint(str(tmp_path)) is None
    assert exact_resume.latest_checkpoint(str(tmp_path / "nowhere")) is None
    save(tmp_path, "epoch_1.pth", 0).write_bytes(b"")
    with pytest.raises(ValueError, match="no complete checkpoint in .*only the incomplete epoch_1"):
        exact_resume.latest_checkpoint(str(tmp_path))


def test_training_state_check():
    check = exact_resume.TrainingStateCheck()
    check.after_load_checkpoint(None, dict(meta=dict(epoch=1, iter=2), message_hub={}))
    for checkpoint, missing in (
        (dict(weight=1), "meta.epoch, meta.iter, message_hub"),
        (dict(meta=dict(epoch=1, iter=2), state_dict={}), "lacks message_hub"),
    ):
        with pytest.raises(ValueError, match=missing):
            check.after_load_checkpoint(None, checkpoint)


def test_config_of_a_checkpoint_is_not_run():
    """mmengine would execute it as a config file in Python."""
    checkpoint = dict(meta=dict(epoch=1, iter=2, config="import os"), message_hub={})
    exact_resume.TrainingStateCheck().after_load_checkpoint(None, checkpoint)
    assert "config" not in checkpoint["meta"]


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


def test_weights_to_start_from_do_not_set_the_random_state():
    hook = exact_resume.RandomState()
    hook.after_load_checkpoint(None, dict(random_state=[exact_resume._random_state()]))
    assert hook.states is None
