"""The operation against an independent loop, F.conv2d, gradcheck, and its error messages."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ddf_cases import DEFINITIONS, by_unfold, make, value_and_gradients

from ddf_mm.ops import backend_info, ddf, ddf_reference, ddf_up
from ddf_mm.ops.checks import COMBINES

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def loop_over_definition(x, cf, sf, k, dilation, stride, combine, out_size):
    """The definition, one number at a time; shares no code or idea with the reference."""
    x = x.numpy()
    cf = None if cf is None else cf.numpy()
    sf = None if sf is None else sf.numpy()
    batch, channels, height, width = x.shape
    groups = 1 if sf is None else sf.shape[1] // k**2
    out = np.zeros((batch, channels, *out_size))
    for b, c, i, j in np.ndindex(out.shape):
        group = c // (channels // groups)
        for ty, tx in np.ndindex(k, k):
            row = i * stride + dilation * (ty - k // 2)
            column = j * stride + dilation * (tx - k // 2)
            if not (0 <= row < height and 0 <= column < width):
                continue
            t = ty * k + tx
            if cf is None:
                weight = sf[b, group * k**2 + t, i, j]
            elif sf is None:
                weight = cf[b, c, ty, tx]
            else:
                weight = DEFINITIONS[combine](cf[b, c, ty, tx], sf[b, group * k**2 + t, i, j])
            out[b, c, i, j] += x[b, c, row, column] * weight
    return torch.from_numpy(out)


# Few: test_sweep.py draws from the whole space of cases.
GRID = [
    dict(k=1, dilation=1, stride=1, groups=2, size=(6, 5)),
    dict(k=3, dilation=1, stride=1, groups=1, size=(1, 1)),
    dict(k=3, dilation=1, stride=4, groups=2, size=(9, 8)),
    dict(k=3, dilation=2, stride=2, groups=2, size=(6, 5)),
    dict(k=3, dilation=3, stride=2, groups=1, size=(2, 3)),
    dict(k=5, dilation=1, stride=3, groups=1, size=(1, 7)),
    dict(k=7, dilation=1, stride=1, groups=4, size=(3, 4)),
]


@pytest.mark.parametrize("which", ["both", "channel", "spatial"])
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("case", GRID, ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items()))
def test_equals_the_loop_over_the_definition(case, combine, which, device):
    k, d, s = case["k"], case["dilation"], case["stride"]
    x, cf, sf = make(size=case["size"], k=k, groups=case["groups"], stride=s, which=which)
    out_size = [-(-n // s) for n in case["size"]]
    want = loop_over_definition(x, cf, sf, k, d, s, combine, out_size)
    on = [None if t is None else t.to(device) for t in (x, cf, sf)]
    # Worst difference seen on this grid: 3e-15.
    torch.testing.assert_close(ddf(*on, k, d, s, combine).cpu(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(7, 9), (8, 7), (5, 5)])
@pytest.mark.parametrize("stride", [2, 3])
def test_takes_the_official_rounding_down(size, stride):
    x, cf, sf = make(size=size, stride=stride, floor=True)
    out_size = [n // stride for n in size]
    want = loop_over_definition(x, cf, sf, 3, 1, stride, "mul", out_size)
    got = ddf(x, cf, sf, 3, 1, stride)
    assert list(got.shape[2:]) == out_size
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k, dilation, stride", [(3, 1, 1), (3, 2, 2), (5, 1, 2), (7, 1, 1)])
@pytest.mark.parametrize("combine, fill", [("mul", 1.0), ("add", 0.0)])
def test_neutral_spatial_filter_is_a_depthwise_convolution(k, dilation, stride, combine, fill):
    x, cf, sf = make(size=(11, 14), k=k, stride=stride)
    want = F.conv2d(
        x.reshape(1, -1, *x.shape[2:]),
        cf.reshape(-1, 1, k, k),
        stride=stride,
        padding=dilation * (k // 2),
        dilation=dilation,
        groups=x.shape[0] * x.shape[1],
    ).view(x.shape[0], x.shape[1], *sf.shape[2:])
    for spatial in (torch.full_like(sf, fill), None):
        got = ddf(x, cf, spatial, k, dilation, stride, combine)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("combine, fill", [("mul", 1.0), ("add", 0.0)])
def test_neutral_channel_filter_is_none(combine, fill):
    x, cf, sf = make(groups=2)
    want = ddf(x, torch.full_like(cf, fill), sf, kernel_combine=combine)
    torch.testing.assert_close(ddf(x, None, sf, kernel_combine=combine), want)


@pytest.mark.parametrize("which", ["both", "channel", "spatial"])
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(
    "case",
    [
        dict(k=3, dilation=1, stride=1, groups=1),
        dict(k=3, dilation=2, stride=2, groups=2),
        dict(k=5, dilation=1, stride=2, groups=2),
    ],
)
def test_gradients_of_first_and_second_order(case, combine, which, device):
    x, cf, sf = make(
        batch=1,
        channels=2,
        size=(3, 3),
        k=case["k"],
        groups=case["groups"],
        stride=case["stride"],
        which=which,
        device=device,
        requires_grad=True,
    )
    tensors = [t for t in (x, cf, sf) if t is not None]

    def function(*given):
        filled = iter(given)
        full = [None if t is None else next(filled) for t in (x, cf, sf)]
        return ddf(*full, case["k"], case["dilation"], case["stride"], combine)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


# Worst error over the rounding unit of the dtype and the largest output, seen on this case:
# 0.5 for every 16-bit one, since sums are kept in float32; 1.1 for float32.
@pytest.mark.parametrize("function", [ddf, ddf_reference])
@pytest.mark.parametrize("dilation", [7, 10**6, 2**62])
def test_dilation_beyond_the_image_leaves_the_centre(function, dilation, device):
    """In no more time and memory than the image takes."""
    x, per_channel, per_pixel = (
        torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)
        for shape in ((2, 4, 6, 7), (2, 4, 3, 3), (2, 9, 6, 7))
    )
    out = function(x, per_channel, per_pixel, 3, dilation)
    expected = x * per_channel[:, :, 1, 1, None, None] * per_pixel[:, 4:5]
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    inputs = (x, per_channel, per_pixel)
    found, wanted = (torch.autograd.grad(value, inputs, grad) for value in (out, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [ddf, ddf_reference])
def test_stride_beyond_the_image_leaves_the_first_window(function, device):
    x, per_channel = torch.randn(1, 4, 6, 7, device=device), torch.randn(1, 4, 3, 3, device=device)
    out = function(x, per_channel, None, 3, 1, 2**62)
    expected = (x[:, :, :2, :2] * per_channel[:, :, 1:, 1:]).sum((2, 3), keepdim=True)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dtype_and_layout_of_the_output(dtype, layout, device):
    x, cf, sf = (t.to(dtype) for t in make(channels=8, size=(9, 7), stride=2, groups=2))
    want = ddf_reference(x.double(), cf.double(), sf.double(), stride=2)
    on = [t.to(device) for t in (x, cf, sf)]
    got = ddf(on[0].contiguous(memory_format=layout), *on[1:], stride=2)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=layout)
    error = (got.double().cpu() - want).abs().max() / want.abs().max()
    assert error <= 2 * torch.finfo(dtype).eps


def test_16_bit_sums_are_kept_in_float32():
    # 49 taps of 1 and one of 256: in float16 or bfloat16 sums the ones would be lost.
    x = torch.ones(1, 1, 7, 7, dtype=torch.bfloat16)
    cf = torch.ones(1, 1, 7, 7, dtype=torch.bfloat16)
    cf[0, 0, 0, 0] = 256
    got = ddf(x, cf, None, 7)[0, 0, 3, 3]
    assert got == torch.tensor(256.0 + 48).bfloat16()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, dilation, stride", [(3, 1, 1), (3, 2, 1), (5, 1, 1), (3, 1, 2)])
def test_every_width_of_a_group_in_channels_last(k, dilation, stride, dtype, device):
    """CPU kernels run along rows or along channels, of one group or of several, by the numbers of
    channels and groups."""
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1e-2)
    for channels, groups in [
        *((c, 1) for c in (*range(1, 14), 15, 17, 24, 33, 41)),
        *((6, 3), (9, 3), (12, 4), (13, 13), (14, 7), (20, 20), (26, 13), (30, 6), (33, 11)),
        *((36, 9), (42, 7), (45, 5), (50, 5), (60, 10), (64, 8)),
    ]:
        tensors = make(1, channels, (9, 21), k, groups, stride, dtype=dtype, device=device)
        x, cf, sf = tensors
        options = (k, dilation, stride, "mul")
        exact = [t.double() for t in tensors]
        grad = torch.ones_like(by_unfold(*exact, *options)).cumsum(1).to(dtype)
        want = value_and_gradients(by_unfold, exact, grad.double(), options)
        x, grad, last = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad, sf))
        for spatial in (sf, last):
            got = value_and_gradients(ddf, (x, cf, spatial), grad, options)
            for a, b in zip(got, want, strict=True):
                error = (a.double() - b).abs().max() / b.abs().max()
                assert error < tolerance, (channels, groups, spatial.stride())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_every_length_of_a_row(dtype, tolerance, device):
    """CPU kernels for 3x3 windows filter several pixels or rows at a time, and read the taps of a
    channels_last spatial filter where they are."""
    for width in range(1, 23):
        tensors = make(1, 21, (5, width), dtype=dtype, device=device)
        grad = torch.ones_like(tensors[0]).cumsum(1)
        exact = [t.double() for t in tensors]
        want = value_and_gradients(by_unfold, exact, grad.double(), (3, 1, 1, "mul"))
        x, cf, sf = tensors
        # Its pixels are 9 elements apart, as in channels_last, but its taps are not adjacent.
        apart = torch.empty(*sf.shape, 9, dtype=dtype, device=device)[..., 0].copy_(sf)
        for layout in (torch.contiguous_format, torch.channels_last):
            features, dy = (t.contiguous(memory_format=layout) for t in (x, grad))
            for spatial in (sf, sf.contiguous(memory_format=torch.channels_last), apart):
                got = value_and_gradients(ddf, (features, cf, spatial), dy, (3,))
                for a, b in zip(got, want, strict=True):
                    error = (a.double() - b).abs().max() / b.abs().max()
                    assert error < tolerance, (width, layout, spatial.stride())


@pytest.mark.parametrize("stride", [1, 2])
def test_empty_batch(stride):
    x, cf, sf = make(batch=0, stride=stride, requires_grad=True)
    out = ddf(x, cf, sf, stride=stride)
    assert out.shape == (0, 4, -(-5 // stride), -(-6 // stride))
    out.sum().backward()
    assert x.grad.shape == x.shape and sf.grad.shape == sf.shape


def test_strided_views_are_read_right():
    x, cf, sf = make(batch=2, channels=4, size=(6, 8))
    want = ddf(x, cf, sf)
    wide = torch.randn(2, 8, 6, 16, dtype=x.dtype)
    view = wide[:, ::2, :, ::2]
    view.copy_(x)
    sf_view = sf.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    assert not view.is_contiguous() and not sf_view.is_contiguous()
    torch.testing.assert_close(ddf(view, cf, sf_view), want, rtol=0, atol=1e-14)


def test_nan_stays_in_its_image_and_window():
    x, cf, sf = make(size=(9, 9))
    x[1, 2, 4, 4] = float("nan")
    bad = ddf(x, cf, sf).isnan().nonzero()
    assert bad[:, :2].unique(dim=0).tolist() == [[1, 2]]
    assert bad[:, 2:].min() == 3 and bad[:, 2:].max() == 5 and len(bad) == 9


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_casts_mixed_inputs(enabled, device):
    x, cf, sf = make(dtype=torch.float32, device=device)
    mixed = (x, cf.bfloat16(), sf)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
        if not enabled:
            with pytest.raises(TypeError, match="channel_filter must have the dtype of features"):
                ddf(*mixed)
            return
        got = ddf(*mixed)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, ddf(*(t.bfloat16() for t in mixed)), rtol=0, atol=0)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ddf(*make()).dtype == torch.float64


def test_gradients_flow_in_the_dtype_of_the_inputs_under_autocast():
    x, cf, sf = make(dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ddf(x, cf, sf).sum().backward()
    assert {t.grad.dtype for t in (x, cf, sf)} == {torch.float32}


def test_compiles_in_one_graph():
    compiled = torch.compile(ddf, fullgraph=True, backend="eager", dynamic=False)
    tensors = make(size=(7, 7), stride=2)
    torch.testing.assert_close(compiled(*tensors, 3, 1, 2), ddf(*tensors, 3, 1, 2))


GOOD = dict(kernel_size=3, dilation=1, stride=1, kernel_combine="mul")
X = torch.zeros(2, 4, 5, 6)
CF = torch.zeros(2, 4, 3, 3)
SF = torch.zeros(2, 9, 5, 6)
ERRORS = [
    # changed arguments, exception, what the message says
    (dict(features=[1.0]), TypeError, "features must be a torch.Tensor, got list"),
    (dict(features=X.int()), TypeError, "features must be one of .* got torch.int32"),
    (dict(features=X[0]), ValueError, r"features must be a Tensor\[B, C, H, W\], got 3 dim"),
    (dict(features=X[:, :0]), ValueError, r"features must have at least one channel.*\[2, 0"),
    (dict(features=X[..., :0]), ValueError, r"features must have at least one .*\[2, 4, 5, 0"),
    (dict(channel_filter="ones"), TypeError, "channel_filter must be a torch.Tensor, got str"),
    (
        dict(channel_filter=torch.cat([CF, CF[:1]])),
        ValueError,
        r"channel_filter must be .*\[2, 4, 3, 3\].*got \[3",
    ),
    (dict(channel_filter=CF[:, :2]), ValueError, r"channel_filter must be .*got \[2, 2, 3, 3\]"),
    (dict(channel_filter=CF.flatten(2)), ValueError, r"channel_filter must be .*got \[2, 4, 9\]"),
    (dict(channel_filter=CF.double()), TypeError, "channel_filter .*float32, got torch.float64"),
    (dict(channel_filter=CF.to("meta")), ValueError, "channel_filter .*device.* cpu, got meta"),
    (dict(kernel_size=5), ValueError, r"channel_filter must be .*\[2, 4, 5, 5\]"),
    (dict(spatial_filter=3), TypeError, "spatial_filter must be a torch.Tensor, got int"),
    (dict(spatial_filter=SF[0]), ValueError, r"spatial_filter must be .*got shape \[9, 5, 6\]"),
    (
        dict(spatial_filter=torch.cat([SF, SF[:1]])),
        ValueError,
        r"spatial_filter must be .*B = 2.*got shape \[3",
    ),
    (dict(spatial_filter=SF[:, :8]), ValueError, "spatial_filter .*multiple of 9 .*got 8"),
    (
        dict(spatial_filter=SF.repeat(1, 3, 1, 1)),
        ValueError,
        "spatial_filter has 27 channels, that is 3 filter groups .*divide the 4 channels",
    ),
    (dict(spatial_filter=SF[..., :3]), ValueError, "spatial_filter must be 5x6 pixels.*got 5x3"),
    (dict(stride=2), ValueError, r"spatial_filter must be 3x3 pixels.*2x3\), got 5x6"),
    (dict(spatial_filter=SF.half()), TypeError, "spatial_filter .*float32, got torch.float16"),
    (dict(spatial_filter=SF.to("meta")), ValueError, "spatial_filter .*device.* cpu, got meta"),
    (
        dict(stride=7, spatial_filter=SF[..., :0, :0]),
        ValueError,
        "spatial_filter must have at least one pixel, got 0x0",
    ),
    (
        dict(channel_filter=None, spatial_filter=None),
        ValueError,
        "channel_filter and spatial_filter are both None",
    ),
    (dict(kernel_size=4), ValueError, "kernel_size must be odd.*got 4"),
    (dict(kernel_size=0), ValueError, "kernel_size must be at least 1, got 0"),
    (dict(kernel_size=3.0), TypeError, "kernel_size must be an int, got 3.0 of type float"),
    (dict(kernel_size=(3, 3)), TypeError, r"kernel_size must be an int, got \(3, 3\)"),
    (dict(stride=0), ValueError, "stride must be at least 1, got 0"),
    (dict(stride=True), TypeError, "stride must be an int, got True"),
    (dict(dilation=0), ValueError, "dilation must be at least 1, got 0"),
    (dict(dilation=-1), ValueError, "dilation must be at least 1, got -1"),
    (dict(kernel_combine="sub"), ValueError, "kernel_combine must be 'mul' or 'add'.*, got 'sub'"),
    (dict(kernel_size="3"), TypeError, "kernel_size must be an int, got '3' of type str"),
    (dict(stride=2**63), ValueError, r"stride must be less than 2\*\*63, got 92"),
    (dict(features=X.to_sparse()), TypeError, "features must be a dense .*got torch.sparse_coo"),
    (dict(channel_filter=CF.to_mkldnn()), TypeError, "channel_filter must be a dense .*_mkldnn"),
    (
        dict(features=torch.nested.nested_tensor([X[0]])),
        TypeError,
        "features must be a dense tensor.*got a nested tensor",
    ),
]


@pytest.mark.parametrize("change, exception, message", ERRORS, ids=[e[2][:40] for e in ERRORS])
@pytest.mark.parametrize("function", [ddf, ddf_reference])
def test_bad_arguments_are_named(function, change, exception, message):
    good = dict(features=X, channel_filter=CF, spatial_filter=SF, **GOOD)
    function(**good)
    with pytest.raises(exception, match=message):
        function(**{**good, **change})


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("scale, groups, k", [(2, 1, 3), (3, 2, 3), (1, 1, 5), (4, 1, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_ddf_up_writes_each_subpixel(scale, groups, k, combine, layout):
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64).contiguous(memory_format=layout)
    cf = torch.randn(2, scale**2, 4, k, k, dtype=torch.float64)
    sf = torch.randn(2, scale**2, groups * k * k, 5, 3, dtype=torch.float64)
    out = ddf_up(x, cf, sf, k, scale, kernel_combine=combine)
    assert out.shape == (2, 4, 5 * scale, 3 * scale)
    assert out.is_contiguous(memory_format=layout)
    for p, q in itertools.product(range(scale), repeat=2):
        r = p * scale + q
        want = ddf(x, cf[:, r], sf[:, r], k, kernel_combine=combine)
        torch.testing.assert_close(out[:, :, p::scale, q::scale], want, rtol=0, atol=0)


def test_ddf_up_without_one_of_the_filters_and_with_an_empty_batch():
    x = torch.randn(2, 4, 5, 3)
    sf = torch.randn(2, 4, 9, 5, 3)
    ones = torch.ones(2, 4, 4, 3, 3)
    torch.testing.assert_close(ddf_up(x, None, sf), ddf_up(x, ones, sf))
    assert ddf_up(x[:0], None, sf[:0]).shape == (0, 4, 10, 6)


@pytest.mark.parametrize(
    "change, exception, message",
    [
        (dict(scale_factor=0), ValueError, "scale_factor must be at least 1, got 0"),
        (dict(scale_factor=2.0), TypeError, "scale_factor must be an int"),
        (dict(scale_factor=3), ValueError, r"channel_filter must be .*s\*s = 9 for scale_factor 3"),
        (dict(spatial_filter=SF), ValueError, r"spatial_filter must be .*s\*s = 4.*\[2, 9, 5, 6\]"),
        (dict(channel_filter=1), TypeError, "channel_filter must be a torch.Tensor"),
        (
            dict(channel_filter=torch.zeros(2, 4, 3, 3, 3)),
            ValueError,
            r"channel_filter must be .*s\*s.* = \[2, 4, 4, 3, 3\].*got \[2, 4, 3, 3, 3\]",
        ),
        (
            dict(spatial_filter=torch.zeros(2, 4, 9, 5, 5)),
            ValueError,
            "spatial_filter must have the 5x6 pixels of features, got 5x5",
        ),
        (dict(dilation=0), ValueError, "dilation must be at least 1, got 0"),
        (dict(channel_filter=None, spatial_filter=None), ValueError, "are both None"),
    ],
)
def test_ddf_up_names_bad_arguments(change, exception, message):
    good = dict(
        features=X,
        channel_filter=torch.zeros(2, 4, 4, 3, 3),
        spatial_filter=torch.zeros(2, 4, 9, 5, 6),
    )
    ddf_up(**good)
    with pytest.raises(exception, match=message):
        ddf_up(**{**good, **change})


def test_sizes_may_be_numpys():
    one, two, three = np.uint8(1), np.int64(2), np.int32(3)
    for function in (ddf, ddf_reference):
        want = function(X, CF, SF[..., ::2, ::2], 3, 1, 2)
        assert torch.equal(function(X, CF, SF[..., ::2, ::2], three, one, two), want)
    filters = torch.randn(2, 4, 9, 5, 6)
    assert torch.equal(ddf_up(X, None, filters, three, two, one), ddf_up(X, None, filters))


@pytest.mark.parametrize("double", ["features", "channel_filter", "spatial_filter"])
def test_autocast_names_the_float64_tensor_that_was_given(double):
    """It casts no float64; a mixture is refused, in words about the tensors as they were given."""
    tensors = dict(features=X, channel_filter=CF, spatial_filter=SF)
    with torch.autocast("cpu"):
        assert ddf(**tensors).dtype == torch.bfloat16
        assert ddf(**{name: t.double() for name, t in tensors.items()}).dtype == torch.float64
        with pytest.raises(TypeError, match="only if none of them is float64") as error:
            ddf(**{**tensors, double: tensors[double].double()})
    message = str(error.value)
    assert "torch.float64" in message and "torch.float32" in message
    assert "bfloat16" not in message


def test_backend_info_names_what_serves():
    info = backend_info()
    assert info["default"] == "reference"


def test_docstring_examples_run():
    """The examples in the docstrings of the functional API print what they say."""
    import doctest
    from importlib import import_module

    for name in ("ddf_mm.ops.ddf", "ddf_mm.ops.filter_norm"):
        module = import_module(name)
        tests = doctest.DocTestFinder(exclude_empty=True).find(
            module, extraglobs={"torch": torch}, module=module
        )
        examples = [t for t in tests if t.examples]
        assert examples, name
        for test in examples:
            result = doctest.DocTestRunner().run(test)
            assert result.failed == 0, re.escape(test.name)
