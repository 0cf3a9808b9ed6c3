"""Tests that need emulated devices: which device, stream and memory ops.cu uses.

Run by test_ops_on_host.py, in a process with such devices.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from cuda_host import emulated
from ops.test_direct_calls import ONLY_CPU, good_calls

from ddf_mm.layers import DDFPack, DDFUpPack
from ddf_mm.ops import backend_info, ddf, ddf_reference, library

pytestmark = pytest.mark.cuda
OPS = [name for name in good_calls() if name not in ONLY_CPU]
NO_IMAGE = 209  # cudaErrorNoKernelImageForDevice
NO_MEMORY = 2  # cudaErrorMemoryAllocation


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


@pytest.fixture
def without_kernels():
    """The kernels are not compiled for device 1."""
    emulated.library.ddf_host_set_kernel_error(1, NO_IMAGE)
    library._runs_on_device.clear()
    yield
    emulated.library.ddf_host_set_kernel_error(1, 0)
    library._runs_on_device.clear()


def test_a_device_without_kernels_has_the_formula_and_one_warning(without_kernels, monkeypatch):
    tensors = [torch.randn(2, *shape) for shape in ((4, 5, 6), (4, 3, 3), (9, 5, 6))]
    there = [t.to("cuda:1").requires_grad_() for t in tensors]
    with pytest.warns(RuntimeWarning, match="no compiled ops for cuda:1") as caught:
        got = ddf(*there)
    assert "compute capability 7.5" in str(caught[0].message)
    assert "set TORCH_CUDA_ARCH_LIST=7.5 and reinstall" in str(caught[0].message)
    assert caught[0].filename == __file__
    torch.testing.assert_close(got.cpu(), ddf_reference(*tensors))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddf(*there).sum().backward()
        layer = DDFPack(4).to("cuda:1")
        layer(there[0]).sum().backward()
        ddf(*(t.to("cuda:0") for t in tensors))
    assert launches() == {"0:0"}
    assert backend_info()["cuda"] == "compiled"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    info = backend_info()
    assert info["cuda"] == "reference" and "TORCH_CUDA_ARCH_LIST=7.5" in info["why"]
    # A direct call of the op.
    with pytest.raises(RuntimeError, match="did not start: no kernel image is available"):
        call("ddf", good_calls("cuda:1")["ddf"])


def test_other_errors_are_left_to_the_call_that_meets_them():
    emulated.library.ddf_host_set_kernel_error(0, NO_MEMORY)
    library._runs_on_device.clear()
    try:
        with pytest.raises(RuntimeError, match="the kernel did not start: an error of CUDA"):
            ddf(*good_calls("cuda")["ddf"].values())
    finally:
        emulated.library.ddf_host_set_kernel_error(0, 0)
