"""Runs the CUDA tests of ops and layers with the library of the CUDA ops, compiled for the host.

They run in a separate process on the devices of emulated.py; sample_for_the_host in
tests/conftest.py selects the cases. Tests of the emulated devices alone are in emulated_cases.py.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from cuda_host.build import (
    CSRC,
    HERE,
    NEEDS_HOST,
    compile_kernels_for_host,
    compile_ops_by_name_for_host,
    compile_ops_for_host,
    names_of_kernels,
)
from ops.test_nvrtc import KERNELS, needs_nvrtc

from ddf_mm.ops import nvrtc

TESTS = HERE.parent
# Files with CUDA tests, and the least number of cases that must run with kernels by name.
FILES = {
    "ops/test_ddf.py": 20,
    "ops/test_up.py": 20,
    "ops/test_filter_norm.py": 4,
    "ops/test_pack.py": 24,
    "ops/test_compiled.py": 36,
    "ops/test_sweep.py": 2,
    "ops/test_direct_calls.py": 24,
    "layers/test_packs.py": 20,
    "layers/test_fold.py": 4,
    "cuda_host/emulated_cases.py": 20,
}

# Those that also run with kernels that are compiled ahead: only the launches differ.
AHEAD = [
    "ops/test_ddf.py",
    "ops/test_up.py",
    "ops/test_filter_norm.py",
    "cuda_host/emulated_cases.py",
]

pytestmark = [
    *NEEDS_HOST,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CUDA tests run on the GPU"),
]


def run(library: Path, *arguments: str, **variables: str) -> dict[str, dict[str, str]]:
    """Runs tests on emulated devices; returns, for each file, the tests and their errors or ""."""
    report = library.with_name("report.xml")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= dict(DDF_MM_TEST_CUDA_ON_HOST=str(library), OMP_NUM_THREADS="1", **variables)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [*command, f"--junitxml={report}", "-o", "junit_family=xunit1", *arguments],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.exists(), ended.stdout + ended.stderr
    results = {file: {} for file in FILES}
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [e for kind in ("failure", "error", "skipped") for e in case.findall(kind)]
        text = "\n".join(f"{e.get('message')}\n{e.text}" for e in wrong)
        results[case.get("file").removeprefix("tests/")][case.get("name")] = text
    return results


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "kernels.o"
    compile_kernels_for_host(path)
    return path


@pytest.fixture(scope="module")
def results(kernels: Path) -> dict[str, dict[str, str]]:
    library = kernels.with_name("ops_on_host.so")
    compile_ops_for_host(library, kernels)
    few = dict(DDF_MM_TEST_CASES_ON_HOST="2")
    return run(library, *(f"tests/{file}" for file in AHEAD), **few)


@pytest.fixture(scope="module")
def library_by_name(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that is built without nvcc: it finds kernels by name and gives their grids and
    parameters to the driver, in whose place the kernels run on the host."""
    library = tmp_path_factory.mktemp("by_name") / "ops_on_host.so"
    compile_ops_by_name_for_host(library)
    return library


@pytest.fixture(scope="module")
def results_by_name(library_by_name: Path) -> dict[str, dict[str, str]]:
    return run(library_by_name, *(f"tests/{file}" for file in FILES))


def test_an_instantiation_of_each_kernel_is_compiled_by_nvrtc(library_by_name):
    """tests/ops/test_nvrtc.py compiles one of each, and none that no call uses."""
    names = names_of_kernels(library_by_name.with_name("by_name.o"))
    tested = [f"ddf::cuda::{name}" for name in KERNELS]
    assert set(tested) <= set(names)
    assert {name.split("<")[0] for name in tested} == {name.split("<")[0] for name in names}
    # Every kernel adds to the compile time and the size of a library.
    assert 200 < len(names) <= 245
    # The library's own list, read in another process, since loading it registers its ops.
    code = (
        "import ctypes, sys; from ddf_mm.ops import nvrtc; "
        "print(nvrtc.names(ctypes.CDLL(sys.argv[1])))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(library_by_name)],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == str(names)


def sizes_of_parameters(kernel: nvrtc.Binary) -> list[int]:
    """The sizes of a kernel's parameters in its binary, an ELF file."""

    def read(layout: str, at: int) -> tuple[int, ...]:
        return struct.unpack_from(layout, kernel.code, at)

    (table,), (step, count, index_of_names) = read("<Q", 0x28), read("<3H", 0x3A)
    headers = [read("<2I4Q", table + step * i) for i in range(count)]
    names = headers[index_of_names][4]
    wanted = b".nv.info." + kernel.symbol + b"\0"
    (header,) = [h for h in headers if kernel.code[names + h[0] :].startswith(wanted)]
    at, end, sizes = header[4], header[4] + header[5], {}
    while at < end:
        kind, attribute, size = read("<2BH", at)
        if attribute == 0x17:  # EIATTR_KPARAM_INFO
            _, ordinal, _, packed = read("<I2HI", at + 4)
            sizes[ordinal] = packed >> 18
        at += 4 + (size if kind == 4 else 0)
    return [sizes[ordinal] for ordinal in range(len(sizes))]


@needs_nvrtc
def test_parameters_have_the_sizes_that_nvrtc_gives_them(library_by_name):
    """The driver copies as many bytes from each."""
    code = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); "
        "find, sizes = library.ddf_host_kernel, library.ddf_host_parameters; "
        "find.restype, sizes.argtypes, sizes.restype = (ctypes.c_void_p, [ctypes.c_void_p], "
        "ctypes.c_char_p); "
        "[print(sizes(find(name.encode())).decode()) for name in sys.argv[2:]]"
    )
    names = [f"ddf::cuda::{name}" for name in KERNELS]
    command = [sys.executable, "-c", "import torch; " + code, str(library_by_name), *names]
    here = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for name, sizes in zip(names, here, strict=True):
        expected = sizes_of_parameters(nvrtc.compile_kernel(name, 90))
        assert [int(size) for size in sizes.split()] == expected, name
        assert expected


def check(results: dict[str, str], least: int) -> None:
    # Some tests are for one of the two libraries only.
    ran = {n: error for n, error in results.items() if not error.startswith("not of this library")}
    for name, error in ran.items():
        assert not error, f"{name}: {error}"
    assert len(ran) >= least


@pytest.mark.parametrize("file", FILES)
def test_cuda_tests_pass_with_kernels_by_name(results_by_name, file):
    check(results_by_name[file], FILES[file])


@pytest.mark.parametrize("file", AHEAD)
def test_cuda_tests_pass_on_emulated_devices(results, file):
    check(results[file], FILES[file] // 2)


GUARD = "const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());"
# Changes of ops.cu, the tests that must fail, and text of the error.
FAULTS = {
    "half the scratch": (
        "empty(like_, {elements}",
        "empty(like_, {elements / 2}",
        "tests/ops/test_compiled.py -k repeatable",
        "outside of every tensor",
    ),
    "rows for columns": (
        "t.stride(last - 1), t.stride(last)}",
        "t.stride(last), t.stride(last - 1)}",
        "tests/ops/test_compiled.py -k repeatable",
        "is written twice",
    ),
    "no device": (
        GUARD,
        "",
        "tests/cuda_host/emulated_cases.py -k current_stream",
        "memory of device 1 in a call on device 0",
    ),
    # The check of a device finds what the emulation cannot know; pytest makes the warning an error.
    "add for mul": (
        "combine_of(kernel_combine)",
        'combine_of(kernel_combine == "mul" ? "add" : "mul")',
        "tests/ops/test_ddf.py -k loop_over -W error::RuntimeWarning",
        "the compiled op ddf failed its check on cuda:0",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_ops_cu_is_found(name, kernels, tmp_path):
    right, wrong, tests, message = FAULTS[name]
    text = (CSRC / "cuda" / "ops.cu").read_text()
    assert right in text
    changed = tmp_path / "ops.cu"
    changed.write_text(text.replace(right, wrong))
    library = tmp_path / "ops_on_host.so"
    compile_ops_for_host(library, kernels, changed)
    # The emulation must find the other faults; the check would replace the op by the formula.
    check = dict(DDF_MM_SELF_CHECK=str(int(name == "add for mul")))
    errors = [
        error for of in run(library, *tests.split(), **check).values() for error in of.values()
    ]
    assert any(message in error for error in errors), errors
