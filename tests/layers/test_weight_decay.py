"""FilterNorm's parameters in the parameter groups of the optimizer constructors."""

from __future__ import annotations

import pytest
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

from ddf_mm.layers import FilterNorm
from ddf_mm.models import DDFResNet


def network() -> nn.Module:
    model = nn.Module()
    model.backbone = DDFResNet(26, base_channels=8)
    # No network of the package has a learned shift.
    model.norm = FilterNorm(2, 3, "spatial", running_std=True, running_mean=True)
    model.get_layer_depth = lambda name: model.backbone.get_layer_depth(name, "backbone.")
    return model


def decays(model: nn.Module, paramwise_cfg: dict, **optim_wrapper) -> dict[str, float]:
    """Weight decay of each parameter, with a base value of 1."""
    cfg = dict(optimizer=dict(type="SGD", lr=1.0, weight_decay=1.0), **optim_wrapper)
    optimizer = build_optim_wrapper(model, ConfigDict(cfg, paramwise_cfg=paramwise_cfg))
    found = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    return {name: found[parameter] for name, parameter in model.named_parameters()}


CONSTRUCTORS = [
    dict(),
    dict(constructor="mmpretrain.LearningRateDecayOptimWrapperConstructor"),
]


@pytest.mark.parametrize("constructor", CONSTRUCTORS, ids=["default", "mmpretrain's by layer"])
def test_a_filter_norm_is_a_norm_to_optimizer_constructors(constructor):
    if constructor:
        pytest.importorskip("mmpretrain")
        init_default_scope("mmpretrain")
    model = network()
    found = decays(model, dict(norm_decay_mult=0.0), **constructor)
    of_norms = {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, (FilterNorm, nn.BatchNorm2d))
        for own, _ in module.named_parameters(recurse=False)
    }
    assert {"norm.std", "norm.mean", "backbone.layer1.0.conv2.channel_branch.4.std"} < of_norms
    assert found == {name: 0.0 if name in of_norms else 1.0 for name in found}


@pytest.mark.parametrize("constructor", CONSTRUCTORS, ids=["default", "mmpretrain's by layer"])
def test_flat_decay_mult_and_custom_keys_reach_it(constructor):
    if constructor:
        pytest.importorskip("mmpretrain")
        init_default_scope("mmpretrain")
    model = network()
    found = decays(model, dict(flat_decay_mult=0.0), **constructor)
    assert found == {name: float(p.ndim > 1) for name, p in model.named_parameters()}
    custom = dict(bias_decay_mult=0.0, custom_keys={".mean": dict(decay_mult=0.0)})
    found = decays(model, custom, **constructor)
    assert found["norm.mean"] == 0.0 and found["norm.std"] == 1.0
    assert found["backbone.layer1.0.conv2.spatial_branch.0.bias"] == 0.0


def test_other_code_for_norms_leaves_it_alone():
    """Code that initializes or freezes public norm classes does not affect it."""
    norm = FilterNorm(2, 3, "spatial", running_std=True)
    public = [getattr(nn, name) for name in dir(nn) if name.endswith(("Norm", "1d", "2d", "3d"))]
    assert not any(isinstance(norm, kind) for kind in public)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm))[0] is norm
    copied = FilterNorm(2, 3, "spatial", running_std=True)
    copied.load_state_dict({"std": norm.std.data})  # of the official code: without metadata
    assert (copied.std == norm.std).all()
