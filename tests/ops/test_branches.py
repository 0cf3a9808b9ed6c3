"""The convolutions of the branches that generate filters, on a CPU: ``depthwise_pointwise`` for
DDF-Up, ``pointwise_pool`` for DDFPack."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from ddf_cases import require_compiled, smaller_instruction_sets
from torch import Tensor

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def compiled() -> None:
    require_compiled("cpu")


def make(
    channels=20, branches=4, outputs=9, kernel=3, size=(2, 6, 19), dtype=torch.float32
) -> list[Tensor]:
    """[features, depthwise, its bias, pointwise, its bias]."""
    batch, *pixels = size
    shapes = [
        (batch, channels, *pixels),
        (branches * channels, 1, kernel, kernel),
        (branches * channels,),
        (branches * outputs, channels, 1, 1),
        (branches * outputs,),
    ]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def by_convolutions(x, depthwise, depthwise_bias, pointwise, pointwise_bias) -> Tensor:
    branches = depthwise.shape[0] // x.shape[1]
    between = F.conv2d(
        x.repeat(1, branches, 1, 1),
        depthwise,
        depthwise_bias,
        padding=depthwise.shape[-1] // 2,
        groups=depthwise.shape[0],
    )
    return F.conv2d(between, pointwise, pointwise_bias, groups=branches)


def run(tensors) -> Tensor:
    return torch.ops.ddf_mm.depthwise_pointwise(*tensors)


def exact(tensors) -> tuple[Tensor, Tensor]:
    """The output in float64, and the magnitude of what its rounding goes with."""
    wide = [None if t is None else t.double() for t in tensors]
    return by_convolutions(*wide), by_convolutions(*[None if t is None else t.abs() for t in wide])


def check_values(got: Tensor, want: Tensor, terms: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.shape == want.shape
    # Sums are kept in float32, or float64, and rounded to the dtype once.
    sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    room = 8 * sums * terms + torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).tiny
    assert ((got.double() - want).abs() <= room).all()


def check(tensors) -> None:
    got = run(tensors)
    assert got.is_contiguous(memory_format=torch.channels_last)
    check_values(got, *exact(tensors), tensors[0].dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equals_the_convolutions(dtype):
    sizes = [(2, 6, 19), (1, 1, 1), (1, 4, 2), (1, 3, 33)]
    for size, layout in itertools.product(sizes, LAYOUTS):
        for channels, branches, outputs, kernel in [
            (20, 4, 9, 3), (1, 1, 1, 3), (8, 9, 25, 3), (37, 2, 18, 5), (16, 4, 9, 1), (5, 3, 14, 7)
        ]:  # fmt: skip
            tensors = make(channels, branches, outputs, kernel, size, dtype)
            tensors[0] = tensors[0].contiguous(memory_format=layout)
            check(tensors)


@pytest.mark.parametrize("without", [(2,), (4,), (2, 4)])
def test_biases_may_be_missing(without):
    check([None if i in without else t for i, t in enumerate(make())])


def test_only_the_batch_may_be_empty():
    assert run(make(size=(0, 4, 5))).shape == (0, 36, 4, 5)
    for size in ((1, 0, 5), (1, 4, 0)):
        with pytest.raises(RuntimeError, match="at least one channel, row and column"):
            run(make(size=size))


def test_strided_inputs():
    tensors = make()
    tensors[0] = torch.randn(2, 40, 6, 38)[:, ::2, :, ::2]
    tensors[1] = tensors[1].transpose(2, 3)
    tensors[3] = torch.randn(36, 40, 1, 1)[:, ::2]
    check(tensors)


def test_a_nan_reaches_only_the_pixels_around_it():
    tensors = make(size=(2, 7, 21))
    tensors[0][1, 3, 2, 10] = float("nan")
    is_nan = run(tensors).isnan()
    want = torch.zeros_like(is_nan)
    want[1, :, 1:4, 9:12] = True
    assert torch.equal(is_nan, want)


def test_threads_change_nothing():
    tensors, threads = make(size=(2, 9, 21)), torch.get_num_threads()
    found = []
    pool = (*make_pool(size=(2, 9, 21)), 2)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([run(tensors), *torch.ops.ddf_mm.pointwise_pool(*pool)])
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, found[0], others)) for others in found[1:])


@pytest.mark.parametrize(
    "place, tensor, message",
    [
        (0, torch.zeros(2, 20, 6), "features must have 4 dimensions, got 3"),
        (1, torch.zeros(81, 1, 3, 3), "depthwise must have a multiple of 20 filters, got 81"),
        (1, torch.zeros(80, 1, 4, 4), "depthwise must have an odd size, got 4"),
        (1, torch.zeros(80, 1, 3, 5), "depthwise must have size 3 in dimension 3, got 5"),
        (1, torch.zeros(80, 1, 3, 3).double(), "depthwise must have the dtype of the first"),
        (2, torch.zeros(79), "depthwise_bias must have size 80 in dimension 0, got 79"),
        (3, torch.zeros(35, 20, 1, 1), "pointwise must have a multiple of 4 filters, got 35"),
        (3, torch.zeros(36, 19, 1, 1), "pointwise must have size 20 in dimension 1, got 19"),
        (4, torch.zeros(36, 1), "pointwise_bias must have 1 dimensions, got 2"),
    ],
)
def test_bad_arguments_are_named(place, tensor, message):
    tensors = make()
    tensors[place] = tensor
    with pytest.raises(RuntimeError, match=message):
        run(tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    tensors = make(size=(2, 3, 5))
    tensors[0] = tensors[0].contiguous(memory_format=layout)
    torch.library.opcheck(torch.ops.ddf_mm.depthwise_pointwise.default, tensors)


def make_pool(
    channels=20, outputs=9, size=(2, 6, 19), dtype=torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, the weight and its bias."""
    shapes = [(size[0], channels, *size[1:]), (outputs, channels, 1, 1), (outputs,)]
    x, *weights = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return x.contiguous(memory_format=torch.channels_last), *weights


def check_pool(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> None:
    out, mean = torch.ops.ddf_mm.pointwise_pool(x, weight, bias, stride)
    wide, sizes = (
        [None if t is None else of(t.double()) for t in (x, weight, bias)]
        for of in (lambda t: t, Tensor.abs)
    )
    check_values(out, F.conv2d(*wide, stride), F.conv2d(*sizes, stride), x.dtype)
    check_values(mean, wide[0].mean((2, 3)), sizes[0].mean((2, 3)), x.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pooling_and_projection_equals_both(dtype):
    sizes = [(2, 6, 19), (1, 1, 1), (3, 5, 2), (1, 3, 50)]
    for size, stride in itertools.product(sizes, [1, 2, 3, 17, 2**62]):
        for channels, outputs in [(20, 9), (1, 1), (16, 18), (37, 14)]:
            check_pool(*make_pool(channels, outputs, size, dtype), stride)


def test_pooling_takes_any_strides_and_no_bias():
    x, weight, _ = make_pool()
    check_pool(x.contiguous(), weight, None, 2)
    check_pool(torch.randn(2, 40, 6, 9)[:, ::2, :, ::2], weight, None, 1)
    out, mean = torch.ops.ddf_mm.pointwise_pool(x[:0], weight, None, 2)
    assert out.shape == (0, 9, 3, 10) and mean.shape == (0, 20)


def test_pooling_keeps_a_nan_in_its_pixel_and_channel():
    x, weight, bias = make_pool()
    x[1, 3, 2, 10] = float("nan")
    out, mean = torch.ops.ddf_mm.pointwise_pool(x, weight, bias, 1)
    assert out.isnan().sum() == 9 and out[1, :, 2, 10].isnan().all()
    assert mean.isnan().sum() == 1 and mean[1, 3].isnan()


@pytest.mark.parametrize(
    "place, value, message",
    [
        (0, torch.zeros(2, 20, 0, 4), "features must have at least one channel, row and"),
        (1, torch.zeros(9, 19, 1, 1), "weight must have size 20 in dimension 1, got 19"),
        (1, torch.zeros(0, 20, 1, 1), "weight must have at least one output"),
        (1, torch.zeros(9, 20, 1, 1).double(), "weight must have the dtype of the first"),
        (2, torch.zeros(8), "bias must have size 9 in dimension 0, got 8"),
        (3, 0, "stride must be at least 1, got 0"),
    ],
)
def test_bad_arguments_of_pooling_are_named(place, value, message):
    arguments = [*make_pool(), 1]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ddf_mm.pointwise_pool(*arguments)


def test_opcheck_of_pooling():
    torch.library.opcheck(torch.ops.ddf_mm.pointwise_pool.default, (*make_pool(size=(2, 3, 5)), 2))


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.parametrize("isa", smaller_instruction_sets())
def test_smaller_instruction_sets(isa):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "equals", __file__],
        env={**os.environ, "DDF_MM_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
