import copy
import functools
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

from ddf_mm.engine import checkpoints
from ddf_mm.engine.cli import UserError


def test_require_checkpoint(tmp_path):
    for address in ("https://host/a.pth", "torchvision://resnet50", "s3://bucket/a.pth"):
        checkpoints.require_checkpoint(address, "checkpoint")
    checkpoint = tmp_path / "a.pth"
    checkpoint.touch()
    checkpoints.require_checkpoint(str(checkpoint), "checkpoint")
    for path in (tmp_path, tmp_path / "b.pth"):
        with pytest.raises(UserError, match="--resume .* is not a file"):
            checkpoints.require_checkpoint(str(path), "--resume")


class _Program:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (torch.save, r"a.pth' was not loaded: it contains \w+.mkdir, which could"),
        # The format of torch before 1.6, and a plain pickle.
        (
            functools.partial(torch.save, _use_new_zipfile_serialization=False),
            r"a.pth' is not a checkpoint that torch can read: .* GLOBAL \w+.mkdir ",
        ),
        (
            lambda value, path: path.write_bytes(pickle.dumps(value, 2)),
            r"a.pth' is not a checkpoint that torch can read: .* GLOBAL \w+.mkdir ",
        ),
    ],
)
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, save, message):
    path, made = tmp_path / "a.pth", tmp_path / "made"
    save(dict(state_dict=dict(weight=_Program(str(made)))), path)
    with pytest.raises(UserError, match=message):
        checkpoints.load_from_local_file(str(path))
    assert not made.exists()


@pytest.mark.parametrize(
    "content", [b"", b"garbage" * 100, b"root:x:0:0\n", b"PK\x03\x04" + bytes(100)]
)
def test_unreadable_checkpoint(tmp_path, content):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.pth' is not a checkpoint that torch can read"):
        checkpoints.load_from_local_file(str(path))


def test_missing_checkpoint_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoints.load_from_local_file(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("content", [[1], dict(state_dict=None), {1: torch.zeros(1)}])
def test_no_weights_by_name(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"a.pth' contains a (list|dict), but a checkpoint is a dict"
    ):
        checkpoints.load_from_local_file(str(tmp_path / "a.pth"))


class Classifier(BaseModel):
    def __init__(self, classes: int = 2):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, classes)

    def forward(self, inputs=None, data_samples=None, mode="tensor"):
        return dict(loss=self.head(self.norm(torch.rand(4, 2))).sum())


@pytest.fixture
def make_runner(tmp_path):
    checkpoints.load_safely()

    def make(kind: type = Runner, classes: int = 2, **kwargs) -> Runner:
        name = f"{tmp_path}{len(list(tmp_path.iterdir()))}"
        loader = dict(batch_size=1, num_workers=0, dataset=[0], sampler=dict(type="DefaultSampler"))
        optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1))
        runner = kind(
            Classifier(classes), work_dir=str(tmp_path / "work"), train_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=1), optim_wrapper=optim_wrapper,
            log_level="ERROR", experiment_name=name, cfg=Config(dict(a=1)), **kwargs,
        )  # fmt: skip
        runner.register_hook(checkpoints.WeightsCheck())
        return runner

    return make


def forms(weights: dict) -> dict[str, dict]:
    """The formats that a checkpoint may have; the first is that of a Runner."""
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    return dict(
        runner=dict(state_dict=weights, meta={}), bare=weights, wrapped=dict(state_dict=wrapped)
    )


@pytest.mark.parametrize("kind", [Runner, FlexibleRunner])
@pytest.mark.parametrize("form", ["runner", "bare", "wrapped"])
def test_a_head_of_other_classes_with_a_moving_average(make_runner, tmp_path, form, kind):
    """Like without EMAHook, weights that match are loaded, also into the averaged model."""
    source = Classifier()
    nn.init.constant_(source.norm.weight, 3)
    torch.save(forms(source.state_dict())[form], tmp_path / "a.pth")
    hook = EMAHook(momentum=1e-9)  # the average stays at its initial value
    runner = make_runner(kind, 5, load_from=str(tmp_path / "a.pth"), custom_hooks=[hook])
    runner.train()
    average = hook.ema_model.module.norm.weight
    torch.testing.assert_close(average, torch.full((2,), 3.0), atol=0.2, rtol=0)
    assert runner.model.head.weight.shape == (5, 2)


def test_versions_of_modules_stay_with_weights_by_themselves():
    weights = Classifier().state_dict()
    checkpoint = copy.copy(weights)
    runner = SimpleNamespace(model=Classifier(), hooks=[], _resume=False)
    checkpoints.WeightsCheck().after_load_checkpoint(runner, checkpoint)
    assert list(checkpoint) == ["state_dict"]
    assert checkpoint["state_dict"]._metadata == weights._metadata


@pytest.mark.parametrize("kind", [Runner, FlexibleRunner])
@pytest.mark.parametrize("form", ["runner", "bare", "wrapped"])
def test_a_checkpoint_of_another_model_is_refused(make_runner, tmp_path, kind, form):
    weights = dict(Classifier(5).state_dict(), extra=torch.zeros(1))
    del weights["norm.bias"]
    torch.save(forms(weights)[form], tmp_path / "a.pth")
    runner = make_runner(kind)
    checkpoints.require_matching_checkpoint(runner)
    if kind is FlexibleRunner:
        runner.strategy.prepare(runner.model)
    message = (
        "a.pth' does not match the model: missing: norm.bias; unexpected: extra; of another size: "
        "head.weight, head.bias; --allow-partial"
    )
    with pytest.raises(UserError, match=message):
        runner.load_checkpoint(str(tmp_path / "a.pth"))
    with pytest.raises(UserError, match=message):
        checkpoints.load_checkpoint(Classifier(), str(tmp_path / "a.pth"), False)


class Particular(Classifier):
    """Rejects all weights with its own message."""

    def _load_from_state_dict(self, state_dict, prefix, meta, strict, missing, unexpected, errors):
        errors.append("the moon is not full")


def test_a_mismatch_that_names_and_sizes_do_not_explain(tmp_path):
    torch.save(Classifier().state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="does not match the model: (?s:.*)the moon is not full$"):
        checkpoints.load_checkpoint(Particular(), str(tmp_path / "a.pth"))
