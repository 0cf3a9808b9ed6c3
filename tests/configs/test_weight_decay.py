"""No recipe decays FilterNorm's parameters if it does not decay those of other norms."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

import ddf_mm  # noqa: F401  (`mmseg::` in bases)
from ddf_mm.layers import FilterNorm

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(
    str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.py") if path.parts[-2] != "_base_"
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_filter_norm_has_the_decay_of_a_norm(recipe):
    for toolbox in ("mmpretrain", "mmdet", "mmseg"):
        pytest.importorskip(toolbox)
    cfg = Config.fromfile(CONFIGS / recipe)
    init_default_scope(cfg.get("default_scope", "mmengine"))
    model = nn.Sequential(
        nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), FilterNorm(1, 3, "channel", running_std=True)
    )
    cfg.optim_wrapper.type = "mmengine.OptimWrapper"  # mixed precision needs a GPU
    cfg.optim_wrapper.pop("loss_scale", None)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    conv, norm, filter_norm = model
    assert decay[filter_norm.std] == decay[norm.weight]
    assert recipe.startswith("upsampling") or decay[conv.weight] > 0
