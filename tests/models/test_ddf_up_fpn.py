"""DDFUpFPN: equality with FPN, sizes, guidance, initialization, compilation, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import nn

from ddf_mm.layers import DDFUpPack
from ddf_mm.models import DDFUpFPN

CHANNELS = [4, 6, 8, 10]


def pyramid(height: int, width: int, channels=CHANNELS, batch: int = 2, **kwargs):
    """Inputs with the sizes that padded strides of 2 give."""
    return [
        torch.randn(batch, c, math.ceil(height / 2**i), math.ceil(width / 2**i), **kwargs)
        for i, c in enumerate(channels)
    ]


def fpn_of(toolbox: str) -> type[nn.Module]:
    return pytest.importorskip(f"{toolbox}.models.necks").FPN


class Nearest(nn.Module):
    """The upsampling of FPN."""

    scale_factor = 2

    def forward(self, x, joint_x=None):
        return F.interpolate(x, scale_factor=2, mode="nearest")


VARIANTS = [
    dict(num_outs=4),
    dict(num_outs=5),
    dict(num_outs=6, add_extra_convs=True),
    dict(num_outs=6, add_extra_convs="on_input", relu_before_extra_convs=True),
    dict(num_outs=6, add_extra_convs="on_lateral"),
    dict(num_outs=6, add_extra_convs="on_output", relu_before_extra_convs=True),
    dict(num_outs=5, start_level=1, add_extra_convs="on_output"),
    dict(num_outs=3, end_level=2),
    dict(num_outs=2, start_level=1, end_level=2),
    dict(num_outs=5, end_level=3),
    dict(num_outs=4, norm_cfg=dict(type="BN"), act_cfg=dict(type="ReLU")),
    dict(num_outs=4, norm_cfg=dict(type="GN", num_groups=2), no_norm_on_lateral=True),
]
MMSEG_VARIANTS = [
    dict(num_outs=6, add_extra_convs=True, extra_convs_on_inputs=True),
    dict(num_outs=6, add_extra_convs=True, extra_convs_on_inputs=False),
    dict(num_outs=3, end_level=3),
    dict(num_outs=2, start_level=1, end_level=3),
    dict(num_outs=4, end_level=4),
]


@pytest.mark.parametrize(
    "toolbox, arguments",
    [("mmdet", a) for a in VARIANTS] + [("mmseg", a) for a in [VARIANTS[0], *MMSEG_VARIANTS]],
)
def test_is_fpn_but_for_the_upsamplers(toolbox, arguments):
    theirs = fpn_of(toolbox)(CHANNELS, 16, **arguments).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours = DDFUpFPN(CHANNELS, 16, **arguments).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected
    assert missing and all(name.startswith("upsample_modules.") for name in missing)
    assert len(ours.upsample_modules) == len(ours.lateral_convs) - 1

    inputs = pyramid(32, 64)
    before = ours(inputs)
    ours.upsample_modules = nn.ModuleList(Nearest() for _ in ours.upsample_modules)
    want = theirs(inputs)
    for got, with_ddf, expected in zip(ours(inputs), before, want, strict=True):
        torch.testing.assert_close(got, expected)
        assert with_ddf.shape == expected.shape
    assert (before[0] != want[0]).any()


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("size", [(64, 32), (57, 41), (9, 15), (8, 1), (1, 1)])
def test_sizes_are_those_of_the_inputs(size, guidance):
    neck = DDFUpFPN(CHANNELS, 8, 5, guidance=guidance)
    inputs = pyramid(*size)
    outs = neck(inputs)
    assert [o.shape[2:] for o in outs[:4]] == [x.shape[2:] for x in inputs]
    sum(o.sum() for o in outs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in neck.parameters())


@pytest.mark.parametrize("guidance", [False, True])
def test_top_down_path_is_ddf_up_cropped_to_the_lateral(guidance):
    neck = DDFUpFPN([4, 6], 8, 2, guidance=guidance, upsample_cfg=dict(head=2)).double()
    fine, coarse = pyramid(7, 9, [4, 6], dtype=torch.float64)
    low, high = neck.lateral_convs[1](coarse), neck.lateral_convs[0](fine)
    guide = F.pad(high, (0, 1, 0, 1), value=3.0) if guidance else None
    up = neck.upsample_modules[0](low, guide)
    assert up.shape[2:] == (8, 10)
    want = neck.fpn_convs[0](high + up[:, :, :7, :9])
    torch.testing.assert_close(neck([fine, coarse])[0], want)


def test_guidance_reaches_the_upsamplers_pixel_by_pixel():
    """A change of one pixel of the fine input changes the upsampled features only there."""
    neck = DDFUpFPN([4, 6], 8, 2, guidance=True).double()
    neck.fpn_convs[0] = nn.Identity()
    fine, coarse = pyramid(8, 8, [4, 6], dtype=torch.float64)
    changed = fine.clone()
    changed[:, :, 3, 5] += 1
    upsampled = [neck([x, coarse])[0] - neck.lateral_convs[0](x) for x in (fine, changed)]
    different = (upsampled[0] - upsampled[1]).abs().amax((0, 1)) > 1e-9
    assert different.nonzero().tolist() == [[3, 5]]


@pytest.mark.parametrize("guidance", [False, True])
def test_scale_factors_of_dilated_and_of_steep_backbones(guidance):
    neck = DDFUpFPN(CHANNELS, 8, 4, scale_factor=[4, 1, 3], guidance=guidance)
    sizes = [(33, 47), (9, 12), (9, 12), (3, 4)]
    inputs = [torch.randn(2, c, *size) for c, size in zip(CHANNELS, sizes, strict=True)]
    assert [tuple(o.shape[2:]) for o in neck(inputs)] == sizes
    assert [len(up.spatial_branch) for up in neck.upsample_modules] == [16, 1, 9]


@pytest.mark.parametrize("guidance", [False, True])
def test_levels_that_were_rounded_down_grow_by_their_border(guidance):
    """Strides without padding, as in ConvNeXt: 15 x 9 -> 7 x 4."""
    neck = DDFUpFPN([4, 4], 8, 2, guidance=guidance)
    fine, coarse = torch.randn(2, 4, 15, 9), torch.randn(2, 4, 7, 4)
    outs = neck([fine, coarse])
    assert [tuple(o.shape[2:]) for o in outs] == [(15, 9), (7, 4)]
    grown = F.pad(coarse, (0, 1, 0, 1), mode="replicate")
    torch.testing.assert_close(outs[0], neck([fine, grown])[0])


@pytest.mark.parametrize(
    "scale_factor, sizes",
    [
        (2, [(16, 16), (16, 16)]),
        (2, [(16, 16), (4, 4)]),
        (2, [(16, 16), (7, 8)]),
        (4, [(17, 17), (3, 5)]),
        (1, [(16, 16), (8, 8)]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(scale_factor, sizes):
    neck = DDFUpFPN([2, 4, 6], 4, 2, start_level=1, scale_factor=scale_factor)
    inputs = [torch.randn(1, 2, 32, 32)]
    inputs += [torch.randn(1, c, *size) for c, size in zip((4, 6), sizes, strict=True)]
    (a, b), (c, d) = sizes
    message = f"scale_factor {scale_factor} does not fit inputs 1 and 2, of sizes {a} x {b} and "
    with pytest.raises(ValueError, match=f"{message}{c} x {d}: give scale_factor as a list"):
        neck(inputs)


def test_upsample_cfg_reaches_every_upsampler():
    cfg = dict(kernel_combine="add", head=4, kernel_size=5, se_ratio=0.5, dw_kernel_size=5)
    neck = DDFUpFPN(CHANNELS, 8, 4, upsample_cfg=cfg)
    for up in neck.upsample_modules:
        assert (up.kernel_combine, up.head, up.kernel_size) == ("add", 4, 5)
        assert up.spatial_branch[0][0].kernel_size == (5, 5)
    neck(pyramid(16, 16))


def test_conv_cfg_makes_the_convolutions():
    neck = DDFUpFPN([8, 8], 8, 3, add_extra_convs=True, conv_cfg=dict(type="ConvWS"))
    kinds = {type(conv.conv).__name__ for conv in [*neck.lateral_convs, *neck.fpn_convs]}
    assert kinds == {"ConvWS2d"}
    assert all(isinstance(up, DDFUpPack) for up in neck.upsample_modules)


def test_initialization():
    neck = DDFUpFPN([64, 128], 64, 2)
    neck.init_weights()
    for conv in [*neck.lateral_convs, *neck.fpn_convs]:
        # Xavier, uniform: within sqrt(6 / (fan_in + fan_out)).
        weight = conv.conv.weight
        bound = math.sqrt(6 / (weight[0].numel() + weight[:, 0].numel()))
        assert 0.98 * bound < weight.abs().max() <= bound
        assert (conv.conv.bias == 0).all()
    (up,) = neck.upsample_modules
    for conv in (m for m in up.modules() if isinstance(m, nn.Conv2d)):
        bound = 1 / math.sqrt(conv.weight[0].numel())
        assert 0.9 * bound < conv.weight.abs().max() <= bound
        assert (conv.bias != 0).any()


@pytest.mark.parametrize("guidance", [False, True])
def test_empty_batch_layout_and_half_precision(guidance):
    neck = DDFUpFPN([8, 16], 8, 3, guidance=guidance)
    inputs = pyramid(9, 15, [8, 16])
    want = neck(inputs)
    assert [o.shape for o in neck([x[:0] for x in inputs])] == [(0, *o.shape[1:]) for o in want]

    last = neck.to(memory_format=torch.channels_last)(
        [x.to(memory_format=torch.channels_last) for x in inputs]
    )
    for got, expected in zip(last, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert last[0].is_contiguous(memory_format=torch.channels_last)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = neck(inputs)
        loss = sum(o.float().square().mean() for o in mixed)
    loss.backward()
    assert all(o.dtype == torch.bfloat16 for o in mixed)
    assert all(p.grad.isfinite().all() for p in neck.parameters())
    half = neck.bfloat16()([x.bfloat16() for x in inputs])
    for got, expected in zip(half, want, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("guidance", [False, True])
def test_exports_and_compiles_as_one_graph(guidance):
    neck = DDFUpFPN([8, 16, 8], 8, 4, guidance=guidance).eval()
    inputs = pyramid(9, 15, [8, 16, 8])
    want = neck(inputs)
    exported = torch.export.export(neck, (inputs,)).module()
    compiled = torch.compile(neck, fullgraph=True, backend="aot_eager")
    for other in (exported(inputs), compiled(inputs)):
        for got, expected in zip(other, want, strict=True):
            torch.testing.assert_close(got, expected)


def test_registered_once_in_the_root():
    assert MODELS.get("DDFUpFPN") is DDFUpFPN
    cfg = dict(type="DDFUpFPN", in_channels=CHANNELS, out_channels=8, num_outs=5)
    assert MODELS.build(cfg).num_outs == 5


@pytest.mark.parametrize(
    "arguments, exception, message",
    [
        (dict(in_channels=8), TypeError, "in_channels must be a list or tuple, .* got 8 of type"),
        (dict(in_channels=[4, 0]), ValueError, r"in_channels\[1\] must be at least 1, got 0"),
        (dict(in_channels="48"), TypeError, "in_channels must be a list or tuple, .* got '48'"),
        (dict(in_channels=np.int64(8)), TypeError, "in_channels must be a list or tuple"),
        (dict(in_channels=[4, "8"]), TypeError, r"in_channels\[1\] must be an int, got '8'"),
        (dict(end_level=None), TypeError, "end_level must be an int, got None"),
        (dict(scale_factor="2"), TypeError, "scale_factor must be .*int, got '2'"),
        (dict(scale_factor=[2, 2, 0]), ValueError, r"scale_factor\[2\] must be at least 1, got 0"),
        (dict(norm_cfg="BN"), TypeError, "norm_cfg must be a dict.*got 'BN'"),
        (dict(upsample_cfg=[1]), TypeError, "upsample_cfg must be a dict.*DDFUpPack.*list"),
        (dict(out_channels=0), ValueError, "out_channels must be at least 1, got 0"),
        (dict(num_outs=3), ValueError, "num_outs must be at least 4 for 4 inputs, .* got 3"),
        (dict(num_outs=5, end_level=1), ValueError, "num_outs must be 2 for 4 .* got 5"),
        (dict(start_level=4), ValueError, "start_level and end_level must leave levels of the 4"),
        (dict(start_level=-1), ValueError, "start_level must be at least 0, got -1"),
        (dict(end_level=4, num_outs=5), ValueError, "must leave levels .* end_level 4"),
        (dict(end_level=-2), ValueError, "end_level must be at least -1, got -2"),
        (dict(add_extra_convs="on_top"), ValueError, "add_extra_convs must be .*got 'on_top'"),
        (dict(scale_factor=0), ValueError, "scale_factor must be at least 1, got 0"),
        (dict(scale_factor=[2, 2]), ValueError, r"adjacent levels .* 3, got \[2, 2\]"),
        (dict(upsample_cfg=dict(mode="nearest")), ValueError, "upsample_cfg holds .*got mode"),
        (dict(upsample_cfg=dict(scale_factor=2)), ValueError, "got scale_factor; scale_factor"),
        (dict(upsample_cfg=dict(head=3)), ValueError, "head must divide in_channels"),
    ],
)
def test_bad_arguments_are_named(arguments, exception, message):
    with pytest.raises(exception, match=message):
        DDFUpFPN(**{"in_channels": CHANNELS, "out_channels": 8, "num_outs": 4, **arguments})


def test_another_number_of_inputs_is_refused():
    with pytest.raises(ValueError, match="inputs must hold a tensor for each .* 4, got 3"):
        DDFUpFPN(CHANNELS, 8, 4)(pyramid(8, 8)[:3])


def test_wrong_inputs_are_named():
    neck, good = DDFUpFPN(CHANNELS, 8, 4), pyramid(8, 8)
    for inputs in (good[0], None, {"a": good[0]}):
        with pytest.raises(TypeError, match="inputs must be a list or tuple, a tensor for each"):
            neck(inputs)
    with pytest.raises(TypeError, match=r"inputs\[2\] must be a torch.Tensor, got NoneType"):
        neck([*good[:2], None, good[3]])
    with pytest.raises(
        ValueError, match=r"inputs\[1\] must be a Tensor\[B, 6, H, W\], .*\[2, 4, 8"
    ):
        neck([good[0], good[0], *good[2:]])
    with pytest.raises(
        ValueError, match=r"inputs\[0\] must be a Tensor\[B, 4, H, W\], .*\[4, 8, 8"
    ):
        neck([x[0] for x in good])


def test_sizes_may_be_numpys():
    sizes = dict(in_channels=(np.int64(4), np.int32(6)), out_channels=np.int64(8))
    neck = DDFUpFPN(**sizes, num_outs=np.int64(2), scale_factor=[np.int64(2)])
    assert [out.shape[1] for out in neck(pyramid(8, 8, CHANNELS[:2]))] == [8, 8]


class TwoLevels(nn.Module):
    def __init__(self, guidance: bool) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.coarse = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.neck = DDFUpFPN([4, 4], 4, num_outs=2, guidance=guidance)

    def forward(self, images):
        fine = self.fine(images)
        return self.neck([fine, self.coarse(fine)])


@pytest.mark.parametrize("guidance", [False, True])
def test_exported_for_even_sizes_serves_odd_ones(guidance):
    model = TwoLevels(guidance).eval()
    free = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(free,), strict=False
    ).module()
    for shape in ((1, 3, 64, 96), (3, 3, 49, 129), (2, 3, 31, 46)):
        images = torch.randn(shape)
        torch.testing.assert_close(program(images), model(images))
