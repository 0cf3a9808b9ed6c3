"""Batch norms folded into DDFPacks: same results, refusals, and the ways of the toolboxes."""

from __future__ import annotations

import copy

import pytest
import torch
from mmcv.cnn import ConvModule, fuse_conv_bn
from torch import nn

from ddf_mm.layers import DDFConv2d, DDFPack, fuse_ddf_bn, switch_to_deploy
from ddf_mm.layers.pack import Shift
from ddf_mm.models import DDFResNet


def randomized(model: nn.Module) -> nn.Module:
    """In evaluation mode, with norms that have seen something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias, module.weight):
                if tensor is not None:
                    nn.init.normal_(tensor, 0.2, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def check_same(folded: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        got, want = folded(x), model(x)
    if isinstance(want, tuple):
        got, want = got[-1], want[-1]
    assert ((got - want).abs() <= 1e-5 * want.abs().max()).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("stride, head", [(1, 1), (2, 2)])
def test_a_pack_takes_in_the_norm_behind_it(stride, head, affine, layout):
    model = randomized(
        nn.Sequential(DDFPack(16, stride=stride, head=head), nn.BatchNorm2d(16, affine=affine))
    )
    folded = fuse_ddf_bn(copy.deepcopy(model))
    assert norms(folded) == 0 and isinstance(folded[0].output, Shift)
    check_same(folded, model, torch.randn(2, 16, 9, 11).contiguous(memory_format=layout))
    state = copy.deepcopy(folded.state_dict())
    assert fuse_ddf_bn(folded) is folded
    assert all(torch.equal(value, folded.state_dict()[name]) for name, value in state.items())


def test_a_folded_pack_still_trains():
    model = randomized(nn.Sequential(DDFPack(8), nn.BatchNorm2d(8)))
    folded = fuse_ddf_bn(copy.deepcopy(model))
    x = torch.randn(2, 8, 5, 7, requires_grad=True)
    grads = [torch.autograd.grad(net(x).square().sum(), x)[0] for net in (model, folded)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_conv_module(bias):
    module = ConvModule(
        8, 8, 3, padding=1, bias=bias, conv_cfg=dict(type="DDF"), norm_cfg=dict(type="BN")
    )
    model = randomized(nn.Sequential(module))
    if bias:
        nn.init.normal_(module.conv.bias)
    folded = fuse_ddf_bn(copy.deepcopy(model))
    assert isinstance(folded[0].conv, DDFConv2d) and norms(folded) == 0
    check_same(folded, model, torch.randn(2, 8, 6, 5))


@pytest.mark.parametrize("deep_stem", [True, False])
def test_backbone_without_norms(deep_stem, tmp_path):
    cfg = dict(depth=26, deep_stem=deep_stem, base_channels=16)
    model = randomized(DDFResNet(**cfg))
    folded = copy.deepcopy(model)
    folded.switch_to_deploy()
    assert norms(folded) == 0
    assert sum(isinstance(m, Shift) and m.relu for m in folded.modules()) == 8
    x = torch.randn(2, 3, 65, 63)
    check_same(folded, model, x)
    loaded = DDFResNet(**cfg, deploy=True)
    loaded.load_state_dict(folded.state_dict())
    check_same(loaded, model, x)


def test_only_packs_are_folded_by_fuse_ddf_bn_and_only_convolutions_by_mmcv():
    model = randomized(DDFResNet(depth=26, base_channels=16))
    packs = sum(isinstance(module, DDFPack) for module in model.modules())
    x = torch.randn(1, 3, 33, 40)
    by_us, by_mmcv = fuse_ddf_bn(copy.deepcopy(model)), fuse_conv_bn(copy.deepcopy(model))
    assert norms(by_us) == norms(model) - packs and norms(by_mmcv) == packs
    check_same(by_us, model, x)
    check_same(by_mmcv, model, x)
    check_same(switch_to_deploy(by_mmcv), model, x)


def test_another_activation_is_left_to_the_block():
    model = randomized(DDFResNet(depth=26, base_channels=16))
    for block in model.layer1:
        block.relu = nn.GELU()
    folded = fuse_ddf_bn(copy.deepcopy(model))
    check_same(folded, model, torch.randn(1, 3, 33, 40))


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: (DDFPack(8), nn.BatchNorm2d(8).train()), r"in training mode; call eval\(\) first"),
        (lambda: (DDFPack(8, kernel_combine="add"), nn.BatchNorm2d(8)), "kernel_combine 'add'"),
        (
            lambda: (DDFPack(8), nn.BatchNorm2d(8, track_running_stats=False)),
            "no running statistics",
        ),
        (lambda: (DDFPack(8), nn.BatchNorm2d(4)), "it has 4 channels, the pack 8"),
    ],
)
def test_what_cannot_be_folded_is_refused_and_nothing_changed(make, reason):
    first = randomized(nn.Sequential(DDFPack(8), nn.BatchNorm2d(8)))
    pack, norm = make()
    training = norm.training and "training" in reason
    model = nn.Sequential(first, nn.Sequential(pack.eval(), norm.train(training)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"^1\.0: DDFPack cannot take in .*" + reason.split(".*")[-1]
    ):
        fuse_ddf_bn(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_second_norm_is_refused():
    folded = fuse_ddf_bn(randomized(nn.Sequential(DDFPack(8), nn.BatchNorm2d(8))))
    folded[1] = nn.BatchNorm2d(8).eval()
    with pytest.raises(ValueError, match="the pack has taken in another one"):
        fuse_ddf_bn(folded)
