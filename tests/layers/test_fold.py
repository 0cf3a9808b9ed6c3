"""Batch norms folded into DDFPacks: results, errors, and the toolboxes' tools."""

from __future__ import annotations

import copy

import pytest
import torch
from mmcv.cnn import ConvModule, build_conv_layer, fuse_conv_bn
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from ddf_mm.layers import DDFConv2d, DDFPack, FilterNorm, fuse_ddf_bn, switch_to_deploy
from ddf_mm.layers.shift import Shift
from ddf_mm.models import DDFResNet


def randomized(model: nn.Module) -> nn.Module:
    """In evaluation mode, with nontrivial running statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias, module.weight):
                if tensor is not None:
                    nn.init.normal_(tensor, 0.2, 0.5)
            if module.running_var is not None:
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
def test_a_pack_takes_in_the_norm_behind_it(stride, head, affine, layout, device):
    model = randomized(
        nn.Sequential(DDFPack(16, stride=stride, head=head), nn.BatchNorm2d(16, affine=affine))
    ).to(device, torch.float64)
    folded = fuse_ddf_bn(copy.deepcopy(model))
    assert norms(folded) == 0 and isinstance(folded[0].output, Shift)
    x = torch.randn(2, 16, 9, 11, dtype=torch.float64).to(device).contiguous(memory_format=layout)
    check_same(folded, model, x)
    state = copy.deepcopy(folded.state_dict())
    assert fuse_ddf_bn(folded) is folded
    assert all(torch.equal(value, folded.state_dict()[name]) for name, value in state.items())


def test_a_folded_pack_still_trains(device):
    exact = dict(dtype=torch.float64, device=device)
    model = randomized(nn.Sequential(DDFPack(8), nn.BatchNorm2d(8))).to(**exact)
    folded = fuse_ddf_bn(copy.deepcopy(model))
    x = torch.randn(2, 8, 5, 7, **exact, requires_grad=True)
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


def test_backbone_whose_packs_cannot_be_folded():
    """mmdeploy switches every backbone, in training mode."""
    x = torch.randn(2, 3, 65, 63)
    cfg = dict(depth=26, base_channels=16, kernel_combine="add")
    model = randomized(DDFResNet(**cfg))
    folded = copy.deepcopy(model).train()
    folded.switch_to_deploy()
    assert norms(folded) == 8
    check_same(folded, model, x)
    DDFResNet(**cfg, deploy=True).load_state_dict(folded.state_dict())
    model = randomized(DDFResNet(depth=26, base_channels=16))
    hook(model.layer2[0].conv2)
    folded = copy.deepcopy(model)
    folded.switch_to_deploy()
    assert norms(folded) == 1
    check_same(folded, model, x)


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
    message = r"^1\.0: the batch norm after DDFPack cannot be folded: .*"
    with pytest.raises(ValueError, match=message + reason):
        fuse_ddf_bn(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_second_norm_is_refused():
    folded = fuse_ddf_bn(randomized(nn.Sequential(DDFPack(8), nn.BatchNorm2d(8))))
    folded[1] = nn.BatchNorm2d(8).eval()
    with pytest.raises(ValueError, match="the pack has a folded norm already"):
        fuse_ddf_bn(folded)


def double_output(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda x: 2 * original(x)


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledPack(DDFPack):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledFilters(DDFPack):
    def generate_filters(self, x):
        channel, spatial = super().generate_filters(x)
        return channel.square(), spatial


class Doubled(nn.Module):
    def forward(self, value):
        return 2 * value


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda m, args, out: 2 * out)


CHANGES = {
    "pack hook": lambda m: hook(m[0]),
    "pack forward": lambda m: double_output(m[0]),
    "pack subclass": lambda m: m.insert(0, m.pop(0) and DoubledPack(8)),
    "filters subclass": lambda m: m.insert(0, m.pop(0) and DoubledFilters(8)),
    "norm hook": lambda m: hook(m[1]),
    "norm forward": lambda m: double_output(m[1]),
    "norm subclass": lambda m: m.__setitem__(1, DoubledNorm(8)),
    "norm parametrized": lambda m: parametrize.register_parametrization(m[1], "weight", Doubled()),
    "output": lambda m: setattr(m[0], "output", nn.Tanh()),
    "output hook": lambda m: hook(m[0].output),
    "FilterNorm hook": lambda m: hook(m[0].channel_branch[4]),
    "FilterNorm forward": lambda m: double_output(m[0].channel_branch[4]),
    "FilterNorm parametrized": lambda m: parametrize.register_parametrization(
        m[0].channel_branch[4], "std", Doubled()
    ),
    "FilterNorm with a mean": lambda m: m[0].channel_branch.__setitem__(
        4, FilterNorm(8, 3, "channel", running_std=True, running_mean=True)
    ),
    "FilterNorm of fixed scale": lambda m: m[0].channel_branch.__setitem__(
        4, FilterNorm(8, 3, "channel")
    ),
    "layer behind FilterNorm": lambda m: m[0].channel_branch.append(nn.Tanh()),
    "branch hook": lambda m: hook(m[0].channel_branch),
    "branch forward": lambda m: double_output(m[0].channel_branch),
    "other convolution": lambda m: m[0].channel_branch.__setitem__(1, nn.Conv2d(8, 1, 1)),
    "convolution hook": lambda m: hook(m[0].spatial_branch[0]),
    "used twice": lambda m: m.extend([m[0], m[1]]),
    "pack used without norm": lambda m: m.append(m[0]),
    "shared norm": lambda m: m.extend([DDFPack(8), m[1]]),
    "shared scale": lambda m: share_scale(m),
    "block of packs": lambda m: m.append(nn.Sequential(DDFPack(8), nn.BatchNorm2d(8))),
}


def share_scale(model: nn.Sequential) -> None:
    second = DDFPack(8)
    second.channel_branch[4].std = model[0].channel_branch[4].std
    model.extend([second, nn.BatchNorm2d(8)])


FOLDED = {
    "FilterNorm with a mean",
    "other convolution",
    "convolution hook",
    "shared scale",
    "block of packs",
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_folded_right_or_refused(name):
    model = nn.Sequential(DDFPack(8), nn.BatchNorm2d(8))
    CHANGES[name](model)
    model = randomized(model)
    x = torch.randn(2, 8, 6, 7)
    with torch.no_grad():
        want = model(x)
    before = norms(model)
    if name in FOLDED:
        fuse_ddf_bn(model)
        assert norms(model) == 0
    else:
        with pytest.raises(ValueError, match="the batch norm after DDFPack cannot be folded"):
            fuse_ddf_bn(model)
        fuse_ddf_bn(model, strict=False)
        assert norms(model) == before
    with torch.no_grad():
        got = model(x)
    assert ((got - want).abs() <= 1e-5 * want.abs().max()).all()


class HalvedConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize(
    "change, left",
    [
        (lambda m: None, 0),
        (lambda m: m.__setitem__(1, nn.BatchNorm2d(8, affine=False)), 0),
        (lambda m: m.__setitem__(1, nn.BatchNorm2d(8, track_running_stats=False)), 1),
        (lambda m: m.__setitem__(1, DoubledNorm(8)), 1),
        (lambda m: hook(m[0]), 1),
        (lambda m: double_output(m[1]), 1),
        (lambda m: m.__setitem__(0, HalvedConv(8, 8, 3)), 1),
        (lambda m: m.__setitem__(0, build_conv_layer(dict(type="ConvWS"), 8, 8, 3)), 1),
        (lambda m: m.__setitem__(0, build_conv_layer(dict(type="Conv"), 8, 8, 3)), 0),
        (lambda m: parametrizations.weight_norm(m[0]), 1),
        (lambda m: m.insert(1, nn.ReLU()), 1),
        (lambda m: m.extend([m[0], m[1]]), 2),
    ],
)
def test_convolutions_are_folded_right_or_left(change, left):
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8))
    change(model)
    model = randomized(model)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        want = model(x)
        got = switch_to_deploy(model)(x)
    assert ((got - want).abs() <= 1e-5 * want.abs().max()).all()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model) == left


@pytest.mark.parametrize("how", ["hook", "forward", "subclass"])
def test_a_relu_that_does_more_is_left_to_the_block(how):
    model = randomized(DDFResNet(depth=26, base_channels=16))
    block, seen = model.layer2[0], []
    if how == "hook":
        block.relu.register_forward_hook(lambda m, args, out: seen.append(1) or 2 * out)
    elif how == "forward":
        double_output(block.relu)
    else:

        class Squeezed(type(block)):
            def _residual_sum(self, x):
                out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
                out = self.norm3(self.conv3(self.relu(out * 0.5 - 0.1)))
                return out + self.downsample(x)

        block.__class__ = Squeezed
    folded = copy.deepcopy(model)
    folded.switch_to_deploy()
    check_same(folded, model, torch.randn(1, 3, 33, 40))
