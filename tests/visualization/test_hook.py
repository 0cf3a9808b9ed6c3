"""DDFFilterVisualizationHook in a training run."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel, ImgDataPreprocessor
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from PIL import Image
from torch import nn

import ddf_mm.registry  # noqa: F401  (`ddf_mm.…` types)
from ddf_mm.engine import DDFFilterVisualizationHook
from ddf_mm.layers import DDFPack

pytest.importorskip("mmpretrain")
from pathlib import Path

CONFIG = Path(__file__).parents[2] / "configs" / "classification" / "ddf-mul-resnet26_digits.py"


def train(tmp_path: Path, hook: dict, **changes: object) -> Runner:
    cfg = Config.fromfile(CONFIG)
    cfg.work_dir = str(tmp_path)
    cfg.experiment_name = tmp_path.name
    cfg.model.backbone.base_channels = cfg.model.backbone.stem_channels = 8
    cfg.model.head.in_channels = 256
    cfg.train_dataloader.dataset.indices = 128
    cfg.val_dataloader.dataset.indices = 8
    cfg.train_cfg.max_epochs = 2
    cfg.default_hooks.checkpoint = None
    cfg.custom_hooks = [dict(type="ddf_mm.DDFFilterVisualizationHook", **hook)]
    cfg.merge_from_dict(changes)
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def pictures(tmp_path: Path) -> dict[str, np.ndarray]:
    return {p.stem: np.asarray(Image.open(p)) for p in tmp_path.glob("*/vis_data/vis_image/*.png")}


def test_draws_before_and_during_training(tmp_path):
    train(tmp_path, dict(stages=[1, 2], points=[[3, 4], [40, 30]]))
    drawn = pictures(tmp_path)
    names = {f"{name}_{n}" for name in ("ddf_filters", "ddf_combined_filters") for n in (0, 1, 2)}
    assert set(drawn) == names
    # The same image and points, different filters.
    first, last = drawn["ddf_filters_0"], drawn["ddf_filters_2"]
    assert first.shape == last.shape and (first != last).any()


def test_iterations_without_validation_or_combined_filters(tmp_path):
    train(
        tmp_path,
        dict(interval=3, by_epoch=False, combined=False, layers=["backbone.layer1.0.conv2"]),
        val_dataloader=None,
        val_cfg=None,
        val_evaluator=None,
    )
    assert set(pictures(tmp_path)) == {"ddf_filters_0", "ddf_filters_3"}


def test_training_is_the_same_with_it(tmp_path):
    weights = []
    for name, interval in (("every", 1), ("never", 99)):
        (tmp_path / name).mkdir()
        runner = train(tmp_path / name, dict(interval=interval, stages=[1], combined=False))
        weights.append(runner.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(interval=0), ValueError, "interval must be at least 1, got 0"),
        (dict(interval=1.5), TypeError, "interval must be an int"),
        (dict(sample=-1), ValueError, "sample must be at least 0, got -1"),
        (dict(points=[]), ValueError, "points must hold at least one pixel"),
        (dict(points=[(1, 2, 3)]), ValueError, r"pairs \(x, y\) of whole numbers, got \(1, 2, 3\)"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        HOOKS.build(dict(type="DDFFilterVisualizationHook", **arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sample=8), "ValueError: sample must be an index .* has 8 images, got 8"),
        (dict(stages=[9]), "ValueError: stages 9: no DDF layers there"),
        (dict(points=[(99, 0)]), "ValueError: points 99,0 is outside"),
    ],
)
def test_never_ends_a_training(tmp_path, arguments, message):
    train(tmp_path, arguments)
    (log,) = tmp_path.glob("*/*.log")
    lines = [
        line for line in log.read_text().splitlines() if "DDFFilterVisualizationHook d" in line
    ]
    assert len(lines) == 1
    assert re.search(f"draws nothing from now on: {message}", lines[0])
    assert not pictures(tmp_path)


def test_a_visualizer_that_fails(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("mmengine.visualization.LocalVisBackend.add_image", fail)
    runner = train(tmp_path, dict(stages=[1]))
    assert runner.epoch == 2
    (log,) = tmp_path.glob("*/*.log")
    assert log.read_text().count("OSError: No space left on device") >= 1


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_images_of_other_channels(channels):
    class Net(BaseModel):
        def __init__(self):
            super().__init__(ImgDataPreprocessor())
            self.conv = nn.Conv2d(channels, 4, 1)
            self.ddf = DDFPack(4)

        def forward(self, inputs, data_samples=None, mode="predict"):
            return list(self.ddf(self.conv(inputs)))

    shown, lines = [], []
    runner = SimpleNamespace(
        model=Net(), epoch=0, logger=SimpleNamespace(error=lambda line, **_: lines.append(line)),
        val_loop=SimpleNamespace(dataloader=SimpleNamespace(
            dataset=[dict(inputs=torch.randint(0, 256, (channels, 9, 8), dtype=torch.uint8))]
        )),
        visualizer=SimpleNamespace(add_image=lambda name, image, step: shown.append(name)),
    )  # fmt: skip
    DDFFilterVisualizationHook().before_train(runner)
    assert (shown, lines) == (["ddf_filters", "ddf_combined_filters"], [])
