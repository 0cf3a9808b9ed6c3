"""The compiled ops against the reference, and what PyTorch expects of an op."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from ddf_cases import (
    DENSE,
    LAYOUTS,
    by_name,
    channel_slice,
    channels_last,
    check_against,
    check_against_reference,
    make,
    require_compiled,
    short,
    value_and_gradients,
)
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from ddf_mm.ops import backend_info, ddf, ddf_reference, library
from ddf_mm.ops.checks import COMBINES
from ddf_mm.ops.reference import ddf_up_reference

INFO = backend_info()
if INFO["cpu"] != "compiled":
    if os.environ.get("DDF_MM_REQUIRE_OPS") == "1":
        raise RuntimeError(f"DDF_MM_REQUIRE_OPS=1, but no compiled ops: {INFO['why']}")
    pytest.skip(f"no compiled ops: {INFO['why']}", allow_module_level=True)

DDF = torch.ops.ddf_mm.ddf
DDF_BACKWARD = torch.ops.ddf_mm.ddf_backward

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WHICH = ["both", "channel", "spatial"]


@pytest.fixture
def device(device: str) -> str:
    require_compiled(device)
    return device


@pytest.mark.any_torch
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("layout", DENSE, **by_name)
@pytest.mark.parametrize("k, stride", [(3, 1), (3, 2), (5, 1), (7, 2)])
def test_every_width(k, stride, layout, dtype, device):
    for width in range(1, 41):
        tensors = make(
            batch=1, channels=3, size=(3, width), k=k, stride=stride, dtype=dtype, device=device
        )
        check_against_reference([layout(t) for t in tensors], (k, 1, stride))


@pytest.mark.any_torch
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("needed", [(True, True, True), (False, True, False), (False, False, True)])
def test_every_width_of_many_channels(needed, dtype, device):
    """CPU kernels write the spatial gradient of one group in place; from 129 channels on it is a
    sum. Pixels of 256 channels are prefetched differently."""
    for channels, height in ((40, 4), (130, 3), (256, 1)):
        for width in range(1, 13):
            tensors = make(
                2, channels, (height, width), 3, 1, 1, "both", dtype=dtype, device=device
            )
            last = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
            grad = torch.randn_like(last[0])
            check_against(ddf_reference, last, (3, 1, 1), grad, needed=needed)


@pytest.mark.any_torch
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("layout", DENSE, **by_name)
@pytest.mark.parametrize("k, stride", [(3, 1), (3, 2), (5, 1)])
def test_every_number_of_channels(k, stride, layout, dtype, device):
    for channels in (*range(1, 20), 31, 32, 33, 63, 65, 130):
        groups = next(g for g in (3, 2, 1) if channels % g == 0)
        tensors = make(
            channels=channels,
            size=(4, 11),  # strips of neighbouring pixels and some that are left
            k=k,
            stride=stride,
            groups=groups,
            dtype=dtype,
            device=device,
        )
        check_against_reference([layout(t) for t in tensors], (k, 1, stride))


@pytest.mark.any_torch
@pytest.mark.parametrize("layout", DENSE, **by_name)
@pytest.mark.parametrize("k, stride", [(3, 1), (3, 2), (3, 3), (5, 1), (5, 2), (7, 1)])
def test_planes_larger_than_a_block(k, stride, layout, device):
    size = (67, 131) if stride < 3 else (301, 41)  # fewer rows of output would make one block
    tensors = make(
        batch=1, channels=20, size=size, k=k, stride=stride, dtype=torch.float32, device=device
    )
    check_against_reference([layout(t) for t in tensors], (k, 1, stride))


@pytest.mark.any_torch
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(
    "k, dilation, stride", [(3, 1, 1), (3, 2, 1), (3, 1, 2), (5, 1, 1), (5, 2, 3), (9, 1, 2)]
)
def test_every_small_image_of_many_channels(k, dilation, stride, which, dtype, device):
    """CPU kernels transpose tiles of them, of at most 128 channels."""
    for channels, groups, size in (
        *((16, 1, (7, 5)), (17, 1, (6, 7)), (40, 1, (14, 9)), (96, 2, (9, 10)), (130, 1, (7, 7))),
        *((144, 1, (13, 20)), (66, 1, (32, 28)), (65, 1, (20, 52))),
    ):
        groups = 1 if which == "channel" else groups
        tensors = make(1, channels, size, k, groups, stride, which, dtype=dtype, device=device)
        options = k, dilation, stride
        shape = channels, *(-(-n // stride) for n in size)
        grad = torch.randn(1, *shape, device=device).to(dtype)
        check_against(ddf_reference, tensors, options, grad)
        x, cf, sf = tensors
        if sf is not None:
            last = sf.contiguous(memory_format=torch.channels_last)
            check_against(ddf_reference, [x, cf, last], options, grad, needed=(True, False, False))
            check_against(ddf_reference, [x, cf, last], options, grad, needed=(False, True, True))


@pytest.mark.any_torch
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("layout", DENSE, **by_name)
@pytest.mark.parametrize("channels, groups, k, s", [(2, 1, 3, 8), (6, 2, 3, 3), (40, 1, 5, 2)])
def test_softmax_of_every_width_cpu(channels, groups, k, s, layout, dtype):
    for width in (1, 3, 4, 7, 8, 9, 15, 16, 18, 33):
        x = torch.randn(2, channels, 3, width).to(dtype)
        logits = torch.randn(2, groups, k * k, s * s, 3, width).mul(3).to(dtype)
        logits[0, 0, 1:, 0] = -torch.inf  # the weight of tap 0 is 1
        by_subpixel = logits.permute(0, 3, 1, 2, 4, 5).flatten(2, 3)
        weights = logits.double().softmax(2).permute(0, 3, 1, 2, 4, 5).flatten(2, 3)
        expected = ddf_up_reference(x.double(), None, weights, k, s)
        got = torch.ops.ddf_mm.ddf_softmax(layout(x), by_subpixel, k, s)
        assert got.dtype == dtype and layout(got).stride() == got.stride()
        # Largest errors in 12 runs: float64 1.6, float32 3.6, 16-bit 0.4 times the epsilon.
        allowed = torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 8)
        torch.testing.assert_close(got.double(), expected, rtol=allowed, atol=allowed)


def test_softmax_of_what_is_not_finite_cpu():
    x, logits = torch.ones(1, 1, 1, 20), torch.zeros(1, 1, 9, 1, 20)
    logits[0, 0, 4, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    logits[0, 0, :, 0, 3] = -torch.inf
    logits[0, 0, 4, 0, 4] = 200.0
    got = torch.ops.ddf_mm.ddf_softmax(x, logits, 3, 1)
    expected = ddf_up_reference(x, None, logits.softmax(2), 3, 1)
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("combine", COMBINES)
def test_official_rounding_down(combine, stride, device):
    for size in ((7, 9), (8, 7), (5, 5)):
        tensors = make(size=size, stride=stride, floor=True, device=device)
        check_against_reference(tensors, (3, 1, stride, combine))


@pytest.mark.parametrize("features_layout", LAYOUTS, **by_name)
@pytest.mark.parametrize("spatial_layout", LAYOUTS, **by_name)
def test_layout_of_outputs_and_gradients(features_layout, spatial_layout, device):
    x, cf, sf = make(device=device)
    x, cf, sf = features_layout(x), channels_last(cf), spatial_layout(sf)
    expected = {
        name: torch.channels_last
        if layout in (channels_last, channel_slice)
        else torch.contiguous_format
        for name, layout in (("features", features_layout), ("spatial", spatial_layout))
    }
    out = DDF(x, cf, sf, 3, 1, 1, "mul")
    assert out.is_contiguous(memory_format=expected["features"])
    grads = DDF_BACKWARD(out, x, cf, sf, 3, 1, 1, "mul", True, True, True)
    assert grads[0].is_contiguous(memory_format=expected["features"])
    assert grads[1].is_contiguous()
    assert grads[2].is_contiguous(memory_format=expected["spatial"])


def test_a_gradient_without_strides(device):
    tensors = make(device=device, requires_grad=True)
    # The gradient of a sum is one number, expanded.
    got = torch.autograd.grad(ddf(*tensors).sum(), tensors)
    want = torch.autograd.grad(ddf_reference(*tensors).sum(), tensors)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


class Calls(TorchDispatchMode):
    """Records the arguments of every call of ddf_backward."""

    def __init__(self):
        super().__init__()
        self.arguments = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is DDF_BACKWARD.default:
            self.arguments.append(args)
        return func(*args, **(kwargs or {}))


NEEDED = [needed for needed in itertools.product((True, False), repeat=3) if any(needed)]


@pytest.mark.parametrize("needed", NEEDED, ids=str)
@pytest.mark.parametrize("layout", DENSE, **by_name)
@pytest.mark.parametrize("k, stride", [(3, 1), (3, 2), (5, 1), (1, 1)])
def test_computes_the_gradients_asked_for_only(k, stride, layout, needed, device):
    tensors = [layout(t) for t in make(k=k, stride=stride, device=device)]
    grad = torch.randn_like(ddf(*tensors, k, 1, stride))
    want = value_and_gradients(ddf_reference, tensors, grad, (k, 1, stride))[1:]
    for t, need in zip(tensors, needed, strict=True):
        t.requires_grad_(need)
    with Calls() as calls:
        ddf(*tensors, k, 1, stride).backward(grad)
    assert [args[-3:] for args in calls.arguments] == [needed]
    direct = DDF_BACKWARD(grad, *(t.detach() for t in tensors), k, 1, stride, "mul", *needed)
    for t, w, d, need in zip(tensors, want, direct, needed, strict=True):
        if need:
            torch.testing.assert_close(t.grad, w, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(d, w, rtol=1e-12, atol=1e-12)
        else:
            assert t.grad is None and d.shape == (0,)


@pytest.mark.parametrize("which", ["channel", "spatial"])
def test_gradient_of_an_absent_filter_is_empty(which, device):
    x, cf, sf = make(which=which, device=device)
    grads = DDF_BACKWARD(torch.ones_like(x), x, cf, sf, 3, 1, 1, "mul", True, True, True)
    absent = 2 if which == "channel" else 1
    assert [g.shape == (0,) for g in grads] == [i == absent for i in range(3)]


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("k, dilation, stride, floor", [(3, 1, 1, False), (3, 2, 2, True)])
def test_derivatives_up_to_the_third(k, dilation, stride, floor, combine, which, device):
    tensors = make(
        1, 2, (3, 5), k, 2, stride, which, floor=floor, device=device, requires_grad=True
    )
    given = [t for t in tensors if t is not None]

    def function(*values):
        filled = iter(values)
        full = [None if t is None else next(filled) for t in tensors]
        return ddf(*full, k, dilation, stride, combine)

    def gradients(*values):
        return torch.autograd.grad(function(*values).square().sum(), values, create_graph=True)

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given, gen_non_contig_grad_outputs=True)
    assert torch.autograd.gradgradcheck(gradients, given, fast_mode=True)


def test_second_derivative_of_some_inputs_only(device):
    for needed in NEEDED:
        tensors = make(device=device)
        for t, need in zip(tensors, needed, strict=True):
            t.requires_grad_(need)
        given = [t for t in tensors if t.requires_grad]
        results = []
        for function in (ddf, ddf_reference):
            loss = function(*tensors).pow(3).sum()
            first = torch.autograd.grad(loss, given, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in first), given))
        torch.testing.assert_close(*results, rtol=1e-11, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("layout", DENSE, **by_name)
def test_opcheck(layout, combine, which, requires_grad, device):
    tensors = make(stride=2, groups=2, which=which, device=device)
    tensors = [None if t is None else layout(t).requires_grad_(requires_grad) for t in tensors]
    args = (*tensors, 3, 1, 2, combine)
    torch.library.opcheck(DDF.default, args)
    grad = layout(torch.randn(2, 4, 3, 3, dtype=torch.float64, device=device))
    args = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    for needed in ((True, True, True), (True, False, False), (False, True, True)):
        torch.library.opcheck(DDF_BACKWARD.default, (grad, *args, *needed))


def test_repeated_call_gives_the_same_bits(device):
    tensors = make(2, 40, (37, 45), dtype=torch.float32, device=device)
    grad = torch.randn_like(tensors[0])
    first, second = (value_and_gradients(ddf, tensors, grad, (3,)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


BAD_CALLS = [
    # changed arguments of the op itself, which Python's checks do not guard
    dict(features=torch.zeros(2, 4, 5)),
    dict(features=torch.zeros(2, 4, 5, 6, dtype=torch.int32)),
    dict(channel_filter=None, spatial_filter=None),
    dict(channel_filter=torch.zeros(1, 4, 3, 3)),
    dict(channel_filter=torch.zeros(2, 4, 9)),
    dict(channel_filter=torch.zeros(2, 4, 3, 3, dtype=torch.float64)),
    dict(spatial_filter=torch.zeros(2, 8, 5, 6)),
    dict(spatial_filter=torch.zeros(2, 27, 5, 6)),
    dict(spatial_filter=torch.zeros(2, 9, 5, 7)),
    dict(spatial_filter=torch.zeros(1, 9, 5, 6)),
    dict(kernel_size=2),
    dict(kernel_size=-1),
    dict(stride=0),
    dict(dilation=0),
    dict(kernel_combine="sub"),
]


@pytest.mark.parametrize("change", BAD_CALLS, ids=lambda c: "-".join(c))
def test_the_ops_refuse_what_they_could_not_read(change):
    good = dict(
        features=torch.zeros(2, 4, 5, 6),
        channel_filter=torch.zeros(2, 4, 3, 3),
        spatial_filter=torch.zeros(2, 9, 5, 6),
        kernel_size=3,
        dilation=1,
        stride=1,
        kernel_combine="mul",
    )
    DDF(**good)
    with pytest.raises(RuntimeError):
        DDF(**{**good, **change})
    flags = dict(need_features=True, need_channel=True, need_spatial=True)
    with pytest.raises(RuntimeError):
        DDF_BACKWARD(torch.zeros(2, 4, 5, 6), **{**good, **change}, **flags)


@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (2, 3, 5, 6), (1, 4, 5, 6), (2, 4, 5)])
def test_the_backward_refuses_a_gradient_of_another_shape(shape):
    x, cf, sf = make()
    with pytest.raises(RuntimeError):
        DDF_BACKWARD(x.new_zeros(shape), x, cf, sf, 3, 1, 1, "mul", True, True, True)


def test_bad_arguments_are_named_while_tracing():
    x, cf, sf = make()
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, cf, sf)]
        with pytest.raises(ValueError, match="spatial_filter must be 3x3 pixels"):
            DDF(*fakes, 3, 1, 2, "mul")
        with pytest.raises(ValueError, match="grad must be a torch.float64 tensor of shape"):
            DDF_BACKWARD(fakes[0][:1], *fakes, 3, 1, 1, "mul", True, True, True)


def test_shapes_on_the_meta_device():
    tensors = [t.to("meta") for t in make(stride=2)]
    for out in (ddf(*tensors, 3, 1, 2), DDF(*tensors, 3, 1, 2, "mul")):
        assert out.device.type == "meta" and out.shape == (2, 4, 3, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("layout", DENSE, **by_name)
def test_compiles_in_one_graph(layout, dynamic, device):
    torch._dynamo.reset()
    compiled = torch.compile(ddf, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((7, 7), (6, 9)):
        tensors = [layout(t) for t in make(size=size, stride=2, device=device)]
        grad = torch.randn_like(ddf(*tensors, 3, 1, 2))
        got = value_and_gradients(compiled, tensors, grad, (3, 1, 2))
        want = value_and_gradients(ddf, tensors, grad, (3, 1, 2))
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w) and g.stride() == w.stride()


@pytest.mark.gpu
@pytest.mark.slow
def test_compiles_with_the_default_backend(device):
    """Inductor may change the layout of inputs, and relies on the fake kernel's strides."""
    torch._dynamo.reset()

    def function(features, channel_filter, spatial_filter):
        out = ddf(features.relu(), channel_filter, spatial_filter.sigmoid(), stride=2)
        return out.permute(0, 2, 3, 1) * 2

    tensors = make(channels=6, size=(7, 9), stride=2, groups=2, device=device)
    x, cf, sf = (channels_last(t) for t in tensors)
    grad = torch.randn_like(function(x, cf, sf))
    got = value_and_gradients(torch.compile(function, fullgraph=True), (x, cf, sf), grad, ())
    want = value_and_gradients(function, (x, cf, sf), grad, ())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


class Filter(torch.nn.Module):
    def forward(self, features, channel_filter, spatial_filter):
        return ddf(features, channel_filter, spatial_filter, stride=2)


@pytest.mark.gpu
@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict, device):
    tensors = make(size=(7, 7), stride=2, device=device)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        Filter(), tuple(tensors), dynamic_shapes=[{0: batch}] * 3, strict=strict
    )
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert DDF.default in calls
    others = make(batch=5, size=(7, 7), stride=2, device=device)
    torch.testing.assert_close(program.module()(*others), ddf(*others, stride=2))


@pytest.mark.gpu
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 0), (None, 2, None), (0, None, None)])
def test_vmap(in_dims, device):
    size = 3
    plain = make(device=device)
    tensors = [
        t if dim is None else torch.stack([t * (n + 1) for n in range(size)], dim)
        for t, dim in zip(plain, in_dims, strict=True)
    ]

    def pick(n):
        return [
            t if dim is None else t.select(dim, n) for t, dim in zip(tensors, in_dims, strict=True)
        ]

    got = torch.vmap(ddf, in_dims)(*tensors)
    want = torch.stack([ddf(*pick(n)) for n in range(size)])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_batched_gradients(device):
    tensors = make(device=device, requires_grad=True)
    out = ddf(*tensors)
    grads = torch.randn(3, *out.shape, dtype=out.dtype, device=device)
    got = torch.autograd.grad(out, tensors, grads, is_grads_batched=True, retain_graph=True)
    for n in range(3):
        want = torch.autograd.grad(out, tensors, grads[n], retain_graph=True)
        torch.testing.assert_close(tuple(g[n] for g in got), want, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_function_transforms_and_forward_mode(device):
    x, cf, sf = make(device=device)
    tangent = torch.randn_like(x)
    want = ddf_reference(tangent, cf, sf)

    def loss(channel_filter, features, spatial_filter):
        return ddf(features[None], channel_filter[None], spatial_filter[None]).square().sum()

    _, got = torch.func.jvp(lambda features: ddf(features, cf, sf), (x,), (tangent,))
    torch.testing.assert_close(got, want)
    with forward_ad.dual_level():
        out = ddf(forward_ad.make_dual(x, tangent), cf, sf)
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, want)
    per_image = torch.vmap(torch.func.grad(loss))(cf, x, sf)
    cf.requires_grad_()
    (want,) = torch.autograd.grad(ddf(x, cf, sf).square().sum(), cf)
    torch.testing.assert_close(per_image, want)


SMALL_CASES = [
    dict(k=k, dilation=dilation, stride=stride, groups=2, size=size)
    for (k, dilation, stride), size in itertools.product(
        [(3, 1, 1), (3, 1, 2), (5, 1, 1), (7, 1, 1), (3, 2, 1)], [(5, 8), (4, 7)]
    )
]


@pytest.mark.cuda
@pytest.mark.parametrize("layout", DENSE, **by_name)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda c: f"{c['k']}-{c['size'][1]}")
def test_small_cases_of_every_kernel(case, layout):
    """Run under compute-sanitizer: each family of kernels, in one block or a few."""
    options = (case["k"], case["dilation"], case["stride"])
    shape = {key: value for key, value in case.items() if key != "dilation"}
    for dtype, combine in itertools.product(DTYPES, COMBINES):
        tensors = make(batch=1, channels=16, which="both", dtype=dtype, device="cuda", **shape)
        tensors = [layout(t) for t in tensors]
        check_against_reference(tensors, (*options, combine), layout)
        # Gradients one at a time, which other kernels compute than all together.
        grad = layout(torch.randn_like(ddf(*tensors, *options, combine)))
        for needed in ((True, False, False), (False, True, False), (False, False, True)):
            check_against(ddf_reference, tensors, (*options, combine), grad, needed=needed)


@pytest.mark.cuda
@pytest.mark.parametrize("layout", DENSE, **by_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_results_are_repeatable_bit_for_bit(dtype, layout):
    tensors = [layout(t) for t in make(4, 192, (30, 36), dtype=dtype, device="cuda")]
    grad = torch.randn_like(tensors[0])
    first = value_and_gradients(ddf, tensors, grad, (3,))
    for _ in range(5):
        again = value_and_gradients(ddf, tensors, grad, (3,))
        assert all(map(torch.equal, first, again))


@pytest.mark.cuda
@pytest.mark.gpu
@pytest.mark.parametrize("layout", DENSE, **by_name)
def test_side_stream(layout):
    """The kernels run after what is before them in the current stream, and their scratch lives."""
    tensors = [layout(t) for t in make(4, 64, (40, 40), dtype=torch.float32, device="cuda")]
    grad = torch.randn_like(tensors[0])
    want = value_and_gradients(ddf, tensors, grad, (3,))
    late = [torch.zeros_like(t) for t in tensors]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for t, value in zip(late, tensors, strict=True):
            t.copy_(value)
        got = value_and_gradients(ddf, late, grad, (3,))
        # Would overwrite scratch memory that was freed too early.
        torch.full((1 << 22,), float("nan"), device="cuda")
    side.synchronize()
    assert all(map(torch.equal, got, want))


@pytest.mark.cuda
@pytest.mark.gpu
@pytest.mark.parametrize("layout", DENSE, **by_name)
@pytest.mark.parametrize("k, stride", [(3, 1), (3, 2), (5, 1)])
def test_graph_capture(k, stride, layout):
    def fresh():
        return [
            layout(t)
            for t in make(2, 32, (12, 16), k, 1, stride, dtype=torch.float32, device="cuda")
        ]

    fixed = fresh()
    grad = torch.randn_like(DDF(*fixed, k, 1, stride, "mul"))

    def step(tensors):
        out = DDF(*tensors, k, 1, stride, "mul")
        return out, *DDF_BACKWARD(grad, *tensors, k, 1, stride, "mul", True, True, True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(fixed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(fixed)
    for _ in range(2):
        others = fresh()
        for t, value in zip(fixed, others, strict=True):
            t.copy_(value)
        graph.replay()
        assert all(map(torch.equal, captured, step(others)))


@pytest.mark.cuda
@pytest.mark.gpu
@pytest.mark.parametrize("layout", DENSE, **by_name)
@pytest.mark.parametrize("k, stride", [(3, 1), (3, 2), (5, 1)])
def test_more_elements_than_32_bits_count(k, stride, layout):
    """The last channels and pixels, whose offsets overflow 32 bits, against the reference."""
    batch, channels, size = 2, 68, (4001, 4004)
    assert batch * channels * size[0] * size[1] > 2**31
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of free GPU memory")
    half = dict(dtype=torch.float16, device="cuda")
    memory_format = torch.channels_last if layout is channels_last else torch.contiguous_format

    def random(*shape):
        return torch.empty(shape, **half, memory_format=memory_format).uniform_(-1, 1)

    out_size = [-(-n // stride) for n in size]
    x, grad = random(batch, channels, *size), random(batch, channels, *out_size)
    cf = torch.empty(batch, channels, k, k, **half).uniform_(-1, 1)
    sf = random(batch, k * k, *out_size)
    out = DDF(x, cf, sf, k, 1, stride, "mul")
    grads = DDF_BACKWARD(grad, x, cf, sf, k, 1, stride, "mul", True, True, True)

    # A corner of the last image; its first rows and columns lack what lies outside of it.
    rows, margin = 32, k
    corner = [slice(-1, None), slice(None)]
    out_corner = [*corner, slice(-rows, None), slice(-rows, None)]
    first = [(n - rows) * stride for n in out_size]
    x_corner = [*corner, slice(first[0], None), slice(first[1], None)]
    small = [x[x_corner], cf[-1:], sf[out_corner]]
    small = [t.double().requires_grad_() for t in small]
    want_out = ddf_reference(*small, k, 1, stride)
    want = torch.autograd.grad(want_out, small, grad[out_corner].double())
    inner = [..., slice(margin, None), slice(margin, None)]
    for got, expected in (
        (out[out_corner], want_out),
        (grads[0][x_corner], want[0]),
        (grads[2][out_corner], want[2]),
    ):
        # Up to 68 products a value, in float32, rounded to float16.
        error = (got.double() - expected).abs()[inner]
        assert (error <= 1e-3 * (1 + expected.abs()[inner])).all()

    # grad_channel of the last channel, tap by tap, over the whole image.
    padded = torch.nn.functional.pad(x[-1, -1], [k // 2] * 4)
    for tap in (0, k * k - 1):
        top, left = tap // k, tap % k
        window = padded[
            top : top + (out_size[0] - 1) * stride + 1 : stride,
            left : left + (out_size[1] - 1) * stride + 1 : stride,
        ].double()
        terms = window * grad[-1, -1].double() * sf[-1, tap].double()
        error = (grads[1][-1, -1, top, left].double() - terms.sum()).abs()
        assert error <= 1e-3 * terms.sum().abs() + 1e-6 * terms.abs().sum()


def test_warnings_point_at_the_code_that_called_torch():
    with pytest.warns(RuntimeWarning, match="a reason") as caught:
        torch.compiler.disable(library.warn)("a reason")
    assert caught[0].filename == __file__
