"""Kernels compiled by NVRTC: the compiler, the cache and the order of choice.

What the library of the ops does with them is tested on emulated devices (tests/cuda_host).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

from ddf_mm.ops import library, nvrtc, precompile

ROOT = Path(__file__).resolve().parents[2]
SMALL = "ddf::cuda::reduce_partials<float>"
# Of each kernel one instantiation; the names come from its library, tests/cuda_host compares them.
KERNELS = [
    "backward_3x3<ddf::cuda::BFloat16, ddf::Mul, true, true>",
    "backward_3x3<float, ddf::Add, false, false>",
    "backward_3x3_channels_last<ddf::cuda::Half, ddf::Mul>",
    "filter_norm_forward<ddf::cuda::Half>",
    "filter_norm_grad_parameters<double>",
    "filter_norm_grad_x<float>",
    "forward_3x3<ddf::cuda::Half, ddf::Add, true, true, false>",
    "forward_3x3<float, ddf::Mul, false, false, true>",
    "forward_3x3_channels_last<ddf::cuda::BFloat16, ddf::Mul, false, true>",
    "forward_generic<double>",
    "forward_tiled<ddf::cuda::Half, 5, 1, ddf::Mul, true, true>",
    "forward_tiled<float, 3, 2, ddf::Add, false, false>",
    "gather_3x3<float, ddf::Mul, false>",
    "gather_3x3_channels_last<ddf::cuda::BFloat16, ddf::Add, true>",
    "grad_channel_generic<ddf::cuda::BFloat16>",
    "grad_features_generic<double>",
    "grad_filters<ddf::cuda::Half, 3, 2, ddf::Mul>",
    "grad_filters_channels_last<ddf::cuda::BFloat16, 7, 1, ddf::Add>",
    "grad_filters_gathered<ddf::cuda::Half, ddf::Mul>",
    "grad_spatial_generic<float>",
    "reduce_partials<ddf::cuda::Half>",
    "upsample_3x3<float, ddf::Mul>",
    "upsample_grad_features_generic<ddf::cuda::BFloat16>",
]
needs_nvrtc = pytest.mark.skipif(
    torch.version.cuda is None or not nvrtc.is_installed(), reason="no NVRTC or no cuda-bindings"
)
needs_new_torch = pytest.mark.skipif(
    library.TORCH_IS_TOO_OLD, reason="a torch too old for compiled ops"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DDF_MM_KERNEL_CACHE", str(folder))
    return folder


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """The kernels that a stand-in for NVRTC has compiled."""
    asked = []

    def compile_kernel(name, arch):
        asked.append(name)
        return nvrtc.Binary(b"symbol", b"code\n\0of " + name.encode())

    monkeypatch.setattr(nvrtc, "compile_kernel", compile_kernel)
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "architectures", lambda: [75, 90])
    return asked


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [75, 90, 120])
@pytest.mark.parametrize("name", KERNELS)
def test_nvrtc_compiles_each_kernel(name, arch):
    if "backward" in name and arch != 90:
        pytest.skip("takes seconds")
    symbol, code = nvrtc.compile_kernel(f"ddf::cuda::{name}", arch)
    assert code.startswith(b"\x7fELF")
    # Mangled, with CUDA's types.
    assert re.match(rb"_ZN3ddf4cuda\d+" + name.split("<")[0].encode() + b"I", symbol)
    assert symbol in code
    assert (b"6__half" in symbol) == ("Half" in name)


@needs_nvrtc
def test_what_does_not_compile_names_the_kernel_and_why():
    with pytest.raises(nvrtc.NoKernel, match=r"not compile ddf::cuda::none<float> for sm_90: ."):
        nvrtc.compile_kernel("ddf::cuda::none<float>", 90)
    with pytest.raises(nvrtc.NoKernel, match="does not compile .* for sm_1"):
        nvrtc.compile_kernel(SMALL, 1)


@needs_nvrtc
def test_architecture_of_a_device():
    assert nvrtc.architecture_for(7, 5) == 75
    assert nvrtc.architecture_for(9, 0) == 90
    # A binary for 8.9 runs on a later device of that major version.
    assert nvrtc.architecture_for(8, 99) in (88, 89)
    with pytest.raises(nvrtc.NoKernel, match=r"does not compile for compute capability 3\.5"):
        nvrtc.architecture_for(3, 5)


@needs_nvrtc
def test_nvrtc_of_another_cuda_than_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    nvrtc._nvrtc.cache_clear()
    try:
        with pytest.raises(nvrtc.NoKernel, match=r"has CUDA 11\.8; pip install 'cuda-bindings"):
            nvrtc.version()
    finally:
        nvrtc._nvrtc.cache_clear()


def test_a_cuda_pathfinder_without_headers_is_named(monkeypatch):
    """Before 1.2.3 it finds libraries only."""
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", ModuleType("cuda.pathfinder"))
    with pytest.raises(nvrtc.NoKernel, match=r"pip install 'cuda-pathfinder>=1\.2\.3'"):
        nvrtc._cuda_headers.__wrapped__()


def test_the_cache_keeps_a_kernel(cache, compiled):
    first = nvrtc.cached_kernel("a<float>", 90)
    assert nvrtc.cached_kernel("a<float>", 90) == first
    assert compiled == ["a<float>"]
    (file,) = cache.iterdir()
    assert file.name.startswith("sm_90-")


def test_the_key_is_kernel_architecture_nvrtc_and_source(cache, compiled, monkeypatch):
    nvrtc.cached_kernel("a<float>", 90)
    nvrtc.cached_kernel("b<float>", 90)
    nvrtc.cached_kernel("a<float>", 75)
    monkeypatch.setattr(nvrtc, "version", lambda: "13.1")
    nvrtc.cached_kernel("a<float>", 90)
    monkeypatch.setattr(nvrtc, "_digest_of_headers", lambda: b"other")
    nvrtc.cached_kernel("a<float>", 90)
    assert len(compiled) == len(list(cache.iterdir())) == 5


def test_the_digest_is_that_of_the_headers(tmp_path, monkeypatch):
    (tmp_path / "cuda").mkdir()
    digests = set()
    monkeypatch.setattr(nvrtc, "HEADERS", tmp_path)
    for file, text in (("a.h", "1"), ("a.h", "2"), ("cuda/b.cuh", "1"), ("cuda/b.cuh", "2")):
        (tmp_path / file).write_text(text)
        digests.add(nvrtc._digest_of_headers.__wrapped__())
    assert len(digests) == 4


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "other", "folder"])
def test_a_damaged_entry_is_compiled_again(cache, compiled, damage):
    expected = nvrtc.cached_kernel("a<float>", 90)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    damaged = {
        "cut": whole[:-1],
        "changed": whole[:-1] + bytes([whole[-1] ^ 1]),
        "empty": b"",
        "other": b"\xff\xfe of another program",
    }
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        file.write_bytes(damaged[damage])
    assert nvrtc.cached_kernel("a<float>", 90) == expected
    assert len(compiled) == 2
    if damage != "folder":
        assert file.read_bytes() == whole
    assert list(cache.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, compiled, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "cache", Path("/proc/ddf_mm")):
        monkeypatch.setenv("DDF_MM_KERNEL_CACHE", str(folder))
        assert nvrtc.cached_kernel("a<float>", 90).symbol == b"symbol"
        with pytest.raises(OSError, match=str(folder)):
            nvrtc.keep_kernel("a<float>", 90)


def test_a_full_disk_leaves_no_part_of_a_file(cache, compiled, monkeypatch):
    """Here it is a limit of the size of a file, of which a signal tells unless it is ignored."""
    large = nvrtc.Binary(b"symbol", bytes(1 << 22))
    monkeypatch.setattr(nvrtc, "compile_kernel", lambda *_: large)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        assert nvrtc.cached_kernel("a<float>", 90) == large
        with pytest.raises(OSError, match="File too large"):
            nvrtc.keep_kernel("a<float>", 90)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(cache.iterdir())


def test_other_users_can_read_the_cache(cache, compiled):
    """As in a container that was filled by root."""
    before = os.umask(0o022)
    try:
        nvrtc.keep_kernel("a<float>", 90)
    finally:
        os.umask(before)
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o644


def test_nor_is_a_user_without_a_home(compiled, monkeypatch):
    monkeypatch.delenv("DDF_MM_KERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert nvrtc.cache_folder() == Path("/somewhere/ddf_mm/kernels")
    for ignored in ("relative/path", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert nvrtc.cache_folder() == Path.home() / ".cache/ddf_mm/kernels"

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert nvrtc.cache_folder() is None
    assert nvrtc.cached_kernel("a<float>", 90).symbol == b"symbol"
    with pytest.raises(OSError, match="set DDF_MM_KERNEL_CACHE"):
        nvrtc.keep_kernel("a<float>", 90)


@pytest.mark.any_torch
@pytest.mark.slow
@needs_nvrtc
def test_eight_processes_at_once(cache):
    """All wait for a start, then compile, write and read the same two kernels."""
    code = (
        "import sys\n"
        "from ddf_mm.ops import nvrtc\n"
        "nvrtc.version(); print('ready', flush=True); sys.stdin.readline()\n"
        "for name in ('reduce_partials<float>', 'reduce_partials<ddf::cuda::Half>'):\n"
        "    binary = nvrtc.cached_kernel('ddf::cuda::' + name, 90)\n"
        "    assert binary.code.startswith(b'\\x7fELF'); print(binary.symbol)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = dict(text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, **options) for _ in range(8)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    results = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 8
    (result,) = results
    assert len(set(result.split())) == 2
    # Two whole files, no parts. The bytes of NVRTC differ between processes.
    files = list(cache.iterdir())
    assert len(files) == 2
    assert {f"{nvrtc._read(file).symbol}" for file in files} == set(result.split("\n")) - {""}


class HostLibrary:
    """A library that was built without kernels."""

    def ddf_mm_set_driver(self, driver):
        self.driver = driver._obj

    class ddf_mm_kernels:
        def __new__(cls):
            return b"b<float>\na<float>\n"


@pytest.fixture
def host(monkeypatch):
    loaded = HostLibrary()
    monkeypatch.setattr(library, "_cuda", loaded)
    monkeypatch.setattr(library, "_kernels", nvrtc.Kernels(loaded))
    monkeypatch.setattr(library, "_reasons", {})
    return loaded


def test_precompile_fills_the_cache(host, cache, compiled, capsys):
    assert precompile.main(["--arch", "75", "90"]) == 0
    assert sorted(compiled) == ["a<float>", "a<float>", "b<float>", "b<float>"]
    assert f"4 kernels for sm_75, sm_90 are in {cache}" in capsys.readouterr().out
    assert precompile.main(["--arch", "7.5", "9.0", "90", "--jobs", "2"]) == 0
    assert len(compiled) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arch", "50", "75"], "NVRTC 13.0 does not compile for 50, but for 75, 90"),
        (["--arch", "ninety"], "invalid architecture value: 'ninety'"),
        (["--arch", "90", "--jobs", "0"], "--jobs must be at least 1, got 0"),
    ],
)
def test_precompile_refuses_wrong_arguments(host, compiled, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        precompile.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not compiled


def test_precompile_says_why_it_cannot(host, cache, compiled, monkeypatch, capsys):
    if torch.cuda.device_count() == 0:
        with pytest.raises(SystemExit):
            precompile.main([])
        assert "there is no GPU; --arch says" in capsys.readouterr().err

    def refuse(name, arch):
        raise nvrtc.NoKernel("NVRTC refuses")

    monkeypatch.setattr(nvrtc, "compile_kernel", refuse)
    with pytest.raises(SystemExit, match="error: NVRTC refuses"):
        precompile.main(["--arch", "75"])
    monkeypatch.setattr(library, "_cuda", None)
    with pytest.raises(SystemExit):
        precompile.main(["--arch", "75"])
    assert "this install has no CUDA ops" in capsys.readouterr().err


@pytest.fixture
def without_driver(host, monkeypatch):
    """A GPU for which no kernel can be compiled."""
    monkeypatch.setattr(library, "COMPILED", frozenset({"cuda"}))
    monkeypatch.setattr(library, "COMPILABLE", ("cuda",))
    monkeypatch.setattr(library, "_runs_on_device", {})
    for name, value in {
        "current_device": 0,
        "is_current_stream_capturing": False,
        "get_device_name": "a GPU",
        "get_device_capability": (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)

    # Not for torch.compile, which would call the driver.
    def is_available():
        return sys._getframe(1).f_globals["__name__"] == library.__name__

    def none():
        raise nvrtc.NoKernel("there is no driver")

    def check(device):
        found = ctypes.c_void_p()
        assert not host.driver.find(b"a<float>", device.index, ctypes.byref(found))
        raise RuntimeError("the kernel did not start")

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(nvrtc, "_nvrtc", none)
    monkeypatch.setattr(library, "_check_against_formula", check)


@needs_new_torch
def test_without_a_driver_the_formula_serves_with_one_warning(without_driver):
    """Where anything that a device needs is missing."""
    info = library.backend_info()
    assert info["cuda"] == "reference"
    assert "cuda:0, a GPU of compute capability 9.0, does not run kernels compiled" in info["why"]
    assert "(there is no driver)" in info["why"]
    device = torch.device("cuda", 0)
    with pytest.warns(RuntimeWarning, match="no compiled ops for cuda:0.*there is no driver"):
        assert not library._runs_on(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not library._runs_on(device)


@needs_new_torch
def test_torch_compile_asks_before_it_records_an_op(without_driver):
    """Its graph could not fall back on the formula."""
    device = torch.device("cuda", 0)

    @torch.compile(backend="eager", fullgraph=True)
    def function(x):
        return x + 1 if library._runs_on(device) else x - 1

    with pytest.warns(RuntimeWarning, match="no compiled ops for cuda:0.*there is no driver"):
        assert function(torch.zeros(1)) == -1


@pytest.mark.parametrize("text", ["", "raise RuntimeError('of a user')"])
def test_another_module_of_the_name_cuda_is_no_error(tmp_path, monkeypatch, text):
    (tmp_path / "cuda.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
            del sys.modules[name]
        assert not nvrtc.is_installed()


@needs_new_torch
def test_without_cuda_bindings_the_import_says_so(tmp_path):
    """In a process where they are not found."""
    code = (
        "import sys, json, importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda n, *a: None if n.startswith('cuda.') else find(n, *a)\n"
        "import ctypes, torch\n"
        "from ddf_mm.ops import nvrtc, library\n"
        "load = library._load\n"
        "class Host: ddf_mm_set_driver = lambda *_: None\n"
        "library._load = lambda name, *a: Host() if name == '_C_cuda' else None\n"
        "library.FORCED = False; library.COMPILABLE = ('cpu', 'cuda')\n"
        "print(json.dumps([sorted(of) if not isinstance(of, str) else of"
        " for of in library._load_all()]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, env=environment, check=True
    )
    compiled, why = json.loads(ran.stdout)
    assert compiled == ["cpu"]
    assert "cuda-bindings, which is not installed; pip install 'ddf-mm[cuda]'" in why


# CUDA's driver as far as it is used: it takes a binary, knows its kernel, and counts.
DRIVER = """
#include <dlfcn.h>
#include <cstring>
#define API extern "C" __attribute__((visibility("default"))) int
static const char* code;
API cuInit(unsigned) { return 0; }
API cuDriverGetVersion(int* version) { *version = 13000; return 0; }
API cuLibraryLoadData(void** library, const void* data, void*, void*, unsigned jit, void*, void*,
                      unsigned options) {
  code = static_cast<const char*>(data);
  *library = const_cast<char*>(code);
  return jit + options != 0 || std::memcmp(code, "\\x7f" "ELF", 4) != 0 ? 200 : 0;
}
API cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  *kernel = reinterpret_cast<void*>(0x1234);
  const char* const known = "_ZN3ddf4cuda15reduce_partialsIfEE";
  return library == code && std::strncmp(name, known, std::strlen(known)) == 0 ? 0 : 500;
}
API cuDeviceGet(int* device, int ordinal) { *device = ordinal + 10; return 0; }
API cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = reinterpret_cast<void*>(device + 100L);
  return 0;
}
API cuCtxSetCurrent(void* context) { return reinterpret_cast<long>(context) == 111 ? 0 : 201; }
API cuLaunchKernel() { return 77; }
API cuGetProcAddress_v2(const char* name, void** found, int, unsigned long, int* status) {
  static void* const self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  *found = std::strcmp(name, "cuGetProcAddress") == 0
               ? reinterpret_cast<void*>(&cuGetProcAddress_v2) : dlsym(self, name);
  if (status != nullptr) *status = *found == nullptr;
  return 0;
}
"""
USE_DRIVER = """
import ctypes, sys, torch
from ddf_mm.ops import nvrtc
for dtype in ("float", "double"):  # for the cache: NVRTC itself looks into a driver
    nvrtc.cached_kernel(f"ddf::cuda::reduce_partials<{dtype}>", 90)
loaded = ctypes.CDLL(sys.argv[1])  # who loads its name later gets this one
torch.cuda.get_device_capability = lambda device: (9, 0)
given = []
class Host:
    def ddf_mm_set_driver(self, driver): given.append(driver._obj)
kernels = nvrtc.Kernels(Host())
driver = given[0]
print(driver.launch)
kernel = ctypes.c_void_p()
print(driver.find(b"ddf::cuda::reduce_partials<float>", 1, ctypes.byref(kernel)), kernel.value)
print(ctypes.CFUNCTYPE(ctypes.c_int)(driver.launch)())
print(driver.use(1), driver.use(0), kernels.failures)
print(driver.find(b"ddf::cuda::reduce_partials<double>", 1, ctypes.byref(kernel)))
print(kernels.failures[1])
"""


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_cuda_bindings_call_the_driver_as_it_is_declared(tmp_path):
    """All calls but the launch itself, by cuda-bindings, on a library in place of the driver."""
    source = tmp_path / "driver.cpp"
    source.write_text(DRIVER)
    driver = tmp_path / "libcuda.so.1"
    soname = "-Wl,-soname,libcuda.so.1"
    subprocess.run(["c++", "-shared", "-fPIC", soname, source, "-ldl", "-o", driver], check=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", USE_DRIVER, str(driver)],
        text=True,
        capture_output=True,
        env=environment,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    before, found, launched, used, missing, why = ran.stdout.splitlines()
    assert before == "None"
    assert found == f"True {0x1234}"
    assert launched == "77"
    assert used == "True False {0: 'CUresult CUDA_ERROR_INVALID_CONTEXT'}"
    assert missing == "False"
    assert why == "CUresult CUDA_ERROR_NOT_FOUND"
