"""The CUDA kernels, compiled by NVRTC on the machine on which they run, each when it is needed.

``csrc/README.md`` describes how. Needs cuda-bindings, which CUDA builds of torch bring since 2.10.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import os
import uuid
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

HEADERS = Path(__file__).resolve().parents[1] / "csrc"
# Headers of the C++ standard library that the kernels include; NVRTC has none.
_STANDARD = ("algorithm", "cmath", "cstddef", "cstdint", "limits", "type_traits")
_SOURCE = '#include "cuda/kernels.cuh"\n'


class NoKernel(Exception):
    """A kernel cannot be compiled or loaded here; says why and, where it is known, what helps."""


class Binary(NamedTuple):
    """A compiled kernel: its name in the binary, and the binary (a cubin)."""

    symbol: bytes
    code: bytes


def _checked(result: tuple[Any, ...]) -> Any:
    """The values of a function of cuda-bindings.

    Raises:
        NoKernel: the function failed.
    """
    error, *values = result
    if error:
        raise NoKernel(f"{type(error).__name__} {error.name}")
    return values[0] if len(values) == 1 else tuple(values)


@cache
def _nvrtc() -> Any:
    """The module ``cuda.bindings.nvrtc``, which has found its library."""
    if not is_installed():
        raise NoKernel("cuda-bindings is not installed; pip install 'ddf-mm[cuda]'")
    try:
        from cuda.bindings import nvrtc

        _, *found = nvrtc.nvrtcVersion()
    except Exception as error:  # cuda-bindings has several for a library that is not there
        raise NoKernel(f"NVRTC does not load ({error})") from error
    major = str(torch.version.cuda).split(".")[0]
    # The driver need not load what another one compiles.
    if str(found[0]) != major:
        raise NoKernel(
            f"NVRTC is that of CUDA {found[0]}, torch has CUDA {torch.version.cuda}; "
            f"pip install 'cuda-bindings=={major}.*'"
        )
    return nvrtc


def is_installed() -> bool:
    """Whether there is a cuda-bindings; its import would take a tenth of a second."""
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except Exception:  # of importing what else is named cuda, which an import of ddf_mm survives
        return False


def version() -> str:
    return "{}.{}".format(*_checked(_nvrtc().nvrtcVersion()))


@cache
def _cuda_headers() -> str:
    """The folder of cuda_fp16.h and cuda_bf16.h."""
    try:
        from cuda.pathfinder import find_nvidia_header_directory
    except ImportError as error:
        raise NoKernel(
            "cuda-pathfinder is missing or too old; pip install 'cuda-pathfinder>=1.2.3'"
        ) from error
    found = find_nvidia_header_directory("cudart")
    if found is None:
        raise NoKernel("the headers of CUDA's runtime are not installed (nvidia-cuda-runtime)")
    return str(found)


@cache
def _digest_of_headers() -> bytes:
    digest = hashlib.sha256()
    files = [*HEADERS.glob("*.h"), *HEADERS.glob("cuda/*.cuh")]
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


def architectures() -> list[int]:
    """The architectures that NVRTC compiles for, such as 90."""
    return [int(arch) for arch in _checked(_nvrtc().nvrtcGetSupportedArchs())]


def architecture_for(major: int, minor: int) -> int:
    """The architecture to compile for, as 90: the device's own or the newest one of its major
    version that NVRTC knows, whose binaries it runs.

    Raises:
        NoKernel: NVRTC knows none.
    """
    fitting = [arch for arch in architectures() if arch // 10 == major and arch % 10 <= minor]
    if not fitting:
        raise NoKernel(f"NVRTC {version()} does not compile for compute capability {major}.{minor}")
    return max(fitting)


def compile_kernel(name: str, arch: int) -> Binary:
    """Compiles one kernel for an architecture.

    Args:
        name: the kernel as C++ writes it, as ``ddf::cuda::reduce_partials<float>``.
        arch: such as 90.

    Raises:
        NoKernel: NVRTC refuses.
    """
    nvrtc = _nvrtc()
    stand_in = b'#include "nvrtc_std.cuh"\n'
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            _SOURCE.encode(),
            b"ddf_mm.cu",
            len(_STANDARD),
            [stand_in] * len(_STANDARD),
            [header.encode() for header in _STANDARD],
        )
    )
    try:
        _checked(nvrtc.nvrtcAddNameExpression(program, name.encode()))
        folders = [HEADERS, HEADERS / "cuda", _cuda_headers()]
        # -default-device: functions of the host, which the headers have too, are refused otherwise.
        options = [
            f"--gpu-architecture=sm_{arch}",
            "-std=c++17",
            "-default-device",
            *(f"-I{f}" for f in folders),
        ]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if error:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            text = log.decode(errors="replace").strip("\0 \n")
            raise NoKernel(f"NVRTC {version()} does not compile {name} for sm_{arch}: {text}")
        symbol = _checked(nvrtc.nvrtcGetLoweredName(program, name.encode()))
        code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Binary(symbol, code)


def cache_folder() -> Path | None:
    """Where compiled kernels are kept: ``DDF_MM_KERNEL_CACHE``, or a folder of the user's cache
    (XDG); None if the user has no home."""
    given = os.environ.get("DDF_MM_KERNEL_CACHE")
    if given:
        return Path(given)
    try:
        # The XDG specification ignores relative paths.
        caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
        caches = caches if caches.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return caches / "ddf_mm" / "kernels"


def _file_of(name: str, arch: int) -> Path | None:
    """The file that keeps a kernel. Its name changes with all that its contents depend on."""
    folder = cache_folder()
    if folder is None:
        return None
    key = hashlib.sha256(_digest_of_headers())
    key.update(f"{version()}\0{arch}\0{name}".encode())
    return folder / f"sm_{arch}-{key.hexdigest()[:40]}"


def _read(file: Path) -> Binary | None:
    """What :func:`_write` wrote; None if there is none, or it is damaged."""
    try:
        digest, symbol, code = file.read_bytes().split(b"\n", 2)
    except (OSError, ValueError):
        return None
    if digest.decode(errors="replace") != hashlib.sha256(symbol + code).hexdigest():
        return None
    return Binary(symbol, code)


def _write(file: Path, binary: Binary) -> None:
    """Writes a whole file or none: other processes read and write the same.

    Raises:
        OSError: the folder cannot be written to.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(binary.symbol + binary.code).hexdigest()
    # Not by tempfile, whose files other users, of a shared cache, could not read.
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as part:
            part.write(b"\n".join([digest.encode(), *binary]))
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def cached_kernel(name: str, arch: int) -> Binary:
    """:func:`compile_kernel`, from the cache if it is there; what cannot be kept is no error."""
    file = _file_of(name, arch)
    kept = None if file is None else _read(file)
    if kept is not None:
        return kept
    binary = compile_kernel(name, arch)
    if file is not None:
        with contextlib.suppress(OSError):
            _write(file, binary)
    return binary


def keep_kernel(name: str, arch: int) -> None:
    """Compiles a kernel for the cache unless it is there.

    Raises:
        NoKernel: NVRTC refuses.
        OSError: the cache cannot be written to.
    """
    file = _file_of(name, arch)
    if file is None:
        raise OSError("there is no folder for the cache; set DDF_MM_KERNEL_CACHE to one")
    if _read(file) is None:
        _write(file, compile_kernel(name, arch))


class _Driver(ctypes.Structure):
    """``Driver`` of ``csrc/cuda/driver.cuh``."""

    Find = ctypes.CFUNCTYPE(
        ctypes.c_bool, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p)
    )
    Use = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_int)
    _fields_ = [("find", Find), ("use", Use), ("launch", ctypes.c_void_p)]


def names(library: ctypes.CDLL) -> list[str]:
    """All kernels that a library of the CUDA ops can launch."""
    library.ddf_mm_kernels.restype = ctypes.c_char_p
    # nvcc may compile a kernel in several files.
    return sorted(set(library.ddf_mm_kernels().decode().split("\n")[:-1]))


class Kernels:
    """Compiles and loads kernels for a library of the CUDA ops.

    NVRTC and CUDA's driver are loaded when the library asks for a kernel.

    Args:
        library: the library.
        driver: the module ``cuda.bindings.driver``, unless a test has another.
    """

    def __init__(self, library: ctypes.CDLL, driver: Any = None) -> None:
        self._library = library
        self._driver = driver
        # Device to the context that torch uses.
        self._contexts: dict[int, Any] = {}
        # Device to why a kernel of it was not found.
        self.failures: dict[int, str] = {}
        # Referred to as long as the library may call them.
        self._functions = _Driver(_Driver.Find(self._find), _Driver.Use(self._use), None)
        library.ddf_mm_set_driver(ctypes.byref(self._functions))

    def _load_driver(self) -> None:
        """Gives the library the driver's function that launches.

        Raises:
            NoKernel: there is no NVRTC, or no driver.
        """
        _nvrtc()
        if self._driver is None:
            self._driver = importlib.import_module("cuda.bindings.driver")
        try:
            # The version of its present signature.
            launch, _ = _checked(self._driver.cuGetProcAddress(b"cuLaunchKernel", 12000, 0))
        except NoKernel:
            raise
        except Exception as error:  # cuda-bindings has several for a library that is not there
            raise NoKernel(f"CUDA's driver does not load ({error})") from error
        self._functions.launch = int(launch)
        self._library.ddf_mm_set_driver(ctypes.byref(self._functions))

    def _find(self, name: bytes, device: int, found: Any) -> bool:
        try:
            found[0] = self.load(name.decode(), device)
        except Exception as error:  # it cannot pass the library that called
            self.failures[device] = (str(error) or repr(error)).split("\n")[0]
            return False
        return True

    def load(self, name: str, device: int) -> int:
        """The handle of a kernel, compiled for a device and loaded.

        Raises:
            NoKernel: that is not possible.
        """
        if self._functions.launch is None:
            self._load_driver()
        capability = torch.cuda.get_device_capability(device)
        binary = cached_kernel(name, architecture_for(*capability))
        options: tuple[Any, ...] = ([], [], 0)
        loaded = _checked(self._driver.cuLibraryLoadData(binary.code, *options, *options))
        return int(_checked(self._driver.cuLibraryGetKernel(loaded, binary.symbol)))

    def _use(self, device: int) -> bool:
        try:
            if device not in self._contexts:
                handle = _checked(self._driver.cuDeviceGet(device))
                self._contexts[device] = _checked(self._driver.cuDevicePrimaryCtxRetain(handle))
            _checked(self._driver.cuCtxSetCurrent(self._contexts[device]))
        except Exception as error:  # it cannot pass the library that called
            self.failures[device] = (str(error) or repr(error)).split("\n")[0]
            return False
        return True
