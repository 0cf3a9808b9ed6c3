from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import EMAHook
from torch import nn

from ddf_mm.contrib.checkpoint_form import OneCheckpointForm


def make_runner(*hooks: object, model: nn.Module | None = None, resume: bool = False):
    return SimpleNamespace(model=model or nn.BatchNorm1d(2), hooks=list(hooks), _resume=resume)


def test_weights_by_themselves_and_of_a_wrapped_model():
    weights = nn.BatchNorm1d(2).state_dict()
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    for given in (copy.copy(weights), dict(state_dict=dict(wrapped)), dict(wrapped)):
        OneCheckpointForm().after_load_checkpoint(make_runner(), given)
        assert list(given) == ["state_dict"]
        assert list(given["state_dict"]) == list(weights)


@pytest.mark.parametrize(("classes", "resume"), [(2, False), (5, False), (5, True)])
def test_the_average_of_another_model_is_dropped_unless_resumed(classes, resume):
    average = {"module.weight": torch.zeros(2, 3), "module.bias": torch.zeros(2)}
    average["steps"] = torch.tensor(7)
    checkpoint = dict(state_dict=nn.Linear(3, 2).state_dict(), ema_state_dict=average)
    runner = make_runner(model=nn.Linear(3, classes), resume=resume)
    OneCheckpointForm().after_load_checkpoint(runner, checkpoint)
    assert ("ema_state_dict" in checkpoint) == (classes == 2 or resume)


def test_a_moving_average_that_does_not_exist_yet_is_made_once():
    hook = EMAHook()
    runner = make_runner(hook)
    OneCheckpointForm().after_load_checkpoint(runner, nn.BatchNorm1d(2).state_dict())
    average = hook.ema_model
    hook.before_run(runner)  # as FlexibleRunner calls it, once it has loaded
    assert hook.ema_model is average
