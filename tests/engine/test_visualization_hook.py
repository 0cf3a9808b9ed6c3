"""DDFFilterVisualizationHook in a training run."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from PIL import Image

import ddf_mm.registry  # noqa: F401  (`ddf_mm.…` types)
from ddf_mm.engine import DDFFilterVisualizationHook

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
    # The same image and points, other filters.
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


def test_a_sample_that_is_not_there():
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=[1, 2]))
    hook = DDFFilterVisualizationHook(sample=2)
    with pytest.raises(ValueError, match="sample must be an index .* has 2 images, got 2"):
        hook.before_train(SimpleNamespace(val_loop=loop))
