"""Tests that need emulated devices: which device, stream and memory ops.cu uses.

Run by test_ops_on_host.py, in a process with such devices.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from cuda_host import emulated
from ops.test_direct_calls import ONLY_CPU, good_calls
from torch.utils.flop_counter import FlopCounterMode

from ddf_mm.layers import DDFPack, DDFUpPack
from ddf_mm.ops import (
    backend_info,
    ddf,
    ddf_reference,
    ddf_up,
    filter_norm,
    library,
    nvrtc,
    self_check,
)

pytestmark = pytest.mark.cuda
OPS = [name for name in good_calls() if name not in ONLY_CPU]
# Whether the library was built without kernels, and finds them by name.
BY_NAME = library.library_by_name() is not None
SERVED = "compiled on this machine" if BY_NAME else "compiled"
only_ahead = pytest.mark.skipif(BY_NAME, reason="not of this library: it has no kernels")
needs_names = pytest.mark.skipif(not BY_NAME, reason="not of this library: it has its kernels")
NO_IMAGE = 209  # cudaErrorNoKernelImageForDevice
INVALID_IMAGE = 200  # CUDA_ERROR_INVALID_IMAGE
NO_MEMORY = 2  # cudaErrorMemoryAllocation
NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


def call(name: str, arguments: dict):
    return getattr(torch.ops.ddf_mm, name)(**arguments)


def launches() -> set[str]:
    """``"device:stream"`` of all launches of the last op."""
    return set(emulated.library.ddf_host_launches().decode().split())


@pytest.mark.parametrize("name", OPS)
def test_ops_use_the_device_of_their_tensors_and_its_current_stream(name):
    """The library rejects memory and streams of another device than the current one, and ops that
    do not restore the previous current device."""
    for device, stream in ((0, 0), (1, 0), (1, 1)):
        emulated.library.ddf_host_set_stream(device, stream)
        try:
            call(name, good_calls(f"cuda:{device}")[name])
        finally:
            emulated.library.ddf_host_set_stream(device, 0)
        assert launches() == {f"{device}:{stream}"}


@pytest.mark.parametrize("name", OPS)
def test_tensors_of_several_devices_are_refused(name):
    arguments = good_calls("cuda:0")[name]
    tensors = [key for key, value in arguments.items() if isinstance(value, torch.Tensor)]
    for key in tensors:
        for device in ("cuda:1", "cpu"):
            with pytest.raises(RuntimeError, match="must be on the device of (features|x)"):
                call(name, {**arguments, key: arguments[key].to(device)})


@pytest.mark.parametrize("name", OPS)
def test_out_of_memory_keeps_its_type_and_text(name, monkeypatch):
    """For each allocation of the op that may fail."""
    arguments = good_calls("cuda:1")[name]
    monkeypatch.setattr(emulated, "memory_for", 100)
    call(name, arguments)
    allocations = 100 - emulated.memory_for
    # At least the results are allocated.
    assert allocations >= (3 if name.endswith("backward") else 1)
    for possible in range(allocations):
        emulated.memory_for = possible
        with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory. Tried to allocate"):
            call(name, arguments)


def test_layers_train_on_another_device_than_the_current_one():
    for layer in (DDFPack(16, head=2), DDFUpPack(16)):
        layer = layer.to("cuda:1")
        x = torch.randn(2, 16, 7, 8, device="cuda:1", requires_grad=True)
        layer(x).square().sum().backward()
        assert launches() == {"1:0"}
        assert x.grad.device == torch.device("cuda", 1)
        assert all(p.grad.device == torch.device("cuda", 1) for p in layer.parameters())


def ask_again():
    """Forgets which devices run the kernels."""
    library._runs_on_device.clear()
    library._reasons.clear()
    for known in (self_check._passed, self_check._calls, self_check._failures):
        known.clear()
    library._kernels.failures.clear()


@pytest.fixture
def without_kernels():
    """The kernels are not compiled for device 1."""
    emulated.library.ddf_host_set_kernel_error(1, INVALID_IMAGE if BY_NAME else NO_IMAGE)
    ask_again()
    yield
    emulated.library.ddf_host_set_kernel_error(1, 0)
    ask_again()
    # Also tells the library whether the device finds kernels by name.
    assert library._why_not_ahead(1) == ""


@only_ahead
def test_a_device_without_kernels_compiled_ahead_finds_them_by_name(without_kernels, monkeypatch):
    tensors = [torch.randn(2, *shape) for shape in ((4, 5, 6), (4, 3, 3), (9, 5, 6))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = ddf(*(t.to("cuda:1") for t in tensors))
    assert launches() == {"1:0"}
    assert library._kernels.failures == {}
    torch.testing.assert_close(got.cpu(), ddf_reference(*tensors))
    assert backend_info() == {"cpu": "compiled", "cuda": "compiled", "default": "reference"}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    info = backend_info()
    assert info["cuda"] == "compiled on this machine"
    assert "cannot run the kernels that were compiled ahead (no kernel image" in info["why"]
    assert "set TORCH_CUDA_ARCH_LIST=7.5 and reinstall" in info["why"]


def test_a_device_without_kernels_has_the_formula_and_one_warning(without_kernels, monkeypatch):
    if not BY_NAME:
        forget_kernels()
        monkeypatch.setattr(nvrtc, "cached_kernel", compiles_no(""))
    tensors = [torch.randn(2, *shape) for shape in ((4, 5, 6), (4, 3, 3), (9, 5, 6))]
    there = [t.to("cuda:1").requires_grad_() for t in tensors]
    with pytest.warns(RuntimeWarning, match="no compiled ops for cuda:1") as caught:
        got = ddf(*there)
    assert "compute capability 7.5" in str(caught[0].message)
    helps = (
        "error 200 of CUDA's driver" if BY_NAME else "set TORCH_CUDA_ARCH_LIST=7.5 and reinstall"
    )
    assert helps in str(caught[0].message)
    assert BY_NAME or "(no ddf::cuda::forward_3x3<" in str(caught[0].message)
    assert caught[0].filename == __file__
    torch.testing.assert_close(got.cpu(), ddf_reference(*tensors))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddf(*there).sum().backward()
        layer = DDFPack(4).to("cuda:1")
        layer(there[0]).sum().backward()
        ddf(*(t.to("cuda:0") for t in tensors))
    assert launches() == {"0:0"}
    assert backend_info()["cuda"] == SERVED
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    info = backend_info()
    assert info["cuda"] == "reference" and helps in info["why"]
    # A direct call of the op.
    with pytest.raises(RuntimeError, match="did not start: (it was not compiled|error 200)"):
        call("ddf", good_calls("cuda:1")["ddf"])


@pytest.fixture
def unchecked():
    """No device has run an op."""
    ask_again()
    # A library by name would refuse devices where ddf fails.
    library._reasons.update(dict.fromkeys(range(emulated.DEVICES), ""))
    yield
    ask_again()


def a_zero(tensor: torch.Tensor) -> None:
    """One element of the last tile, as if a bound were wrong."""
    tensor.flatten()[-1] = 0


def a_nan(tensor: torch.Tensor) -> None:
    tensor[:] = float("nan")


def plant(monkeypatch: pytest.MonkeyPatch, op: str, fault) -> list[str]:
    """Makes the device compute wrong results by an op; returns the list of its calls."""
    right, calls = emulated._run_op, []

    def wrong(called, *arguments):
        results = right(called, *arguments)
        if called._opname == op:
            calls.append(op)
            for result in [results] if isinstance(results, torch.Tensor) else results:
                if result.numel():
                    fault(result)
        return results

    monkeypatch.setattr(emulated, "_run_op", wrong)
    return calls


def pack(features, raw_channel, raw_spatial):
    """Of features of 8 channels, by the filters of a DDFPack."""
    torch.manual_seed(0)
    layer = DDFPack(8).to(features.device)
    norms = layer.channel_branch[-1], layer.spatial_branch[-1]
    flat = raw_channel.flatten(1)[:, :, None, None]
    return layer._filter_by_raw(features, flat, raw_spatial, *norms)


def norm(x):
    return filter_norm(x, 2, "spatial")


SHAPES = [(2, 8, 6, 8), (2, 8, 3, 3), (2, 9, 6, 8)]
CHECKED = {
    "ddf": (ddf, SHAPES),
    "ddf_backward": (ddf, SHAPES),
    "ddf_up": (ddf_up, [SHAPES[0], (2, 4, 8, 3, 3), (2, 4, 9, 6, 8)]),
    "ddf_up_backward": (ddf_up, [SHAPES[0], (2, 4, 8, 3, 3), (2, 4, 9, 6, 8)]),
    "ddf_pack": (pack, SHAPES),
    "ddf_backward of ddf_pack": (pack, SHAPES),
    "filter_norm_backward of ddf_pack": (pack, SHAPES),
    "filter_norm": (norm, [(2, 18, 6, 8)]),
    "filter_norm_backward": (norm, [(2, 18, 6, 8)]),
}


@pytest.mark.parametrize("fault", [a_zero, a_nan])
@pytest.mark.parametrize("name", CHECKED)
def test_an_op_that_computes_wrong_results_is_replaced_by_the_formula(
    name, fault, unchecked, monkeypatch
):
    """Results and gradients are right, with one warning; other ops and devices keep theirs."""
    function, shapes = CHECKED[name]
    op = name.split(" ")[0]
    tensors = [torch.randn(shape) for shape in shapes]
    here = [t.clone().requires_grad_() for t in tensors]
    there = [t.to("cuda").requires_grad_() for t in tensors]
    calls = plant(monkeypatch, op, fault)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = function(*there)
        grads = torch.autograd.grad(got.square().sum(), there)
    (warning,) = [w for w in caught if w.category is RuntimeWarning]
    message = str(warning.message)
    assert warning.filename == __file__
    assert f"the compiled op {op} failed its check on cuda:0, emulated" in message
    assert "differ from those of the formula by" in message and "=float32[2, " in message
    assert len(calls) == 1
    expected = function(*here)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)
    for ours, of in zip(grads, torch.autograd.grad(expected.square().sum(), here), strict=True):
        torch.testing.assert_close(ours.cpu(), of, rtol=1e-3, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(*there).sum().backward()
    assert len(calls) == 1
    info = backend_info()
    assert info["cuda"] == SERVED and f"which failed their check: {op}: results" in info["why"]
    assert not self_check.failures(1)
    assert {failed for _, failed in self_check._failures} == {op}


@only_ahead
def test_so_is_an_op_whose_kernel_does_not_start(unchecked):
    tensors = [torch.randn(shape) for shape in SHAPES]
    emulated.library.ddf_host_set_kernel_error(0, NO_MEMORY)
    try:
        with pytest.warns(RuntimeWarning, match="the kernel did not start: an error of CUDA"):
            got = ddf(*(t.to("cuda") for t in tensors))
    finally:
        emulated.library.ddf_host_set_kernel_error(0, 0)
    torch.testing.assert_close(got.cpu(), ddf_reference(*tensors))


def test_calls_of_other_kernels_are_checked_and_the_same_ones_are_not(unchecked, monkeypatch):
    """By dtype, memory format, kernel size, stride and aligned sizes."""
    calls = plant(monkeypatch, "ddf", lambda result: None)

    def count(dtype=torch.float32, layout=torch.contiguous_format, channels=8, width=8, **options):
        k, stride = options.get("kernel_size", 3), options.get("stride", 1)
        out = -(-6 // stride), -(-width // stride)
        features = torch.randn(1, channels, 6, width).contiguous(memory_format=layout)
        tensors = features, torch.randn(1, channels, k, k), torch.randn(1, k * k, *out)
        before = len(calls)
        ddf(*(t.to(dtype).to("cuda") for t in tensors), **options)
        return len(calls) - before

    assert (count(), count(), count(width=12), count(channels=16)) == (2, 1, 1, 1)
    for other in (
        dict(dtype=torch.bfloat16),
        dict(layout=torch.channels_last),
        dict(width=7),
        dict(channels=6),
        dict(kernel_size=5),
        dict(stride=2),
        dict(dilation=2),
        dict(kernel_combine="add"),
    ):
        assert (count(**other), count(**other)) == (2, 1)


@pytest.mark.parametrize("shape", [(0, 18, 3, 4), (2, 18, 0, 4), (2, 18, 1, 1)], ids=str)
def test_calls_of_nothing_and_of_one_pixel_are_checked(shape, unchecked):
    assert norm(torch.zeros(shape, device="cuda")).shape == shape
    assert [key[1] for key in self_check._passed] == ["filter_norm"]


def test_the_check_can_be_turned_off(unchecked, monkeypatch):
    monkeypatch.setattr(self_check, "ENABLED", False)
    calls = plant(monkeypatch, "ddf", a_nan)
    got = ddf(*(torch.randn(shape).to("cuda") for shape in SHAPES))
    assert len(calls) == 1 and got.cpu().isnan().all()


def test_the_check_is_no_part_of_what_the_caller_does(unchecked):
    """It draws no random numbers, and is neither recorded nor cast."""
    tensors = [torch.randn(shape) for shape in SHAPES]
    state = torch.get_rng_state()
    with torch.autocast("cuda", torch.bfloat16), FlopCounterMode(display=False) as counter:
        ddf(*(t.to("cuda") for t in tensors))
    ((_, _, case),) = [key for key in self_check._passed if key[1] == "ddf"][-1:]
    assert case[0].dtype == torch.bfloat16
    assert torch.equal(torch.get_rng_state(), state)
    assert counter.get_total_flops() == 2 * math.prod(SHAPES[0]) * 9


@needs_names
def test_a_thread_without_a_context_gets_that_of_the_device():
    """As autograd's, which may have called nothing of CUDA's runtime: the first launch fails."""
    tensors = good_calls("cuda:1")["ddf"]
    expected = call("ddf", tensors)
    emulated.library.ddf_host_set_kernel_error(1, NO_CONTEXT)
    torch.testing.assert_close(call("ddf", tensors).cpu(), expected.cpu(), rtol=0, atol=0)


@needs_names
def test_memory_that_is_full_in_the_check_of_a_device_is_no_answer(monkeypatch):
    ask_again()
    tensors = [torch.randn(2, *shape, device="cuda") for shape in ((4, 5, 6), (4, 3, 3), (9, 5, 6))]
    monkeypatch.setattr(emulated, "memory_for", 0)
    with pytest.raises(torch.OutOfMemoryError):
        ddf(*tensors)
    monkeypatch.setattr(emulated, "memory_for", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddf(*tensors)
    assert backend_info()["cuda"] == SERVED


def forget_kernels():
    """Unloads all, as it is in a new process."""
    library._kernels = nvrtc.Kernels(emulated.library, emulated.Driver)


def check_warning(caught: list, kernel: str) -> None:
    (message,) = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert "no compiled ops for cuda:0" in message and f"no ddf::cuda::{kernel}" in message


def compiles_no(text: str):
    """In place of ``nvrtc.cached_kernel``."""
    before = nvrtc.cached_kernel

    def cached_kernel(name: str, arch: int) -> nvrtc.Binary:
        if text in name:
            raise nvrtc.NoKernel(f"no {name}")
        return before(name, arch)

    return cached_kernel


CALLS = {
    "ddf": ("forward_generic", ddf, [(2, 4, 5, 6), (2, 4, 3, 3), (2, 9, 5, 6)], ()),
    "backward of ddf": (
        "grad_channel_generic",
        ddf,
        [(2, 4, 5, 6), (2, 4, 3, 3), (2, 9, 5, 6)],
        (),
    ),
    "ddf_up": ("forward_generic", ddf_up, [(2, 4, 5, 6), (2, 4, 4, 3, 3), (2, 4, 9, 5, 6)], ()),
    "filter_norm": ("filter_norm_forward", filter_norm, [(2, 9, 5, 6)], (1, "spatial")),
    "backward of filter_norm": ("filter_norm_grad_x", filter_norm, [(2, 9, 5, 6)], (1, "spatial")),
}


@needs_names
@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_that_does_not_compile_ends_in_the_formula_and_one_warning(name, monkeypatch):
    kernel, function, shapes, options = CALLS[name]
    ask_again()
    forget_kernels()
    monkeypatch.setattr(nvrtc, "cached_kernel", compiles_no(kernel))
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    there = [t.to("cuda").requires_grad_() for t in tensors]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = function(*there, *options)
            grads = torch.autograd.grad(got.square().sum(), there)
        check_warning(caught, kernel)
        here = [t.requires_grad_() for t in tensors]
        expected = function(*here, *options)
        torch.testing.assert_close(got.cpu(), expected)
        for ours, of in zip(grads, torch.autograd.grad(expected.square().sum(), here), strict=True):
            torch.testing.assert_close(ours.cpu(), of)
        assert backend_info()["cuda"] == "reference"
    finally:
        ask_again()


@needs_names
def test_nor_does_a_layer_that_fuses_its_norms_fail(monkeypatch):
    ask_again()
    layer, x = DDFPack(8), torch.randn(2, 8, 6, 8)
    expected = layer(x)
    expected.square().sum().backward()
    there = DDFPack(8)
    there.load_state_dict(layer.state_dict())
    there = there.to("cuda")
    forget_kernels()
    # The check of a device needs one kernel.
    library._runs_on_device[0], library._reasons[0] = True, ""
    monkeypatch.setattr(nvrtc, "cached_kernel", compiles_no("forward_3x3<"))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = there(x.to("cuda"))
            got.square().sum().backward()
        check_warning(caught, "forward_3x3<")
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)
        for ours, of in zip(there.parameters(), layer.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.cpu(), of.grad, rtol=1e-3, atol=1e-4)
    finally:
        ask_again()
