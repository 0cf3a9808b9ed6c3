"""DDFResNet: official parameter names and sizes, and the toolboxes' ResNet arguments."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddf_mm.layers import DDFConv2d, DDFPack
from ddf_mm.models import DDFResNet, DDFResNet_CIFAR
from ddf_mm.models.ddf_resnet import DDFBottleneck

OFFICIAL = json.loads((Path(__file__).parent / "official_names.json").read_text())


def small(depth: int = 26, **arguments) -> DDFResNet:
    return DDFResNet(depth, **{"base_channels": 8, **arguments})


def image(*size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, *size)


@pytest.mark.parametrize("depth", ["50", "101"])
@pytest.mark.parametrize("combine", ["mul", "add"])
def test_names_and_shapes_are_the_official_ones(depth, combine):
    with torch.device("meta"):
        ours = DDFResNet(int(depth), kernel_combine=combine).state_dict()
    assert {name: list(value.shape) for name, value in ours.items()} == OFFICIAL[depth]


@pytest.mark.parametrize("depth, parameters", [(50, 16_843_748), (101, 28_146_912)])
def test_parameters_with_a_head_of_1000_classes(depth, parameters):
    with torch.device("meta"):
        backbone, head = DDFResNet(depth), nn.Linear(2048, 1000)
    counted = sum(p.numel() for m in (backbone, head) for p in m.parameters())
    assert counted == parameters


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (33, 31), (1, 1)])
@pytest.mark.parametrize("combine", ["mul", "add"])
def test_output_sizes_round_up_at_each_stage(size, combine):
    model = small(out_indices=(0, 1, 2, 3), kernel_combine=combine)
    outs = model(image(*size))
    for i, out in enumerate(outs):
        assert out.shape[:2] == (2, 32 * 2**i)
        assert list(out.shape[2:]) == [math.ceil(s / 2 ** (i + 2)) for s in size]
    outs[-1].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_default_is_the_last_stage_and_train_and_eval_return_the_model():
    model = small()
    outs = model(image(32, 32))
    assert isinstance(outs, tuple) and len(outs) == 1
    assert model.eval() is model and not model.training
    assert model.train() is model and model.training
    assert model.feat_dim == outs[0].shape[1]


def test_empty_batch():
    out = small().eval()(image(33, 32)[:0])
    assert out[0].shape == (0, 256, 2, 1)


def test_ddf_arguments_reach_every_pack():
    model = small(kernel_combine="add", head=2, kernel_size=5, se_ratio=0.5)
    packs = [m for m in model.modules() if isinstance(m, DDFPack)]
    assert len(packs) == 8
    for pack in packs:
        assert (pack.kernel_combine, pack.head, pack.kernel_size) == ("add", 2, 5)
        assert pack.channel_branch[1].out_channels == pack.in_channels // 2
    assert model(image(32, 32))[0].shape[-1] == 1


def test_stages_without_ddf_have_convolutions():
    model = small(stage_with_ddf=(False, True, False, True))
    kinds = [type(getattr(model, name)[0].conv2) for name in model.res_layers]
    assert kinds == [nn.Conv2d, DDFPack, nn.Conv2d, DDFPack]
    model(image(32, 32))


def test_dcn_takes_the_place_of_convolutions():
    model = small(
        stage_with_ddf=(True, False, False, False),
        dcn=dict(type="DDF"),
        stage_with_dcn=(False, False, True, True),
    )
    kinds = [type(getattr(model, name)[1].conv2) for name in model.res_layers]
    assert kinds == [DDFPack, nn.Conv2d, DDFConv2d, DDFConv2d]
    model(image(32, 32))


@pytest.mark.parametrize("frozen", [-1, 0, 2, 4])
@pytest.mark.parametrize("deep_stem", [False, True])
def test_frozen_stages(frozen, deep_stem):
    model = small(frozen_stages=frozen, deep_stem=deep_stem).train()
    stem = [model.stem] if deep_stem else [model.conv1, model.bn1]
    parts = [stem] + [[getattr(model, name)] for name in model.res_layers]
    for i, modules in enumerate(parts):
        for module in modules:
            assert module.training != (i <= frozen)
            assert all(p.requires_grad != (i <= frozen) for p in module.parameters())


def test_norm_eval_keeps_the_statistics():
    model = small(norm_eval=True).train()
    assert not any(m.training for m in model.modules() if isinstance(m, _BatchNorm))
    before = model.layer1[0].bn2.running_mean.clone()
    model(image(32, 32))
    assert (model.layer1[0].bn2.running_mean == before).all()


def test_with_cp_gives_the_same_gradients():
    plain, cp = small(), small(with_cp=True)
    cp.load_state_dict(plain.state_dict())
    x = image(33, 40)
    grads = []
    for model in (plain, cp):
        given = x.clone().requires_grad_()
        model(given)[0].square().sum().backward()
        grads.append([given.grad] + [p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_style_places_the_stride():
    for style, strides in [("pytorch", (1, 2)), ("caffe", (2, 1))]:
        block = small(style=style).layer2[0]
        assert (block.conv1.stride[0], block.conv2.stride) == strides
    assert small(style="caffe")(image(65, 33))[0].shape[2:] == (3, 2)


@pytest.mark.parametrize(
    "contract, multi_grid, expected",
    [(False, None, [4, 4]), (True, None, [2, 4]), (True, (1, 2), [1, 2])],
)
def test_dilations(contract, multi_grid, expected):
    model = small(
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        contract_dilation=contract,
        multi_grid=multi_grid,
        out_indices=(1, 3),
    )
    assert [block.conv2.dilation for block in model.layer4] == expected
    outs = model(image(33, 40))
    assert outs[0].shape[2:] == outs[1].shape[2:] == (5, 5)


@pytest.mark.parametrize("depth", [26, 50])
def test_drop_path_grows_over_the_blocks(depth):
    model = small(depth, drop_path_rate=0.2)
    blocks = [m for m in model.modules() if isinstance(m, DDFBottleneck)]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.2 * i / (len(blocks) - 1) for i in range(len(blocks))])
    model.train()(image(32, 32))


def test_avg_down_pools_before_the_1x1():
    model = small(avg_down=True)
    kinds = [type(m) for m in model.layer2[0].downsample]
    assert kinds == [nn.AvgPool2d, nn.Conv2d, nn.BatchNorm2d]
    assert [type(m) for m in model.layer1[0].downsample] == [nn.Conv2d, nn.BatchNorm2d]
    assert model(image(65, 33))[0].shape[2:] == (3, 2)


def test_deep_stem_loads_both_families_of_names():
    model = small(deep_stem=True)
    own = model.state_dict()
    assert {"stem.0.weight", "stem.1.weight", "stem.3.weight", "stem.7.running_var"} <= set(own)
    widths = (3, 4, 4, 8)
    mmpretrain_stem = nn.Sequential(
        *(
            ConvModule(widths[i], widths[i + 1], 3, padding=1, norm_cfg=dict(type="BN"))
            for i in range(3)
        )
    )
    theirs = {f"stem.{k}": v for k, v in mmpretrain_stem.state_dict().items()}
    theirs |= {k: v for k, v in own.items() if not k.startswith("stem.")}
    model.load_state_dict(theirs)
    assert (model.stem[3].weight == mmpretrain_stem[1].conv.weight).all()
    model.load_state_dict(own)


def test_in_channels_stem_channels_norm_and_few_stages():
    model = small(
        in_channels=4,
        stem_channels=12,
        num_stages=2,
        strides=(1, 2),
        dilations=(1, 1),
        out_indices=(0, 1),
        norm_cfg=dict(type="GN", num_groups=4),
    )
    assert model.conv1.weight.shape[:2] == (12, 4)
    assert isinstance(model.layer1[0].norm2, nn.GroupNorm)
    assert [o.shape[1] for o in model(image(32, 32, channels=4))] == [32, 64]


def test_plugins_are_placed_as_in_mmdet():
    model = small(
        plugins=[
            dict(
                cfg=dict(type="ContextBlock", ratio=0.25),
                stages=(False, True, False, True),
                position="after_conv3",
            ),
            dict(cfg=dict(type="NonLocal2d"), position="after_conv1"),
        ]
    )
    assert not hasattr(model.layer1[0], "context_block")
    assert model.layer2[0].context_block.in_channels == 64
    assert model.layer1[0].nonlocal_block.in_channels == 8
    model(image(32, 32))
    with pytest.raises(ValueError, match="position must be one of .*got 'before'"):
        small(plugins=[dict(cfg=dict(type="NonLocal2d"), position="before")])
    with pytest.raises(ValueError, match="plugins: stages must have one value for each stage, 4"):
        small(plugins=[dict(cfg={}, position="after_conv1", stages=(True,))])
    with pytest.raises(ValueError, match="two layers named 'nonlocal_block'"):
        small(plugins=[dict(cfg=dict(type="NonLocal2d"), position="after_conv1")] * 2)


def test_initialization_is_the_official_one():
    model = small(base_channels=64)
    model.init_weights()
    conv = model.layer1[0].conv3
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.05)
    assert all((b.norm3.weight == 0).all() for b in model.modules() if isinstance(b, DDFBottleneck))
    assert (model.layer1[0].norm2.weight == 1).all()
    pack = model.layer2[0].conv2
    squeeze = pack.channel_branch[3]
    assert squeeze.weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.05)
    assert (pack.spatial_branch[0].bias != 0).all()
    kept = small(zero_init_residual=False)
    kept.init_weights()
    assert (kept.layer1[0].norm3.weight == 1).all()


@pytest.mark.parametrize("how", ["init_cfg", "pretrained", "prefix"])
def test_pretrained_weights_load_whole(how, tmp_path):
    source = small()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    prefix = "backbone." if how == "prefix" else ""
    state = {prefix + k: v for k, v in source.state_dict().items()}
    path = str(tmp_path / "source.pth")
    torch.save({"state_dict": state}, path)
    if how == "pretrained":
        model = small(pretrained=path)
    else:
        cfg = dict(type="Pretrained", checkpoint=path)
        model = small(init_cfg=cfg | (dict(prefix=prefix) if prefix else {}))
    model.init_weights()
    for (name, a), b in zip(model.state_dict().items(), source.state_dict().values(), strict=True):
        assert (a == b).all(), name


@pytest.mark.parametrize(
    "depth, expected, num_layers",
    [
        (26, {"layer2.1": 2, "layer3.0": 3, "layer3.1": 3, "layer4.1": 4}, 6),
        (50, {"layer2.1": 2, "layer2.2": 3, "layer3.2": 4, "layer3.5": 5, "layer4.0": 6}, 8),
        (101, {"layer2.3": 3, "layer3.2": 4, "layer3.22": 11, "layer4.2": 12}, 14),
        (152, {"layer2.7": 3, "layer3.3": 4, "layer3.35": 12, "layer4.0": 13}, 15),
    ],
)
def test_layer_depth_of_every_depth(depth, expected, num_layers):
    with torch.device("meta"):
        model = DDFResNet(depth)
    for prefix in ("", "backbone."):
        assert model.get_layer_depth(f"{prefix}conv1.weight", prefix) == (0, num_layers)
        assert model.get_layer_depth(f"{prefix}layer1.0.conv1.weight", prefix) == (1, num_layers)
        for block, layer_id in expected.items():
            name = f"{prefix}{block}.conv2.channel_branch.4.std"
            assert model.get_layer_depth(name, prefix) == (layer_id, num_layers)
    head = model.get_layer_depth("head.fc.weight", "backbone.")
    assert head == (num_layers - 1, num_layers)
    ids = {model.get_layer_depth(name)[0] for name, _ in model.named_parameters()}
    assert ids == set(range(num_layers - 1))


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_layer_depth_is_mmpretrains_where_it_has_one(depth):
    resnet = pytest.importorskip("mmpretrain.models").ResNet
    with torch.device("meta"):
        ours = DDFResNet(depth)
    theirs = resnet(depth, base_channels=4, stem_channels=4)
    for name, _ in theirs.named_parameters():
        full = f"backbone.{name}"
        assert ours.get_layer_depth(full, "backbone.") == theirs.get_layer_depth(full, "backbone.")


def test_efficient_conv_bn_eval():
    model = nn.Sequential()
    model.backbone = small().eval()
    x = image(33, 40)
    want = model.backbone(x)[0]
    turn_on_efficient_conv_bn_eval(model, "backbone")
    torch.testing.assert_close(model.backbone(x)[0], want)


def test_half_precision_and_channels_last():
    model = small().eval()
    x = image(40, 56)
    want = model(x)[0]
    last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))[0]
    torch.testing.assert_close(last, want, rtol=1e-3, atol=1e-4)
    assert last.is_contiguous(memory_format=torch.channels_last)
    half = model.bfloat16()(x.bfloat16())[0]
    assert half.dtype == torch.bfloat16
    assert (half - want).norm() / want.norm() < 0.05  # measured: 0.012


def test_registered_once_in_the_root():
    assert MODELS.get("DDFResNet") is DDFResNet
    assert MODELS.build(dict(type="DDFResNet", depth=26, base_channels=8)).depth == 26


@pytest.mark.parametrize(
    "arguments, exception, message",
    [
        (dict(depth=34), ValueError, r"depth must be one of \[26, 50, 101, 152\], got 34"),
        (dict(num_stages=5), ValueError, "num_stages must be 1 to 4, got 5"),
        (dict(strides=(1, 2)), ValueError, "strides must have one value for each stage, 4"),
        (dict(dilations=1), TypeError, "dilations must be a list or tuple, .* got 1 of type int"),
        (dict(strides="1222"), TypeError, "strides must be a list or tuple, .* got '1222'"),
        (dict(strides=(1, 2, 2, 0)), ValueError, r"strides\[3\] must be at least 1, got 0"),
        (dict(multi_grid=2), TypeError, "multi_grid must be a list or tuple"),
        (dict(out_indices=3), TypeError, "out_indices must be a list or tuple, of stages.* got 3"),
        (dict(out_indices=np.int64(3)), TypeError, "out_indices must be a list or tuple"),
        (dict(out_indices="3"), TypeError, "out_indices must be a list or tuple, .* got '3'"),
        (dict(out_indices=(3, "2")), TypeError, r"out_indices\[1\] must be an int, got '2'"),
        (dict(stage_with_ddf=True), TypeError, "stage_with_ddf must be a list or tuple"),
        (dict(stage_with_ddf=("False",) * 4), TypeError, "stage_with_ddf must hold bools"),
        (dict(depth="26"), TypeError, "depth must be an int, got '26'"),
        (dict(depth=[26]), TypeError, r"depth must be an int, got \[26\]"),
        (dict(num_stages="4"), TypeError, "num_stages must be an int, got '4'"),
        (dict(in_channels=0), ValueError, "in_channels must be at least 1, got 0"),
        (dict(stem_channels="16"), TypeError, "stem_channels must be an int, got '16'"),
        (dict(base_channels=None), TypeError, "base_channels must be an int, got None"),
        (dict(expansion=0), ValueError, "expansion must be at least 1, got 0"),
        (dict(frozen_stages="1"), TypeError, "frozen_stages must be an int, got '1'"),
        (dict(drop_path_rate="0.1"), TypeError, "drop_path_rate must be a number, got '0.1'"),
        (dict(drop_path_rate=1.0), ValueError, "drop_path_rate must be from 0 to less than 1"),
        (dict(se_ratio=None), TypeError, "se_ratio must be a number, got None"),
        (dict(norm_cfg="BN"), TypeError, "norm_cfg must be a dict.* got 'BN'"),
        (
            dict(norm_cfg=None),
            TypeError,
            "norm_cfg must be a dict, the config of a layer, got None",
        ),
        (dict(conv_cfg="Conv2d"), TypeError, "conv_cfg must be a dict.*, or None, got 'Conv2d'"),
        (dict(plugins=dict(cfg={})), TypeError, "plugins must be a list or tuple"),
        (dict(plugins=[dict(position="after_conv1")]), TypeError, "plugins must hold dict"),
        (dict(out_indices=(4,)), ValueError, r"out_indices must name stages from 0 to 3, got \(4"),
        (dict(out_indices=()), ValueError, "out_indices must name stages"),
        (dict(frozen_stages=5), ValueError, "frozen_stages must be -1 to 4, got 5"),
        (dict(style="tf"), ValueError, "style must be 'pytorch' or 'caffe', got 'tf'"),
        (dict(stage_with_ddf=(True,)), ValueError, "stage_with_ddf must have one value"),
        (dict(multi_grid=(1, 2, 4)), ValueError, "multi_grid must have .*block of the last stage"),
        (dict(kernel_combine="div"), ValueError, "kernel_combine must be 'mul' or 'add'"),
        (dict(head=3), ValueError, "head must divide in_channels"),
        (
            dict(dcn=dict(type="DDF"), stage_with_dcn=(False, True, True, True)),
            ValueError,
            "stage_with_dcn and stage_with_ddf must not both be true",
        ),
        (
            dict(pretrained="a.pth", init_cfg=dict(type="Kaiming")),
            ValueError,
            "pretrained and init_cfg are both given",
        ),
        (dict(pretrained=True), TypeError, "pretrained must be a path .*got True"),
    ],
)
def test_bad_arguments_are_named(arguments, exception, message):
    with pytest.raises(exception, match=message):
        small(**arguments)


def test_sizes_may_be_numpys():
    two = np.int64(2)
    sizes = dict(base_channels=np.int64(8), num_stages=two, out_indices=(np.int64(1),), head=two)
    model = DDFResNet(np.int64(26), **sizes, strides=(np.int64(1), two), dilations=(1, np.int32(1)))
    assert model(image(33, 32))[0].shape == (2, 64, 5, 4)


# -------------------------------------------------------------------------------- small images


def test_the_stem_for_small_images_is_that_of_resnet_cifar():
    pytest.importorskip("mmpretrain")
    arguments = dict(depth=50, base_channels=8, stem_channels=16, out_indices=(0, 1, 2, 3))
    theirs = MODELS.build(dict(type="mmpretrain.ResNet_CIFAR", **arguments))
    ours = MODELS.build(
        dict(type="ddf_mm.DDFResNet_CIFAR", stage_with_ddf=(False,) * 4, **arguments)
    )
    assert type(ours) is DDFResNet_CIFAR
    ours.load_state_dict(theirs.state_dict())
    images = image(32, 32)
    with torch.no_grad():
        # In training mode: batch norm keeps the features near one.
        for one, other in zip(ours(images), theirs(images), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("combine", ["mul", "add"])
def test_sizes_of_small_images(combine):
    arguments = dict(base_channels=32, out_indices=(0, 1, 2, 3), frozen_stages=0)
    model = DDFResNet_CIFAR(26, kernel_combine=combine, zero_init_residual=False, **arguments)
    outs = model.train()(image(32, 31))
    assert [tuple(out.shape[2:]) for out in outs] == [(32, 31), (16, 16), (8, 8), (4, 4)]
    outs[-1].square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert not model.bn1.training and not model.conv1.weight.requires_grad


def test_small_images_have_no_deep_stem():
    with pytest.raises(ValueError, match="deep_stem must be False"):
        DDFResNet_CIFAR(26, deep_stem=True)
