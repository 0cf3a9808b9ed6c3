"""Emulated CUDA devices for tests: tensors in host memory whose device is ``cuda``.

PyTorch's operators compute on them as on CPU tensors; those of ``ddf_mm`` run ``csrc/cuda/ops.cu``
and its kernels, compiled for the host. So all Python code that uses the ops (autograd, autocast,
layers) takes its CUDA branch. There are two devices; PyTorch's streams, graphs and generators are
not emulated.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

DEVICES = 2
# Number of allocations that succeed before the memory is exhausted; None: all.
memory_for: int | None = None
library: ctypes.CDLL
# During a call of an op's kernel.
_is_inside = False
# During an explicit copy between devices. PyTorch's C++ code also passes a device to _to_copy: the
# CPU, on which it believes emulated tensors to be.
_is_moving = False


class EmulatedTensor(Tensor):
    """A tensor of device ``cuda:index`` whose values are those of a CPU tensor.

    PyTorch's C++ code treats it as a CPU tensor and dispatches its operators to this class.
    """

    @staticmethod
    def __new__(cls, values: Tensor, index: int) -> EmulatedTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=values.device,
        )
        made.memory, made.index = values, index
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cpu = False
    is_cuda = True

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        index = next(t.index for t in given if isinstance(t, EmulatedTensor))
        if op.namespace == "ddf_mm":
            result = _run_op(op, args, kwargs, given)
        else:
            if op is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
                device = torch.device(kwargs["device"])
                if device.type == "cuda":
                    index = device.index or 0
                    kwargs["device"] = "cpu"
                elif _is_moving or device.type != "cpu":
                    index = None
            result = op(*tree_map(_memory, args), **tree_map(_memory, kwargs))
        # In-place operators return their argument.
        same = {id(_memory(t)): t for t in given}

        def emulated(value):
            if not isinstance(value, Tensor) or index is None:
                return value
            return same[id(value)] if id(value) in same else EmulatedTensor(value, index)

        return tree_map(emulated, result)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"EmulatedTensor({self.memory!r}, device='{self.device}')"


def _memory(x):
    return x.memory if isinstance(x, EmulatedTensor) else x


def _run_op(op, args, kwargs, given):
    """Runs the CUDA kernel of an op of ``ddf_mm``."""
    global _is_inside
    library.ddf_host_begin()
    for t in given:
        index = t.index if isinstance(t, EmulatedTensor) else -1
        library.ddf_host_place(_memory(t).data_ptr(), index)
    completed, _is_inside = False, True
    try:
        result = op._op_dk(
            torch._C.DispatchKey.CUDA, *tree_map(_memory, args), **tree_map(_memory, kwargs)
        )
        completed = True
    finally:
        _is_inside = False
        fault = library.ddf_host_end(completed).decode()
        if fault:
            raise RuntimeError(f"error of the op on the host: {fault}")
    return result


def _allocated(values: Tensor, device) -> Tensor:
    global memory_for
    if memory_for is not None:
        if memory_for == 0:
            mib = values.nbytes / 2**20
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {mib:.2f} MiB.")
        memory_for -= 1
    # ops.cu gets the host tensor; the library knows its device.
    return values if _is_inside else EmulatedTensor(values, torch.device(device).index or 0)


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    memory_format = memory_format or torch.contiguous_format
    return _allocated(torch.empty(size, dtype=dtype, memory_format=memory_format), device)


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return _allocated(torch.empty_strided(size, stride, dtype=dtype), device)


_to_of_torch = Tensor.to


def _to(self, *args, **kwargs) -> Tensor:
    """``Tensor.to`` with support for the emulated devices."""
    global _is_moving
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    device = self.device if device is None else _with_index(device)
    dtype = self.dtype if dtype is None else dtype
    if device == self.device:
        kept = dict(memory_format=memory_format, copy=kwargs.get("copy", False))
        return _to_of_torch(self, dtype, **kept)
    _is_moving = True
    try:
        options = dict(dtype=dtype, device=device, memory_format=memory_format)
        return torch.ops.aten._to_copy(self, **options)
    finally:
        _is_moving = False


def _with_index(device) -> torch.device:
    device = torch.device(device)
    return torch.device("cuda", 0) if device == torch.device("cuda") else device


def _by_copy(factory):
    """Wraps a factory that does not allocate by ``empty``: the tensor is copied to the device."""

    @functools.wraps(factory)
    def made(*args, device=None, **kwargs):
        if device is None or torch.device(device).type != "cuda":
            return factory(*args, **kwargs, device=device)
        requires_grad = kwargs.pop("requires_grad", False)
        return factory(*args, **kwargs).to(device).requires_grad_(requires_grad)

    return made


class _Autocast(torch.amp.autocast_mode.autocast):
    """Autocast for ``cuda`` that also enables the CPU's, which C++ applies to emulated tensors."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__(device_type, *args, **kwargs)
        self._of_cpu = None
        if device_type == "cuda":
            self._of_cpu = torch.amp.autocast_mode.autocast(
                "cpu", self.fast_dtype, enabled=self._enabled
            )

    def __enter__(self):
        if self._of_cpu:
            self._of_cpu.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        if self._of_cpu:
            self._of_cpu.__exit__(*exception)


class Driver:
    """``cuda.bindings.driver`` of a library that was built without kernels."""

    @staticmethod
    def cuGetProcAddress(symbol, version, flags):
        assert symbol == b"cuLaunchKernel"
        return 0, ctypes.cast(library.ddf_host_launch, ctypes.c_void_p).value, 0

    @staticmethod
    def cuLibraryLoadData(code, *options):
        return 0, code

    @staticmethod
    def cuLibraryGetKernel(loaded, symbol):
        found = library.ddf_host_kernel
        found.restype = ctypes.c_void_p
        kernel = found(symbol)
        assert kernel, f"no kernel {symbol.decode()}"
        return 0, kernel

    @staticmethod
    def cuDeviceGet(index):
        return 0, index

    @staticmethod
    def cuDevicePrimaryCtxRetain(device):
        return 0, device

    @staticmethod
    def cuCtxSetCurrent(context):
        library.ddf_host_set_kernel_error(context, 0)
        return (0,)


def install(path: Path) -> None:
    """Emulates the devices in this process, with the library of the ops in ``path``."""
    global library, _registered
    from ddf_mm.layers import pack, unmodified
    from ddf_mm.ops import library as ops
    from ddf_mm.ops import nvrtc

    # The library has the kernels, by the names that are compiled.
    nvrtc._nvrtc = lambda: None
    nvrtc.architecture_for = lambda major, minor: 10 * major + minor
    nvrtc.cached_kernel = lambda name, arch: nvrtc.Binary(name.encode(), b"")

    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    ops._cuda = library
    library.ddf_host_place.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.ddf_host_end.argtypes = [ctypes.c_bool]
    library.ddf_host_end.restype = library.ddf_host_launches.restype = ctypes.c_char_p
    ops._kernels = nvrtc.Kernels(library, Driver)
    ops.COMPILED, ops._WHY = ops.COMPILED | {"cuda"}, ""
    ops.COMPILABLE = ("cpu", "cuda")
    # These modules test whether a tensor is of exactly this class.
    unmodified.Tensor = pack.Tensor = EmulatedTensor

    Tensor.to = _to
    Tensor.cpu = lambda self, *_, **__: self.to("cpu")
    Tensor.cuda = lambda self, device=0, *_, **__: self.to(torch.device("cuda", device))
    torch.autocast = torch.amp.autocast = _Autocast
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = lambda: True
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.device_count = lambda: DEVICES
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (7, 5)
    torch.cuda.get_device_name = lambda device=None: "emulated"
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    # Autograd would create undefined gradients on the CPU.
    for name in ("gradcheck", "gradgradcheck"):
        checked = functools.partial(getattr(torch.autograd, name), check_undefined_grad=False)
        setattr(torch.autograd, name, checked)
    for name in ("arange", "as_tensor", "eye", "linspace", "randperm", "tensor"):
        setattr(torch, name, _by_copy(getattr(torch, name)))
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _registered = torch.library.Library("aten", "IMPL")
    _registered.impl("empty.memory_format", _empty, "CUDA", allow_override=True)
    _registered.impl("empty_strided", _empty_strided, "CUDA", allow_override=True)
