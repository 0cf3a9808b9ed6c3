"""CARAFE and involution: the originals' parameters, and the formulas by unfold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import build_upsample_layer
from mmengine.registry import MODELS

import ddf_mm.models  # noqa: F401 registers DDFResNet
from ddf_mm.layers import CARAFE, DDFPack, Involution


def assert_same(layer: torch.nn.Module, x: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal values, and equal gradients of the input and of all parameters."""
    ours = layer(x)
    torch.testing.assert_close(ours, expected)
    inputs, weights = [x, *layer.parameters()], torch.randn_like(expected)
    both = (torch.autograd.grad(out, inputs, weights) for out in (ours, expected))
    for got, wanted in zip(*both, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kernel, groups, scale", [(5, 1, 2), (3, 2, 3)])
def test_carafe_is_the_papers_formula(kernel, groups, scale):
    layer = CARAFE(4, scale, kernel, groups, compressed_channels=8).double()
    torch.nn.init.normal_(layer.content_encoder.weight)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    logits = F.pixel_shuffle(layer.content_encoder(layer.channel_compressor(x)), scale)
    masks = logits.unflatten(1, (groups, kernel**2)).softmax(2).repeat_interleave(4 // groups, 1)
    windows = F.unfold(x, kernel, padding=kernel // 2).view(2, 4, kernel**2, 5, 6)
    repeated = windows.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    assert_same(layer, x, (repeated * masks).sum(2))


def test_carafe_is_mmcvs_layer():
    """mmcv's own preparation of the masks, then the op on them; its state dict."""
    pytest.importorskip("mmcv._ext")
    from mmcv.ops import CARAFEPack

    from ddf_mm.ops import carafe

    options = dict(up_kernel=3, up_group=2, encoder_kernel=5, encoder_dilation=2)
    mmcvs = CARAFEPack(4, 2, **options, compressed_channels=8)
    torch.nn.init.normal_(mmcvs.content_encoder.weight)
    layer = build_upsample_layer(
        dict(type="DDFCARAFE", channels=4, scale_factor=2, **options, compressed_channels=8)
    )
    assert type(layer) is CARAFE
    layer.load_state_dict(mmcvs.state_dict())
    x = torch.randn(2, 4, 5, 6)
    masks = mmcvs.kernel_normalizer(mmcvs.content_encoder(mmcvs.channel_compressor(x)))
    torch.testing.assert_close(layer(x), carafe(x, masks, 3, 2, 2))


@pytest.mark.parametrize("stride", [1, 2])
def test_involution_is_the_official_layer(stride):
    layer = MODELS.build(dict(type="DDFInvolution", channels=32, stride=stride)).double().eval()
    assert set(layer.state_dict()) == {
        "conv1.conv.weight",
        *(f"conv1.bn.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
        "conv1.bn.num_batches_tracked",
        "conv2.conv.weight",
        "conv2.conv.bias",
    }
    assert layer.conv2.conv.weight.shape == (2 * 49, 8, 1, 1)
    x = torch.randn(2, 32, 7, 9, dtype=torch.float64, requires_grad=True)
    filters = layer.conv2(layer.conv1(x if stride == 1 else F.avg_pool2d(x, 2)))
    size = filters.shape[2:]
    windows = F.unfold(x, 7, padding=3, stride=stride)
    windows = windows.view(2, 2, 16, 49, -(-7 // stride), -(-9 // stride))[
        ..., : size[0], : size[1]
    ]
    expected = (windows * filters.view(2, 2, 1, 49, *size)).sum(3).flatten(1, 2)
    assert_same(layer, x, expected)


def test_backbone_takes_involutions_by_config():
    cfg = dict(type="DDFResNet", depth=26, involution=dict(kernel_size=7), base_channels=16)
    backbone = MODELS.build(dict(cfg, strides=(1, 2, 2, 2), out_indices=(0, 1, 2, 3)))
    assert not any(isinstance(module, DDFPack) for module in backbone.modules())
    layers = [module for module in backbone.modules() if isinstance(module, Involution)]
    assert len(layers) == 8 and all(layer.kernel_size == 7 for layer in layers)
    assert "layer2.0.conv2.conv2.conv.weight" in backbone.state_dict()  # RedNet's name
    backbone.init_weights()
    outs = backbone(torch.randn(1, 3, 64, 96))
    assert [out.shape[1:] for out in outs] == [
        (64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)
    ]  # fmt: skip
    outs[-1].square().mean().backward()
    assert all(layer.conv2.conv.weight.grad is not None for layer in layers)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: CARAFE(6, 2, up_group=4), "up_group must divide channels, got up_group 4"),
        (lambda: CARAFE(6, 2, up_kernel=4), "up_kernel must be odd"),
        (lambda: Involution(24), "group_channels must divide channels, got group_channels 16"),
        (lambda: Involution(32, 6), "kernel_size must be odd"),
    ],
)
def test_errors_name_the_argument(make, match):
    with pytest.raises(ValueError, match=match):
        make()
