"""The compiled upsampling against its reference, and what PyTorch expects of an op."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from ddf_cases import (
    DENSE,
    contiguous,
    larger_terms,
    require_compiled,
    short,
    smaller_instruction_sets,
    value_and_gradients,
)
from ddf_cases import make as make_inputs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ddf_mm.ops import backend_info, ddf_up, ddf_up_reference
from ddf_mm.ops.checks import COMBINES

if backend_info()["cpu"] != "compiled" and os.environ.get("DDF_MM_REQUIRE_OPS") != "1":
    pytest.skip(f"no compiled ops: {backend_info()['why']}", allow_module_level=True)

UP = torch.ops.ddf_mm.ddf_up
UP_BACKWARD = torch.ops.ddf_mm.ddf_up_backward

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture
def device(device: str) -> str:
    require_compiled(device)
    return device


make = partial(make_inputs, scale=2)


def results(*args) -> list[Tensor]:
    return [t for t in value_and_gradients(*args) if t is not None]


def check(tensors, options, needed=(True, True, True), padding="zeros") -> list[Tensor]:
    """Every result is within the rounding errors of the sums of its terms."""
    function = partial(ddf_up, padding=padding)
    reference = partial(ddf_up_reference, is_valid=padding == "valid")
    dtype = tensors[0].dtype
    exact = [None if t is None else t.double() for t in tensors]
    grad = torch.randn_like(reference(*exact, *options)).to(dtype)
    got = results(function, tensors, grad, options, needed)
    want = results(reference, exact, grad.double(), options, needed)
    # The sums of the terms' absolute values, which are as many as 4 * 9 * 200 here.
    sizes = [None if t is None else t.abs() for t in exact]
    size = results(reference, sizes, grad.double().abs(), larger_terms(options), needed)
    sum_eps = torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype).eps
    stored = torch.finfo(dtype)
    for g, w, s in zip(got, want, size, strict=True):
        assert g.dtype == dtype and g.shape == w.shape
        allowed = 64 * sum_eps * s
        if dtype.itemsize == 2:
            allowed = allowed + 0.51 * stored.eps * w.abs() + stored.smallest_normal * stored.eps
        assert ((g.double() - w).abs() <= allowed).all()
    return got


GRID = [
    dict(k=k, scale=s, groups=g)
    for k, s, g in [(1, 2, 1), (3, 1, 2), (3, 2, 1), (3, 2, 2), (3, 3, 1), (3, 4, 2), (5, 2, 2)]
]


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("layout", DENSE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", GRID, ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items()))
def test_equals_the_reference(case, layout, dtype, device):
    for which, combine, dilation in itertools.product(
        ("both", "channel", "spatial"), COMBINES, (1, 2)
    ):
        tensors = make(size=(4, 7), which=which, dtype=dtype, device=device, **case)
        tensors[0] = layout(tensors[0])
        out = check(tensors, (case["k"], case["scale"], dilation, combine))[0]
        assert layout(out).stride() == out.stride()


@pytest.mark.any_torch
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("layout", DENSE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("scale", [2, 3])
def test_sizes_around_whole_vectors(scale, layout, dtype, device):
    for width, channels in ((1, 3), (7, 5), (8, 17), (15, 4), (16, 33), (17, 1), (37, 6)):
        tensors = make(1, channels, (3, width), scale=scale, dtype=dtype, device=device)
        tensors[0] = layout(tensors[0])
        check(tensors, (3, scale))
        tensors[0] = layout(torch.randn(1, channels, 5, width + 2, device=device).to(dtype))
        check(tensors, (3, scale), padding="valid")


@pytest.mark.any_torch
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("k, scale", [(3, 2), (3, 3), (5, 2)])
def test_small_images_of_many_channels(k, scale, dtype, device):
    """CPU kernels transpose tiles of them, of at most 128 channels."""
    for channels, groups, height, width in ((16, 1, 3, 5), (66, 1, 9, 19), (160, 2, 4, 10)):
        tensors = make(1, channels, (height, width), k, groups, scale=scale, dtype=dtype)
        tensors = [t.to(device) for t in tensors]
        check(tensors, (k, scale))
        check(tensors, (k, scale), needed=(False, True, True))
        tensors[0] = torch.randn(1, channels, height + k - 1, width + k - 1, device=device)
        tensors[0] = tensors[0].to(dtype)
        check(tensors, (k, scale), padding="valid")


@pytest.mark.any_torch
@pytest.mark.parametrize("layout", DENSE, ids=lambda f: f.__name__)
def test_planes_larger_than_a_block(layout, device):
    tensors = make(1, 9, (41, 131), dtype=torch.float32, device=device)
    tensors[0] = layout(tensors[0])
    check(tensors, (3, 2))


@pytest.mark.parametrize("layout", DENSE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", ["both", "channel", "spatial"])
def test_each_gradient_alone(which, layout, device):
    tensors = make(groups=2, which=which, device=device)
    tensors[0] = layout(tensors[0])
    out = ddf_up(*tensors)
    for needed in itertools.product((True, False), repeat=3):
        if any(need and t is not None for need, t in zip(needed, tensors, strict=True)):
            check(tensors, (3, 2), needed)
        grads = UP_BACKWARD(out, *tensors, 3, 2, 1, "mul", *needed)
        for g, t, need in zip(grads, tensors, needed, strict=True):
            assert g.shape == (t.shape if need and t is not None else (0,))


def test_strided_filters(device):
    x, cf, sf = make(groups=2, device=device)
    want = ddf_up(x, cf, sf)
    # As a convolution of channels_last features makes them, and with gaps.
    innermost = sf.flatten(1, 2).contiguous(memory_format=torch.channels_last).unflatten(1, (4, 18))
    gaps = torch.randn(2, 8, 36, 5, 12, dtype=sf.dtype, device=device)[:, ::2, 1::2, :, ::2]
    for spatial in (innermost, gaps.copy_(sf)):
        got = ddf_up(x, cf.transpose(1, 2).contiguous().transpose(1, 2), spatial)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        check([x, cf, spatial], (3, 2))


@pytest.mark.parametrize("layout", DENSE, ids=lambda f: f.__name__)
def test_a_nan_stays_where_it_is(layout, device):
    x, cf, sf = make(1, 3, (6, 20), dtype=torch.float32, device=device)
    sf[0, 1, 4, 2, 5] = float("nan")
    is_nan = ddf_up(layout(x), cf, sf).isnan()
    expected = torch.zeros_like(is_nan)
    expected[..., 4, 11] = True
    assert torch.equal(is_nan, expected)
    sf[0, 1, 4, 2, 5] = 0
    x[0, 1, 3, 7] = float("inf")
    finite = ddf_up(layout(x), cf, sf).isfinite()
    expected = torch.ones_like(finite)
    expected[0, 1, 4:10, 12:18] = False
    assert torch.equal(finite, expected)


def test_empty_batch(device):
    tensors = make(batch=0, device=device, requires_grad=True)
    out = ddf_up(*tensors)
    assert out.shape == (0, 4, 10, 12)
    assert [g.shape for g in torch.autograd.grad(out.sum(), tensors)] == [t.shape for t in tensors]


@pytest.mark.parametrize("layout", DENSE, ids=lambda f: f.__name__)
def test_result_does_not_depend_on_the_number_of_threads(layout):
    tensors = make(2, 40, (23, 31), groups=2, dtype=torch.float32)
    tensors[0] = layout(tensors[0])
    grad = torch.randn(2, 40, 46, 62)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(ddf_up, tensors, grad, (3, 2)))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.slow
@pytest.mark.any_torch
@pytest.mark.parametrize("isa", smaller_instruction_sets())
def test_smaller_instruction_sets(isa):
    name = "test_sizes_around_whole_vectors or test_each_gradient_alone"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", name, __file__],
        env={**os.environ, "DDF_MM_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("which", ["both", "channel", "spatial"])
def test_derivatives_up_to_the_third(which, combine, device):
    tensors = make(1, 2, (2, 3), groups=2, which=which, device=device, requires_grad=True)
    given = [t for t in tensors if t is not None]

    def function(*values):
        filled = iter(values)
        return ddf_up(*(None if t is None else next(filled) for t in tensors), 3, 2, 1, combine)

    def gradients(*values):
        return torch.autograd.grad(function(*values).square().sum(), values, create_graph=True)

    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(gradients, given, fast_mode=True)


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["both", "channel", "spatial"])
@pytest.mark.parametrize("layout", DENSE, ids=lambda f: f.__name__)
def test_opcheck(layout, which, device):
    tensors = make(size=(3, 4), groups=2, which=which, device=device)
    tensors[0] = layout(tensors[0])
    for t in tensors:
        if t is not None:
            t.requires_grad_()
    args = (*tensors, 3, 2, 1, "mul")
    torch.library.opcheck(UP.default, args)
    grad = layout(torch.randn(2, 4, 6, 8, dtype=torch.float64, device=device))
    args = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    for needed in ((True, True, True), (False, True, True)):
        torch.library.opcheck(UP_BACKWARD.default, (grad, *args, *needed))


@pytest.mark.parametrize(
    "change",
    [
        dict(channel_filter=torch.zeros(2, 3, 4, 3, 3)),
        dict(channel_filter=torch.zeros(2, 4, 4, 9)),
        dict(spatial_filter=torch.zeros(2, 4, 9, 5, 7)),
        dict(spatial_filter=torch.zeros(2, 9, 5, 6)),
        dict(spatial_filter=torch.zeros(2, 4, 9, 5, 6, dtype=torch.float64)),
        dict(channel_filter=None, spatial_filter=None),
        dict(scale_factor=0),
        dict(scale_factor=3),
        dict(scale_factor=2**40),
        dict(kernel_size=2),
        dict(dilation=0),
    ],
    ids="-".join,
)
def test_the_ops_refuse_what_they_could_not_read(change):
    good = dict(
        features=torch.zeros(2, 4, 5, 6),
        channel_filter=torch.zeros(2, 4, 4, 3, 3),
        spatial_filter=torch.zeros(2, 4, 9, 5, 6),
        kernel_size=3,
        scale_factor=2,
        dilation=1,
        kernel_combine="mul",
    )
    needs = dict(need_features=True, need_channel=True, need_spatial=True)
    grad = torch.zeros(2, 4, 10, 12)
    UP_BACKWARD(grad, **good, **needs)
    with pytest.raises(RuntimeError):
        UP(**{**good, **change})
    with pytest.raises(RuntimeError):
        UP_BACKWARD(grad, **{**good, **change}, **needs)
    with pytest.raises(RuntimeError):
        UP_BACKWARD(grad[:, :, 1:], **good, **needs)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", DENSE, ids=lambda f: f.__name__)
def test_compiles_in_one_graph(layout, device):
    torch._dynamo.reset()
    compiled = torch.compile(ddf_up, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((7, 7), (6, 9)):
        tensors = make(size=size, device=device)
        tensors[0] = layout(tensors[0])
        grad = torch.randn_like(ddf_up(*tensors))
        got = results(compiled, tensors, grad, (3, 2))
        want = results(ddf_up, tensors, grad, (3, 2))
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w) and g.stride() == w.stride()


class Upsample(torch.nn.Module):
    def forward(self, features, channel_filter, spatial_filter):
        return ddf_up(features, channel_filter, spatial_filter)


@pytest.mark.gpu
def test_exports(device):
    tensors = make(device=device)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Upsample(), tuple(tensors), dynamic_shapes=[{0: batch}] * 3)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert UP.default in calls and torch.ops.aten.pixel_shuffle.default not in calls
    others = make(batch=5, device=device)
    torch.testing.assert_close(program.module()(*others), ddf_up(*others))


def test_autocast(device):
    x, cf, sf = make(dtype=torch.float32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ddf_up(x, cf, sf).dtype == torch.bfloat16


@pytest.mark.gpu
def test_vmap_and_transforms(device):
    x, cf, sf = make(dtype=torch.float32, device=device)
    stacked = torch.stack([x, 2 * x])
    got = torch.vmap(ddf_up, (0, None, None))(stacked, cf, sf)
    torch.testing.assert_close(got, torch.stack([ddf_up(x, cf, sf), ddf_up(2 * x, cf, sf)]))
    _, tangent = torch.func.jvp(lambda features: ddf_up(features, cf, sf), (x,), (x,))
    torch.testing.assert_close(tangent, ddf_up(x, cf, sf))


def test_flops_are_those_of_a_ddf_for_each_subpixel():
    tensors = make(requires_grad=True, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        ddf_up(*tensors).sum().backward()
    found = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    taps = 2 * 4 * 10 * 12 * 9
    assert found == {"ddf_mm.ddf_up": 2 * taps, "ddf_mm.ddf_up_backward": 6 * taps}


@pytest.mark.parametrize("layout", DENSE, ids=lambda f: f.__name__)
def test_reads_any_layout_of_the_gradient(layout, device):
    tensors = make(device=device, requires_grad=True)
    out = ddf_up(*tensors)
    grad = torch.randn_like(out)
    want = torch.autograd.grad(out, tensors, contiguous(grad), retain_graph=True)
    got = torch.autograd.grad(out, tensors, layout(grad), retain_graph=True)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    expanded = torch.autograd.grad(out.sum(), tensors)
    want = torch.autograd.grad(ddf_up_reference(*tensors).sum(), tensors)
    torch.testing.assert_close(expanded, want)
