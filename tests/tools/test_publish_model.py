"""tools/publish_model.py, on checkpoints that mmengine's Runner writes."""

from __future__ import annotations

import hashlib
import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

TOOL = Path(__file__).resolve().parents[2] / "tools" / "publish_model.py"


class Line(BaseModel):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 1)

    def forward(self, inputs, mode="tensor"):
        out = self.fc(inputs)
        return dict(loss=out.square().mean()) if mode == "loss" else out


@pytest.fixture
def trained(tmp_path) -> Path:
    """A checkpoint of a training with a moving average of the weights."""
    runner = Runner(
        model=Line(),
        work_dir=str(tmp_path),
        train_dataloader=dict(
            batch_size=2,
            dataset=torch.ones(4, 1).unbind(),
            sampler=dict(type="DefaultSampler", shuffle=False),
            collate_fn=lambda batch: dict(inputs=torch.stack(batch)),
        ),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        custom_hooks=[dict(type="EMAHook", momentum=0.5)],
        experiment_name="publish",
        log_level="ERROR",
        cfg=dict(note="the config"),
    )
    runner.train()
    torch.save(runner.model.state_dict(), tmp_path / "as_trained.pth")
    return tmp_path / "epoch_1.pth"


def publish(monkeypatch, capsys, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")
    return capsys.readouterr().out


def refused(monkeypatch, capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as error:
        publish(monkeypatch, capsys, *arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    return message


def test_averaged_weights_and_what_inferencers_read(trained, monkeypatch, capsys):
    printed = publish(monkeypatch, capsys, trained, trained.parent / "line.pth", "--hash-name")
    (path,) = trained.parent.glob("line-*.pth")
    assert printed.splitlines()[0] == str(path)
    assert "left out  ema_state_dict, message_hub, optimizer\n" in printed
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"line-{digest[:8]}.pth" and digest in printed
    # Only tensors, numbers and text, which torch loads by default.
    published = torch.load(path, weights_only=True)
    original = torch.load(trained, weights_only=False)
    assert set(published) == {"meta", "state_dict"}
    torch.testing.assert_close(published["state_dict"], original["state_dict"], rtol=0, atol=0)
    assert "the config" in published["meta"]["cfg"]
    assert published["meta"]["epoch"] == 1
    assert not {"seed", "experiment_name", "time"} & set(published["meta"])


def test_weights_as_trained(trained, monkeypatch, capsys):
    options = ["--no-ema", "--no-config", "--overwrite"]
    path = trained.parent / "line.pth"
    path.touch()
    assert "exists; --overwrite replaces it" in refused(monkeypatch, capsys, trained, path)
    publish(monkeypatch, capsys, trained, path, *options)
    published = torch.load(path, weights_only=True)
    expected = torch.load(trained.parent / "as_trained.pth")
    torch.testing.assert_close(published["state_dict"], expected, rtol=0, atol=0)
    averaged = torch.load(trained, weights_only=False)["state_dict"]
    assert not torch.equal(averaged["fc.weight"], expected["fc.weight"])
    assert "cfg" not in published["meta"]


def test_refusals(tmp_path, monkeypatch, capsys):
    plain, state = tmp_path / "plain.pth", tmp_path / "state.pth"
    torch.save(dict(weight=torch.zeros(1)), plain)
    torch.save(dict(state_dict=dict(weight=torch.zeros(1))), state)
    out = tmp_path / "out.pth"
    for arguments, message in [
        ([tmp_path / "no.pth", out], "no.pth' is not a file"),
        ([state, tmp_path / "no" / "out.pth"], "is in a folder that does not exist"),
        ([plain, out], "has no 'state_dict': it is not a checkpoint of a Runner"),
        ([state, out, "--no-ema"], "has no moving average, which --no-ema would omit"),
    ]:
        assert message in refused(monkeypatch, capsys, *arguments)
    assert not list(tmp_path.glob("out*"))
