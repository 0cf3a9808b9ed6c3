"""filter_norm against numpy, at zero variance, under half precision, and its error messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddf_mm.ops import filter_norm


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
        ((torch.zeros(2, 10), 3, "channel"), ValueError, "x must have in_channels .* 3 .*got 10"),
        ((torch.zeros(2, 3), 3, "channel"), ValueError, "at least 2 taps .*got 3"),
        ((torch.zeros(2, 9), 0, "channel"), ValueError, "in_channels must be at least 1, got 0"),
        ((torch.zeros(2, 9), 1, "row"), ValueError, "filter_type must be .*got 'row'"),
        ((torch.zeros(2, 9), 1, "channel", torch.ones(3)), ValueError, r"std must be .*\[9\].*\[3"),
        (
            (torch.zeros(2, 9), 1, "channel", 1.0, torch.ones(1, 9)),
            ValueError,
            r"mean must be .*got shape \[1, 9\]",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, exception, message):
    with pytest.raises(exception, match=message):
        filter_norm(*arguments)
