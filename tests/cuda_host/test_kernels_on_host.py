"""Tests the sources of the CUDA kernels on the host (cuda_on_host.h) against the reference in
float64.

The host build checks every access and runs each kernel in three orders of its threads. Tests named
``test_a_fault_…`` plant faults in a copy of the kernels, which must be detected.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cuda_host.build import CSRC, HERE, NEEDS_HOST, compile_for_host
from ddf_cases import LARGER_TERMS
from torch import Tensor

from ddf_mm.ops import ddf_reference, ddf_up_reference
from ddf_mm.ops.checks import COMBINES
from ddf_mm.ops.reference import accumulate_dtype, filter_norm_reference, layout_of

pytestmark = NEEDS_HOST

PASSES = ["forward", "grad_features", "grad_channel", "grad_spatial"]
# Relative rounding errors of a result, and of a term of a sum.
EPSILON = {
    torch.float64: (2**-53, 2**-53),
    torch.float32: (2**-24, 2**-24),
    torch.float16: (2**-11, 2**-24),
    torch.bfloat16: (2**-8, 2**-24),
}
# Allowed error of a sum, in rounding errors of the sum of the terms' magnitudes; the largest error
# measured is 3.1.
ROUNDINGS = 4


# Orders of the threads in which each kernel is run.
ORDERS = ["forward", "backward", "shuffled"]
# FilterNorm's scales of the channel and the spatial filters of ddf_pack.
PACK_SCALES = (0.7, 0.4)
# The dtypes that have fast kernels, and their names on the host.
KERNEL_TYPES = {torch.float16: "c10::Half", torch.bfloat16: "c10::BFloat16", torch.float32: "float"}
FAST = list(KERNEL_TYPES)


class HostTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("strides", ctypes.c_int64 * 4),
    ]

    @classmethod
    def of(cls, tensor: Tensor | None) -> HostTensor:
        if tensor is None:
            return cls()
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in steps)
        size = (last + 1) * tensor.element_size()
        # Without the dimension of subpixels of ddf_up's filters.
        strides = [tensor.stride(0), *tensor.stride()[-3:]]
        return cls(tensor.data_ptr(), size, (ctypes.c_int64 * 4)(*strides))


class Call(ctypes.Structure):
    _fields_ = [
        ("grad", HostTensor),
        ("features", HostTensor),
        ("channel_filter", HostTensor),
        ("spatial_filter", HostTensor),
        ("results", HostTensor * 3),
        ("geometry", ctypes.c_int64 * 13),  # the last is false
        ("filters", ctypes.c_int64 * 2),
        ("gradients", ctypes.c_int64 * 2),
        ("combine", ctypes.c_int32),
        ("relu", ctypes.c_int32),
        ("scales", ctypes.c_double * 3),
        ("channel_std", HostTensor),
        ("bias", HostTensor),
    ]


class NormCall(ctypes.Structure):
    _fields_ = [
        ("grad", HostTensor),
        ("x", HostTensor),
        ("std", HostTensor),
        ("mean", HostTensor),
        ("results", HostTensor * 3),
        ("sizes", ctypes.c_int64 * 4),
        ("taps_inner", ctypes.c_int32),
        ("scale", ctypes.c_double),
        ("eps", ctypes.c_double),
    ]


class Host:
    """The kernels in ``csrc``, compiled for the host into ``folder``."""

    def __init__(self, csrc: Path, folder: Path, *options: str) -> None:
        library = folder / "kernels_on_host.so"
        compile_for_host(HERE / "run_kernels.cpp", library, csrc, *options)
        self.library = ctypes.CDLL(str(library))
        self.library.ddf_run_on_host.restype = ctypes.c_char_p
        self.library.ddf_norm_on_host.restype = ctypes.c_char_p
        self.library.ddf_last_kernels.restype = ctypes.c_char_p

    def run(self, name: str, grad, x, cf, sf, k, dilation, stride, combine) -> Tensor:
        """The result of the pass ``name``.

        Raises:
            RuntimeError: the host detected a fault.
        """
        return self.run_several([name], grad, x, cf, sf, k, dilation, stride, combine)[0]

    def run_several(self, names, grad, x, cf, sf, k, dilation, stride, combine) -> list[Tensor]:
        """Like :meth:`run`, for several gradients in one call."""
        results = [HostTensor() for _ in range(3)]
        tensors = []
        for name in names:
            like = {"forward": grad, "grad_features": x, "grad_channel": cf, "grad_spatial": sf}
            source = {"forward": x, "grad_channel": x.new_empty(0)}.get(name, like[name])
            layout = layout_of(source)
            tensors.append(torch.empty(like[name].shape, dtype=x.dtype, memory_format=layout))
            results[max(PASSES.index(name) - 1, 0)] = HostTensor.of(tensors[-1])
        groups = 1 if sf is None else sf.shape[1] // k**2
        geometry = [*x.shape, *grad.shape[2:], groups, x.shape[1] // groups, k, dilation, stride, 1]
        read = None if names == ["forward"] else grad
        call = Call(
            *[HostTensor.of(t) for t in (read, x, cf, sf)],
            (HostTensor * 3)(*results),
            (ctypes.c_int64 * 13)(*geometry),
            combine=COMBINES.index(combine),
        )
        self.start("forward" if names == ["forward"] else "backward", x.dtype, call)
        return tensors

    def run_up(self, kind, grad, x, cf, sf, k, scale, dilation, combine) -> list[Tensor]:
        """The output of ddf_up, or all gradients (``kind`` "forward", "backward")."""
        inputs = [x, cf, sf]
        of = [grad] if kind == "forward" else inputs
        results = [None if t is None else torch.empty_like(t) for t in of]
        groups = 1 if sf is None else sf.shape[2] // k**2
        geometry = [*x.shape, *x.shape[2:], groups, x.shape[1] // groups, k, dilation, 1, scale]

        def strides(filters):
            return (ctypes.c_int64 * 2)(*(0 if t is None else t.stride(1) for t in filters))

        # The size of a filter's tensor includes all subpixels.
        call = Call(
            *[HostTensor.of(t) for t in (None if kind == "forward" else grad, *inputs)],
            (HostTensor * 3)(*map(HostTensor.of, results)),
            (ctypes.c_int64 * 13)(*geometry),
            strides(inputs[1:]),
            strides([None, None] if kind == "forward" else results[1:]),
            COMBINES.index(combine),
        )
        self.start(f"up {kind}", x.dtype, call)
        return results

    def pack(self, x, cf, sf, std, bias, relu, k, dilation, stride, combine) -> Tensor:
        """The output of ddf_pack, with the scales of PACK_SCALES."""
        size = (*x.shape[:2], *sf.shape[2:])
        result = torch.empty(size, dtype=x.dtype, memory_format=layout_of(x))
        groups = sf.shape[1] // k**2
        geometry = [*x.shape, *sf.shape[2:], groups, x.shape[1] // groups, k, dilation, stride, 1]
        call = Call(
            *[HostTensor.of(t) for t in (None, x, cf, sf)],
            (HostTensor * 3)(HostTensor.of(result)),
            (ctypes.c_int64 * 13)(*geometry),
            combine=COMBINES.index(combine),
            relu=relu,
            scales=(ctypes.c_double * 3)(*PACK_SCALES, 1e-10),
            channel_std=HostTensor.of(std),
            bias=HostTensor.of(bias),
        )
        self.start("pack", x.dtype, call)
        return result

    def start(self, kind: str, dtype: torch.dtype, call: Call) -> None:
        name = str(dtype).removeprefix("torch.")
        message = self.library.ddf_run_on_host(kind.encode(), name.encode(), ctypes.byref(call))
        if message:
            raise RuntimeError(message.decode())

    def norm(self, grad, x, filters, std, mean, scale, eps=1e-10) -> list[Tensor]:
        """The result of filter_norm, or, with ``grad``, the gradients of x, std and mean."""
        taps = x.shape[1] // filters
        parameter = torch.empty(x.shape[1], dtype=accumulate_dtype(x.dtype))
        results = [torch.empty_like(x)]
        if grad is not None:
            results += [parameter, parameter.clone()]
        sizes = [x.shape[0], filters, taps, x[0, 0].numel()]
        call = NormCall(
            *[HostTensor.of(t) for t in (grad, x, std, mean)],
            (HostTensor * 3)(*map(HostTensor.of, results)),
            (ctypes.c_int64 * 4)(*sizes),
            sizes[3] == 1 or layout_of(x) == torch.channels_last,
            scale,
            eps,
        )
        name = b"norm" if grad is None else b"norm_backward"
        dtype = str(x.dtype).removeprefix("torch.")
        message = self.library.ddf_norm_on_host(name, dtype.encode(), ctypes.byref(call))
        if message:
            raise RuntimeError(message.decode())
        return results

    @property
    def last_kernels(self) -> str:
        """Names of the kernels of the last run, one per line."""
        return self.library.ddf_last_kernels().decode()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(CSRC, tmp_path_factory.mktemp("host"))


def make(
    batch=2,
    channels=4,
    size=(5, 8),
    k=3,
    groups=1,
    stride=1,
    which="both",
    floor=False,
    dtype=torch.float32,
    layout=torch.contiguous_format,
) -> list[Tensor | None]:
    """[grad, features, channel_filter, spatial_filter], random."""
    # Only a spatial filter can have a size that is rounded down.
    out = [s // stride if floor and which != "channel" else -(-s // stride) for s in size]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).contiguous(memory_format=layout)

    return [
        random(batch, channels, *out),
        random(batch, channels, *size),
        random(batch, channels, k, k).contiguous() if which != "spatial" else None,
        random(batch, groups * k * k, *out) if which != "channel" else None,
    ]


def expected(name: str, tensors: list[Tensor | None], k, dilation, stride, combine) -> Tensor:
    grad, *inputs = [None if t is None else t.double() for t in tensors]
    for t in inputs:
        if t is not None:
            t.requires_grad_(name != "forward")
    out = ddf_reference(*inputs, k, dilation, stride, combine)
    if name == "forward":
        return out
    wanted = inputs[["grad_features", "grad_channel", "grad_spatial"].index(name)]
    return torch.autograd.grad(out, wanted, grad)[0]


def served(tensors: list[Tensor | None]) -> list[str]:
    """The passes that exist for these filters."""
    present = [True, True, *(t is not None for t in tensors[2:])]
    return [name for name, there in zip(PASSES, present, strict=True) if there]


def check(host: Host, name: str, tensors, k=3, dilation=1, stride=1, combine="mul") -> None:
    got = host.run(name, *tensors, k, dilation, stride, combine)
    compare(name, got, tensors, k, dilation, stride, combine)


def compare(name: str, got: Tensor, tensors, k, dilation, stride, combine) -> None:
    """Asserts that ``got`` is the result of the pass ``name``, up to rounding."""
    want = expected(name, tensors, k, dilation, stride, combine)
    magnitudes = [None if t is None else t.abs() for t in tensors]
    terms = expected(name, magnitudes, k, dilation, stride, LARGER_TERMS[combine])
    of_result, of_term = EPSILON[got.dtype]
    smallest = torch.finfo(got.dtype).smallest_normal * of_result
    bound = of_result * want.abs() + ROUNDINGS * of_term * terms + smallest
    assert got.dtype == tensors[0].dtype and got.shape == want.shape
    error = (got.double() - want).abs()
    assert (error <= bound).all(), f"{name} is off by {error.max():.3g}"


GENERIC = [
    dict(k=1),
    dict(k=5, groups=2, size=(4, 5), batch=1),
    dict(k=7, size=(4, 3), batch=1, channels=2),
    dict(k=3, dilation=2, groups=2),
    dict(k=3, stride=2, size=(5, 7)),
    dict(k=3, stride=2, size=(5, 7), floor=True),
    dict(k=5, stride=3, dilation=2, size=(7, 6), groups=4),
    dict(k=3, stride=4, size=(2, 3)),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("which", ["both", "channel", "spatial"])
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("case", GENERIC, ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items()))
def test_generic_kernels(host, case, combine, which, layout):
    dilation = case.get("dilation", 1)
    sizes = {key: value for key, value in case.items() if key != "dilation"}
    tensors = make(which=which, layout=layout, dtype=torch.float64, **sizes)
    for name in served(tensors):
        check(host, name, tensors, case["k"], dilation, case.get("stride", 1), combine)
        assert f"{name}_generic<double>" in host.last_kernels


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_generic_kernels_of_every_dtype(host, name, dtype, layout):
    # 40 channels are more than one warp of channels in grad_channel.
    tensors = make(1, 40, (7, 8), 5, 2, stride=3, dtype=dtype, layout=layout)
    check(host, name, tensors, 5, stride=3)
    assert f"{name}_generic<" in host.last_kernels


def template_arguments(combine: str, *flags: bool) -> str:
    """The last template arguments of a kernel, as its name ends."""
    return ", ".join([f", ddf::{combine.capitalize()}", *(str(f).lower() for f in flags)]) + ">\n"


SIZES_3X3 = [(5, 8), (6, 7), (1, 1), (2, 9), (7, 14), (20, 36)]


@pytest.mark.parametrize("size", SIZES_3X3, ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("name", ["forward", "grad_features"])
def test_3x3_kernel(host, name, dtype, combine, size):
    for which in ("both", "channel", "spatial"):
        tensors = make(channels=6, size=size, groups=2, which=which, dtype=dtype)
        if which == "channel":
            tensors[2] = tensors[2].transpose(2, 3)
        check(host, name, tensors, combine=combine)
        assert "forward_3x3<" in host.last_kernels
        vector = size[1] % 4 == 0
        assert (
            template_arguments(combine, name == "grad_features", vector, False) in host.last_kernels
        )


@pytest.mark.parametrize("size", [(1, 2), (3, 7), (4, 16), (2, 35)], ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("name", ["forward", "grad_features"])
def test_3x3_channels_last_kernel(host, name, dtype, combine, size):
    for which in ("both", "channel", "spatial"):
        layout = torch.channels_last
        tensors = make(channels=24, size=size, groups=2, which=which, dtype=dtype, layout=layout)
        check(host, name, tensors, combine=combine)
        assert "forward_3x3_channels_last<" in host.last_kernels
        assert template_arguments(combine, name == "grad_features", False) in host.last_kernels


@pytest.mark.parametrize("name", ["forward", "grad_features"])
def test_3x3_channels_last_of_odd_groups(host, name):
    """Vector loads need a multiple of 4 channels in a group; here there are 3."""
    check(host, name, make(channels=12, groups=4, layout=torch.channels_last))
    assert "gather_3x3<" in host.last_kernels


GATHERED = [
    dict(dilation=2, size=(5, 8)),
    dict(dilation=4, size=(7, 9)),
    dict(dilation=5, size=(6, 3)),
    dict(stride=2, size=(5, 8)),
    dict(stride=2, size=(4, 7), floor=True),
    dict(stride=2, dilation=2, size=(6, 7)),
    dict(stride=3, size=(1, 11)),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("case", GATHERED, ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items()))
def test_3x3_windows_of_every_dilation_and_stride(host, case, dtype, combine, layout):
    """No pass has a generic kernel."""
    dilation, stride = case.get("dilation", 1), case.get("stride", 1)
    sizes = {key: value for key, value in case.items() if key != "dilation"}
    alone = ("channel", "spatial") if (dtype, combine) == (torch.float32, "mul") else ()
    for which in ("both", *alone):
        # 9 channels in a group are not all of a block's; 12 are three quads.
        channels = 18 if layout == torch.contiguous_format else 24
        tensors = make(1, channels, groups=2, which=which, dtype=dtype, layout=layout, **sizes)
        for name in served(tensors):
            check(host, name, tensors, 3, dilation, stride, combine)
            assert "_generic<" not in host.last_kernels
            quads = "_channels_last" if layout == torch.channels_last else ""
            if name == "grad_features":
                assert f"gather_3x3{quads}<" in host.last_kernels
                assert template_arguments(combine, True) in host.last_kernels


@pytest.mark.parametrize("channels, size", [(150, (3, 5)), (17, (12, 13)), (1, (1, 1))], ids=str)
def test_gathered_3x3_of_channel_blocks_and_tiles(host, channels, size):
    for layout in (torch.contiguous_format, torch.channels_last):
        for count in {channels, -(-channels // 4) * 4}:
            tensors = make(2, count, size, layout=layout)
            names = PASSES[1:]
            got = host.run_several(names, *tensors, 3, 2, 1, "mul")
            for name, result in zip(names, got, strict=True):
                compare(name, result, tensors, 3, 2, 1, "mul")
            check(host, "forward", tensors, dilation=2)


def test_gathered_3x3_of_any_strides(host):
    """A transposed image, whose rows and channels are not contiguous, and every second row."""
    grad, x, cf, sf = make(channels=5, size=(8, 6))
    turned = [t.transpose(2, 3) for t in (grad, x, sf)]
    for name in PASSES:
        check(host, name, [turned[0], turned[1], cf, turned[2]])
        assert "gather" in host.last_kernels
    halves = [t[:, :, ::2, 1::2] for t in (grad, x, sf)]
    for name in PASSES:
        check(host, name, [halves[0], halves[1], cf, halves[2]])
        assert "gather" in host.last_kernels


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("poisoned", range(4), ids=["grad", "features", "channel", "spatial"])
def test_gathered_nan_and_inf_stay_where_they_are(host, poisoned, value):
    for layout, stride in ((torch.contiguous_format, 2), (torch.channels_last, 2)):
        tensors = make(1, 8, (6, 8), groups=2, stride=stride, layout=layout)
        tensors[poisoned][0, 1, 0, 1] = value
        for name in PASSES[1:]:
            got = host.run(name, *tensors, 3, 1, stride, "mul")
            want = expected(name, tensors, 3, 1, stride, "mul")
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.isinf(), want.isinf())


WINDOWS = [(3, 2), (5, 1), (7, 1)]  # other kernels than 3 x 3 windows of stride 1


@pytest.mark.parametrize("size", [(3, 8), (2, 9)], ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("k, stride", WINDOWS)
def test_filter_gradients(host, k, stride, dtype, combine, size):
    for which in ("both", "channel", "spatial"):
        # 9 channels per group: one of the 4 warps has three of them, the others two.
        tensors = make(1, 18, size, k, 2, stride, which, dtype=dtype)
        names = served(tensors)[2:]
        for name in names:
            check(host, name, tensors, k, 1, stride, combine)
            assert "grad_filters<" in host.last_kernels
            assert f", {k}, {stride}{template_arguments(combine)}" in host.last_kernels
            # A single partial sum in float32 is the gradient.
            reduces = name == "grad_channel" and dtype != torch.float32
            assert ("reduce_partials<" in host.last_kernels) == reduces
        if len(names) == 1:
            continue
        alone = [host.run(name, *tensors, k, 1, stride, combine) for name in names]
        together = host.run_several(names, *tensors, k, 1, stride, combine)
        assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


@pytest.mark.parametrize("size", [(3, 8), (9, 20), (1, 1)], ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_filter_gradients_alone_of_3x3_windows(host, dtype, combine, size):
    """backward_3x3 computes all gradients together."""
    for which in ("both", "channel", "spatial"):
        tensors = make(1, 18, size, 3, 2, which=which, dtype=dtype)
        for name in served(tensors)[2:]:
            check(host, name, tensors, combine=combine)
            assert "grad_filters_gathered<" in host.last_kernels


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("k, stride", WINDOWS)
def test_larger_windows_and_stride_2(host, k, stride, dtype, combine, layout):
    rows = layout == torch.contiguous_format
    for which, size in (
        ("both", (3, 8)),
        ("both", (5, 9)),
        ("channel", (2, 9)),
        ("spatial", (3, 9)),
    ):
        # In NCHW, 3 channels per group are less than the 4 channels of a thread.
        tensors = make(1, 6 if rows else 16, size, k, 2, stride, which, False, dtype, layout)
        for name in PASSES[: 3 - stride]:
            check(host, name, tensors, k, 1, stride, combine)
            assert "forward_tiled<" in host.last_kernels
            kinds = template_arguments(combine, name != "forward", not rows)
            assert f", {k}, {stride}{kinds}" in host.last_kernels


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("channels, size", [(132, (2, 4)), (4, (7, 60)), (4, (9, 74))], ids=str)
@pytest.mark.parametrize("k, stride", WINDOWS)
def test_larger_windows_with_channel_blocks_and_tiles(host, k, stride, channels, size, layout):
    tensors = make(1, channels, size, k, stride=stride, layout=layout)
    for name in PASSES[: 3 - stride]:
        check(host, name, tensors, k, 1, stride)
        assert "forward_tiled<" in host.last_kernels


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("k, stride", WINDOWS)
def test_filter_gradients_channels_last(host, k, stride, dtype, combine):
    for which in ("both", "channel", "spatial"):
        # 6 quads of channels on 8 lanes; widths of 17 and 9.
        tensors = make(1, 48, (2, 17), k, 2, stride, which, False, dtype, torch.channels_last)
        names = served(tensors)[2:]
        got = host.run_several(names, *tensors, k, 1, stride, combine)
        for name, result in zip(names, got, strict=True):
            compare(name, result, tensors, k, 1, stride, combine)
        assert "grad_filters_channels_last<" in host.last_kernels
        assert f", {k}, {stride}{template_arguments(combine)}" in host.last_kernels


# Channels for 32, 16 and 8 lanes (the last in several channel blocks), and a single quad.
@pytest.mark.parametrize(
    "channels, size", [(128, (9, 3)), (64, (3, 18)), (160, (4, 4)), (4, (1, 4))]
)
@pytest.mark.parametrize("k, stride", WINDOWS)
def test_filter_gradients_channels_last_of_lanes(host, k, stride, channels, size):
    tensors = make(2, channels, size, k, stride=stride, layout=torch.channels_last)
    got = host.run_several(PASSES[2:], *tensors, k, 1, stride, "mul")
    for name, result in zip(PASSES[2:], got, strict=True):
        compare(name, result, tensors, k, 1, stride, "mul")
    assert "grad_filters_channels_last<" in host.last_kernels


@pytest.mark.parametrize("size", [(1, 1), (12, 36), (9, 20), (5, 74)], ids=str)
@pytest.mark.parametrize("k, stride", WINDOWS)
def test_filter_gradients_of_a_pixel_and_of_several_tiles(host, k, stride, size):
    tensors = make(1, 3, size, k, stride=stride)
    got = host.run_several(PASSES[2:], *tensors, k, 1, stride, "mul")
    for name, result in zip(PASSES[2:], got, strict=True):
        compare(name, result, tensors, k, 1, stride, "mul")
    assert "grad_filters<" in host.last_kernels


@pytest.mark.parametrize("floor", [True, False])
def test_filter_gradients_of_sizes_rounded_down(host, floor):
    tensors = make(size=(7, 9), stride=2, floor=floor)
    for name in PASSES:
        check(host, name, tensors, stride=2)


@pytest.mark.parametrize("size", SIZES_3X3, ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_3x3_backward_in_one_pass(host, dtype, combine, size):
    for which in ("both", "channel", "spatial"):
        tensors = make(1, 18, size, groups=2, which=which, dtype=dtype)
        names = served(tensors)[1:]
        got = host.run_several(names, *tensors, 3, 1, 1, combine)
        for name, result in zip(names, got, strict=True):
            compare(name, result, tensors, 3, 1, 1, combine)
        assert "backward_3x3<" in host.last_kernels
        assert "forward_3x3" not in host.last_kernels and "grad_filters" not in host.last_kernels
        flags = size[1] % 4 == 0, size[1] % 2 == 0
        assert template_arguments(combine, *flags) in host.last_kernels


@pytest.mark.parametrize("size", [(1, 2), (2, 3), (5, 8), (6, 17)], ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_3x3_channels_last_backward_in_one_pass(host, dtype, combine, size):
    for which in ("both", "channel", "spatial"):
        # 6 quads of channels in a group, on 8 lanes.
        tensors = make(1, 48, size, 3, 2, 1, which, False, dtype, torch.channels_last)
        names = served(tensors)[1:]
        together = host.run_several(names, *tensors, 3, 1, 1, combine)
        for name, result in zip(names, together, strict=True):
            compare(name, result, tensors, 3, 1, 1, combine)
        kernel = f"backward_3x3_channels_last<{KERNEL_TYPES[dtype]}{template_arguments(combine)}"
        assert kernel in host.last_kernels
        assert "forward_3x3" not in host.last_kernels and "grad_filters" not in host.last_kernels
        for name, result in zip(names[1:], together[1:], strict=True):
            assert torch.equal(host.run(name, *tensors, 3, 1, 1, combine), result)
            assert kernel in host.last_kernels


# Lanes of a warp and its tiles, warps that divide the channels, and channel blocks.
ONE_PASS = {
    "8 lanes of several tiles": (3, 32, 1, (7, 31)),
    "8 lanes of an active quad each": (2, 12, 3, (3, 4)),
    "16 lanes": (2, 64, 1, (9, 16)),
    "32 lanes, tiles in different warps": (1, 128, 1, (18, 15)),
    "two warps of channels": (1, 256, 1, (5, 16)),
    "four warps of channels": (1, 512, 1, (3, 9)),
    "three channel blocks": (1, 384, 1, (2, 5)),
    "two channel blocks of two warps, the last quad in a warp of its own": (1, 388, 1, (3, 2)),
}


# Enough blocks for tiles of two pairs of rows.
TWO_PAIRS = dict(batch=2, channels=512 * 128, groups=128, size=(3, 1))


def test_one_pass_of_several_pairs_of_rows_in_a_tile(host):
    tensors = make(**TWO_PAIRS, layout=torch.channels_last)
    got = host.run_several(PASSES[1:], *tensors, 3, 1, 1, "mul")
    for name, result in zip(PASSES[1:], got, strict=True):
        compare(name, result, tensors, 3, 1, 1, "mul")
    assert "reduce_partials<" not in host.last_kernels  # there is a single tile


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("case", ONE_PASS)
def test_one_pass_of_lanes_and_channel_warps(host, case, dilation):
    batch, channels, groups, size = ONE_PASS[case]
    tensors = make(batch, channels, size, groups=groups, layout=torch.channels_last)
    got = host.run_several(PASSES[1:], *tensors, 3, dilation, 1, "mul")
    for name, result in zip(PASSES[1:], got, strict=True):
        compare(name, result, tensors, 3, dilation, 1, "mul")
    assert "backward_3x3_channels_last<" in host.last_kernels
    assert "gather" not in host.last_kernels


# Lanes of a channel, and whether rows are copied in vectors, in pairs or not.
PARTS = {
    "8 lanes, plain": (2, 16, 2, (7, 7)),
    "8 lanes, several channel blocks": (1, 600, 1, (7, 6)),
    "8 lanes, vectors": (1, 12, 1, (3, 12)),
    "16 lanes, plain": (1, 10, 1, (10, 11)),
    "16 lanes, pairs": (1, 12, 2, (9, 10)),
    "16 lanes, vectors, several tiles": (1, 4, 1, (14, 28)),
    "channels that parts cannot divide": (1, 9, 1, (7, 6)),
}


@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("case", PARTS)
def test_one_pass_of_parts_of_warps(host, case, dtype):
    batch, channels, groups, size = PARTS[case]
    tensors = make(batch, channels, size, groups=groups, dtype=dtype)
    got = host.run_several(PASSES[1:], *tensors, 3, 1, 1, "mul")
    for name, result in zip(PASSES[1:], got, strict=True):
        compare(name, result, tensors, 3, 1, 1, "mul")
    flags = size[1] % 4 == 0, size[1] % 2 == 0
    assert "backward_3x3<" in host.last_kernels
    assert template_arguments("mul", *flags) in host.last_kernels


NORM_SHAPES = [(2, 18, 5, 7), (2, 18, 1, 1), (3, 45, 2, 3), (1, 100, 3, 100)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("filters", [1, 2])
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_filter_norm(host, dtype, shape, filters, layout):
    if shape[1] % filters:
        filters = 5
    exact = accumulate_dtype(dtype)
    x, grad = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    x[0, :, 0, 0] = 0.1  # a filter with equal taps
    for learned in (False, True):
        std, mean = (torch.randn(shape[1], dtype=exact) if learned else None for _ in range(2))
        given = [t.double().requires_grad_() for t in (x, *([std, mean] if learned else []))]
        want = filter_norm_reference(
            given[0], filters, 0.5 * given[1] if learned else 0.5, given[2] if learned else None
        )
        grads = torch.autograd.grad(want, given, grad.double())
        pairs = [(host.norm(None, x, filters, std, mean, 0.5)[0], want)]
        pairs += zip(host.norm(grad, x, filters, std, None, 0.5), grads, strict=False)
        for got, wanted in pairs:
            scale = wanted.abs().max().clamp(min=1)
            # Rounding errors of a sum over up to 300 pixels and of a quotient.
            bound = scale * (EPSILON[got.dtype][0] + 16 * EPSILON[exact][0])
            assert ((got.double() - wanted).abs() <= bound).all()
        assert "filter_norm_grad_parameters<" in host.last_kernels


@pytest.mark.parametrize("names", [PASSES[1:], PASSES[2:]], ids="-".join)
def test_filter_gradients_of_many_channels_in_few_pixels(host, names):
    """The channels are split among blocks, so that grad_spatial has partial sums too, and the tile
    into two."""
    tensors = make(batch=1, channels=150, size=(9, 20))
    for name, result in zip(names, host.run_several(names, *tensors, 3, 1, 1, "mul"), strict=True):
        compare(name, result, tensors, 3, 1, 1, "mul")
    assert host.last_kernels.count("reduce_partials<") == len(ORDERS)


def compare_not_finite(name, got, tensors, poisoned, place, dilation, combine, one_pass) -> None:
    """Asserts that ``got`` has NaN and Inf where the formula has them. In one pass, taps outside of
    the features, which the formula multiplies by zeros, have the gradient 0."""
    want = expected(name, tensors, 3, dilation, 1, combine)
    if one_pass and name in PASSES[2:]:
        ones = [torch.ones_like(t) for t in tensors]
        ones[poisoned].zero_()[place] = 1
        outside = (expected(name, ones, 3, dilation, 1, "mul") == 0) & ~want.isfinite()
        assert got[outside].isfinite().all()
        got, want = got.where(~outside, 0), want.where(~outside, 0)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("poisoned", range(4), ids=["grad", "features", "channel", "spatial"])
def test_nan_and_inf_in_one_pass(host, poisoned, value, layout):
    # Rows and columns of odd sizes end within the pixels of a thread.
    for size, place in (
        ((6, 8), (0, 1)),
        ((5, 8), (-1, -1)),
        ((5, 6), (-1, -1)),
        ((7, 7), (-1, 0)),
    ):
        for combine in COMBINES:
            tensors = make(batch=1, channels=8, size=size, groups=2, layout=layout)
            tensors[poisoned][(0, 1, *place)] = value
            got = host.run_several(PASSES[1:], *tensors, 3, 1, 1, combine)
            for name, result in zip(PASSES[1:], got, strict=True):
                compare_not_finite(
                    name, result, tensors, poisoned, (0, 1, *place), 1, combine, one_pass=True
                )


@pytest.mark.parametrize("channels, size", [(150, (3, 8)), (70, (4, 4)), (3, (34, 40))], ids=str)
@pytest.mark.parametrize("name", ["forward", "grad_features"])
def test_3x3_kernel_with_channel_blocks_and_tiles(host, name, channels, size):
    check(host, name, make(batch=1, channels=channels, size=size))
    assert "forward_3x3<" in host.last_kernels


@pytest.mark.parametrize("channels, size", [(520, (3, 2)), (8, (7, 35)), (132, (2, 17))], ids=str)
@pytest.mark.parametrize("name", ["forward", "grad_features"])
def test_3x3_channels_last_kernel_with_chunks_and_strips(host, name, channels, size):
    """More quads of channels than threads in a block, far fewer, and a number that does not divide
    the threads."""
    check(host, name, make(channels=channels, size=size, layout=torch.channels_last))
    assert "forward_3x3_channels_last<" in host.last_kernels


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("offset", [1, 4])
def test_views(host, name, offset):
    """Slices of larger tensors, with unaligned and aligned rows, and an expanded grad."""
    grad, x, cf, sf = make(size=(6, 16))
    x = x[..., 1:-1, offset : offset + 8]
    sf = torch.stack([sf, sf], dim=1)[:, 1, :, 1:-1, offset : offset + 8]
    cf = torch.stack([cf, cf], dim=1)[:, 1]
    grad = grad[..., :1, :1].expand(-1, -1, 4, 8)
    check(host, name, [grad, x, cf, sf])


@pytest.mark.parametrize("k, dilation", [(3, 1), (3, 2), (5, 1), (7, 1)])
def test_channel_slices_of_channels_last(host, k, dilation):
    """They stay channels_last, on the kernels for it."""
    wide = make(1, 16, (5, 18), k, layout=torch.channels_last)
    grad, x, cf, sf = wide[0][:, 4:12], wide[1][:, 8:], wide[2][:, :8], wide[3]
    assert layout_of(x) == layout_of(x[..., 1:-1]) == torch.channels_last
    for name in PASSES:
        check(host, name, [grad, x, cf, sf], k, dilation)
        of_tiled = template_arguments("mul", name == "grad_features", True)
        assert "_channels_last<" in host.last_kernels or of_tiled in host.last_kernels


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("poisoned", range(4), ids=["grad", "features", "channel", "spatial"])
@pytest.mark.parametrize("name", PASSES)
def test_nan_and_inf_stay_where_they_are(host, name, poisoned, value, dilation, layout):
    tensors = make(batch=1, channels=8, size=(6, 8), groups=2, layout=layout)
    tensors[poisoned][0, 1, 0, 1] = value
    for combine in COMBINES:
        got = host.run(name, *tensors, 3, dilation, 1, combine)
        one_pass = "backward_3x3_channels_last<" in host.last_kernels
        place = 0, 1, 0, 1
        compare_not_finite(name, got, tensors, poisoned, place, dilation, combine, one_pass)
        assert torch.isfinite(got).any()


@pytest.mark.parametrize("name", PASSES)
def test_one_pixel(host, name):
    check(host, name, make(batch=1, channels=1, size=(1, 1)))


class Fault(NamedTuple):
    """Replaces ``old`` (an expression, or statements that end in ";"), which ``file`` has once
    before ``after``, by ``new``; what the host then reports matches ``message``."""

    file: str
    old: str
    new: str
    message: str
    after: str = ""

    @property
    def edit(self) -> tuple[str, ...]:
        return self.file, self.old, self.after, self.new


class FaultyHost(Host):
    """The float32 kernels, compiled once with all ``faults``; :meth:`plant` switches one on."""

    MAX_ELEMENTS = "constexpr int64_t kMaxElements32 = INT32_MAX;"

    def __init__(self, folder: Path, faults: list[Fault]) -> None:
        csrc = folder / "csrc"
        shutil.copytree(CSRC, csrc)
        self.edits = list(dict.fromkeys(fault.edit for fault in faults))
        for number, (file, old, after, new) in enumerate(self.edits):
            if old.endswith(";"):
                switch = f"if (planted_fault == {number}) {{ {new} }} else {{ {old} }}"
            else:
                switch = f"(planted_fault == {number} ? ({new}) : ({old}))"
            self.replace(csrc / "cuda" / file, old + after, switch + after)
        # A variable instead of the constant, for the tests of several launches.
        variable = 'extern "C" { int64_t max_elements_32 = INT32_MAX; }\n'
        variable += "static int64_t& kMaxElements32 = max_elements_32;"
        self.replace(csrc / "cuda" / "arguments.cuh", self.MAX_ELEMENTS, variable)
        header = folder / "planted_fault.h"
        header.write_text('extern "C" { int planted_fault = -1; }\n')
        super().__init__(csrc, folder, "-include", str(header), "-DDDF_FLOAT32_ONLY", "-O0")
        self.planted_fault = ctypes.c_int.in_dll(self.library, "planted_fault")
        self.max_elements = ctypes.c_int64.in_dll(self.library, "max_elements_32")

    @staticmethod
    def replace(path: Path, old: str, new: str) -> None:
        source = path.read_text()
        assert source.count(old) == 1, f"{path.name} no longer has {old!r} once"
        path.write_text(source.replace(old, new))

    @contextmanager
    def plant(self, fault: Fault) -> Iterator[None]:
        self.planted_fault.value = self.edits.index(fault.edit)
        try:
            yield
        finally:
            self.planted_fault.value = -1


# Faults whose results are wrong, but the same in every order of the threads.
COPY_FAULTS = {
    "copies read before they are there": Fault(
        "backward_3x3.cuh", "await_copies<1>();", "await_copies<2>();", "off by"
    ),
    "copies over what is read": Fault(
        "backward_3x3.cuh", "copy_next(other);", "copy_next(0);", "off by"
    ),
    "copies of pairs over each other": Fault("backward_3x3.cuh", "x / kHalo", "0", "off by"),
    "a channel of another part of the warp": Fault(
        "backward_3x3.cuh", "part_channel * kBackwardTapStride", "0", "off by"
    ),
    "copies of the wrong side": Fault(
        "backward_3x3.cuh", "line + 1 - kHalo", "line + 2 - kHalo", "off by"
    ),
}


@pytest.mark.parametrize("name", COPY_FAULTS)
def test_a_fault_of_copies_to_shared_memory_is_found(faulty_host, name):
    pairs = "pairs" in name
    # Two channels for each part of a warp of 8 lanes.
    tensors = make(batch=1, channels=32, size=(4, 18 if pairs else 20))

    def check_all():
        for of, got in zip(
            PASSES[1:], faulty_host.run_several(PASSES[1:], *tensors, 3, 1, 1, "mul"), strict=True
        ):
            compare(of, got, tensors, 3, 1, 1, "mul")

    check_all()
    assert (
        f"backward_3x3<float{template_arguments('mul', not pairs, True)}"
        in faulty_host.last_kernels
    )
    fault = COPY_FAULTS[name]
    with faulty_host.plant(fault), pytest.raises(AssertionError, match=fault.message):
        check_all()


@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_backward_of_more_channels_than_a_block_has(host, dtype):
    """In equal blocks: the copies of vectors leave room for 341 channels of float32."""
    tensors = make(batch=1, channels=620, size=(2, 4), dtype=dtype)
    got = host.run_several(PASSES[1:], *tensors, 3, 1, 1, "mul")
    for name, result in zip(PASSES[1:], got, strict=True):
        compare(name, result, tensors, 3, 1, 1, "mul")
    assert "backward_3x3<" in host.last_kernels


@pytest.fixture(scope="module")
def faulty_host(tmp_path_factory: pytest.TempPathFactory) -> FaultyHost:
    faults = [*FAULTS.values(), *PACK_FAULTS.values(), *UP_FAULTS.values(), *GATHER_FAULTS.values()]
    faults += [NORM_FAULT, *COPY_FAULTS.values()]
    return FaultyHost(tmp_path_factory.mktemp("faulty_host"), faults)


@pytest.mark.parametrize("elements", [7, 50, 130])
def test_results_of_several_launches(faulty_host, monkeypatch, elements):
    """The split into launches of at most 2**31 - 1 elements, with a smaller bound."""
    monkeypatch.setattr(faulty_host.max_elements, "value", elements)
    for layout in (torch.contiguous_format, torch.channels_last):
        tensors = make(batch=3, channels=2, size=(5, 6), k=5, layout=layout)
        for name in PASSES:
            check(faulty_host, name, tensors, 5, dilation=2)
            launches = faulty_host.last_kernels.count("_generic<") / len(ORDERS)
            assert (launches > 1) == (name != "grad_channel")


ORDER = "depends on the order of the threads"
FAULTS = {
    "removed barrier": Fault(
        "forward_3x3.cuh", "sync_threads();", "", ORDER, "\n\n  const int tile ="
    ),
    "barrier after a return": Fault(
        "forward_3x3.cuh",
        "if (tile >= tiling.tiles) return;",
        "if (tile >= tiling.tiles) return; sync_threads();",
        "divergent barrier",
    ),
    "halo one too wide": Fault(
        "forward_3x3.cuh",
        "left + column - 1 < width",
        "left + column - 1 <= width",
        "outside of every tensor",
    ),
    "vector loads of unaligned rows": Fault(
        "dispatch.cuh",
        "reinterpret_cast<uintptr_t>(tensor.data) % (count * sizeof(T)) == 0",
        "true",
        "misaligned read of 16 bytes",
    ),
    "shared memory too small": Fault(
        "dispatch.cuh",
        "sizeof(float) * kReduceThreads",
        "sizeof(float) * (kReduceThreads - 1)",
        "shared memory is written past its",
    ),
    "sums of another result": Fault(
        "reduce.cuh",
        "block_index() < first_blocks",
        "block_index() <= first_blocks",
        "never written",
    ),
    "a thread too many": Fault(
        "generic.cuh",
        "index < static_cast<unsigned>(slice.batches)",
        "index <= static_cast<unsigned>(slice.batches)",
        "outside of every tensor",
    ),
    "shuffle of a part of a warp": Fault(
        "grad_filters.cuh",
        "partials.channel_partials != nullptr",
        "partials.channel_partials != nullptr && active",
        "divergent shuffle",
    ),
    "sums overwritten before they are read": Fault(
        "grad_filters.cuh",
        "// The sums of the previous step are read before they are overwritten.\n"
        "    sync_threads();",
        "",
        ORDER,
    ),
    "unfinished sum": Fault(
        "generic.cuh", "sync_threads();", "", ORDER, "\n    if (thread_index() < half)"
    ),
    "taps read before they are written, backward 3 x 3": Fault(
        "backward_3x3.cuh", "sync_threads();", "", ORDER, "\n  if (Copies) {\n    if (warp"
    ),
    "sums read before they are written, backward 3 x 3": Fault(
        "backward_3x3.cuh",
        "// The sums of all threads.\n    sync_threads();",
        "",
        ORDER,
    ),
    "sums over what is read, backward 3 x 3": Fault(
        "backward_3x3.cuh",
        "// What was in the shared memory is not used any more.\n    sync_threads();",
        "",
        ORDER,
    ),
    "taps read before they are written, 5 x 5": Fault(
        "forward_tiled.cuh", "sync_threads();", "", ORDER, "\n\n  const View"
    ),
    "taps of a pair of rows read before they are written": Fault(
        "backward_3x3_channels_last.cuh",
        "sync_warp();",
        "",
        ORDER,
        "\n\n    // All lanes take all steps",
    ),
    "sums read before they are written": Fault(
        "backward_3x3_channels_last.cuh",
        "// The sums of all warps of channels.\n    sync_threads();",
        "",
        ORDER,
    ),
    "taps of the next rows over sums": Fault(
        "backward_3x3_channels_last.cuh",
        "// The sums are read before the next taps.\n    sync_threads();",
        "",
        ORDER,
    ),
    "copies outside of the image": Fault(
        "backward_3x3_channels_last.cuh",
        "column + x + 1 < width",
        "column + x + 1 <= width",
        "outside of every tensor",
    ),
    "taps of a row read before they are written": Fault(
        "grad_filters_channels_last.cuh", "sync_warp();", "", ORDER, "\n\n    const int top"
    ),
    "taps of a row overwritten before they are read": Fault(
        "grad_filters_channels_last.cuh",
        "// The taps of the previous row are read before they are overwritten.\n    sync_warp();",
        "",
        ORDER,
    ),
    "blocks beyond the grid": Fault(
        "dispatch.cuh",
        "blocks",
        "blocks << 31",
        "CUDA cannot launch",
        ", kForward3x3Threads, shared",
    ),
}
# The passes that run the changed kernel; of the others, forward.
FAULTY_PASSES = {
    "a thread too many": ["grad_spatial"],
    "shared memory too small": ["grad_channel"],
    "sums of another result": PASSES[2:],
    "shuffle of a part of a warp": ["grad_channel"],
    "sums overwritten before they are read": ["grad_spatial"],
    "unfinished sum": ["grad_channel"],
    "taps read before they are written, backward 3 x 3": PASSES[1:],
    "sums read before they are written, backward 3 x 3": PASSES[1:],
    "sums over what is read, backward 3 x 3": PASSES[1:],
    "taps of a pair of rows read before they are written": PASSES[1:],
    "sums read before they are written": PASSES[1:],
    "taps of the next rows over sums": PASSES[1:],
    "copies outside of the image": PASSES[1:],
    "taps of a row read before they are written": ["grad_channel"],
    "taps of a row overwritten before they are read": ["grad_channel"],
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(faulty_host, name):
    fault = FAULTS[name]
    dilation = 2 if fault.file == "generic.cuh" else 1
    k = 5 if fault.file in ("forward_tiled.cuh", "generic.cuh") else 3
    layout = torch.channels_last if "channels_last" in fault.file else torch.contiguous_format
    sizes = dict(batch=1, channels=4, size=(4, 20))
    # 3 x 3 windows of stride 1 have another kernel.
    if fault.file == "grad_filters_channels_last.cuh" or "shuffle" in name:
        k = 5
    if name in ("shared memory too small", "sums of another result"):
        sizes = dict(batch=1, channels=150, size=(8, 20))
    if fault.file == "backward_3x3_channels_last.cuh":
        sizes = TWO_PAIRS if "next rows" in name else {**sizes, "channels": 8}
    grad, x, cf, sf = make(**sizes, k=k, layout=layout)
    if "unaligned" in name:  # after one float of padding no row is aligned
        x = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    arguments = FAULTY_PASSES.get(name, ["forward"]), grad, x, cf, sf, k, dilation, 1, "mul"
    faulty_host.run_several(*arguments)
    with faulty_host.plant(fault), pytest.raises(RuntimeError, match=fault.message):
        faulty_host.run_several(*arguments)


NORM_FAULT = Fault(
    "filter_norm.cuh", "sync_threads();", "", ORDER, "\n    if (thread_index() < half)"
)


def test_a_fault_of_filter_norm_is_found(faulty_host):
    x, std = torch.randn(1, 9, 20, 20), torch.randn(9)
    arguments = torch.randn_like(x), x, 1, std, None, 1.0
    faulty_host.norm(*arguments)
    with faulty_host.plant(NORM_FAULT), pytest.raises(RuntimeError, match=NORM_FAULT.message):
        faulty_host.norm(*arguments)


def make_pack(
    batch=2,
    channels=6,
    size=(5, 8),
    k=3,
    groups=2,
    stride=1,
    floor=False,
    dtype=torch.float32,
    layout=torch.contiguous_format,
) -> list[Tensor]:
    """[features, raw_channel, raw_spatial, channel_std, bias], random."""
    tensors = make(batch, channels, size, k, groups, stride, "both", floor, dtype, layout)[1:]
    exact = accumulate_dtype(dtype)
    return [*tensors, *(torch.randn(n, dtype=exact) for n in (channels * k * k, channels))]


def expected_pack(tensors, relu, k, dilation, stride, combine) -> tuple[Tensor, Tensor]:
    """The output in float64, and the sum of magnitudes to which its rounding error is relative."""
    x, cf, sf, std, bias = [None if t is None else t.double() for t in tensors]
    channels, groups = x.shape[1], sf.shape[1] // k**2
    scale, spatial_scale = PACK_SCALES
    factor = scale if std is None else scale * std
    channel = filter_norm_reference(cf.flatten(1), channels, factor, None, 1e-10).view_as(cf)
    spatial = filter_norm_reference(sf, groups, spatial_scale, None, 1e-10)
    # A tap close to the mean of its filter has the same absolute error as one far from it.
    most = torch.as_tensor(factor, dtype=torch.float64).abs().expand(channels * k * k)
    rounded = channel.abs() + most.view(channels, k, k), spatial.abs() + spatial_scale
    results = []
    for values in ((x, channel, spatial), (x.abs(), *rounded)):
        results.append(ddf_reference(*values, k, dilation, stride, combine))
    if bias is not None:
        results[0] = results[0] + bias[:, None, None]
        results[1] = results[1] + bias.abs()[:, None, None]
    return results[0].relu() if relu else results[0], results[1]


# Whether there is a parameter of channel FilterNorm, a bias, ReLU.
PACK_OPTIONS = [(True, True, True), (True, True, False), (True, False, True), (False, False, False)]


def check_pack(
    host: Host, tensors, k=3, dilation=1, stride=1, combine="mul", options=PACK_OPTIONS
) -> None:
    for has_std, has_bias, relu in options:
        given = [*tensors[:3], tensors[3] if has_std else None, tensors[4] if has_bias else None]
        got = host.pack(*given, relu, k, dilation, stride, combine)
        want, terms = expected_pack(given, relu, k, dilation, stride, combine)
        of_result, of_term = EPSILON[got.dtype]
        bound = of_result * want.abs() + ROUNDINGS * of_term * terms
        if "filter_norm_forward<" in host.last_kernels:  # rounds the normalized filters
            bound += 2 * of_result * terms
        bound += torch.finfo(got.dtype).smallest_normal * of_result
        assert got.dtype == tensors[0].dtype and got.shape == want.shape
        error = (got.double() - want).abs()
        fits = (error <= bound) | (got.isnan() & want.isnan())
        assert fits.all(), f"off by {(error / bound).max():.3g} times the allowed error"


@pytest.mark.parametrize("size", SIZES_3X3, ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_pack_3x3(host, dtype, combine, size):
    check_pack(host, make_pack(size=size, dtype=dtype), combine=combine)
    assert host.last_kernels.count("forward_3x3<") == len(ORDERS)
    assert template_arguments(combine, False, size[1] % 4 == 0, True) in host.last_kernels


@pytest.mark.parametrize("size", [(1, 2), (3, 7), (4, 16), (2, 35)], ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_pack_3x3_channels_last(host, dtype, combine, size):
    tensors = make_pack(channels=24, size=size, dtype=dtype, layout=torch.channels_last)
    check_pack(host, tensors, combine=combine)
    assert host.last_kernels.count("forward_3x3_channels_last<") == len(ORDERS)
    assert template_arguments(combine, False, True) in host.last_kernels


@pytest.mark.parametrize("size", [(3, 8), (5, 9)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("k, stride", WINDOWS)
def test_pack_of_larger_windows_and_stride_2(host, k, stride, dtype, combine, layout, size):
    rows = layout == torch.contiguous_format
    # In NCHW, 3 channels per group are less than the 4 channels of a thread.
    channels = 6 if rows else 16
    tensors = make_pack(1, channels, size, k, stride=stride, dtype=dtype, layout=layout)
    check_pack(host, tensors, k, 1, stride, combine)
    assert host.last_kernels.count("filter_norm_forward<") == 2 * len(ORDERS)
    assert host.last_kernels.count("forward_tiled<") == len(ORDERS)
    kinds = template_arguments(combine, False, not rows)
    assert f", {k}, {stride}{kinds}" in host.last_kernels


@pytest.mark.parametrize(
    "channels, size, layout",
    [
        (150, (3, 8), torch.contiguous_format),
        (3, (34, 40), torch.contiguous_format),
        (520, (3, 2), torch.channels_last),
        (132, (2, 17), torch.channels_last),
    ],
    ids=str,
)
def test_pack_in_one_block_and_several(host, channels, size, layout):
    check_pack(host, make_pack(1, channels, size, groups=1, layout=layout))
    assert "forward_3x3" in host.last_kernels
    if channels > 3:
        check_pack(host, make_pack(1, channels, size, 5, groups=1, layout=layout), 5)
        assert "forward_tiled<" in host.last_kernels


def test_pack_of_more_channels_in_a_block_than_threads(host):
    """With many images the channels are not split among blocks."""
    tensors = make_pack(1030, 130, (1, 1), groups=1)
    check_pack(host, tensors, options=PACK_OPTIONS[:1])
    assert "forward_3x3<" in host.last_kernels


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(
    "case", GENERIC[1:], ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items())
)
def test_pack_of_every_geometry(host, case, combine, layout):
    dilation = case.get("dilation", 1)
    sizes = {"channels": 4} | {key: value for key, value in case.items() if key != "dilation"}
    for dtype in (torch.float64, torch.float32):
        tensors = make_pack(dtype=dtype, layout=layout, **sizes)
        check_pack(host, tensors, case["k"], dilation, case.get("stride", 1), combine)
        if dtype == torch.float64:
            assert host.last_kernels.count("filter_norm_forward<double>") == 2 * len(ORDERS)
            assert host.last_kernels.count("forward_generic<double>") == len(ORDERS)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_pack_of_every_dtype(host, dtype, layout):
    tensors = make_pack(channels=10, size=(5, 7), dtype=dtype, layout=layout)
    check_pack(host, tensors, dilation=2)
    kernel = "forward_generic<" if dtype == torch.float64 else "gather_3x3<"
    assert kernel in host.last_kernels


# Calls for which ddf_pack uses each kernel.
PACK_KERNELS = {
    "forward_3x3<": dict(size=(5, 8)),
    "forward_3x3_channels_last<": dict(channels=8, layout=torch.channels_last),
    "forward_tiled<": dict(k=5),
    "gather_3x3<": dict(channels=8, groups=4, layout=torch.channels_last),
    "forward_generic<": dict(k=5, channels=8, groups=4, layout=torch.channels_last),
}


@pytest.mark.parametrize("kernel", PACK_KERNELS)
def test_pack_of_constant_filters(host, kernel):
    """Equal taps become exactly 0, even if their mean is rounded."""
    k = PACK_KERNELS[kernel].get("k", 3)
    x, cf, sf, std, bias = make_pack(**PACK_KERNELS[kernel])
    cf[:, 1], sf[0, : k * k, 0, 0] = 0.1, 0.3
    args = (x, cf, sf, std, bias, False, k, 1, 1)
    got = host.pack(*args, "mul")
    assert kernel in host.last_kernels
    assert (got[:, 1] == bias[1]).all()
    first = x.shape[1] // (sf.shape[1] // k**2)
    assert torch.equal(got[0, :first, 0, 0], bias[:first])
    check_pack(host, [x, cf, sf, std, bias], k, combine="add")
    sf[:, : k * k] = -1e3 / 3
    assert (host.pack(*args, "add")[:, 1] == bias[1]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "poisoned", range(5), ids=["features", "channel", "spatial", "std", "bias"]
)
@pytest.mark.parametrize("kernel", PACK_KERNELS)
def test_pack_keeps_nan_and_inf_where_they_are(host, kernel, poisoned, value):
    k = PACK_KERNELS[kernel].get("k", 3)
    for relu, combine in ((True, "mul"), (False, "add")):
        tensors = make_pack(**PACK_KERNELS[kernel])
        tensors[poisoned][(0, 1, 0, 1) if poisoned < 3 else 1] = value
        got = host.pack(*tensors, relu, k, 1, 1, combine)
        assert kernel in host.last_kernels
        want, _ = expected_pack(tensors, relu, k, 1, 1, combine)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())
        assert torch.isfinite(want).any()


@pytest.mark.parametrize("k, kernel", [(3, "gather_3x3<"), (5, "forward_tiled<")])
def test_pack_of_filters_in_another_layout(host, k, kernel):
    layouts = torch.contiguous_format, torch.channels_last
    for ours, theirs in (layouts, layouts[::-1]):
        x, cf, sf, *parameters = make_pack(channels=10, k=k, layout=ours)
        check_pack(host, [x, cf, sf.contiguous(memory_format=theirs), *parameters], k)
        assert kernel in host.last_kernels or ours is layouts[1]


@pytest.mark.parametrize("offset", [1, 4])
def test_pack_of_views(host, offset):
    """Features with unaligned and with aligned rows."""
    x, *others = make_pack(size=(6, 16))
    for k, dilation in ((3, 1), (5, 1), (3, 2)):
        _, *others = make_pack(size=(4, 8), k=k)
        check_pack(host, [x[..., 1:-1, offset : offset + 8], *others], k, dilation)


PACK_FAULTS = {
    "taps normalized before they are written": Fault(
        "forward_3x3.cuh", "sync_threads();", "", ORDER, "\n    for (int channel"
    ),
    "taps read before they are normalized": FAULTS["removed barrier"],
    "taps read before they are normalized, channels_last": Fault(
        "forward_3x3_channels_last.cuh", "sync_threads();", "", ORDER
    ),
    "a factor beyond the last": Fault(
        "filter_norm.cuh", "load(std + tap)", "load(std + tap + 1)", "outside of every tensor"
    ),
    "a bias beyond the last": Fault(
        "forward_tiled.cuh",
        "(channel + i < channels ? i : 0)",
        "i",
        "outside of every tensor",
        ");",
    ),
    "taps of a pixel without their scale": Fault(
        "filter_norm.cuh", "pack.spatial_scale", "1.f", "off by", ", pack.eps"
    ),
    "a maximum that drops NaN": Fault(
        "arguments.cuh",
        "sum < output_min ? output_min : sum",
        "sum >= output_min ? sum : output_min",
        "off by",
    ),
}


@pytest.mark.parametrize("name", PACK_FAULTS)
def test_a_fault_of_ddf_pack_is_found(faulty_host, name):
    fault = PACK_FAULTS[name]
    k = 5 if fault.file == "forward_tiled.cuh" else 3
    layout = torch.channels_last if "channels_last" in fault.file else torch.contiguous_format
    channels = 8 if "channels_last" in fault.file else 6
    tensors = make_pack(1, channels, (4, 20), k, layout=layout)
    if "NaN" in name:
        tensors[0][0, 1, 1, 1] = float("nan")
    check_pack(faulty_host, tensors, k)
    with (
        faulty_host.plant(fault),
        pytest.raises((RuntimeError, AssertionError), match=fault.message),
    ):
        check_pack(faulty_host, tensors, k)


def make_up(
    channels=6, size=(5, 8), k=3, scale=2, groups=1, which="both", dtype=torch.float32,
    layout=torch.contiguous_format,
) -> list[Tensor | None]:  # fmt: skip
    """[grad, features, channel_filter, spatial_filter] of ddf_up, random."""
    shapes = [
        (2, channels, scale * size[0], scale * size[1]),
        (2, channels, *size),
        (2, scale**2, channels, k, k) if which != "spatial" else None,
        (2, scale**2, groups * k * k, *size) if which != "channel" else None,
    ]
    tensors = [None if shape is None else torch.randn(shape).to(dtype) for shape in shapes]
    return [t if t is None or t.dim() == 5 else t.contiguous(memory_format=layout) for t in tensors]


def check_up(host: Host, tensors, k=3, scale=2, dilation=1, combine="mul") -> str:
    """Asserts that output and gradients are right up to rounding; returns the kernels' names."""
    dtype = tensors[0].dtype
    of_result, of_term = EPSILON[dtype]

    def results(values, combine):
        grad, *inputs = [None if t is None else t.detach().double() for t in values]
        inputs = [None if t is None else t.requires_grad_() for t in inputs]
        out = ddf_up_reference(*inputs, k, scale, dilation, combine)
        given = [t for t in inputs if t is not None]
        return [out.detach(), *torch.autograd.grad(out, given, grad)]

    got, kernels = [], ""
    for kind in ("forward", "backward"):
        found = host.run_up(kind, *tensors, k, scale, dilation, combine)
        got += [t for t in found if t is not None]
        kernels += host.last_kernels
    terms = results([None if t is None else t.abs() for t in tensors], LARGER_TERMS[combine])
    for value, want, size in zip(got, results(tensors, combine), terms, strict=True):
        smallest = torch.finfo(dtype).smallest_normal * of_result
        bound = of_result * want.abs() + ROUNDINGS * of_term * size + smallest
        assert value.dtype == dtype and value.shape == want.shape
        error = (value.double() - want).abs()
        assert (error <= bound).all(), f"off by {error.max():.3g}"
    return kernels


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_upsampling(host, dtype, combine, layout):
    for which in ("both", "channel", "spatial"):
        tensors = make_up(channels=8, which=which, groups=2, dtype=dtype, layout=layout)
        kernels = check_up(host, tensors, combine=combine)
        quads = "_channels_last" if layout is torch.channels_last else ""
        assert ("_generic<" in kernels) == (dtype == torch.float64)
        assert (f"gather_3x3{quads}<" in kernels) == (dtype != torch.float64)
        fast = dtype != torch.float64 and layout is torch.contiguous_format
        assert ("upsample_3x3<" in kernels) == fast


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (12, 13)], ids=str)
def test_upsampling_in_one_block_and_several(host, size):
    tensors = make_up(channels=70, size=size, groups=2)
    (got,) = host.run_up("forward", *tensors, 3, 2, 1, "mul")
    assert "upsample_3x3<" in host.last_kernels
    want = ddf_up_reference(*(t.double() for t in tensors[1:]))
    terms = ddf_up_reference(*(t.double().abs() for t in tensors[1:]))
    assert ((got.double() - want).abs() <= 2**-24 * (want.abs() + ROUNDINGS * terms)).all()


@pytest.mark.parametrize(
    "k, scale, dilation", [(1, 2, 1), (3, 1, 1), (3, 2, 2), (3, 3, 1), (5, 3, 1)]
)
def test_upsampling_of_every_kind(host, k, scale, dilation):
    for layout in (torch.contiguous_format, torch.channels_last):
        tensors = make_up(4, (4, 5), k, scale, 2, dtype=torch.float64, layout=layout)
        check_up(host, tensors, k, scale, dilation)
        if k == 3:
            tensors = make_up(8, (4, 5), k, scale, 2, layout=layout)
            assert "_generic<" not in check_up(host, tensors, k, scale, dilation)


def test_upsampling_keeps_a_nan_where_it_is(host):
    grad, x, cf, sf = make_up(size=(6, 9))
    sf[1, 1, 4, 2, 5] = float("nan")
    (out,) = host.run_up("forward", grad, x, cf, sf, 3, 2, 1, "mul")
    assert out[1, :, 4, 11].isnan().all() and out.isnan().sum() == 6
    sf[1, 1, 4, 2, 5], x[0, 1, 3, 7] = 0, float("inf")
    (out,) = host.run_up("forward", grad, x, cf, sf, 3, 2, 1, "mul")
    assert out[0, 1, 4:10, 12:].isfinite().sum() == 0 and (~out.isfinite()).sum() == 36


# The first of each pair of subpixels' filters of ddf_up, and what ddf's gradients of stride 2 read.
GATHER_FAULTS = {
    "taps read before they are written": Fault(
        "gather_3x3.cuh",
        "sync_threads();",
        "",
        f"{ORDER}|shared",
        "\n    if (!active) continue;\n\n    float spatial[9];",
    ),
    "taps read before they are written, channels_last": Fault(
        "gather_3x3.cuh",
        "sync_threads();",
        "",
        f"{ORDER}|shared",
        "\n    if (!active) continue;\n\n    const T* const origin",
    ),
    "taps overwritten before they are read": Fault(
        "gather_3x3.cuh",
        "// The taps of the previous subpixel are read before they are overwritten.\n"
        "    sync_threads();",
        "",
        ORDER,
    ),
    "taps overwritten before they are read, channels_last": Fault(
        "gather_3x3.cuh", "// As in gather_3x3.\n    sync_threads();", "", ORDER
    ),
    "a column too many": Fault(
        "generic.cuh", "output < outputs", "output <= outputs", "outside of every tensor|off by"
    ),
    "filters of another subpixel, channels_last": Fault(
        "gather_3x3.cuh",
        "input.at(batch, channel, subpixel / scale, subpixel % scale)",
        "input.at(batch, channel, subpixel % scale, subpixel / scale)",
        "off by",
    ),
    "sums of another pixel": Fault(
        "grad_filters_gathered.cuh",
        "spatial_sums[p * 9 + tap]",
        "spatial_sums[tap]",
        "off by",
        ");",
    ),
}


@pytest.mark.parametrize("name", GATHER_FAULTS)
def test_a_fault_of_the_gathering_kernels_is_found(faulty_host, name):
    fault = GATHER_FAULTS[name]
    layout = torch.channels_last if "channels_last" in name else torch.contiguous_format
    tensors = make_up(channels=8, size=(6, 13), layout=layout)
    check_up(faulty_host, tensors)
    with (
        faulty_host.plant(fault),
        pytest.raises((RuntimeError, AssertionError), match=fault.message),
    ):
        check_up(faulty_host, tensors)


UP_FAULTS = {
    "removed barrier": Fault("upsample.cuh", "sync_threads();", "", f"{ORDER}|shared"),
    "window one too wide": Fault(
        "upsample.cuh", "x < width", "x <= width", "outside of every tensor|off by"
    ),
    "pixel too many": Fault(
        "upsample.cuh", "pixel >= height * width", "pixel > height * width", "written twice"
    ),
}


@pytest.mark.parametrize("name", UP_FAULTS)
def test_a_fault_of_upsampling_is_found(faulty_host, name):
    fault = UP_FAULTS[name]
    arguments = "forward", *make_up(size=(3, 5)), 3, 2, 1, "mul"
    faulty_host.run_up(*arguments)
    with faulty_host.plant(fault), pytest.raises(RuntimeError, match=fault.message):
        faulty_host.run_up(*arguments)
