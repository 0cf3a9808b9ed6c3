"""``ddf_pack``: FilterNorm, ddf, a bias and ReLU as one operator, against the formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
from ddf_cases import DENSE, LAYOUTS, by_name, contiguous, require_compiled, short
from ddf_cases import make as make_inputs
from torch import Tensor

from ddf_mm.ops import ddf_reference
from ddf_mm.ops.checks import COMBINES
from ddf_mm.ops.reference import accumulate_dtype, filter_norm_reference, layout_of

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Of the channel and the spatial filters, behind FilterNorm.
SCALES = 0.7, 0.4
EPS = 1e-10


@pytest.fixture
def device(device: str) -> str:
    require_compiled(device)
    return device


def make(
    batch=2, channels=16, size=(5, 8), k=3, groups=2, stride=1, floor=False, dtype=torch.float32,
    device="cpu", layout=contiguous,
) -> list[Tensor]:  # fmt: skip
    """[features, raw_channel, raw_spatial, channel_std, bias], drawn alike for all devices."""
    tensors = make_inputs(batch, channels, size, k, groups, stride, "both", floor, dtype, device)
    exact = dict(dtype=accumulate_dtype(dtype), device=device)
    std, bias = (torch.randn(n, dtype=torch.float64) for n in (channels * k * k, channels))
    return [*map(layout, tensors), std.to(**exact), bias.to(**exact)]


def run(tensors, relu=True, k=3, dilation=1, stride=1, combine="mul") -> Tensor:
    x, raw_channel, raw_spatial, std, bias = tensors
    return torch.ops.ddf_mm.ddf_pack(
        x, raw_channel, raw_spatial, std, *SCALES, EPS, bias, relu, k, dilation, stride,
        combine,
    )  # fmt: skip


def expected(tensors, relu, k, dilation, stride, combine) -> tuple[Tensor, Tensor]:
    """The output in float64, and the magnitude that its rounding errors are relative to."""
    x, raw_channel, raw_spatial, std, bias = [None if t is None else t.double() for t in tensors]
    channels, groups = x.shape[1], raw_spatial.shape[1] // k**2
    scale, spatial_scale = SCALES
    factor = scale * (x.new_ones(channels * k * k) if std is None else std)
    channel = filter_norm_reference(raw_channel.flatten(1), channels, factor, None, EPS)
    channel = channel.view(-1, channels, k, k)
    spatial = filter_norm_reference(raw_spatial, groups, spatial_scale, None, EPS)
    # A tap near the mean of its filter has the error of one that is far from it.
    sizes = x.abs(), channel.abs() + factor.abs().view(channels, k, k), spatial.abs() + scale
    want, terms = (
        ddf_reference(*values, k, dilation, stride, combine)
        for values in ((x, channel, spatial), sizes)
    )
    if bias is not None:
        want, terms = want + bias[:, None, None], terms + bias.abs()[:, None, None]
    return want.relu() if relu else want, terms


def check(tensors, k=3, dilation=1, stride=1, combine="mul", options=None) -> None:
    """With and without a parameter of FilterNorm, a bias and ReLU."""
    x, raw_channel, raw_spatial, std, bias = tensors
    for has_std, has_bias, relu in options or [(1, 1, 1), (1, 1, 0), (1, 0, 1), (0, 0, 0)]:
        given = [x, raw_channel, raw_spatial, std if has_std else None, bias if has_bias else None]
        got = run(given, bool(relu), k, dilation, stride, combine)
        want, terms = expected(given, relu, k, dilation, stride, combine)
        assert got.dtype == x.dtype and got.shape == want.shape
        assert got.is_contiguous(memory_format=layout_of(x))
        stored = torch.finfo(x.dtype)
        bound = (k * k + 12) * torch.finfo(accumulate_dtype(x.dtype)).eps / 2 * terms
        bound += 0.51 * stored.eps * want.abs() + stored.smallest_normal * stored.eps
        if x.is_cuda and x.dtype.itemsize == 2:
            # Where no kernel of the geometry normalizes the filters itself, they are rounded.
            bound += stored.eps * terms
        error = (got.double() - want).abs()
        assert (error <= bound).all(), f"off by {(error / bound).max():.3g} of what it may be"


GEOMETRIES = [
    dict(k=3),
    dict(k=3, stride=2),
    dict(k=5),
    dict(k=7),
    dict(k=3, dilation=2),
    dict(k=5, stride=3, dilation=2),
    dict(k=9),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("layout", LAYOUTS, **by_name)
@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda c: "-".join(map(str, c.values())))
def test_equals_the_ops_one_after_the_other(case, layout, dtype, device):
    k, dilation, stride = case["k"], case.get("dilation", 1), case.get("stride", 1)
    cases = [(24, 2, (9, 17)), (22, 1, (4, 3)), (22, 2, (8, 16))]
    for (channels, groups, size), combine in itertools.product(cases, COMBINES):
        tensors = make(2, channels, size, k, groups, stride, False, dtype, device, layout)
        check(tensors, k, dilation, stride, combine)


@pytest.mark.any_torch
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("layout", DENSE, **by_name)
@pytest.mark.parametrize("k, stride", [(3, 1), (3, 2), (5, 1)])
def test_every_width(k, stride, layout, dtype, device):
    for width in range(1, 41):
        tensors = make(1, 8, (3, width), k, 1, stride, False, dtype, device, layout)
        check(tensors, k, 1, stride, options=[(1, 1, 1)])


@pytest.mark.any_torch
@pytest.mark.parametrize("channels, size", [(3, (70, 90)), (520, (4, 6)), (64, (33, 31))])
@pytest.mark.parametrize("layout", DENSE, **by_name)
@pytest.mark.parametrize("k, stride", [(3, 1), (3, 2), (5, 1)])
def test_many_channels_and_pixels(k, stride, layout, channels, size, device):
    tensors = make(2, channels, size, k, 1, stride, device=device, layout=layout)
    check(tensors, k, 1, stride, options=[(1, 1, 1)])


def test_size_rounded_down(device):
    check(make(size=(7, 9), stride=2, floor=True, device=device), stride=2)


def test_filters_of_another_layout_than_the_features(device):
    for k, dilation in ((3, 1), (5, 1), (3, 2)):
        for ours, theirs in itertools.permutations(LAYOUTS[:3], 2):
            x, *filters = make(k=k, device=device, layout=ours)[:3]
            others = make(k=k, device=device)[3:]
            check([x, *map(theirs, filters), *others], k, dilation)


@pytest.mark.parametrize("layout", DENSE, **by_name)
@pytest.mark.parametrize("k, dilation", [(3, 1), (5, 1), (3, 2)])
def test_taps_without_deviation_are_zero(k, dilation, layout, device):
    x, raw_channel, raw_spatial, std, bias = make(k=k, device=device, layout=layout)
    raw_channel[:, 1], raw_spatial[0, : k * k, 0, 0] = 0.1, 0.3
    out = run([x, raw_channel, raw_spatial, std, bias], False, k, dilation)
    assert (out[:, 1] == bias[1]).all()
    assert torch.equal(out[0, :8, 0, 0], bias[:8])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("poisoned", [0, 1, 2, 4], ids=["features", "channel", "spatial", "bias"])
@pytest.mark.parametrize("layout", DENSE, **by_name)
@pytest.mark.parametrize("k, dilation", [(3, 1), (5, 1), (3, 2)])
def test_nan_and_inf_stay_where_they_are(k, dilation, layout, poisoned, value, device):
    for relu, combine in itertools.product([True, False], COMBINES):
        tensors = make(1, 8, (6, 8), k, device=device, layout=layout)
        tensors[poisoned][(0, 1, 0, 1) if poisoned < 3 else 1] = value
        got = run(tensors, relu, k, dilation, 1, combine)
        want, _ = expected(tensors, relu, k, dilation, 1, combine)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())


def test_only_the_batch_may_be_empty(device):
    tensors = make(batch=0, device=device)
    assert run(tensors).shape == tensors[0].shape
    for size in ((0, 4), (4, 0)):
        with pytest.raises(RuntimeError, match="at least one channel, row and column"):
            run(make(size=size, device=device))


def test_bad_arguments_are_refused(device):
    x, raw_channel, raw_spatial, std, bias = make(device=device)
    wrong = [
        ([x, raw_channel[:, 1:], raw_spatial, std, bias], "channel_filter must have size 16"),
        ([x, raw_channel, raw_spatial[:, 1:], std, bias], "spatial_filter has 17 channels"),
        ([x, raw_channel, raw_spatial[:, :, 1:], std, bias], "spatial_filter has 4 rows"),
        ([x, raw_channel.double(), raw_spatial, std, bias], "must have the dtype of features"),
        ([x, raw_channel, raw_spatial, std[1:], bias], "channel_std must have one dimension of"),
        ([x, raw_channel, raw_spatial, std, bias[1:]], "bias must have one dimension of 16"),
        ([x, raw_channel, raw_spatial, std.double(), bias], "channel_std must be float64 if"),
        (
            [x, raw_channel, raw_spatial, std, bias.to(x.dtype).half()],
            "bias must be float64 if features",
        ),
    ]
    for tensors, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            run(tensors)
    one_tap = make(k=1, device=device)
    with pytest.raises(RuntimeError, match="kernel_size must be at least 3, got 1"):
        run(one_tap, k=1)


@pytest.mark.cuda
@pytest.mark.parametrize("layout", DENSE, **by_name)
@pytest.mark.parametrize(
    "k, dilation, stride", [(3, 1, 1), (3, 1, 2), (5, 1, 1), (7, 1, 1), (3, 2, 1)]
)
def test_small_cases_of_every_kernel(k, dilation, stride, layout):
    """Run under compute-sanitizer."""
    require_compiled("cuda")
    for size, dtype, combine in itertools.product([(5, 8), (4, 7)], DTYPES, COMBINES):
        tensors = make(1, 16, size, k, 2, stride, False, dtype, "cuda", layout)
        check(tensors, k, dilation, stride, combine)


@pytest.mark.cuda
@pytest.mark.gpu
@pytest.mark.parametrize("layout", DENSE, **by_name)
@pytest.mark.parametrize("dilation", [1, 2])
def test_side_stream(dilation, layout):
    """The kernels run after what is before them in the current stream, and their scratch lives."""
    require_compiled("cuda")
    tensors = make(4, 64, (40, 40), device="cuda", layout=layout)
    want = run(tensors, dilation=dilation)
    late = [torch.zeros_like(t) for t in tensors]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for t, value in zip(late, tensors, strict=True):
            t.copy_(value)
        got = run(late, dilation=dilation)
        # Would overwrite scratch memory that was freed too early.
        torch.full((1 << 22,), float("nan"), device="cuda")
    side.synchronize()
    assert torch.equal(got, want)


@pytest.mark.cuda
@pytest.mark.gpu
@pytest.mark.parametrize("layout", DENSE, **by_name)
@pytest.mark.parametrize("dilation", [1, 2])
def test_graph_capture(dilation, layout):
    require_compiled("cuda")
    fixed = make(2, 32, (12, 16), device="cuda", layout=layout)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(fixed, dilation=dilation)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(fixed, dilation=dilation)
    for _ in range(2):
        others = make(2, 32, (12, 16), device="cuda", layout=layout)
        for t, value in zip(fixed, others, strict=True):
            t.copy_(value)
        graph.replay()
        assert torch.equal(captured, run(others, dilation=dilation))


@pytest.mark.parametrize("layout", DENSE, **by_name)
def test_any_number_of_threads_gives_the_same_bits(layout):
    require_compiled("cpu")
    tensors = make(3, 33, (13, 18), groups=3, layout=layout)
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(run(tensors))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
