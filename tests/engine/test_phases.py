"""Errors of every kind of runner name the step that failed."""

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import METRICS, MODELS, RUNNERS
from mmengine.runner import FlexibleRunner, Runner

from ddf_mm.engine import launch
from ddf_mm.engine.cli import describe


class Custom(Runner):
    """A runner as a toolbox or a user may define it."""


class Net(BaseModel):
    def __init__(self, fails="", init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        self.fails = fails
        self.weight = torch.nn.Parameter(torch.zeros(1))
        if fails == "model":
            raise ValueError("no such depth")

    def init_weights(self):
        super().init_weights()
        if self.fails == "weights":
            raise ValueError("no such weights")

    def forward(self, x, mode="tensor"):
        if self.fails == mode:
            raise ValueError(f"no {mode}")
        if mode == "loss":
            return dict(loss=(torch.as_tensor(x).float() * self.weight).sum())
        return [dict(x=x)]


class Metric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return dict(n=len(results))


@pytest.fixture(autouse=True)
def _registered():
    with pytest.MonkeyPatch.context() as patch:
        for registry, cls in ((MODELS, Net), (METRICS, Metric), (RUNNERS, Custom)):
            patch.setitem(registry._module_dict, cls.__name__, cls)
        yield


def config(tmp_path, runner_type, dataset=({"x": 1},), **changes) -> Config:
    loader = dict(
        batch_size=1, num_workers=0, dataset=[dict(x=1)], sampler=dict(type="DefaultSampler")
    )
    cfg = Config(
        dict(
            runner_type=runner_type,
            work_dir=str(tmp_path),
            experiment_name=tmp_path.name,
            env_cfg=dict(),
            model=dict(type="Net"),
            train_dataloader=dict(loader, dataset=dataset),
            val_dataloader=dict(loader),
            train_cfg=dict(by_epoch=True, max_epochs=1),
            val_cfg=dict(),
            val_evaluator=dict(type="Metric"),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        )
    )
    cfg.merge_from_dict(changes)
    return cfg


RUNNER_TYPES = ["Runner", "FlexibleRunner", "Custom", Custom]
CASES = {
    "building the model": {"model.fails": "model"},
    "initializing the model": {"model.fails": "weights"},
    "initializing Net from the checkpoint 'no.pth' with the prefix 'net.'": {
        "model.init_cfg": dict(type="Pretrained", checkpoint="no.pth", prefix="net.")
    },
    "building the training data": {"dataset": dict(type="NoDataset")},
    "building the validation data": {"val_dataloader.sampler.type": "NoSampler"},
    "building the evaluator": {"val_evaluator.type": "NoMetric"},
    "building the optimizer": {"optim_wrapper.optimizer.type": "NoOptimizer"},
    "building the parameter schedulers": {"param_scheduler": dict(type="NoScheduler")},
    "building the hooks": {"custom_hooks": [dict(type="NoHook")]},
    "loading the checkpoint 'no.pth'": {"load_from": "no.pth"},
    "evaluating": {"model.fails": "predict"},
    "training": {"model.fails": "loss"},
}


@pytest.mark.parametrize("runner_type", RUNNER_TYPES, ids=str)
@pytest.mark.parametrize("phase", CASES)
def test_phase(tmp_path, runner_type, phase):
    with pytest.raises(Exception) as info:  # noqa: PT011
        launch.build_runner(config(tmp_path, runner_type, **CASES[phase])).train()
    assert describe(info.value).startswith(f"while {phase}: ")
    assert info.value._ddf_mm_phase[2] is (phase == "training")


@pytest.mark.parametrize("runner_type", RUNNER_TYPES, ids=str)
def test_runner_is_of_its_kind(tmp_path, runner_type):
    runner = launch.build_runner(config(tmp_path, runner_type))
    kind = dict(Runner=Runner, FlexibleRunner=FlexibleRunner).get(runner_type, Custom)
    assert isinstance(runner, kind) and type(runner).__name__ == kind.__name__
    runner.train()
    assert runner.epoch == 1


def test_a_checkpoint_that_cannot_be_written(tmp_path):
    runner = launch.build_runner(config(tmp_path, "Runner"))
    (tmp_path / "epoch_1.pth").mkdir()
    with pytest.raises(OSError) as info:  # noqa: PT011
        runner.train()
    assert describe(info.value).startswith(f"while writing '{tmp_path / 'epoch_1.pth'}': ")


def test_data_sets_are_named(tmp_path):
    one = dict(type="CocoDataset", ann_file="a.json", data_prefix=dict(img="train"))
    dataset = dict(type="ConcatDataset", datasets=[one, one])
    dataset = dict(type="RepeatDataset", times=2, dataset=dataset)
    runner = launch.build_runner(config(tmp_path, "Runner", dataset=dataset))
    with pytest.raises(KeyError) as info:
        runner.train()
    name = "CocoDataset: ann_file='a.json', data_prefix={'img': 'train'}"
    assert f" ({name}; {name}) (DDF" in describe(info.value)
