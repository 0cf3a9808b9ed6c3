"""Direct calls of torch.ops.ddf_mm, as exported programs make them: right, or a clear error.

The fake kernels refuse the same calls, and return the same shapes and strides.
"""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from ddf_cases import require_compiled
from torch._subclasses import FakeTensorMode

from ddf_mm.ops import ddf_reference, ddf_up_reference
from ddf_mm.ops.reference import (
    ddf_up_valid_reference,
    ddf_valid_reference,
    filter_norm_reference,
)

ABSURD = [0, -1, 2, 2**31 - 1, 2**31, 2**62 + 1, 2**63 - 1, -(2**63)]
ONLY_CPU = (
    "ddf_softmax", "ddf_valid", "ddf_valid_backward", "ddf_up_valid", "ddf_up_valid_backward"
)  # fmt: skip
NEEDS = list(itertools.product((False, True), repeat=3))


@pytest.fixture(autouse=True)
def compiled(request: pytest.FixtureRequest):
    uses_device = "device" in request.fixturenames
    require_compiled(request.getfixturevalue("device") if uses_device else "cpu")


def good_calls(device: str = "cpu", batch: int = 2) -> dict[str, dict]:
    """Arguments of a good call of each op that ``device`` has."""

    def random(*shape):
        return torch.randn(batch, *shape)

    ddf = dict(
        features=random(4, 5, 6),
        channel_filter=random(4, 3, 3),
        spatial_filter=random(18, 3, 3),
        kernel_size=3,
        dilation=1,
        stride=2,
        kernel_combine="mul",
    )
    valid = dict(ddf, spatial_filter=random(18, 2, 2))
    up = dict(
        features=random(4, 3, 4),
        channel_filter=random(4, 4, 3, 3),
        spatial_filter=random(4, 18, 3, 4),
        kernel_size=3,
        scale_factor=2,
        dilation=1,
        kernel_combine="mul",
    )
    up_valid = dict(up, features=random(4, 5, 6))
    norm = dict(x=random(18, 3, 4), filters=2, std=torch.rand(18))
    needs = dict(need_features=True, need_channel=True, need_spatial=True)
    calls = dict(
        ddf=ddf,
        ddf_backward=dict(grad=random(4, 3, 3), **ddf, **needs),
        ddf_valid=valid,
        ddf_valid_backward=dict(grad=random(4, 2, 2), **valid, **needs),
        ddf_up=up,
        ddf_softmax=dict(
            features=random(4, 3, 4), logits=random(4, 18, 3, 4), kernel_size=3, scale_factor=2
        ),
        ddf_up_backward=dict(grad=random(4, 6, 8), **up, **needs),
        ddf_up_valid=up_valid,
        ddf_up_valid_backward=dict(grad=random(4, 6, 8), **up_valid, **needs),
        ddf_pack=dict(
            features=random(4, 5, 6),
            raw_channel=random(4, 3, 3),
            raw_spatial=random(9, 5, 6),
            channel_std=torch.rand(36),
            channel_scale=1.0,
            spatial_scale=0.5,
            eps=1e-10,
            bias=torch.randn(4),
            relu=True,
            kernel_size=3,
            dilation=1,
            stride=1,
            kernel_combine="mul",
        ),
        filter_norm=dict(**norm, mean=torch.randn(18), scale=1.5, eps=1e-10),
        filter_norm_backward=dict(
            grad=random(18, 3, 4),
            **norm,
            scale=1.5,
            eps=1e-10,
            need_x=True,
            need_std=True,
            need_mean=True,
        ),
    )
    return {
        name: {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        for name, call in calls.items()
        if device == "cpu" or name not in ONLY_CPU
    }


def formula(name: str, call: dict) -> list[torch.Tensor]:
    """What the op ``name`` is to return, in float64."""
    call = {k: v.double().cpu() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    references = dict(
        ddf=ddf_reference,
        ddf_valid=ddf_valid_reference,
        ddf_up=ddf_up_reference,
        ddf_up_valid=ddf_up_valid_reference,
    )
    if name in references:
        return [references[name](*call.values())]
    if name == "ddf_softmax":
        x, logits, k, s = call.values()
        weights = logits.unflatten(2, (-1, k * k)).softmax(3).flatten(2, 3)
        return [ddf_up_reference(x, None, weights, k, s)]
    if name == "filter_norm":
        std = call["scale"] if call["std"] is None else call["scale"] * call["std"]
        return [filter_norm_reference(call["x"], call["filters"], std, call["mean"], call["eps"])]
    if name.endswith("_backward"):
        grad, needed = call.pop("grad"), [v for k, v in call.items() if k.startswith("need_")]
        call = {k: v for k, v in call.items() if not k.startswith("need_")}
        if name == "filter_norm_backward":
            scale, eps, total = call.pop("scale"), call.pop("eps"), call["x"].shape[1]
            shift = torch.zeros(total, dtype=torch.float64)
            factor = torch.ones(total, dtype=torch.float64)
            # The gradient of std is scaled, whether a std is given or not.
            call = dict(x=call["x"], filters=call["filters"], std=call["std"], mean=shift)
            call["std"] = factor if call["std"] is None else call["std"]
            call.update(scale=scale, eps=eps)
        of = [v for v in call.values() if v is None or isinstance(v, torch.Tensor)]
        given = [t.requires_grad_() for t in of if t is not None]
        (out,) = formula(name.removesuffix("_backward"), call)
        # PyTorch has no gradient of the pixel shuffle of an empty batch.
        grads = iter(
            torch.autograd.grad(out, given, grad, allow_unused=True)
            if out.numel()
            else [torch.zeros_like(t) for t in given]
        )
        all_grads = [None if t is None else next(grads) for t in of]
        nothing = torch.zeros(0, dtype=torch.float64)
        return [
            nothing if t is None or not need else torch.zeros_like(t) if g is None else g
            for t, g, need in zip(of, all_grads, needed, strict=True)
        ]
    x = call["features"]
    taps = call["kernel_size"] ** 2
    channels, groups = x.shape[1], call["raw_spatial"].shape[1] // taps
    std = call["channel_scale"]
    std = std if call["channel_std"] is None else std * call["channel_std"]
    per_channel = filter_norm_reference(call["raw_channel"].flatten(1), channels, std)
    per_pixel = filter_norm_reference(call["raw_spatial"], groups, call["spatial_scale"])
    options = [call[k] for k in ("kernel_size", "dilation", "stride", "kernel_combine")]
    per_channel = per_channel.view_as(call["raw_channel"])
    out = ddf_reference(x, per_channel, per_pixel, *options)
    out = out if call["bias"] is None else out + call["bias"].view(1, -1, 1, 1)
    return [out.relu() if call["relu"] else out]


def listed(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def check(name: str, call: dict) -> bool:
    """Asserts that the op computes the right result or refuses the call, and its fake kernel does
    the same; returns whether there is a result."""
    op = getattr(torch.ops.ddf_mm, name)
    errors = (RuntimeError, ValueError, TypeError)
    try:
        got = listed(op(**call))
    except errors as error:
        refusal = str(error)
        got = None
    # Fake tensors have no limit of memory.
    if got is None and "larger than any memory" in refusal:
        return False
    assert got is not None or "API call failed" not in refusal
    with FakeTensorMode():
        fakes = {
            k: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
            if isinstance(v, torch.Tensor)
            else v
            for k, v in call.items()
        }
        try:
            fake = listed(op(**fakes))
        except errors:
            fake = None
    assert (got is None) == (fake is None), f"real {got is not None}, fake {fake is not None}"
    if got is None:
        return False
    for g, f in zip(got, fake, strict=True):
        assert (g.shape, g.stride(), g.dtype) == (f.shape, f.stride(), f.dtype)
    for g, want in zip(got, formula(name, call), strict=True):
        # Sums of up to 72 terms about as large as 1.
        tolerance = 1e-4 + 8 * torch.finfo(g.dtype).eps
        torch.testing.assert_close(g.double().cpu(), want, rtol=tolerance, atol=tolerance)
    return True


OPS = list(good_calls())


# The ops that each device has.
each_op = pytest.mark.parametrize(
    "name, device",
    [
        *((name, "cpu") for name in OPS),
        *(pytest.param(n, "cuda", marks=pytest.mark.cuda) for n in OPS if n not in ONLY_CPU),
    ],
)


@each_op
def test_a_good_call(name, device):
    assert check(name, good_calls(device)[name])


@each_op
def test_absurd_integers(name, device):
    call = good_calls(device)[name]
    served = 0
    for key, value in call.items():
        if isinstance(value, int) and not isinstance(value, bool):
            for absurd in ABSURD:
                served += check(name, {**call, key: absurd})
                # Without a filter that determines the output's size.
                if "spatial_filter" in call:
                    without = {**call, "spatial_filter": None, key: absurd}
                    if "grad" in call and key == "stride" and absurd > 2:
                        without["grad"] = call["grad"][..., :1, :1]
                    served += check(name, without)
    assert served or name in ("filter_norm", "filter_norm_backward")


def test_a_stride_beyond_the_features_leaves_one_window(device):
    call = good_calls(device)["ddf"]
    for stride in (6, 2**31, 2**63 - 1):
        assert check("ddf", {**call, "spatial_filter": None, "stride": stride})


def replacements(tensor: torch.Tensor):
    """Tensors most of which are wrong in place of ``tensor``."""
    yield None
    yield tensor.flatten()
    yield tensor[None]
    yield tensor[0]
    yield torch.tensor(1.0)
    yield tensor.to("meta")
    for dtype in (torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64):
        yield tensor.to(dtype)
    for dim, size in enumerate(tensor.shape):
        for other in (0, 1, size - 1, size + 1, 2 * size, 2**40):
            shape = list(tensor.shape)
            shape[dim] = other
            yield tensor.flatten()[:1].expand(shape)
    yield tensor.flatten()[:1].expand([2**9] * tensor.dim())


@each_op
def test_tensors_that_do_not_fit(name, device):
    call = good_calls(device)[name]
    for key, value in call.items():
        if isinstance(value, torch.Tensor):
            for other in replacements(value):
                check(name, {**call, key: other})


@each_op
def test_all_tensors_with_nothing_in_a_dimension(name, device):
    """Refused, except in the batch."""
    call = good_calls(device)[name]
    first = next(v for v in call.values() if isinstance(v, torch.Tensor))
    for dim in range(1, 4):
        empty = {
            k: v.narrow(dim - 4, 0, 0)
            if isinstance(v, torch.Tensor) and v.dim() >= 4 and v.shape[dim - 4] > 1
            else v
            for k, v in call.items()
        }
        check(name, empty)
        of_first = {k: v.narrow(dim, 0, 0) if v is first else v for k, v in call.items()}
        check(name, of_first)


@pytest.mark.parametrize("needed", NEEDS, ids=str)
@pytest.mark.parametrize(
    "name, device",
    [
        pytest.param(name, device, marks=[pytest.mark.cuda] if device == "cuda" else [])
        for name in OPS
        for device in ("cpu", "cuda")
        if name.endswith("backward") and not (device == "cuda" and name in ONLY_CPU)
    ],
)
def test_each_subset_of_gradients(name, needed, device):
    for batch in (0, 2):
        call = good_calls(device, batch)[name]
        keys = [k for k in call if k.startswith("need_")]
        call.update(zip(keys, needed, strict=True))
        assert check(name, call)
        for absent in ("channel_filter", "spatial_filter", "std"):
            if absent in call:
                given = {**call, absent: None}
                # Without a std there is no gradient of one.
                if absent != "std" or not call["need_std"]:
                    assert check(name, given)


@each_op
def test_an_empty_batch(name, device):
    assert check(name, good_calls(device, 0)[name])


@each_op
def test_tensors_of_any_strides(name, device):
    call = good_calls(device)[name]
    for key, value in call.items():
        if not isinstance(value, torch.Tensor):
            continue
        wide = torch.stack([value, value], -1)[..., 0]
        layouts = [wide, value[..., :1].expand_as(value), value.flip(-1)]
        if value.dim() > 1:
            layouts.append(value.transpose(-1, -2).contiguous().transpose(-1, -2))
        if value.dim() == 4:
            layouts.append(value.contiguous(memory_format=torch.channels_last))
        # Strides of dimensions of one element mean nothing.
        one = value[:1]
        strides = (2**40, *value.stride()[1:])
        if one.numel() == value.numel():
            layouts.append(value.as_strided(value.shape, strides))
        for other in layouts:
            assert check(name, {**call, key: other})


def test_sizes_beyond_memory(device):
    one, pixel = torch.ones(1, device=device), torch.ones(1, 1, 1, 1, device=device)
    huge = one.expand(1, 1, 2**31, 2**31)
    filters = torch.ones(1, 1, 3, 3, device=device)
    calls = [
        ("ddf", (huge, filters, None, 3, 1, 1, "mul")),
        ("ddf", (huge, filters, None, 3, 2**63 - 1, 2**63 - 1, "mul")),
        ("ddf", (one.expand(0, 1, 2**40, 2**40), filters[:0], None, 3, 1, 1, "mul")),
        ("ddf", (one.expand(1, 1, 1, 2**40), filters, None, 3, 2**40, 1, "mul")),
        (
            "ddf",
            (pixel, None, one.expand(1, 2**62 - 2**32 + 1, 1, 1), 2**31 - 1, 1, 1, "mul"),
        ),
        ("ddf_up", (pixel, one.expand(1, 2**60, 1, 1, 1), None, 1, 2**30, 1, "mul")),
        ("filter_norm", (one.expand(0, 2**40, 2**40), 2, None, None, 1.0, 0.0)),
    ]
    for name, args in calls:
        if device != "cpu" and name in ONLY_CPU:
            continue
        with pytest.raises(RuntimeError, match="larger than any memory"):
            getattr(torch.ops.ddf_mm, name)(*args)


# In a process with little address space: what PyTorch says of an allocation of the same size, what
# the op says, and what it says where only its intermediate results find no room.
OUT_OF_MEMORY = """
import resource, torch, ddf_mm.ops
op = torch.ops.ddf_mm
torch.set_num_threads(1)
x, c = torch.zeros(1, 16, 1024, 1024), torch.zeros(1, 16, 3, 3)
sums = torch.zeros(1, 1, 1, 1 << 15)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
def message(function):
    try:
        function()
    except RuntimeError as error:
        return type(error).__name__ + " " + str(error).splitlines()[0]
op.ddf(x[..., :8, :8], c, None, 3, 1, 1, "mul")
resource.setrlimit(resource.RLIMIT_AS, (used + (48 << 20),) * 2)
print(message(lambda: torch.empty(1 << 26, dtype=torch.uint8)))
print(message(lambda: op.ddf(x, c, None, 3, 1, 1, "mul")))
print(message(lambda: op.ddf(x.requires_grad_(), c, None, 3, 1, 1, "mul")))
print(message(lambda: op.ddf(sums, c[:, :1], None, 3, 1 << 15, 1, "mul")))
"""


@pytest.mark.slow
def test_out_of_memory():
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    result = subprocess.run(command, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    want, got, with_autograd, intermediate = result.stdout.splitlines()
    assert "can't allocate memory: you tried to allocate 67108864 bytes" in want
    assert got == with_autograd == want
    assert "can't allocate memory for intermediate results" in intermediate
