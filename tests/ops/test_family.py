"""The family of weight-dynamic depthwise operations against their formulas by unfold.

The formulas are written from the papers with each original's own layout of the filters, values and
gradients in float64.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from ddf_cases import channels_last, contiguous, transposed, value_and_gradients
from torch import Tensor

from ddf_mm.ops import (
    adaptive_conv,
    apply_kernel,
    backend_info,
    carafe,
    convex_upsample,
    cspn,
    ddf,
    ddf_reference,
    ddf_up,
    ddf_up_reference,
    dynamic_upsampling,
    involution,
)
from ddf_mm.ops.checks import DTYPES, PADDINGS, check_ddf, check_ddf_up
from ddf_mm.ops.ddf import _by_rim_of_zeros
from ddf_mm.ops.reference import ddf_up_valid_reference, ddf_valid_reference

B, H, W = 2, 6, 7


def random(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


def windows(x: Tensor, k: int, padding: int = 0, stride: int = 1, dilation: int = 1) -> Tensor:
    """``Tensor[B, C, k*k, Ho, Wo]``."""
    reach = dilation * (k - 1)
    size = [(s + 2 * padding - reach - 1) // stride + 1 for s in x.shape[2:]]
    return F.unfold(x, k, dilation, padding, stride).view(*x.shape[:2], k * k, *size)


def assert_same(ours: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Equal values, and equal gradients of a weighted sum of them."""
    torch.testing.assert_close(ours, expected)
    weights = torch.randn_like(expected)
    both = (torch.autograd.grad(out, inputs, weights) for out in (ours, expected))
    for got, wanted in zip(*both, strict=True):
        assert wanted.abs().sum() > 0
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("k, groups, s", [(5, 1, 2), (3, 2, 3)])
def test_carafe(k, groups, s):
    x, masks = random(B, 4, H, W), random(B, groups * k * k, s * H, s * W)
    repeated = windows(x, k, k // 2).repeat_interleave(s, 3).repeat_interleave(s, 4)
    taps = masks.view(B, groups, k * k, s * H, s * W).repeat_interleave(4 // groups, 1)
    assert_same(carafe(x, masks, k, groups, s), (repeated * taps).sum(2), [x, masks])


@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2)])
def test_involution(stride, dilation):
    k, groups = 7, 2
    x, bias = random(B, 6, H, W), random(6)
    size = H // stride, W // stride  # as the official average pooling leaves it
    weight = random(B, groups, k, k, *size)
    taps = windows(x, k, dilation * (k // 2), stride, dilation)[..., : size[0], : size[1]]
    products = taps * weight.flatten(2, 3).repeat_interleave(3, 1)
    expected = products.sum(2) + bias[:, None, None]
    ours = involution(x, weight, bias, stride, dilation * 3, dilation)
    assert_same(ours, expected, [x, weight, bias])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_adaptive_conv(layout):
    k = 5
    x = random(B, 3, H + k - 1, W + k - 1)
    filters = random(B, H, W, k, k)
    expected = torch.einsum("bcthw,bhwt->bchw", windows(x, k), filters.flatten(3))
    ours = adaptive_conv(x.contiguous(memory_format=layout), filters)
    assert_same(ours, expected, [x, filters])


def test_adaptive_conv_of_reflection_is_ddf_with_reflection():
    k = 5
    x, filters = random(B, 3, H, W), random(B, H, W, k, k)
    expected = adaptive_conv(F.pad(x, (2,) * 4, mode="reflect"), filters)
    ours = ddf(x, None, filters.flatten(3).permute(0, 3, 1, 2), k, padding="reflect")
    assert_same(ours, expected, [x, filters])


@pytest.mark.parametrize("s", [8, 3])
def test_convex_upsample(s):
    flow, mask = random(B, 2, H, W), random(B, 9 * s * s, H, W)
    weights = mask.view(B, 1, 9, s, s, H, W).softmax(2)
    combined = (weights * windows(s * flow, 3, 1).view(B, 2, 9, 1, 1, H, W)).sum(2)
    expected = combined.permute(0, 1, 4, 2, 5, 3).reshape(B, 2, s * H, s * W)
    assert_same(convex_upsample(flow, mask, s), expected, [flow, mask])
    constant = torch.full((1, 2, H, W), 3.0)
    interior = convex_upsample(constant, torch.randn(1, 9 * s * s, H, W), s)[..., s:-s, s:-s]
    torch.testing.assert_close(interior, torch.full_like(interior, 3.0 * s))


@pytest.mark.parametrize("name", ["convex_upsample", "apply_kernel"])
def test_softmax_without_gradients_is_the_same(name):
    """Predictions on a CPU have softmax and filter in one op."""
    call, sizes = CALLS[name]
    inputs = [random(*size) for size in sizes]
    expected = call(*inputs)
    assert expected.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(call(*inputs), expected.detach())
    torch.testing.assert_close(call(*(x.detach() for x in inputs)), expected.detach())


@pytest.mark.parametrize("norm_type", ["8sum", "8sum_abs"])
@pytest.mark.parametrize("channels, is_sparse", [(1, True), (3, False)])
def test_cspn(norm_type, channels, is_sparse):
    guidance, blur = random(B, 8, H, W), random(B, channels, H, W)
    known = torch.randint(0, 2, (B, channels, H, W)).double() if is_sparse else None
    gates = guidance.abs() if norm_type == "8sum_abs" else guidance
    # Each pixel gives to its neighbours: gate n reaches the pixel at minus offset n.
    offsets = [
        (row, column) for row in (1, 0, -1) for column in (1, 0, -1) if (row, column) != (0, 0)
    ]

    def shifted(x: Tensor, row: int, column: int) -> Tensor:
        return F.pad(x, (1,) * 4)[..., 1 + row : 1 + row + H, 1 + column : 1 + column + W]

    weights = [shifted(gates[:, n : n + 1], *offset) for n, offset in enumerate(offsets)]
    total = sum(weight.abs() for weight in weights)
    weights = [weight / total for weight in weights]
    depth = blur
    for _ in range(3):
        given = [w * shifted(depth, *offset) for w, offset in zip(weights, offsets, strict=True)]
        depth = sum(given) + (1 - sum(weights)) * blur
        if known is not None:
            depth = (1 - known) * depth + known * blur
    assert_same(cspn(guidance, blur, known, 3, norm_type), depth, [guidance, blur])


@pytest.mark.parametrize("k, normalize", [(21, True), (3, False)])
def test_apply_kernel(k, normalize):
    weights, data = random(B, k * k, H, W), random(B, 3, H, W)
    taps = weights.softmax(1) if normalize else weights
    expected = (windows(data, k, k // 2) * taps[:, None]).sum(2)
    assert_same(apply_kernel(weights, data, normalize), expected, [weights, data])


def test_dynamic_upsampling():
    k, s = 5, 4
    x, filters = random(B, 3, H, W), random(B, k * k, s * s, H, W)
    combined = torch.einsum("bcthw,btrhw->bcrhw", windows(x, k, k // 2), filters)
    expected = F.pixel_shuffle(combined.flatten(1, 2), s)
    assert_same(dynamic_upsampling(x, filters), expected, [x, filters])


def filtered_windows(
    x: Tensor, k: int, dilation: int, stride: int, padding: str, kinds: str, subpixels: tuple = ()
) -> tuple[list[Tensor | None], Tensor]:
    """Random tensors for a call, and its result ``Tensor[B, *subpixels, C, Ho, Wo]`` by the
    definition: windows of the padded features, each with its filter."""
    groups, channels = 2, x.shape[1]
    mode = dict(zeros="constant").get(padding, padding)
    padded = x if padding == "valid" else F.pad(x, (dilation * (k // 2),) * 4, mode=mode)
    taps = windows(padded, k, 0, stride, dilation)
    of_channel = None if kinds == "spatial" else random(B, *subpixels, channels, k, k)
    size = B, *subpixels, groups * k * k, *taps.shape[3:]
    of_pixel = None if kinds == "channel" else random(*size)
    weight = 1.0
    if of_channel is not None:
        weight = weight * of_channel.flatten(-2)[..., None, None]
    if of_pixel is not None:
        by_group = of_pixel.unflatten(-3, (groups, k * k))
        weight = weight * by_group.repeat_interleave(channels // groups, -4)
    return [x, of_channel, of_pixel], ((taps[:, None] if subpixels else taps) * weight).sum(-3)


@pytest.mark.parametrize("padding", ["reflect", "replicate", "valid"])
@pytest.mark.parametrize("k, dilation, stride", [(3, 1, 1), (5, 1, 2), (3, 2, 3), (3, 1, 2)])
@pytest.mark.parametrize("kinds", ["both", "channel", "spatial"])
def test_paddings(padding, k, dilation, stride, kinds):
    tensors, expected = filtered_windows(random(B, 4, 8, 9), k, dilation, stride, padding, kinds)
    ours = ddf(*tensors, k, dilation, stride, padding=padding)
    assert_same(ours, expected, [t for t in tensors if t is not None])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("factors", [2, (1, 3), (3, 2)], ids=str)
@pytest.mark.parametrize(
    "k, dilation, kinds", [(3, 1, "both"), (5, 1, "channel"), (3, 2, "spatial"), (1, 1, "both")]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_paddings_and_factors_of_upsampling(layout, padding, factors, k, dilation, kinds):
    rows, columns = (factors, factors) if isinstance(factors, int) else factors
    x = random(B, 4, 8, 9)
    tensors, by_subpixel = filtered_windows(x, k, dilation, 1, padding, kinds, (rows * columns,))
    height, width = by_subpixel.shape[-2:]
    expected = x.new_zeros(B, 4, rows * height, columns * width)
    for r in range(rows * columns):
        expected[..., r // columns :: rows, r % columns :: columns] = by_subpixel[:, r]
    given = [x.contiguous(memory_format=layout), *tensors[1:]]
    ours = ddf_up(*given, k, factors, dilation, padding=padding)
    assert ours.is_contiguous(memory_format=layout)
    if padding in ("zeros", "valid"):
        options = k, factors, dilation, "mul", padding == "valid"
        torch.testing.assert_close(ddf_up_reference(*given, *options), expected)
    assert_same(ours, expected, [t for t in tensors if t is not None])


@pytest.mark.skipif(backend_info()["cpu"] != "compiled", reason="no compiled ops")
def test_valid_padding_copies_nothing():
    """The compiled op gets the tensors that were given, and is the only one called."""
    x, filters = torch.randn(1, 4, 10, 11), torch.randn(1, 9, 8, 9)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append((function, args[0].data_ptr(), args[2].data_ptr()))
            return function(*args, **(kwargs or {}))

    with Watch():
        ddf(x, None, filters, padding="valid")
    assert seen == [(torch.ops.ddf_mm.ddf_valid.default, x.data_ptr(), filters.data_ptr())]


@pytest.mark.skipif(backend_info()["cpu"] != "compiled", reason="no compiled ops")
@pytest.mark.parametrize("upsamples", [False, True])
@pytest.mark.parametrize("k, dilation, stride", [(3, 1, 1), (5, 1, 2), (3, 2, 3), (1, 1, 2)])
def test_valid_padding_by_a_rim_of_zeros(k, dilation, stride, upsamples):
    """As on devices for which the op without padding is not compiled."""
    function, check, reference = ddf, check_ddf, ddf_valid_reference
    options, subpixels = (k, dilation, stride, "mul"), ()
    if upsamples:
        function, check, reference = ddf_up, check_ddf_up, ddf_up_valid_reference
        options, subpixels, stride = (k, stride, dilation, "mul"), (stride**2,), 1
    tensors, _ = filtered_windows(
        random(B, 4, 8, 9), k, dilation, stride, "valid", "both", subpixels
    )
    geometry = check(*tensors, *options, is_valid=True)
    ours = _by_rim_of_zeros(function, *tensors, options, geometry)
    assert_same(ours, reference(*tensors, *options), tensors)


@pytest.mark.parametrize("upsamples", [False, True])
def test_filters_of_batch_one_serve_the_whole_batch(upsamples):
    subpixels = (4,) if upsamples else ()
    x = random(3, 4, H, W)
    of_channel, of_pixel = random(1, *subpixels, 4, 3, 3), random(1, *subpixels, 18, H, W)
    call = ddf_up if upsamples else ddf
    expected = call(x, *(f.repeat(3, *(1,) * (f.dim() - 1)) for f in (of_channel, of_pixel)))
    assert_same(call(x, of_channel, of_pixel), expected, [x, of_channel, of_pixel])


def test_errors_name_the_argument():
    x = torch.randn(1, 4, 6, 6)
    filters = torch.randn(1, 9, 6, 6)
    with pytest.raises(ValueError, match="padding must be one of 'zeros', 'reflect', .* 'same'"):
        ddf(x, None, filters, padding="same")
    with pytest.raises(ValueError, match="4x4 pixels without padding, got shape"):
        ddf(x, None, filters, padding="valid")
    with pytest.raises(ValueError, match="more than .* = 8 rows and columns .*, got 6x6"):
        ddf(x, None, filters, 9, padding="valid")
    with pytest.raises(ValueError, match="more than .* = 6 rows and .*'reflect', got 6x6"):
        ddf(x, None, filters, 3, 6, padding="reflect")
    by_subpixel = filters[:, None].expand(1, 6, 9, 6, 6)
    for padding in ("replicate", "valid"):
        with pytest.raises(ValueError, match="must be odd.* got 4 .*5 x 5 whose first or last row"):
            ddf(x, None, torch.randn(1, 16, 6, 6), 4, padding=padding)
        with pytest.raises(ValueError, match="must be odd.* got 4 .*5 x 5 whose first or last row"):
            ddf_up(x, None, by_subpixel, 4, (2, 3), padding=padding)
    with pytest.raises(ValueError, match="padding must be one of 'zeros', 'reflect', .* 'same'"):
        ddf_up(x, None, by_subpixel, 3, (2, 3), padding="same")
    with pytest.raises(ValueError, match="the 4x4 pixels of features whose windows lie in them"):
        ddf_up(x, None, by_subpixel, 3, (2, 3), padding="valid")
    with pytest.raises(ValueError, match=r"sh\*sw = 8 for scale_factor \(2, 4\)"):
        ddf_up(x, None, by_subpixel, 3, (2, 4))
    with pytest.raises(ValueError, match=r"scale_factor must be an int or two, .* got \[2\]"):
        ddf_up(x, None, by_subpixel, 3, [2])
    with pytest.raises(ValueError, match=r"scale_factor\[1\] must be at least 1, got 0"):
        ddf_up(x, None, by_subpixel, 3, (6, 0))
    with pytest.raises(ValueError, match="B = 1, the batch"):
        ddf(x, None, filters.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match=r"masks must be .* = \[1, 25, 12, 12\]"):
        carafe(x, torch.randn(1, 25, 6, 6), 5)
    with pytest.raises(ValueError, match=r"weight must be a Tensor\[B, g, k, k, Ho, Wo\]"):
        involution(x, filters)
    with pytest.raises(ValueError, match="padding must be 1, .* got 0"):
        involution(x, filters.view(1, 1, 3, 3, 6, 6), padding=0)
    with pytest.raises(ValueError, match=r"filters must be a Tensor\[B, H, W, k, k\]"):
        adaptive_conv(x, filters)
    with pytest.raises(ValueError, match=r"mask must be .* = \[1, 576, 6, 6\]"):
        convex_upsample(x, filters)
    with pytest.raises(ValueError, match=r"guidance must be .* = \[1, 8, 6, 6\]"):
        cspn(filters, x)
    with pytest.raises(ValueError, match="norm_type must be '8sum' or '8sum_abs', got '9sum'"):
        cspn(filters[:, :8], x, norm_type="9sum")
    with pytest.raises(ValueError, match=r"weights must be a Tensor\[B, k\*k, H, W\]"):
        apply_kernel(filters[:, :8], x)
    with pytest.raises(ValueError, match=r"filters must be a Tensor\[B, k\*k, s\*s, H, W\]"):
        dynamic_upsampling(x, filters)


@pytest.mark.parametrize("padding", ["zeros", "reflect", "valid"])
def test_even_kernels_by_a_row_and_column_of_zeros(padding):
    """As the error message for even kernels advises."""
    x, filters = random(1, 4, 7, 8), random(1, 4, 2, 2)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect") if padding == "reflect" else x
    around = 1 if padding == "zeros" else 0
    odd = F.pad(filters, (1, 0, 1, 0))  # the taps that a 2 x 2 window reads at and above its pixel
    expected = (windows(padded, 3, around) * odd.flatten(2)[..., None, None]).sum(2)
    assert_same(ddf(x, odd, None, padding=padding), expected, [x, filters])
    torch.testing.assert_close(ddf_reference(x, odd, None), ddf(x, odd, None))


CALLS = {
    "carafe": (lambda x, f: carafe(x, f, 3), [(2, 4, 5, 6), (2, 9, 10, 12)]),
    "involution": (lambda x, f: involution(x, f), [(2, 4, 5, 6), (2, 2, 3, 3, 5, 6)]),
    "adaptive_conv": (adaptive_conv, [(2, 4, 7, 8), (2, 5, 6, 3, 3)]),
    "convex_upsample": (lambda x, f: convex_upsample(x, f, 2), [(2, 2, 5, 6), (2, 36, 5, 6)]),
    "cspn": (lambda x, f: cspn(x, f, prop_time=2), [(2, 8, 5, 6), (2, 1, 5, 6)]),
    "apply_kernel": (apply_kernel, [(2, 9, 5, 6), (2, 4, 5, 6)]),
    "dynamic_upsampling": (dynamic_upsampling, [(2, 4, 5, 6), (2, 9, 4, 5, 6)]),
    "reflect": (lambda x, f: ddf(x, None, f, padding="reflect"), [(2, 4, 5, 6), (2, 9, 5, 6)]),
    "replicate, up": (
        lambda x, f: ddf_up(x, None, f, padding="replicate"),
        [(2, 4, 5, 6), (2, 4, 9, 5, 6)],
    ),
    "valid, two factors": (
        lambda x, f: ddf_up(x, None, f, 3, (3, 1), padding="valid"),
        [(2, 4, 5, 6), (2, 3, 18, 3, 4)],
    ),
}


EVERY_CALL = pytest.mark.parametrize("name", list(CALLS))


def inputs_of(name: str) -> list[Tensor]:
    # Positive, so that sums are not near 0.
    return [torch.rand(size, dtype=torch.float64) + 0.1 for size in CALLS[name][1]]


def last(x: Tensor) -> Tensor:
    return channels_last(x) if x.dim() == 4 else x


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x + torch.nan], -1)[..., 0]


@EVERY_CALL
def test_dtypes_and_layouts(name):
    call, exact = CALLS[name][0], inputs_of(name)
    grad = torch.rand_like(call(*exact))
    every = (True,) * len(exact)
    want = value_and_gradients(call, exact, grad, (), every)
    for dtype, layout in itertools.product(DTYPES, (contiguous, last, strided, transposed)):
        inputs = [layout(x.to(dtype)) for x in exact]
        got = value_and_gradients(call, inputs, layout(grad.to(dtype)), (), every)
        # Largest error in 20 runs: 5.8 times the epsilon, of the gradient of cspn's affinities.
        allowed = 8 * torch.finfo(dtype).eps
        for ours, value in zip(got, want, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(
                ours.double(), value, rtol=allowed, atol=allowed * value.abs().max().item()
            )
    for needed in itertools.product((True, False), repeat=len(exact)):
        some = value_and_gradients(call, exact, grad, (), needed)
        for ours, value, need in zip(some, want, (True, *needed), strict=True):
            assert (ours is None) != need
            if need:
                torch.testing.assert_close(ours, value)
    nothing = value_and_gradients(call, [x[:0] for x in exact], grad[:0], (), every)
    assert [t.shape for t in nothing] == [t[:0].shape for t in want]


@EVERY_CALL
def test_autocast(name):
    call, inputs = CALLS[name][0], [x.float() for x in inputs_of(name)]
    expected = call(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(inputs[0], inputs[1].bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)


@EVERY_CALL
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_in_one_graph(name, dynamic):
    torch._dynamo.reset()
    call, inputs = CALLS[name][0], inputs_of(name)
    compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(*inputs), call(*inputs))


@EVERY_CALL
def test_transforms_exports_and_traces(name):
    call, inputs = CALLS[name][0], inputs_of(name)
    several = [torch.stack([x, x / 2, 3 * x]) for x in inputs]
    mapped = torch.func.vmap(call)(*several)
    torch.testing.assert_close(mapped[2], call(*(x[2] for x in several)))
    gradients = torch.func.grad(lambda *tensors: call(*tensors).sin().sum(), (0, 1))(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.testing.assert_close(gradients, torch.autograd.grad(call(*leaves).sin().sum(), leaves))

    class Module(torch.nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return call(first, second)

    other = [torch.cat([x, 2 * x]) for x in inputs]
    if backend_info()["cpu"] == "compiled":  # torch 2.6 exports the formula for one size
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(Module(), tuple(inputs), dynamic_shapes=[{0: batch}] * 2)
        torch.testing.assert_close(program.module()(*other), call(*other))
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        graph = torch.jit.trace(Module(), tuple(inputs))
    assert "ddf_mm::" not in str(graph.inlined_graph)
    torch.testing.assert_close(graph(*other), call(*other))
