"""DDFPack, DDFUpPack and FilterNorm: names, shapes, semantics, initialization, errors."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ddf_cases import require_compiled
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddf_mm.layers import DDFConv2d, DDFPack, DDFUpPack, FilterNorm, fuse_ddf_bn
from ddf_mm.ops import backend_info, ddf, ddf_up_reference, filter_norm


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def test_pack_has_the_official_names():
    assert shapes(DDFPack(64)) == {
        "spatial_branch.0.weight": [9, 64, 1, 1],
        "spatial_branch.0.bias": [9],
        "channel_branch.1.weight": [12, 64, 1, 1],
        "channel_branch.1.bias": [12],
        "channel_branch.3.weight": [576, 12, 1, 1],
        "channel_branch.3.bias": [576],
        "channel_branch.4.std": [576],
    }


def test_pack_takes_the_official_arguments_in_order():
    pack = DDFPack(8, 5, 2, 3, 4, 0.5, "linear", "add")
    assert shapes(pack)["spatial_branch.0.weight"] == [4 * 25, 8, 1, 1]
    assert shapes(pack)["channel_branch.1.weight"] == [4, 8, 1, 1]
    assert (pack.kernel_size, pack.stride, pack.dilation, pack.head) == (5, 2, 3, 4)
    assert pack.kernel_combine == "add"
    assert pack.channel_branch[-1].scale == 1 / 5


def test_up_pack_has_the_official_names():
    names = shapes(DDFUpPack(16, scale_factor=2))
    assert names["spatial_branch.3.0.weight"] == [16, 1, 3, 3]
    assert names["spatial_branch.3.1.0.weight"] == [9, 16, 1, 1]
    assert names["channel_branch.3.3.weight"] == [144, 3, 1, 1]
    assert names["channel_branch.3.4.std"] == [144]
    joint = shapes(DDFUpPack(16, scale_factor=2, joint_channels=5))
    assert joint["spatial_branch.0.0.weight"] == [9, 5, 1, 1]


def test_up_pack_takes_the_official_arguments_in_order():
    up = DDFUpPack(8, 5, 3, 2, 4, 0.5, "relu", 7, -1, "add")
    assert (up.kernel_size, up.scale_factor, up.dilation, up.head) == (5, 3, 2, 4)
    assert up.kernel_combine == "add"
    assert up.spatial_branch[0][0].kernel_size == (7, 7)
    assert up(torch.randn(1, 8, 3, 5)).shape == (1, 8, 9, 15)


@pytest.mark.parametrize("head", [1, 2])
@pytest.mark.parametrize("stride, dilation, k, combine", [(1, 1, 3, "mul"), (2, 2, 5, "add")])
def test_pack_is_its_parts(head, stride, dilation, k, combine):
    pack = DDFPack(6, k, stride, dilation, head, kernel_combine=combine).double()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    raw_spatial = F.conv2d(x, pack.spatial_branch[0].weight, pack.spatial_branch[0].bias, stride)
    spatial = filter_norm(raw_spatial, head, "spatial", math.sqrt(2) / k)
    hidden = pack.channel_branch[1](x.mean((2, 3), keepdim=True)).relu()
    raw_channel = pack.channel_branch[3](hidden)
    channel = filter_norm(raw_channel, 6, "channel", pack.channel_branch[4].std)
    want = ddf(x, channel.view(2, 6, k, k), spatial, k, dilation, stride, combine)
    torch.testing.assert_close(pack(x), want)
    assert want.shape == (2, 6, -(-9 // stride), -(-8 // stride))


def test_heads_filter_their_own_channels():
    """A pack of two heads is two packs of one head side by side, as the official reshape has it."""
    pack = DDFPack(4, head=2).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    channel = pack.channel_branch(x).view(2, 4, 3, 3)
    spatial = pack.spatial_branch(x)
    parts = [
        ddf(x[:, 2 * h : 2 * h + 2], channel[:, 2 * h : 2 * h + 2], spatial[:, 9 * h : 9 * h + 9])
        for h in range(2)
    ]
    torch.testing.assert_close(pack(x), torch.cat(parts, dim=1))


@pytest.mark.parametrize("layer", [DDFPack(8), DDFPack(8, stride=2, head=2), DDFUpPack(8)])
@pytest.mark.parametrize("size", [(7, 5), (1, 1), (8, 6)])
def test_layout_empty_batch_and_odd_sizes(layer, size, device):
    layer = copy.deepcopy(layer).to(device, torch.float64)
    x = torch.randn(2, 8, *size, dtype=torch.float64, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    out = layer(x)
    torch.testing.assert_close(out, layer(x.contiguous()), rtol=1e-4, atol=1e-5)
    # One pixel has the same strides in both layouts.
    assert out.is_contiguous(memory_format=torch.channels_last) or size == (1, 1)
    assert layer(x[:0]).shape == (0, *out.shape[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", [DDFPack(16, head=2), DDFUpPack(16)])
def test_half_precision_keeps_its_dtype_and_stays_close(layer, dtype, device):
    x = torch.randn(2, 16, 9, 9)
    want = layer(x)
    half = copy.deepcopy(layer).to(device, dtype)
    got = half(x.to(device, dtype))
    assert got.dtype == dtype
    relative = (got.cpu() - want).norm() / want.norm()
    # Measured: 0.9 % for bfloat16, 0.1 % for float16.
    assert relative < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("layer", [DDFPack(16), DDFUpPack(16)])
def test_trains_under_autocast(layer, device):
    layer = copy.deepcopy(layer).to(device)
    x = torch.randn(2, 16, 8, 8, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = layer(x)
        assert out.dtype == torch.bfloat16
        loss = out.float().square().mean()
    loss.backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.dtype == torch.float32


def test_gradcheck_of_the_packs(device):
    exact = dict(dtype=torch.float64, device=device)
    x = torch.randn(1, 4, 3, 4, **exact, requires_grad=True)
    guide = torch.randn(1, 2, 6, 8, **exact, requires_grad=True)
    up = DDFUpPack(4, joint_channels=2).to(**exact)
    assert torch.autograd.gradcheck(DDFPack(4, stride=2).to(**exact), (x,), fast_mode=True)
    assert torch.autograd.gradcheck(up, (x, guide), fast_mode=True)


@pytest.mark.parametrize("dw_kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("scale_factor", [2, 3, 4])
@pytest.mark.parametrize("kernel_size, head", [(3, 1), (5, 2)])
def test_up_pack_upsamples_any_size(dw_kernel_size, scale_factor, kernel_size, head):
    up = DDFUpPack(4, kernel_size, scale_factor, head=head, dw_kernel_size=dw_kernel_size)
    assert up(torch.randn(2, 4, 5, 3)).shape == (2, 4, 5 * scale_factor, 3 * scale_factor)


@pytest.mark.parametrize("rows, columns", [(3, 3), (1, 2), (3, 2)])
def test_up_pack_writes_branch_ij_to_subpixel_ij(rows, columns):
    up = DDFUpPack(4, scale_factor=(rows, columns), kernel_combine="add", joint_channels=2).double()
    assert up.scale_factor == (3 if rows == columns else (rows, columns))
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    guide = torch.randn(2, 2, 5 * rows, 3 * columns, dtype=torch.float64)
    out, of_same_guide = up(x, guide), up(x, guide[..., :5, :3])
    for p in range(rows):
        for q in range(columns):
            r = columns * p + q
            channel = up.channel_branch[r](x).view(2, 4, 3, 3)
            for got, seen in (
                (out, guide[:, :, p::rows, q::columns]), (of_same_guide, guide[..., :5, :3])
            ):  # fmt: skip
                want = ddf(x, channel, up.spatial_branch[r](seen), kernel_combine="add")
                torch.testing.assert_close(got[:, :, p::rows, q::columns], want)


def by_branches(up, x):
    """The layer's output, computed branch by branch."""
    channel = torch.stack([branch(x) for branch in up.channel_branch], dim=1)
    channel = channel.unflatten(2, (up.in_channels, up.kernel_size, up.kernel_size))
    spatial = torch.stack([branch(x) for branch in up.spatial_branch], dim=1)
    options = (up.kernel_size, up.scale_factor, up.dilation, up.kernel_combine)
    return ddf_up_reference(x, channel, spatial, *options)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(head=2, scale_factor=3, dilation=2), dict(kernel_size=5, kernel_combine="add")],
)
def test_up_pack_equals_its_branches(options, layout, device):
    up = DDFUpPack(8, **options).to(device, torch.float64)
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64, device=device)
    x = x.contiguous(memory_format=layout).requires_grad_()
    inputs = [x, *up.parameters()]
    found = []
    for function in (up, lambda value: by_branches(up, value)):
        out = function(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(up.eval()(x), found[0][0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["spatial_branch.1", "spatial_branch.2.1.1", "channel_branch.0.4"])
def test_hooks_of_the_branches_are_called(name):
    up = DDFUpPack(8).double()
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64)
    want = up(x)
    seen = []
    up.get_submodule(name).register_forward_hook(lambda *args: seen.append(args[-1].shape))
    torch.testing.assert_close(up(x), want, rtol=1e-9, atol=1e-9)
    assert len(seen) == 1


def test_filter_norms_of_different_scales_stay_apart():
    up = DDFUpPack(8).double()
    up.spatial_branch[3][1][1].std *= 2
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(up(x), by_branches(up, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("joint_channels", [5, -1])
def test_guidance_of_the_upsampled_size_is_read_by_phase(joint_channels):
    up = DDFUpPack(4, joint_channels=joint_channels).double()
    channels = joint_channels if joint_channels > 0 else 4
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    guide = torch.randn(2, channels, 6, 10, dtype=torch.float64)
    out = up(x, guide)
    # Each phase alone, as a guidance of the features' size, gives the same subpixels.
    for p in range(2):
        for q in range(2):
            alone = up(x, guide[:, :, p::2, q::2])
            torch.testing.assert_close(out[:, :, p::2, q::2], alone[:, :, p::2, q::2])


def test_guidance_of_another_shape_is_refused():
    up = DDFUpPack(4, joint_channels=5)
    x = torch.randn(2, 4, 3, 5)
    for bad in [(2, 4, 3, 5), (2, 5, 6, 9), (1, 5, 3, 5), (2, 5, 12, 20)]:
        with pytest.raises(ValueError, match=r"joint_x must be .*\[2, 5, 3, 5\].*\[2, 5, 6, 10\]"):
            up(x, torch.randn(bad))
    with pytest.raises(ValueError, match="joint_x must be"):
        up(x)


@pytest.mark.parametrize("layer", [DDFPack(64, head=2), DDFUpPack(64, dw_kernel_size=5)])
def test_branches_start_as_the_official_code_starts_them(layer):
    before = {name: p.clone() for name, p in layer.named_parameters()}
    # As the init_cfg of an enclosing backbone or neck does first.
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    layer.init_weights()
    assert all((p != before[name]).any() for name, p in layer.named_parameters())
    for name, module in layer.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            fan_out = module.weight[:, 0].numel()
            # timm's initialization for the pack; PyTorch's otherwise: U(-b, b), b = 1/sqrt(fan_in).
            kaiming = math.sqrt(2 / fan_out)
            expected = kaiming if isinstance(layer, DDFPack) else 1 / math.sqrt(3 * fan_in)
            assert module.weight.std().item() == pytest.approx(expected, rel=0.25), name
            assert 0 < module.bias.abs().max() <= 1 / math.sqrt(fan_in), name
        if isinstance(module, FilterNorm) and module.running_std:
            assert module.std.std().item() == pytest.approx(module.scale, rel=0.2), name


def test_own_init_cfg_has_the_last_word():
    pack = DDFPack(8, init_cfg=dict(type="Constant", layer="Conv2d", val=0.5, bias=0.25))
    pack.init_weights()
    assert (pack.spatial_branch[0].weight == 0.5).all()
    assert (pack.channel_branch[1].bias == 0.25).all()


@pytest.mark.parametrize("make", [DDFPack, DDFUpPack])
@pytest.mark.parametrize(
    "arguments, exception, message",
    [
        (dict(in_channels=0), ValueError, "in_channels must be at least 1, got 0"),
        (dict(in_channels=8.0), TypeError, "in_channels must be an int"),
        (dict(kernel_size=1), ValueError, "kernel_size must be at least 3, got 1"),
        (dict(kernel_size=4), ValueError, "kernel_size must be odd"),
        (dict(dilation=0), ValueError, "dilation must be at least 1"),
        (dict(head=3), ValueError, "head must divide in_channels, got head 3, in_channels 8"),
        (dict(se_ratio=0), ValueError, "se_ratio must be positive, got 0"),
        (dict(kernel_combine="div"), ValueError, "kernel_combine must be 'mul' or 'add'"),
        (dict(nonlinearity="none"), ValueError, "nonlinearity must be .*got 'none'"),
        (dict(in_channels="8"), TypeError, "in_channels must be an int, got '8' of type str"),
        (dict(head=True), TypeError, "head must be an int, got True of type bool"),
        (dict(dilation=None), TypeError, "dilation must be an int, got None"),
        (dict(dilation=2**63), ValueError, r"dilation must be less than 2\*\*63, got 92"),
        (dict(se_ratio="a"), TypeError, "se_ratio must be a number, got 'a' of type str"),
        (dict(se_ratio=math.inf), ValueError, "se_ratio must be finite, got inf"),
    ],
)
def test_bad_arguments_are_named(make, arguments, exception, message):
    with pytest.raises(exception, match=message):
        make(**{"in_channels": 8, **arguments})


def test_bad_arguments_of_one_layer_are_named():
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        DDFPack(8, stride=0)
    with pytest.raises(ValueError, match="scale_factor must be at least 1, got 0"):
        DDFUpPack(8, scale_factor=0)
    with pytest.raises(ValueError, match="scale_factor must be an int or two, .* got .1, 2, 3"):
        DDFUpPack(8, scale_factor=(1, 2, 3))
    with pytest.raises(ValueError, match="dw_kernel_size must be odd.*got 2"):
        DDFUpPack(8, dw_kernel_size=2)
    for given in (None, "3", 3.0, True):
        with pytest.raises(TypeError, match=f"joint_channels must be an int, got {given!r}"):
            DDFUpPack(8, joint_channels=given)
    with pytest.raises(ValueError, match="filter_type must be .*got 'both'"):
        FilterNorm(1, 3, "both")


def test_narrow_layers_keep_one_hidden_channel():
    # int(2 * 0.2) is zero channels.
    pack = DDFPack(2)
    assert shapes(pack)["channel_branch.1.weight"] == [1, 2, 1, 1]
    assert pack(torch.randn(1, 2, 4, 4)).isfinite().all()


def test_filter_norm_layer():
    norm = FilterNorm(2, 3, "spatial", "relu", running_mean=True)
    assert set(norm.state_dict()) == {"mean"}
    assert norm.std == math.sqrt(2) / 3
    x = torch.randn(2, 18, 4, 4)
    want = filter_norm(x, 2, "spatial", norm.std) + norm.mean.view(1, 18, 1, 1)
    torch.testing.assert_close(norm(x), want)
    learned = FilterNorm(2, 3, "channel", running_std=True)
    assert set(learned.state_dict()) == {"std"}
    assert learned.std.shape == (18,)


def by_modules(monkeypatch, call):
    """What ``call`` returns where the pack runs its modules one after the other."""
    with monkeypatch.context() as patch:
        patch.setattr(DDFPack, "_norms_to_fuse", lambda pack, x: None)
        return call()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("combine", ["mul", "add"])
@pytest.mark.parametrize("stride, head, k", [(1, 1, 3), (1, 2, 5), (2, 2, 3)])
def test_pack_as_one_function_equals_its_modules(
    stride, head, k, combine, dtype, layout, device, monkeypatch
):
    require_compiled(device)
    pack = DDFPack(16, k, stride, head=head, kernel_combine=combine).to(device, dtype)
    x = torch.randn(3, 16, 11, 9, dtype=dtype).to(device).contiguous(memory_format=layout)
    x.requires_grad_()
    assert pack._norms_to_fuse(x) is not None
    grad = torch.randn_like(pack(x))

    def run():
        out = pack(x)
        return [out, *torch.autograd.grad(out, [x, *pack.parameters()], grad)]

    fused, apart = run(), by_modules(monkeypatch, run)
    tolerance = 1e-12 if dtype == torch.float64 else 0.03
    for got, want in zip(fused, apart, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * want.abs().max().item())
    with torch.no_grad():
        assert torch.equal(pack(x), fused[0])


def test_frozen_parameters_get_no_gradient(device, monkeypatch):
    pack = DDFPack(8).to(device, torch.float64)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    pack.spatial_branch.requires_grad_(False)
    pack.channel_branch[1].weight.requires_grad_(False)
    pack(x).square().sum().backward()
    trained = {name for name, p in pack.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in pack.named_parameters() if p.requires_grad}
    got = x.grad.clone()
    x.grad = None
    by_modules(monkeypatch, lambda: pack(x).square().sum().backward())
    torch.testing.assert_close(got, x.grad)


def test_pack_keeps_the_features_and_the_raw_filters():
    if backend_info()["cpu"] != "compiled":
        pytest.skip("no compiled ops on this machine")
    pack = DDFPack(64)
    x = torch.randn(2, 64, 24, 24, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pack(x)
    parameters = {p.data_ptr() for p in pack.parameters()}
    sizes = sorted(size for address, size in kept.items() if address not in parameters)
    hidden, pooled, channel, spatial = 2 * 12, 2 * 64, 2 * 64 * 9, 2 * 9 * 24 * 24
    assert sizes == [hidden, pooled, channel, spatial, x.numel()]


def test_hooks_and_replaced_modules_are_heeded():
    x = torch.randn(1, 8, 5, 6)
    pack = DDFPack(8)
    seen = []
    handle = pack.spatial_branch[1].register_forward_hook(lambda *args: seen.append(args[2]))
    pack(x)
    assert len(seen) == 1
    handle.remove()

    class Zero(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 0

    convolution = pack.channel_branch[3]
    pack.channel_branch[3] = Zero(convolution.in_channels, convolution.out_channels, 1)
    assert (pack(x) == 0).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_folded_pack_keeps_nan_where_it_is(layout, device):
    if backend_info()[device] == "reference":
        pytest.skip(f"no compiled ops for {device}")
    pack = fuse_ddf_bn(nn.Sequential(DDFPack(8), nn.BatchNorm2d(8)).eval()).to(device)
    x = torch.randn(2, 8, 7, 9, device=device).contiguous(memory_format=layout)
    x[1, 2, 3, 4] = float("nan")
    with torch.no_grad():
        out = pack(x)
    assert out[0].isfinite().all() and out[1].isnan().any()


def test_flops_of_a_fused_pack_are_those_of_its_modules(monkeypatch):
    pack = DDFPack(16, stride=2)
    x = torch.randn(2, 16, 9, 10)

    def count():
        with FlopCounterMode(display=False) as counter:
            pack(x).sum().backward()
        return counter.get_total_flops()

    assert count() == by_modules(monkeypatch, count)


def test_flops_of_an_up_pack_are_those_of_its_modules():
    up, x = DDFUpPack(16), torch.randn(2, 16, 9, 10)
    with FlopCounterMode(display=False) as with_gradients:
        up(x)
    with torch.no_grad(), FlopCounterMode(display=False) as without:
        up(x)
    assert without.get_total_flops() == with_gradients.get_total_flops()


LAYERS = {
    "DDFPack": lambda: DDFPack(8, stride=2),
    "DDFConv2d": lambda: DDFConv2d(8, 8, 3, padding=1),
    "DDFUpPack": lambda: DDFUpPack(8),
}
X = torch.randn(2, 8, 5, 6)


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    layer = LAYERS[request.param]()
    if request.param == "DDFConv2d":
        nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("hook", [False, True])
def test_one_image_is_taken_as_a_batch_of_one(layer, hook, grad):
    if hook:  # the modules one after the other
        layer.channel_branch[-1].register_forward_hook(lambda *_: None)
    with torch.set_grad_enabled(grad):
        out = layer(X[1])
        torch.testing.assert_close(out, layer(X[1:])[0], rtol=0, atol=0)
    assert out.requires_grad == grad


def test_one_image_and_its_guidance():
    up = DDFUpPack(8, joint_channels=3)
    for size in ((5, 6), (10, 12)):
        guide = torch.randn(1, 3, *size)
        torch.testing.assert_close(up(X[0], guide[0]), up(X[:1], guide)[0], rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"joint_x must be one image.*\[1, 3, "):
            up(X[0], guide)
        with pytest.raises(ValueError, match=r"joint_x must be .*B, joint_channels.*got .*\[3, "):
            up(X, guide[0])


@pytest.mark.parametrize(
    "x, exception, message",
    [
        (X[:, :7], ValueError, r"x must have in_channels = 8 channels.*got shape \[2, 7, 5, 6\]"),
        (X[0, :7], ValueError, r"x must have in_channels = 8 channels.*got shape \[7, 5, 6\]"),
        (X[0, 0], ValueError, r"x must be a Tensor\[B, C, H, W\] or .*C = 8, got shape \[5, 6\]"),
        (X[None], ValueError, r"x must be a Tensor\[B, C, H, W\] or .*got shape \[1, 2, 8, 5, 6\]"),
        (X[:, :, :0], ValueError, r"x must have .*at least one row and column.*\[2, 8, 0, 6\]"),
        (X.long(), TypeError, "x must be one of float16.*got torch.int64"),
        (X.to_sparse(), TypeError, "x must be a dense tensor.*got torch.sparse_coo"),
        (X.to_mkldnn(), TypeError, "x must be a dense tensor.*got torch._mkldnn"),
        (torch.nested.nested_tensor([X[0]]), TypeError, "x must be a dense .*got a nested tensor"),
        (X.numpy(), TypeError, "x must be a torch.Tensor, got ndarray"),
        ([X], TypeError, "x must be a torch.Tensor, got list"),
        (None, TypeError, "x must be a torch.Tensor, got NoneType"),
    ],
    # Not of the features, which are random in each worker.
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", None),
)
def test_wrong_features_are_named(layer, x, exception, message):
    for call in (layer, layer.generate_filters):
        with pytest.raises(exception, match=message):
            call(x)


def test_filters_are_of_batches(layer):
    with pytest.raises(ValueError, match=r"x must be a batch here.*got shape \[8, 5, 6\]"):
        layer.generate_filters(X[0])


@pytest.mark.parametrize(
    "guide, exception, message",
    [
        (None, ValueError, "joint_x must be given, a guidance of 3 channels, .* in_channels 8"),
        (X, ValueError, r"joint_x must be .*\[2, 3, 5, 6\].*\[2, 3, 10, 12\], got .*\[2, 8, 5, 6"),
        (3, TypeError, "joint_x must be a torch.Tensor, got int"),
        (X[:, :3].long(), TypeError, "joint_x must be one of float16.*got torch.int64"),
    ],
)
def test_a_wrong_guidance_is_named(guide, exception, message):
    with pytest.raises(exception, match=message):
        DDFUpPack(8, joint_channels=3)(X, guide)


def test_sizes_may_be_numpys():
    eight, three, one = np.int64(8), np.int32(3), np.uint8(1)
    pack = DDFPack(eight, three, one, one, one)
    up = DDFUpPack(eight, three, np.int64(2), one, one, joint_channels=three)
    conv = DDFConv2d(eight, eight, (three, three), [one, one], one, one, one)
    norm = FilterNorm(one, three, "spatial")
    for layer in (pack, up, conv, norm):
        sizes = [v for v in vars(layer).values() if isinstance(v, (int, np.integer))]
        assert {type(size) for size in sizes} <= {int, bool}
    assert pack(X).shape == conv(X).shape == X.shape
    assert up(X, X[:, :3]).shape == (2, 8, 10, 12)


@pytest.mark.parametrize("autocast", [False, True])
def test_features_of_another_dtype_or_device_are_named(layer, autocast):
    with torch.autocast("cpu", enabled=autocast):
        for own, given in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
            message = f"x must have the dtype of the layer's parameters, {own}, got {given} "
            with pytest.raises(TypeError, match=message):
                layer.to(own)(X.to(given))
        layer.to(torch.float32)
        if autocast:
            assert layer(X.half()).dtype == torch.bfloat16
        else:
            with pytest.raises(TypeError, match="parameters, torch.float32, got torch.float16"):
                layer(X.half())
        with pytest.raises(ValueError, match="x must be on the device of .*, cpu, got meta"):
            layer(X.to("meta"))
        with pytest.raises(ValueError, match="x must be on the device of .*, meta, got cpu"):
            layer.to("meta")(X)
        assert layer(X.to("meta")).shape[:2] == X.shape[:2]


def test_a_guidance_of_another_dtype_or_device_is_named():
    up, guide = DDFUpPack(8, joint_channels=3), X[:, :3]
    with pytest.raises(TypeError, match="joint_x must have the dtype of the layer's .* got .*64"):
        up(X, guide.double())
    with pytest.raises(ValueError, match="joint_x must be on the device of .*, cpu, got meta"):
        up(X, guide.to("meta"))


def test_a_branch_that_was_modified_reads_what_it_takes():
    """A custom module may cast; only stock convolutions are checked."""
    pack = DDFPack(8).double()
    want = pack(X.double())
    for branch, i in ((pack.spatial_branch, 0), (pack.channel_branch, 1)):
        branch[i].float().register_forward_pre_hook(lambda _, args: (args[0].float(),))
        branch[i].register_forward_hook(lambda _, args, out: out.double())
    pack.channel_branch[3].double()
    torch.testing.assert_close(pack(X.double()), want, rtol=1e-4, atol=1e-4)
