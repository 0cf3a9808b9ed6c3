"""The CPU ops built with AddressSanitizer and UndefinedBehaviorSanitizer pass the sweep.

The build is cached in build/sanitized and compiles only what has changed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ddf_cases import smaller_instruction_sets

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitized"
SETS = ["", *smaller_instruction_sets()]  # "": the largest of this processor
in_each_set = pytest.mark.parametrize("instruction_set", SETS, ids=lambda name: name or "own")

# A spatial filter with a shape of twice its memory. Its rows fill vectors of AVX-512, which leaves
# shorter ones to AVX2.
READ_TOO_FAR = """
import numpy as np, torch
from ddf_mm.ops import ddf
memory = np.zeros(9 * 160 // 2, np.float32)
claimed = np.lib.stride_tricks.as_strided(memory, (1, 9, 5, 32), (0, 640, 128, 4))
ddf(torch.ones(1, 4, 5, 32), None, torch.from_numpy(claimed))
"""
# Features not aligned to 4 bytes.
MISALIGNED = """
import numpy as np, torch
from ddf_mm.ops import ddf
memory = np.zeros(1 + 4 * 4 * 35, np.uint8)
features = torch.from_numpy(memory[1:].view(np.float32).reshape(1, 4, 5, 7))
ddf(features, torch.ones(1, 4, 9, 9), None, kernel_size=9, dilation=2, stride=3)
"""


def run(command: list[object], cwd: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


@pytest.fixture(scope="module")
def sanitized() -> dict[str, object]:
    """The environment in which Python loads the sanitized ops."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    runtimes = []
    for name in ("libasan.so", "libstdc++.so"):
        # Python is linked to neither, and they must be loaded before anything allocates or throws.
        answer = run([*compiler, f"-print-file-name={name}"], ROOT).stdout.strip()
        if not Path(answer).is_absolute():
            pytest.skip(f"{compiler[0]} has no {name}")
        runtimes.append(answer)
    folders = ["--build-lib", BUILD / "lib", "--build-temp", BUILD / "temp"]
    result = run(
        [sys.executable, "setup.py", "-q", "build", *folders],
        ROOT,
        DDF_MM_WITH_OPS=1,
        DDF_MM_SANITIZE="address,undefined",
    )
    assert result.returncode == 0, result.stdout
    return dict(
        LD_PRELOAD=" ".join(runtimes),
        # Python and torch do not free everything at exit.
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
        PYTHONPATH=BUILD / "lib",
        DDF_MM_REQUIRE_OPS=1,
    )


@in_each_set
def test_passes_the_cases_of_ddf_and_ddf_pack(sanitized, instruction_set):
    names = ["test_sweep.py", "test_pack.py"]
    command = [sys.executable, "-m", "pytest", "-q", *(ROOT / "tests" / "ops" / n for n in names)]
    # The kernels of the other types differ by the type alone, and the random cases are of all.
    cases = "(cpu or threads) and not float64 and not float16"
    if instruction_set:
        cases += " and not bfloat16"
    # Not in ROOT, whose ddf_mm would be imported first.
    result = run(
        [*command, "-k", cases, "--hypothesis-profile=sanitized"],
        BUILD,
        **sanitized,
        DDF_MM_CPU_ISA=instruction_set,
    )
    assert result.returncode == 0, result.stdout
    assert re.search(r"\b[1-9]\d\d passed", result.stdout), result.stdout


def test_passes_the_direct_calls(sanitized):
    tests = ROOT / "tests" / "ops" / "test_direct_calls.py"
    command = [sys.executable, "-m", "pytest", "-q", tests, "-k", "not out_of_memory"]
    # Copies of expanded tensors request more memory than there is.
    options = f"{sanitized['ASAN_OPTIONS']}:allocator_may_return_null=1"
    result = run(command, BUILD, **{**sanitized, "ASAN_OPTIONS": options})
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout


@in_each_set
def test_a_read_out_of_bounds_is_found(sanitized, instruction_set):
    result = run(
        [sys.executable, "-c", READ_TOO_FAR], BUILD, **sanitized, DDF_MM_CPU_ISA=instruction_set
    )
    assert result.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in result.stdout
    # The kernel's callers in the stack trace show the instruction set.
    found = set(re.findall(r"ddf::cpu::(avx512|avx2|baseline)::", result.stdout))
    assert len(found) == 1 and (not instruction_set or found == {instruction_set})


def test_undefined_behaviour_is_found(sanitized):
    result = run([sys.executable, "-c", MISALIGNED], BUILD, **sanitized)
    assert result.returncode != 0 and "runtime error: load of misaligned address" in result.stdout
