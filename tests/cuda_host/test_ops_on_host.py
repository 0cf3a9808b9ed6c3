"""The library of the CUDA ops, compiled for the host, under the CUDA tests of the Python stack.

They run in a process of their own, on the devices of emulated.py: see sample_for_the_host in
tests/conftest.py for which cases. What emulated devices have to show by themselves is in
emulated_cases.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from cuda_host.build import CSRC, HERE, NEEDS_HOST, compile_ops_for_host

TESTS = HERE.parent
# The CUDA tests, and how many cases of theirs run at least.
FILES = {
    "ops/test_ddf.py": 40,
    "ops/test_up.py": 35,
    "ops/test_filter_norm.py": 8,
    "ops/test_pack.py": 40,
    "ops/test_compiled.py": 60,
    "ops/test_sweep.py": 2,
    "ops/test_direct_calls.py": 40,
    "layers/test_packs.py": 20,
    "cuda_host/emulated_cases.py": 10,
}

pytestmark = [
    *NEEDS_HOST,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to run them"),
]


def run(library: Path, report: Path, *arguments: str) -> dict[str, list[tuple[str, str]]]:
    """Runs tests on emulated devices; for each file the name and the error, or "", of each test."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= dict(DDF_MM_TEST_CUDA_ON_HOST=str(library), OMP_NUM_THREADS="1")
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
    results = {file: [] for file in FILES}
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [e for kind in ("failure", "error", "skipped") for e in case.findall(kind)]
        text = "\n".join(e.get("message") + "\n" + (e.text or "") for e in wrong)
        results[case.get("file").removeprefix("tests/")].append((case.get("name"), text))
    return results


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ops_on_host") / "ops_on_host.so"
    compile_ops_for_host(path)
    return path


@pytest.fixture(scope="module")
def results(library: Path) -> dict[str, list[tuple[str, str]]]:
    return run(library, library.with_name("report.xml"), *(str(TESTS / file) for file in FILES))


@pytest.mark.parametrize("file", FILES)
def test_cuda_tests_pass_on_emulated_devices(results, file):
    for name, error in results[file]:
        assert not error, f"{name}: {error}"
    assert len(results[file]) >= FILES[file]


FAULTS = [
    # The scratch of the sums is too small.
    ("tensors_.push_back(empty(like_, {elements},", "tensors_.push_back(empty(like_, {elements / 2},"),
]


@pytest.mark.parametrize("right, wrong", FAULTS)
def test_a_fault_in_ops_cu_is_found(right, wrong, tmp_path):
    text = (CSRC / "cuda" / "ops.cu").read_text()
    assert right in text
    del re, wrong
