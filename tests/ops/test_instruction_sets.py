"""The kernels for smaller instruction sets than this processor's, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ddf_cases import require_compiled, smaller_instruction_sets

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.any_torch
@pytest.mark.parametrize("name", smaller_instruction_sets())
def test_passes_the_same_tests(name):
    require_compiled("cpu")
    files = [HERE / "test_compiled.py", HERE / "test_sweep.py"]
    chosen = "cpu and (reference or every or planes or output or finite) or threads"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files, "-k", chosen],
        env={**os.environ, "DDF_MM_CPU_ISA": name, "DDF_MM_REQUIRE_OPS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert result.returncode == 0, result.stdout
