"""The CIFAR recipes are mmpretrain's with another backbone, and train and test on small data."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from ddf_mm.engine.launch import adapt_to_device
from ddf_mm.layers import DDFPack
from ddf_mm.models import DDFResNet_CIFAR

pytest.importorskip("mmpretrain")

from mmpretrain.datasets import CIFAR10, CIFAR100

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = {
    f"ddf-{combine}-resnet50_8xb16_cifar{classes}.py": (combine, classes)
    for combine, classes in itertools.product(("mul", "add"), (10, 100))
}


def load(recipe: str) -> Config:
    return Config.fromfile(CONFIGS / "classification" / recipe)


def inherited(base: str, folder: Path) -> Config:
    path = folder / "inherited.py"
    path.write_text(f'_base_ = "{base}"\n')
    return Config.fromfile(path)


def test_every_recipe_is_listed():
    found = {path.name for path in (CONFIGS / "classification").glob("*_cifar*.py")}
    assert found == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_the_backbone_differs_from_mmpretrains_recipe(recipe, tmp_path):
    combine, classes = RECIPES[recipe]
    ours = load(recipe)
    theirs = inherited(f"mmpretrain::resnet/resnet50_8xb16_cifar{classes}.py", tmp_path)
    assert theirs.model.backbone.type == "ResNet_CIFAR"
    theirs.model.backbone.update(type="DDFResNet_CIFAR", kernel_combine=combine)
    # Of the runtime these recipes have what the others of this package have.
    runtime = ("custom_imports", "default_hooks", "env_cfg", "randomness", "visualizer")
    differing = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    assert differing == set(runtime)
    assert ours.default_hooks.checkpoint.save_best == "accuracy/top1"


@pytest.mark.parametrize("recipe", RECIPES)
def test_inherited_through_the_package(recipe, tmp_path):
    cfg = inherited(f"ddf_mm::classification/{recipe}", tmp_path)
    init_default_scope("mmpretrain")
    from mmpretrain.registry import MODELS

    combine, classes = RECIPES[recipe]
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert type(model.backbone) is DDFResNet_CIFAR
    packs = [module for module in model.modules() if isinstance(module, DDFPack)]
    assert len(packs) == 16
    assert {pack.kernel_combine for pack in packs} == {combine}
    assert model.head.fc.out_features == classes


@pytest.fixture
def data_root(tmp_path, monkeypatch):
    """Four images of each split, in the files of both sets."""
    rng = np.random.default_rng(0)
    for kind, label in ((CIFAR10, "labels"), (CIFAR100, "fine_labels")):
        folder = tmp_path / kind.base_folder
        folder.mkdir()
        for split in ("train_list", "test_list"):
            (name, _), *_ = getattr(kind, split)
            monkeypatch.setattr(kind, split, [[name, None]])  # no md5
            entry = {"data": rng.integers(0, 256, (4, 3072), np.uint8), label: [0, 1, 2, 3]}
            (folder / name).write_bytes(pickle.dumps(entry))
    return str(tmp_path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_trains_and_tests(recipe, data_root, tmp_path):
    _, classes = RECIPES[recipe]
    cfg = copy.deepcopy(load(recipe))
    cfg.work_dir = str(tmp_path / "work")
    cfg.log_level = "WARNING"
    if recipe != next(iter(RECIPES)):  # one is enough for a whole network
        cfg.model.backbone.update(depth=26, base_channels=16)
        cfg.model.head.in_channels = 16 * 8 * 4
    cfg.train_cfg.max_epochs = 1
    cfg.default_hooks.checkpoint.update(interval=-1, save_best=None)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = data_root
    adapt_to_device(cfg)
    runner = Runner.from_cfg(cfg)
    sizes = []
    runner.model.backbone.register_forward_hook(
        lambda module, args, output: sizes.append((args[0].shape[2:], output[-1].shape[2:]))
    )
    runner.train()
    metrics = runner.test()

    assert runner.iter == 2
    assert set(sizes) == {((32, 32), (4, 4))}
    losses, _ = runner.message_hub.get_scalar("train/loss").data
    assert losses[0] == pytest.approx(math.log(classes), abs=1.0)
    assert all(block.bn3.weight.any() for block in runner.model.backbone.layer4)
    assert all(p.isfinite().all() for p in runner.model.parameters())
    assert set(metrics) == {"accuracy/top1"}
