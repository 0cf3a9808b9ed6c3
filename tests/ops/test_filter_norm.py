"""filter_norm against numpy, at zero variance, under half precision, and its error messages."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ddf_mm.ops import backend_info, filter_norm
from ddf_mm.ops.reference import accumulate_dtype, filter_norm_reference, layout_of


def by_numpy(x, filters, std, mean):
    """Each filter by itself, in float64."""
    x = x.double().numpy()
    batch, total = x.shape[:2]
    taps = total // filters
    out = np.empty_like(x)
    for b in range(batch):
        for f in range(filters):
            part = slice(f * taps, (f + 1) * taps)
            values = x[b, part]
            out[b, part] = (values - values.mean(0)) / (values.std(0, ddof=1) + 1e-10)
    shape = (total,) + (1,) * (x.ndim - 2)
    return torch.from_numpy(out * np.broadcast_to(std, total).reshape(shape) + mean)


@pytest.mark.parametrize("filters", [1, 3])
@pytest.mark.parametrize("std", [0.5, "learned"])
@pytest.mark.parametrize("filter_type", ["spatial", "channel"])
def test_equals_the_formula(filter_type, std, filters):
    shape = (2, filters * 9, 4, 5) if filter_type == "spatial" else (2, filters * 9)
    x = torch.randn(shape, dtype=torch.float64)
    if std == "learned":
        std = torch.randn(filters * 9, dtype=torch.float64)
    got = filter_norm(x, filters, filter_type, std)
    want = by_numpy(x, filters, np.asarray(std), 0.0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_mean_is_added_and_channel_filters_come_out_flat():
    x = torch.randn(2, 18, 1, 1)
    shift = torch.randn(18)
    got = filter_norm(x, 2, "channel", 2.0, shift)
    assert got.shape == (2, 18)
    torch.testing.assert_close(got - shift, filter_norm(x.flatten(1), 2, "channel", 2.0))


def test_gradcheck():
    x = torch.randn(2, 18, 2, 1, dtype=torch.float64, requires_grad=True)
    std = torch.randn(18, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, s: filter_norm(a, 2, "spatial", s), (x, std))
    assert torch.autograd.gradgradcheck(lambda a, s: filter_norm(a, 2, "spatial", s), (x, std))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equal_taps_give_the_shift_and_finite_gradients(dtype):
    x = torch.full((2, 9, 3, 3), 0.1, dtype=dtype)
    x[0, :, 0, 0] = torch.randn(9).to(dtype)
    x.requires_grad_()
    out = filter_norm(x, 1, "spatial", 0.5)
    assert (out[1] == 0).all() and (out[0, :, 0, 0] != 0).any()
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_statistics_are_float32_under_half_precision(dtype, autocast):
    # In 16 bits the mean of these taps overflows or loses their small differences, and the
    # epsilon of 1e-10 is zero.
    offset = 3e4 if dtype == torch.float16 else 1024.0
    x = (offset + 32 * torch.randn(4, 9, 8, 8)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = filter_norm(x, 1, "spatial", torch.ones(9))
    assert got.dtype == dtype
    want = by_numpy(x, 1, 1.0, 0.0)
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error <= torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "arguments, exception, message",
    [
        ((None, 1, "spatial"), TypeError, "x must be a torch.Tensor"),
        ((torch.zeros(2, 9), 1, "spatial"), ValueError, r"x must be .*'spatial', got shape \[2, 9"),
        ((torch.zeros(2, 9, 2, 2), 1, "channel"), ValueError, "x must be .*'channel', got shape"),
        ((torch.zeros(9), 1, "channel"), ValueError, "x must be .*'channel', got shape"),
        (
            (torch.zeros(2, 10), 3, "channel"),
            ValueError,
            "x must have in_channels .*in_channels 3, got 10",
        ),
        ((torch.zeros(2, 3), 3, "channel"), ValueError, "at least 2 taps .*got 3"),
        ((torch.zeros(2, 9), 0, "channel"), ValueError, "in_channels must be at least 1, got 0"),
        ((torch.zeros(2, 9), 1, "row"), ValueError, "filter_type must be .*got 'row'"),
        ((torch.zeros(2, 9), 1, "channel", torch.ones(3)), ValueError, r"std must be .*\[9\].*\[3"),
        (
            (torch.zeros(2, 9), 1, "channel", 1.0, torch.ones(1, 9)),
            ValueError,
            r"mean must be .*got shape \[1, 9\]",
        ),
        (
            (torch.zeros(2, 9), 1, "channel", torch.ones(9, device="meta")),
            ValueError,
            "std must be on the device of x, cpu, got meta",
        ),
        (
            (torch.zeros(2, 9), 1, "channel", 1.0, torch.ones(9, device="meta")),
            ValueError,
            "mean must be on the device of x, cpu, got meta",
        ),
        ((torch.zeros(2, 9), 1, "channel", "1"), TypeError, "std must be a number, got '1' of"),
        ((torch.zeros(2, 9), 1, "channel", None), TypeError, "std must be a number, got None"),
        ((torch.zeros(2, 9), 1, "channel", 1, [1]), TypeError, r"mean must be a number, got \[1\]"),
        ((torch.zeros(2, 9), 1, "channel", 1, 0, "x"), TypeError, "eps must be a number, got 'x'"),
        ((torch.zeros(2, 9), "1", "channel"), TypeError, "in_channels must be an int, got '1'"),
        ((torch.zeros(2, 9).to_sparse(), 1, "channel"), TypeError, "x must be a dense tensor"),
    ],
)
def test_bad_arguments_are_named(arguments, exception, message):
    with pytest.raises(exception, match=message):
        filter_norm(*arguments)


COMPILED = pytest.mark.skipif(
    backend_info()["cpu"] != "compiled", reason="no compiled ops on this machine"
)
SHAPES = [(2, 18, 5, 7), (3, 27, 1, 40), (2, 50, 9, 3), (5, 72), (2, 36, 1, 1), (0, 9, 4, 4)]


def compiled(x, filters, *arguments):
    return filter_norm(x, filters, "spatial" if x.dim() == 4 else "channel", *arguments)


def both_ways(x, filters, std, mean, grad):
    """Results and gradients of the compiled op and of the formula in float64."""
    results = []
    for function, dtype in ((compiled, None), (filter_norm_reference, "exact")):
        given = [t.detach().clone() for t in (x, std, mean) if isinstance(t, torch.Tensor)]
        given = [(t if dtype is None else t.double()).requires_grad_() for t in given]
        rest = iter(given[1:])
        parameters = [next(rest) if isinstance(t, torch.Tensor) else t for t in (std, mean)]
        out = function(given[0], filters, *parameters, 1e-10)
        grads = torch.autograd.grad(out, given, grad.to(out.dtype))
        results.append([out.detach(), *grads])
    return results


@COMPILED
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_compiled_op_equals_the_formula(dtype, layout, shape, device):
    exact = accumulate_dtype(dtype)
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    if x.numel():
        x[0] = 0.1  # filters of equal taps
    if len(shape) == 4:
        x = x.contiguous(memory_format=layout)
    factor, shift = (torch.randn(shape[1], dtype=exact, device=device) for _ in range(2))
    # The gradient of fewer taps is a difference of much larger numbers.
    fitting = [n for n in (1, 2, 9) if shape[1] % n == 0 and shape[1] >= 4 * n]
    cases = itertools.product(fitting, [(0.5, None), (factor, None), (0.5, shift), (factor, shift)])
    for filters, (std, mean) in cases:
        for got, want in zip(*both_ways(x, filters, std, mean, grad), strict=True):
            scale = want.abs().max().clamp(min=1) if want.numel() else 1
            bound = scale * (torch.finfo(got.dtype).eps / 2 + 8 * torch.finfo(exact).eps)
            assert ((got.double() - want).abs() <= bound).all()
        out = compiled(x, filters, std, mean, 1e-10)
        assert out.shape == x.shape and out.dtype == dtype and layout_of(out) == layout_of(x)


@pytest.mark.gpu
@COMPILED
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("shape", [(2, 18, 5, 7), (3, 18)], ids=str)
def test_opcheck(shape, learned, device):
    x, grad = (torch.randn(shape, dtype=torch.float64, device=device) for _ in range(2))
    std, mean = (torch.randn(18, dtype=torch.float64, device=device) for _ in range(2))
    given = [t.requires_grad_() for t in ([x, std, mean] if learned else [x])]
    parameters = given[1:] or [None, None]
    args = (x, 2, *parameters, 0.5, 1e-10)
    torch.library.opcheck(torch.ops.ddf_mm.filter_norm.default, args)
    args = (grad.requires_grad_(), x, 2, parameters[0], 0.5, 1e-10, True, learned, learned)
    torch.library.opcheck(torch.ops.ddf_mm.filter_norm_backward.default, args)


@COMPILED
def test_compiled_op_does_not_depend_on_the_number_of_threads():
    x, grad = torch.randn(3, 36, 33, 41), torch.randn(3, 36, 33, 41)
    std, mean = torch.randn(36), torch.randn(36)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(both_ways(x, 4, std, mean, grad)[0])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_nan_and_inf_stay_in_their_filter(layout, value):
    x = torch.randn(2, 18, 3, 5).contiguous(memory_format=layout)
    x[1, 4, 2, 1] = value
    spoilt = torch.zeros(2, 18, 3, 5, dtype=torch.bool)
    spoilt[1, :9, 2, 1] = True
    assert torch.equal(filter_norm(x, 2, "spatial", 0.5).isnan(), spoilt)


@COMPILED
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(3), 1, None, None), "x must have at least 2 dimensions, got 1"),
        ((torch.zeros(2, 9), 2, None, None), "got 9 channels for 2 filters"),
        ((torch.zeros(2, 9), 0, None, None), "got 9 channels for 0 filters"),
        ((torch.zeros(2, 9), 9, None, None), "at least 2 taps"),
        ((torch.zeros(2, 9), 1, torch.zeros(8), None), "std must have one dimension of 9"),
        ((torch.zeros(2, 9), 1, None, torch.zeros(9, 1)), "mean must have one dimension of 9"),
        (
            (torch.zeros(2, 9), 1, torch.zeros(9).double(), None),
            "std must be float64 if x is",
        ),
        ((torch.zeros(2, 9, dtype=torch.int32), 1, None, None), "must be float16, bfloat16"),
    ],
)
def test_the_op_refuses_what_it_could_not_read(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ddf_mm.filter_norm(*arguments, 1.0, 1e-10)


@COMPILED
def test_the_backward_refuses_a_gradient_of_another_shape():
    x = torch.zeros(2, 9)
    with pytest.raises(RuntimeError, match="grad must have size 2 in dimension 0, got 1"):
        torch.ops.ddf_mm.filter_norm_backward(x[:1], x, 1, None, 1.0, 1e-10, True, False, False)
