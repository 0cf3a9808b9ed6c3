"""Jacobians, batched gradients, vmap, torch.fx and torch.jit's tracer over the functional API."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from ddf_cases import channels_last, make
from transforms import TRANSFORMS, check_derivatives, check_transform

from ddf_mm.ops import ddf, ddf_up, filter_norm


def upsampling(**options):
    x, cf, sf = make(size=(3, 4), **options)
    return [x, torch.stack([cf, -cf, cf / 2, cf + 1], 1), torch.stack([sf, sf + 1, -sf, sf / 2], 1)]


def float64(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


CASES = {
    "ddf": (lambda *t: ddf(*t, stride=2), make(stride=2, groups=2)),
    "add": (lambda *t: ddf(*t, dilation=2, kernel_combine="add"), make(batch=1, size=(3, 4))),
    "floor": (lambda *t: ddf(*t, stride=2), make(stride=2, floor=True)),
    "channels_last": (ddf, [channels_last(t) for t in make(size=(3, 4))]),
    "per channel": (lambda x, cf: ddf(x, cf, None, stride=2), make(which="channel")[:2]),
    "per pixel": (lambda x, sf: ddf(x, None, sf, 5), make(which="spatial", k=5, batch=1)[::2]),
    "ddf_up": (ddf_up, upsampling()),
    "spatial norm": (lambda x: filter_norm(x, 2, "spatial"), [float64(2, 18, 3, 2)]),
    "channel norm": (
        lambda x, std, mean: filter_norm(x, 4, "channel", std, mean),
        [float64(2, 36, 1, 1), float64(36), float64(36)],
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.__name__)
@pytest.mark.parametrize("case", CASES)
def test_transform(case, transform):
    check_transform(transform, *CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_derivatives_in_every_mode(case):
    check_derivatives(*CASES[case])


class Functions(torch.nn.Module):
    """Calls that some other package makes."""

    def forward(self, x, cf, sf, std):
        sf = filter_norm(sf, in_channels=2, filter_type="spatial", std=std)
        out = ddf(x, cf, sf, stride=2, kernel_combine="add")
        return ddf_up(out, None, torch.stack([sf] * 4, 1), scale_factor=2)


def arguments(batch: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    x, cf, sf = make(batch, size=(height, width), groups=2, stride=2)
    return x, cf, sf, torch.rand(18, dtype=torch.float64)


SIZES = [(2, 8, 6), (1, 7, 5), (3, 11, 16)]


def test_fx_records_one_call_each():
    graph = torch.fx.symbolic_trace(Functions())
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert calls == [filter_norm, ddf, torch.stack, ddf_up]
    for size in SIZES:
        tensors = arguments(*size)
        for module in (graph, copy.deepcopy(graph)):
            torch.testing.assert_close(module(*tensors), Functions()(*tensors))


@pytest.mark.parametrize("traced", SIZES[:2], ids=str)
def test_trace_serves_other_sizes_without_this_package(traced):
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        graph = torch.jit.trace(Functions(), arguments(*traced))
    assert "ddf_mm::" not in str(graph.inlined_graph)
    for size in SIZES:
        tensors = [t.requires_grad_() for t in arguments(*size)]
        got, want = graph(*tensors), Functions()(*tensors)
        torch.testing.assert_close(got, want)
        grad = torch.randn_like(want)
        torch.testing.assert_close(
            torch.autograd.grad(got, tensors, grad), torch.autograd.grad(want, tensors, grad)
        )


@pytest.mark.parametrize("floor", [False, True])
def test_trace_takes_either_size_of_the_spatial_filter(floor):
    """The trace is of even sizes, where both have the same size."""
    graph = torch.jit.trace(lambda *t: ddf(*t, stride=2), make(stride=2, size=(6, 8)))
    tensors = make(stride=2, size=(7, 9), floor=floor)
    torch.testing.assert_close(graph(*tensors), ddf(*tensors, stride=2))


def test_wrong_arguments_are_named_while_tracing():
    x, cf, sf = make()
    with pytest.raises(ValueError, match=r"channel_filter must be a Tensor\[B, C, k, k\]"):
        torch.jit.trace(ddf, (x, cf[:, :1], sf))
