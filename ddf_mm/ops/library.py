"""Loads the libraries of the compiled ops and decides which calls use them."""

from __future__ import annotations

import ctypes
import filecmp
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ddf_mm.ops import nvrtc

# Oldest torch with the stable ABI that the libraries are built against (see setup.py).
MIN_TORCH = (2, 10)
TORCH_IS_TOO_OLD = tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH
# Device types that can have compiled kernels. ROCm builds of torch, which also name their devices
# cuda, have no CUDA version.
COMPILABLE = ("cpu",) if torch.version.cuda is None else ("cpu", "cuda")
FORCED = os.environ.get("DDF_MM_FORCE_REFERENCE", "") not in ("", "0")
# Folders of code that a warning does not point at.
_PACKAGES = str(Path(__file__).parents[1]) + os.sep, str(Path(torch.__file__).parent) + os.sep
REINSTALL = (
    "reinstall ddf_mm with `pip install -v --no-build-isolation .` in its source folder, which "
    "prints what it compiles"
)


P = ParamSpec("P")
R = TypeVar("R")


class _Missing(Exception):
    """A library cannot be used; the message has the reason and a remedy."""


def _find(name: str, package: Path) -> Path | None:
    """The library ``<name>*.so`` in a package's folder."""
    # setuptools' suffixes of an extension module: .abi3.so and those of this Python version.
    found = (package / (name + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((path for path in found if path.is_file()), None)


def _package_with_libraries() -> Path:
    """The folder of this package or, if Python was started in a source folder without compiled
    libraries, that of the package that was installed from these sources.

    Raises:
        _Missing: the installed package was installed from other sources.
    """
    here = Path(__file__).resolve().parents[1]
    sources = here.parent / "csrc"
    if _find("_C", here) or not (sources.is_dir() and (here.parent / "setup.py").is_file()):
        return here
    for entry in sys.path:
        installed = Path(entry).resolve() / here.name
        library = _find("_C", installed)
        if installed == here or library is None:
            continue
        # The Python callers of the ops must be the same, and the library newer than the sources.
        callers = [
            path.relative_to(here) for of in ("ops", "layers") for path in here.glob(f"{of}/*.py")
        ]
        _, differing, missing = filecmp.cmpfiles(
            here, installed, [Path("version.py"), *callers], False
        )
        compiled = library.stat().st_mtime
        if differing or missing or any(f.stat().st_mtime > compiled for f in sources.rglob("*.*")):
            raise _Missing(
                f"Python imports the sources in {here.parent}, in which nothing is compiled, and "
                f"{installed} was installed from other sources: start Python in another folder, or "
                "install these, with `pip install -v --no-build-isolation .`"
            )
        return installed
    return here


def _load(name: str, package: Path, remedy: str) -> ctypes.CDLL:
    """Loads ``<package>/<name>*.so``.

    Raises:
        _Missing: it does not exist or does not load.
    """
    library = _find(name, package)
    if library is None:
        raise _Missing(f"this install has no ddf_mm/{name}*.so; {remedy}")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise _Missing(
            f"{library} does not load with torch {torch.__version__} "
            f"({error.__cause__ or error}); {REINSTALL}"
        ) from error
    return ctypes.CDLL(str(library))


def _load_all() -> tuple[frozenset[str], str]:
    """Device types with compiled kernels, and the reason if one that could have them has none."""
    global _cuda, _kernels
    compiled: set[str] = set()
    if FORCED:
        return frozenset(), "DDF_MM_FORCE_REFERENCE is set"
    try:
        if TORCH_IS_TOO_OLD:
            oldest = ".".join(map(str, MIN_TORCH))
            raise _Missing(f"torch {torch.__version__} is older than {oldest}; upgrade torch")
        package = _package_with_libraries()
        _load("_C", package, f"install a C++ compiler and ninja and {REINSTALL}")
        compiled.add("cpu")
        if "cuda" in COMPILABLE:
            _cuda = _load(
                "_C_cuda", package, f"install a CUDA {torch.version.cuda} toolkit and {REINSTALL}"
            )
            _kernels = nvrtc.Kernels(_cuda)
            if library_by_name() and not nvrtc.is_installed():
                raise _Missing(
                    "this install compiles its CUDA kernels when they are needed, by NVRTC and "
                    "cuda-bindings, which is not installed; pip install 'ddf-mm[cuda]'"
                )
            compiled.add("cuda")
    except _Missing as missing:
        return frozenset(compiled), str(missing)
    return frozenset(compiled), ""


def backend_info() -> dict[str, str]:
    """The implementation of :func:`ddf_mm.ops.ddf` that is used on each type of device.

    Returns:
        A dict from device type to ``'compiled'``, ``'compiled on this machine'`` (CUDA kernels that
        NVRTC compiles when they are needed) or ``'reference'`` (the formula in plain PyTorch).
        ``'default'`` is for all device types that are not listed; ``'cuda'`` is the current CUDA
        device. ``'why'`` has the reason, and a remedy if it is known, if a listed device type uses
        the reference, for all ops or for some, or a device does not run the kernels that were
        compiled ahead for other GPUs.
    """
    from ddf_mm.ops import self_check

    info = {name: "compiled" if name in COMPILED else "reference" for name in COMPILABLE}
    info["default"] = "reference"
    why = _WHY
    if "cuda" in COMPILED:
        why = ahead = failed = ""
        if torch.cuda.is_available():
            index = torch.cuda.current_device()
            why, ahead = _why_not_on(index), _why_not_ahead(index)
            if not why and (failures := self_check.failures(index)):
                failed = f"the formula is used for these ops, which failed their check: {failures}"
        served = "compiled on this machine" if ahead or library_by_name() else "compiled"
        info["cuda"] = "reference" if why else served
        why = why or "; ".join(filter(None, (failed, ahead)))
    return {**info, "why": why} if why else info


def _why_not_on(index: int) -> str:
    """Reason and remedy if a CUDA device cannot run the kernels of this install, neither those
    that were compiled ahead nor those that are compiled on this machine; otherwise ""."""
    ahead = _why_not_ahead(index)
    if not ahead and not library_by_name():
        return ""
    why = _why_not_compiled_for(index)
    return f"{why}; {ahead}" if why and ahead else why


def _why_not_ahead(index: int) -> str:
    """Reason and remedy if this install has kernels that were compiled ahead, but not for a CUDA
    device; otherwise "". If so, the library compiles kernels by name for this device."""
    if _cuda is None or library_by_name():
        return ""
    ask = _cuda.ddf_mm_why_not_on
    ask.restype = ctypes.c_char_p
    why = ask(index)
    _cuda.ddf_mm_set_by_name(index, why is not None)
    if why is None:
        return ""
    return (
        f"{described(index)} cannot run the kernels that were compiled ahead ({why.decode()}); "
        f"set TORCH_CUDA_ARCH_LIST={_capability(index)} and {REINSTALL}"
    )


def _capability(index: int) -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability(index))


def described(index: int) -> str:
    """A CUDA device, with a comma after it."""
    name = torch.cuda.get_device_name(index)
    return f"cuda:{index}, {name} of compute capability {_capability(index)},"


def cuda_library() -> ctypes.CDLL | None:
    """The library of the CUDA ops, if it is loaded."""
    return _cuda


def library_by_name() -> ctypes.CDLL | None:
    """The library of the CUDA ops if it was built without kernels, which NVRTC compiles."""
    return None if _cuda is None or hasattr(_cuda, "ddf_mm_why_not_on") else _cuda


def _why_not_compiled_for(index: int) -> str:
    """Why the kernels cannot be compiled for a CUDA device; "" if they can.

    A small call, computed once, and the later calls of kernels show whether they can.
    """
    if index not in _reasons:
        try:
            _check_against_formula(torch.device("cuda", index))
            _reasons[index] = ""
        except torch.OutOfMemoryError:
            raise  # as any call may
        except Exception as error:  # after any error the formula is used
            _reasons[index] = str(error).split("\n")[0]
    why = (_kernels.failures.get(index) if _kernels else None) or _reasons[index]
    return (
        f"{described(index)} does not run kernels compiled on this machine ({why})" if why else ""
    )


def _check_against_formula(device: torch.device) -> None:
    """Computes a small ddf by the compiled op.

    Raises:
        RuntimeError: that fails, or the result is not that of the formula.
    """
    from ddf_mm.ops import self_check

    features, channel_filter, spatial_filter = (
        torch.empty(shape, device="meta") for shape in ((2, 8, 9, 16), (2, 8, 3, 3), (2, 9, 9, 16))
    )
    self_check.check("ddf", device, features, channel_filter, spatial_filter, 3, 1, 1, "mul")


def kernel_is_missing(device: torch.device) -> bool:
    """Whether a kernel for a CUDA device could not be compiled on this machine."""
    return _kernels is not None and device.index in _kernels.failures


def _runs_on(device: torch.device) -> bool:
    """Whether a CUDA device can run the kernels of this install; warns once if not.

    Determined in the first call on a device: it needs a CUDA context, which an import must not
    create.
    """
    index = device.index
    if kernel_is_missing(device) and _runs_on_device.get(index):
        del _runs_on_device[index]
    if index not in _runs_on_device:
        return _determine_runs_on(index)
    return _runs_on_device[index]


# torch.compile calls this instead of tracing it: its graphs could not fall back on the formula.
@torch.compiler.assume_constant_result
def _determine_runs_on(index: int) -> bool:
    # torch.export records the op, for another machine.
    if torch.compiler.is_exporting() or not torch.cuda.is_available():
        return True
    # The check needs results, which there are none of in a capture.
    by_name = library_by_name() or _why_not_ahead(index)
    if by_name and index not in _reasons and torch.cuda.is_current_stream_capturing():
        return True
    why = _why_not_on(index)
    _runs_on_device[index] = not why
    if why:
        _warn_about(f"cuda:{index}", why)
    return not why


def serves(features: Tensor) -> bool:
    """Whether a call with ``features`` uses the compiled op.

    Under torch.func's transforms and forward-mode differentiation it does not: PyTorch rejects ops
    with a registered backward there, or drops their tangents silently; the formula supports both.
    Nor in torch.jit's tracer, whose graphs are used without ddf_mm, in ONNX and in C++.
    """
    device = features.device
    return (
        device.type in COMPILED
        and (device.type == "cpu" or _runs_on(device))
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and (_traces_ops or not torch.jit.is_tracing())
    )


def with_formula(function: Callable[P, R]) -> Callable[P, R]:
    """A function that calls :func:`serves`. If a kernel cannot be compiled in a call, the call is
    repeated, with the formula."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RuntimeError:
            if _kernels is None or not _kernels.failures:
                raise
        return function(*args, **kwargs)

    return call


@contextmanager
def traced_ops() -> Iterator[None]:
    """Makes torch.jit's tracer record compiled ops instead of the formula, to count their FLOPs."""
    global _traces_ops
    before, _traces_ops = _traces_ops, True
    try:
        yield
    finally:
        _traces_ops = before


def raise_failed_allocation(size: int, device: str, text: str) -> NoReturn:
    """Raises the error of allocating ``size`` bytes on ``device``.

    The libraries call it, because PyTorch's C interface reports a failed allocation without the
    reason.

    Raises:
        torch.OutOfMemoryError: from the allocation, or with ``text`` if it succeeds now.
    """
    torch.empty(size, dtype=torch.uint8, device=device)
    raise torch.OutOfMemoryError(text)


def warn_about_reference(device_type: str) -> None:
    """Warns, once per process, that ``device_type`` could have compiled ops but has none."""
    global _warned
    could_have = device_type in COMPILABLE and device_type not in COMPILED
    # Tracing through warnings.warn would break torch.compile's graph.
    if FORCED or _warned or not could_have or torch.compiler.is_compiling():
        return
    _warned = True
    _warn_about(device_type, _WHY)


def _warn_about(device: str, why: str) -> None:
    warn(
        f"ddf_mm: no compiled ops for {device}, so the several times slower formula in plain "
        f"PyTorch is used: {why}. DDF_MM_FORCE_REFERENCE=1 silences this warning."
    )


def warn(text: str) -> None:
    """Warns at the line that called this package, directly or through modules of torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGES):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, RuntimeWarning, stacklevel=level)


def autocast_inputs(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Casts float32 and 16-bit tensors to the autocast dtype if autocast is enabled.

    A call with float64 tensors is unchanged: autocast never casts float64, and for mixed dtypes the
    error of the check then names those that were given.
    """
    if not isinstance(tensors[0], Tensor):
        return tensors
    device_type = tensors[0].device.type
    # The meta device has no autocast; is_autocast_enabled would raise.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors
    )


_warned = False
_traces_ops = False
# The library of the CUDA ops, if there is one; and whether each device that had a call can run its
# kernels.
_cuda: ctypes.CDLL | None = None
# What compiles kernels that it lacks; and why it could not for a device, "" if it could.
_kernels: nvrtc.Kernels | None = None
_reasons: dict[int, str] = {}
_runs_on_device: dict[int, bool] = {}
COMPILED, _WHY = _load_all()
