"""DDF-ResNets in timm, by themselves and in libraries that build timm's networks."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from official_network import classifier, official
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet, resnet50

from ddf_mm.layers import DDFPack, switch_to_deploy
from ddf_mm.models import DDFResNet

pytest.importorskip("timm")

import timm

import ddf_mm.timm

OFFICIAL = json.loads((Path(__file__).parent / "models" / "official_names.json").read_text())
NAMES = [f"ddf_{combine}_resnet{depth}" for combine in ("add", "mul") for depth in (101, 152, 50)]
LAYERS = (2, 2, 2, 2)  # of depth 26


def small(name: str = "ddf_mul_resnet50", **arguments) -> nn.Module:
    return timm.create_model(name, **{"layers": LAYERS, "num_classes": 10, **arguments})


def image(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, dtype=dtype)


def without_head(state_dict: dict) -> dict:
    return {name: value for name, value in state_dict.items() if not name.startswith("fc.")}


# ---------------------------------------------------------------------------------- the networks


def test_names():
    assert sorted(timm.list_models("ddf_*")) == NAMES
    assert sorted(ddf_mm.timm.__all__) == ["DDFBottleneck", *NAMES]
    assert all(getattr(ddf_mm.timm, name) is timm.model_entrypoint(name) for name in NAMES)


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize("combine", ["mul", "add"])
def test_parameters_are_the_official_ones(combine, depth):
    with torch.device("meta"):
        model = timm.create_model(f"ddf_{combine}_resnet{depth}")
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert without_head(shapes) == OFFICIAL[str(depth)]
    assert (shapes["fc.weight"], shapes["fc.bias"]) == ([1000, 2048], [1000])
    packs = [module for module in model.modules() if isinstance(module, DDFPack)]
    assert len(packs) == {50: 16, 101: 33}[depth]
    assert {pack.kernel_combine for pack in packs} == {combine}


@pytest.mark.parametrize("combine, depth", [("mul", 50), ("add", 26)])
def test_logits_are_the_official_ones(combine, depth, tmp_path):
    pytest.importorskip("mmpretrain")
    make = resnet50 if depth == 50 else partial(ResNet, Bottleneck, list(LAYERS))
    network = official(combine, make)
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    layers = None if depth == 50 else LAYERS
    model = timm.create_model(
        f"ddf_{combine}_resnet50", layers=layers, checkpoint_path=str(path)
    ).eval()
    ours = classifier(depth, combine)
    ours.backbone.load_state_dict(without_head(network.state_dict()))
    ours.head.fc.load_state_dict(network.fc.state_dict())

    images = 3 * torch.randn(2, 3, 65, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images), ours(images), atol=1e-5, rtol=0)
        # In float64: the random weights amplify the rounding of float32 to 1e-3 of logits around
        # 10.
        images = images.double()
        expected = network.double()(images)
        assert expected.std() > 1
        torch.testing.assert_close(model.double()(images), expected, atol=1e-10, rtol=1e-10)


STRIDES = {
    32: ((1, 2, 2, 2), (1, 1, 1, 1)),
    16: ((1, 2, 2, 1), (1, 1, 1, 2)),
    8: ((1, 2, 1, 1), (1, 1, 2, 4)),
}


@pytest.mark.parametrize(
    "feature_cls, output_stride",
    [("list", 32), ("list", 16), ("list", 8)]
    + [(kind, 32) for kind in ("dict", "hook", "getter", "fx")],
)
def test_features_are_those_of_ddfresnet(feature_cls, output_stride):
    strides, dilations = STRIDES[output_stride]
    backbone = DDFResNet(
        26,
        strides=strides,
        dilations=dilations,
        contract_dilation=True,
        out_indices=(0, 1, 2, 3),
        zero_init_residual=False,
    ).eval()
    head = {"fc.weight": torch.ones(1000, 2048), "fc.bias": torch.ones(1000)}
    model = small(
        output_stride=output_stride,
        features_only=True,
        feature_cls=feature_cls,
        out_indices=(1, 2, 3, 4),
        pretrained=True,
        pretrained_cfg_overlay=dict(state_dict={**backbone.state_dict(), **head}),
    ).eval()
    assert model.feature_info.channels() == [256, 512, 1024, 2048]
    assert model.feature_info.reduction() == [min(r, output_stride) for r in (4, 8, 16, 32)]
    images = image()
    with torch.no_grad():
        found, expected = model(images), backbone(images)
    found = list(found.values()) if isinstance(found, dict) else found
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------- timm's interface


def test_interface():
    model = small(in_chans=4, num_classes=7, drop_rate=0.25, drop_path_rate=0.2).eval()
    images = torch.randn(2, 4, 64, 64)
    features = model.forward_features(images)
    assert features.shape == (2, 2048, 2, 2)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model(images), model.forward_head(features))
    assert model(images).shape == (2, 7)
    assert model.get_classifier() is model.fc
    model.reset_classifier(3)
    assert (model.get_classifier().out_features, model(images).shape) == (3, (2, 3))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(images), features)
    assert model.drop_rate == 0.25
    assert [info["num_chs"] for info in model.feature_info] == [64, 256, 512, 1024, 2048]
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]


def test_stochastic_depth_grows_as_ddfresnets_does():
    ours = DDFResNet(26, drop_path_rate=0.2)
    model = small(drop_path_rate=0.2)
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for one, other in zip(getattr(model, stage), getattr(ours, stage), strict=True):
            rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in (one, other)]
            assert rates[0] == pytest.approx(rates[1])


def test_default_cfg_is_the_official_one():
    cfg = small().default_cfg
    assert (cfg["architecture"], cfg["input_size"]) == ("ddf_mul_resnet50", (3, 224, 224))
    assert (cfg["interpolation"], cfg["crop_pct"]) == ("bicubic", 0.875)
    assert (cfg["first_conv"], cfg["classifier"]) == ("conv1", "fc")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(small()))
    assert [type(step).__name__ for step in transform.transforms][:2] == ["Resize", "CenterCrop"]
    assert transform.transforms[0].size == 256


def test_training_starts_as_ddfresnets_does():
    model = small()
    for block in model.layer3:
        assert not block.bn3.weight.any()
        expand = block.conv2.channel_branch[3]
        fan_out = expand.out_channels
        assert expand.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        assert expand.bias.any()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("combine", ["mul", "add"])
def test_training_step(combine, checkpointing):
    model = small(f"ddf_{combine}_resnet50", zero_init_last=False).train()
    images = image()
    expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing(checkpointing)
    found = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    assert all(gradient.any() for gradient in found)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_arguments_of_the_block():
    model = small("ddf_add_resnet50", block_args=dict(head=2, kernel_size=5, se_ratio=0.5))
    pack = model.layer2[0].conv2
    assert (pack.kernel_combine, pack.head, pack.kernel_size, pack.stride) == (
        ("add", 2, (5, 5), (2, 2))
    )
    assert pack.channel_branch[1].out_channels == 64
    assert model(image()).shape == (2, 10)
    with pytest.raises(ValueError, match="kernel_combine must be 'mul' or 'add'.*, got 'or'"):
        small(block_args=dict(kernel_combine="or"))
    with pytest.raises(ValueError, match="out_channels must equal in_channels"):
        small(block_reduce_first=2)


def test_device_and_dtype():
    model = small(device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}


def test_norms_fold_into_the_packs():
    model = small(zero_init_last=False).double()
    images = image(torch.float64)
    with torch.no_grad():
        model.train()(images)
        expected = model.eval()(images)
        found = switch_to_deploy(copy.deepcopy(model))
        assert not any(isinstance(module, nn.BatchNorm2d) for module in found.modules())
        torch.testing.assert_close(found(images), expected, atol=1e-10, rtol=1e-10)


# ---------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    """The file of a training with timm, and the running average in it."""
    model = small(num_classes=1000)
    averaged = {name: value + 1 for name, value in model.state_dict().items()}
    path = tmp_path / "model_best.pth.tar"
    torch.save(
        dict(
            arch="ddf_mul_resnet50",
            state_dict=model.state_dict(),
            state_dict_ema={f"module.{name}": value for name, value in averaged.items()},
            args=argparse.Namespace(model="ddf_mul_resnet50"),
        ),
        path,
    )
    return str(path), averaged


def test_checkpoint_of_a_training(checkpoint):
    path, averaged = checkpoint
    model = small(num_classes=1000, checkpoint_path=path)
    assert all(torch.equal(value, averaged[name]) for name, value in model.state_dict().items())


def test_checkpoint_for_other_classes_and_images(checkpoint):
    path, averaged = checkpoint
    overlay = dict(file=path)
    model = small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1)
    assert model.fc.out_features == 5
    loaded = model.state_dict()
    assert torch.equal(loaded["layer4.1.bn3.bias"], averaged["layer4.1.bn3.bias"])
    summed = averaged["conv1.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(loaded["conv1.weight"], summed)


def test_no_weights_to_download():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for ddf_mul_resnet50"):
        small(pretrained=True)
    assert not timm.list_models("ddf_*", pretrained=True)


# -------------------------------------------------------------------------------- without timm


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_timm():
    block = "import sys; sys.modules['timm'] = None\n"
    done = run(block + "import ddf_mm, ddf_mm.layers, ddf_mm.models")
    assert done.returncode == 0, done.stderr
    done = run(block + "import ddf_mm.timm")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: ddf_mm.timm registers networks with timm >= 0.9, which cannot be imported: "
        "pip install timm"
    )


def test_the_package_does_not_import_timm():
    done = run("import sys, ddf_mm.models, ddf_mm.engine; assert 'timm' not in sys.modules")
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------- other libraries' backbones


def backbone(scope: str, **arguments) -> dict:
    return dict(
        type=f"{scope}.TIMMBackbone",
        model_name="ddf_mul_resnet50",
        pretrained=False,
        layers=LAYERS,
        **arguments,
    )


def test_mmpretrain(checkpoint):
    pytest.importorskip("mmpretrain")
    from mmpretrain.registry import MODELS

    path, averaged = checkpoint
    init_default_scope("mmpretrain")
    model = MODELS.build(
        dict(
            type="ImageClassifier",
            backbone=backbone("mmpretrain", checkpoint_path=path),
            neck=dict(type="GlobalAveragePooling"),
            head=dict(type="LinearClsHead", num_classes=10, in_channels=2048),
        )
    )
    model.init_weights()
    loaded = model.backbone.timm_model.state_dict()
    assert loaded.keys() == without_head(averaged).keys()
    assert all(torch.equal(value, averaged[name]) for name, value in loaded.items())
    model.backbone = MODELS.build(backbone("mmpretrain", norm_layer="BN2d"))
    model.init_weights()
    assert model.eval()(image(), mode="tensor").shape == (2, 10)


def test_mmdet(tmp_path):
    pytest.importorskip("mmdet")
    pytest.importorskip("mmpretrain")
    from mmdet.registry import MODELS

    path = tmp_path / "retinanet.py"
    arguments = dict(model_name="ddf_mul_resnet50", pretrained=False, layers=LAYERS)
    path.write_text(
        '_base_ = "mmdet::timm_example/retinanet_timm-tv-resnet50_fpn_1x_coco.py"\n'
        'custom_imports = dict(imports=["mmpretrain.models", "ddf_mm.timm"])\n'
        f"model = dict(backbone={arguments})\n"
    )
    cfg = Config.fromfile(path)
    init_default_scope("mmdet")
    model = MODELS.build(cfg.model)
    model.init_weights()
    scores, boxes = model(image(), mode="tensor")
    assert [tuple(level.shape[2:]) for level in scores] == [(s, s) for s in (8, 4, 2, 1, 1)]
    sum(level.sum() for level in (*scores, *boxes)).backward()
    packs = [module for module in model.backbone.modules() if isinstance(module, DDFPack)]
    assert len(packs) == sum(LAYERS)
    assert all(p.grad is not None for pack in packs for p in pack.parameters())


def test_mmseg():
    pytest.importorskip("mmseg")
    from mmseg.registry import MODELS

    init_default_scope("mmseg")
    model = MODELS.build(
        dict(
            type="EncoderDecoder",
            backbone=backbone("mmseg", out_indices=(1, 2, 3, 4), output_stride=8),
            decode_head=dict(
                type="UPerHead",
                in_channels=[256, 512, 1024, 2048],
                in_index=[0, 1, 2, 3],
                pool_scales=(1, 2),
                channels=8,
                num_classes=3,
            ),
            test_cfg=dict(mode="whole"),
        )
    )
    model.init_weights()
    assert model(image(), mode="tensor").shape == (2, 3, 16, 16)


def test_segmentation_models_pytorch(checkpoint):
    smp = pytest.importorskip("segmentation_models_pytorch")
    path, averaged = checkpoint
    name = "tu-ddf_mul_resnet50"
    loads = dict(encoder_weights=True, pretrained_cfg_overlay=dict(file=path))
    model = smp.Unet(name, classes=3, layers=LAYERS, **loads).eval()
    loaded = model.encoder.model.state_dict()
    assert loaded.keys() == without_head(averaged).keys()
    assert all(torch.equal(value, averaged[name]) for name, value in loaded.items())
    assert model(image()).shape == (2, 3, 64, 64)
    model = smp.DeepLabV3(name, encoder_weights=None, classes=3, layers=LAYERS).eval()
    assert model.encoder(image())[-1].shape == (2, 2048, 8, 8)
    assert model(image()).shape == (2, 3, 64, 64)
