"""The MMCV layers: conv layer `DDF` and upsample layer `DDFUp`."""

from __future__ import annotations

import pytest
import torch
from mmcv.cnn import ConvModule, build_conv_layer, build_upsample_layer
from torch import nn

from ddf_mm.layers import DDFConv2d, DDFPack, DDFUpPack


@pytest.mark.parametrize("stride, dilation, k", [(1, 1, 3), (2, 1, 3), (1, 2, 3), (2, 3, 5)])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_conv_layer_has_the_attributes_and_output_size_of_conv2d(stride, dilation, k, groups):
    arguments = dict(stride=stride, padding=dilation * (k // 2), dilation=dilation, groups=groups)
    ours = build_conv_layer(dict(type="DDF"), 8, 8, k, **arguments)
    theirs = nn.Conv2d(8, 8, k, **arguments)
    for name in [
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "transposed",
        "output_padding",
        "padding_mode",
    ]:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.bias is None) == (theirs.bias is None)
    x = torch.randn(2, 8, 13, 10)
    assert ours(x).shape == theirs(x).shape


def test_conv_layer_takes_conv2d_arguments_by_position():
    ours = DDFConv2d(8, 8, (3, 3), (2, 2), (1, 1), (1, 1), 8, False, "zeros", "cpu", torch.float64)
    assert ours.bias is None
    assert ours(torch.randn(1, 8, 5, 5, dtype=torch.float64)).shape == (1, 8, 3, 3)


def test_conv_layer_is_a_pack_and_its_bias():
    conv = DDFConv2d(8, 8, 3, padding=1, head=2, kernel_combine="add", se_ratio=0.5)
    pack = DDFPack(8, head=2, kernel_combine="add", se_ratio=0.5)
    missing, unexpected = pack.load_state_dict(conv.state_dict(), strict=False)
    assert not missing and unexpected == ["bias"]
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(conv(x), pack(x))
    with torch.no_grad():
        conv.bias.copy_(torch.arange(8.0))
    torch.testing.assert_close(
        conv(x) - pack(x), torch.arange(8.0).view(8, 1, 1).expand(2, 8, 6, 6)
    )


@pytest.mark.parametrize(
    "change, exception, message",
    [
        (dict(out_channels=16), ValueError, "out_channels must equal in_channels.*8, out_.* 16"),
        (dict(padding=0), ValueError, "padding must be 1.*got 0"),
        (dict(padding=(1, 0)), ValueError, r"padding must be 1.*got \(1, 0\)"),
        (dict(padding="same", stride=2), ValueError, "padding must be 1.*got 'same'"),
        (dict(padding="valid"), ValueError, "padding must be 1.*got 'valid'"),
        (dict(groups=3), ValueError, "groups must divide in_channels, got groups 3"),
        (dict(padding_mode="reflect"), ValueError, "padding_mode must be 'zeros', got 'reflect'"),
        (dict(kernel_size=(3, 5)), ValueError, r"kernel_size must be .*equal ints, got \(3, 5\)"),
        (dict(kernel_size=1, padding=0), ValueError, "kernel_size must be at least 3"),
        (dict(stride=(2, 1)), ValueError, "stride must be an int or a pair of equal ints"),
        (dict(dilation=(1, 2)), ValueError, "dilation must be an int or a pair of equal ints"),
    ],
)
def test_conv_layer_refuses_what_it_is_not(change, exception, message):
    good = dict(in_channels=8, out_channels=8, kernel_size=3, stride=1, padding=1)
    build_conv_layer(dict(type="DDF"), **good)
    with pytest.raises(exception, match=message):
        build_conv_layer(dict(type="DDF"), **{**good, **change})


@pytest.mark.parametrize("norm_cfg", [None, dict(type="BN")])
def test_conv_module(norm_cfg):
    module = ConvModule(
        8, 8, 3, stride=2, padding=1, conv_cfg=dict(type="DDF", head=2), norm_cfg=norm_cfg
    )
    assert isinstance(module.conv, DDFConv2d)
    assert (module.conv.bias is None) == (norm_cfg is not None)
    assert module.kernel_size == (3, 3) and module.stride == (2, 2) and module.padding == 1
    module.init_weights()
    out = module(torch.randn(2, 8, 9, 9))
    assert out.shape == (2, 8, 5, 5)
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_conv_module_without_padding_says_what_it_needs():
    with pytest.raises(ValueError, match="padding must be 1"):
        ConvModule(8, 8, 3, conv_cfg=dict(type="DDF"))


def test_upsample_layer():
    up = build_upsample_layer(dict(type="DDFUp", in_channels=8, scale_factor=3))
    assert isinstance(up, DDFUpPack)
    assert up(torch.randn(1, 8, 5, 4)).shape == (1, 8, 15, 12)
