"""The operation under random shapes, options, layouts and dtypes, on every backend.

CI always draws the same cases; ``--hypothesis-profile=thorough`` draws many others, new ones each
time (see conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from ddf_cases import (
    LAYOUTS,
    NAMES,
    by_unfold,
    check_against,
    make,
    require_compiled,
    value_and_gradients,
)
from torch import Tensor

from ddf_mm.ops import ddf, ddf_reference
from ddf_mm.ops.checks import COMBINES

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

# Those with kernels of their own come first, and are drawn more often.
FAST = [(3, 1, 1), (3, 1, 2), (5, 1, 1), (5, 1, 2), (7, 1, 1), (7, 1, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PLACES = ["features", "channel_filter", "spatial_filter", "grad"]
# Multiply-adds of one case: more takes long and finds no more.
MOST_WORK = 200_000


@dataclass(frozen=True)
class Case:
    batch: int
    channels: int
    size: tuple[int, int]
    groups: int
    k: int
    dilation: int
    stride: int
    floor: bool
    combine: str
    which: str
    dtype: torch.dtype
    layouts: tuple[Callable[[Tensor], Tensor], ...]  # of features, filters and grad
    needed: tuple[bool, bool, bool]
    seed: int

    @property
    def options(self) -> tuple[int, int, int, str]:
        return self.k, self.dilation, self.stride, self.combine

    def tensors(self, device: str = "cpu") -> tuple[list[Tensor | None], Tensor]:
        """Features and filters, and the gradient of the output."""
        torch.manual_seed(self.seed)
        tensors = make(
            self.batch,
            self.channels,
            self.size,
            self.k,
            self.groups,
            self.stride,
            self.which,
            self.floor,
            self.dtype,
            device,
        )
        ceil = [-(-n // self.stride) for n in self.size]
        out = ceil if tensors[2] is None else tensors[2].shape[2:]
        grad = torch.randn(self.batch, self.channels, *out).to(tensors[0])
        laid_out = [
            None if t is None else layout(t)
            for t, layout in zip((*tensors, grad), self.layouts, strict=True)
        ]
        return laid_out[:3], laid_out[3]


@st.composite
def cases(draw: st.DrawFn, least_batch: int = 0) -> Case:
    any_geometry = st.tuples(st.sampled_from([1, 3, 5, 7, 9]), st.integers(1, 3), st.integers(1, 4))
    k, dilation, stride = draw(st.sampled_from(FAST) | any_geometry)
    batch = draw(st.integers(least_batch, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 9) | st.sampled_from([16, 31, 33, 64]))
    most_pixels = MOST_WORK * stride**2 // (k * k * channels * max(batch, 1))
    height = draw(st.integers(1, max(1, min(48, most_pixels))))
    width = draw(st.integers(1, max(1, min(140, most_pixels // height))))
    which = draw(st.sampled_from(["both", "both", "channel", "spatial"]))
    # The output's size is the spatial filter's, and has at least one pixel.
    may_floor = which != "channel" and min(height, width) >= stride > 1
    return Case(
        batch=batch,
        channels=channels,
        size=(height, width),
        groups=1 if which == "channel" else groups,
        k=k,
        dilation=dilation,
        stride=stride,
        floor=may_floor and draw(st.booleans()),
        combine=draw(st.sampled_from(COMBINES)),
        which=which,
        dtype=draw(st.sampled_from(DTYPES)),
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(4)),
        needed=tuple(draw(st.tuples(*[st.booleans()] * 3))),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.fixture(
    params=["reference", "cpu", pytest.param("cuda", marks=pytest.mark.cuda)], scope="module"
)
def backend(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], str]:
    """What computes the operation, and on which device."""
    if request.param == "reference":
        return ddf_reference, "cpu"
    require_compiled(request.param)
    return ddf, request.param


@given(case=cases())
def test_output_and_gradients(backend, case):
    function, device = backend
    tensors, grad = case.tensors(device)
    check_against(by_unfold, tensors, case.options, grad, function, case.needed)


def finite_terms(tensors: list[Tensor | None], grad: Tensor, case: Case) -> list[Tensor | None]:
    """How many terms of each sum are finite numbers, counting those inside the features alone.

    A term is finite where its factors are, and 1 or 0 is then the product of theirs.
    """
    ones = [None if t is None else t.isfinite().double() for t in tensors]
    options = (*case.options[:3], "mul")
    counts = value_and_gradients(by_unfold, ones, grad.isfinite().double(), options)
    if case.combine == "add" and case.which == "both":
        # The gradient of a filter does not depend on the other one.
        for i, other in ((1, 2), (2, 1)):
            alone = [torch.ones_like(t) if j == other else t for j, t in enumerate(ones)]
            counts[i + 1] = value_and_gradients(
                by_unfold, alone, grad.isfinite().double(), options
            )[i + 1]
    return counts


@pytest.mark.any_torch
@pytest.mark.slow
@given(
    case=cases(least_batch=1),
    where=st.sampled_from(PLACES),
    position=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 4),
    value=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
def test_values_that_are_not_finite_stay_where_they_are(backend, case, where, position, value):
    function, device = backend
    tensors, grad = case.tensors(device)
    spoilt = dict(zip(PLACES, (*tensors, grad), strict=True))[where]
    if spoilt is None:
        return
    finite = finite_terms(tensors, grad, case)
    spoilt[tuple(int(p * n) for p, n in zip(position, spoilt.shape, strict=True))] = value
    left = finite_terms(tensors, grad, case)
    got = value_and_gradients(function, tensors, grad, case.options)
    exact = [None if t is None else t.double() for t in tensors]
    padded = value_and_gradients(by_unfold, exact, grad.double(), case.options)
    # Zero times such a value is one too, and a kernel may skip the products with the padding or
    # not: the formula has those with the features' padding, and a gradient of the features that
    # is computed as a filter of the padded gradient has those with each tap of the channel filter.
    may_be_bad = [None if p is None else ~p.isfinite() for p in padded]
    if where == "channel_filter":
        may_be_bad[1] |= ~spoilt.isfinite().all((2, 3), keepdim=True)
    for name, g, may_be, before, after in zip(NAMES, got, may_be_bad, finite, left, strict=True):
        if g is None:
            continue
        bad = ~g.isfinite()
        assert not (bad & ~may_be).any(), f"{name} is spoilt where it has no such term"
        assert not ((after < before) & ~bad).any(), f"{name} hides a value that is not finite"


@pytest.fixture(scope="module")
def compiled_for_the_cpu() -> None:
    require_compiled("cpu")


@pytest.mark.any_torch
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_for_the_cpu")
@given(case=cases(least_batch=1))
def test_any_number_of_threads_gives_the_same_bits(case):
    tensors, grad = case.tensors()
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(value_and_gradients(ddf, tensors, grad, case.options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, a, b in zip(NAMES, results[0], other, strict=True):
            assert a is None or torch.equal(a, b), name
