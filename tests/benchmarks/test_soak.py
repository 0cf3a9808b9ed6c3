"""`benchmarks/soak.py`, and that it detects growth and different results."""

import os
import subprocess
import sys

import pytest
import soak
import torch
from fork_server import ROOT, tool_environment

from ddf_mm.engine.cli import UserError

SCRIPT = ROOT / "benchmarks" / "soak.py"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")


def test_soak(tmp_path):
    result = subprocess.run(
        [sys.executable, SCRIPT, "--steps", "500"],
        cwd=tmp_path,
        env=tool_environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("steps 500, backend ")


def test_growth_is_found():
    flat = [1000, 1300] + [1500, 1503, 1501] * 10
    assert abs(soak.grown(flat)) < 0.2
    leak = [1500 + 5 * i for i in range(32)]
    assert soak.grown(leak) > 5
    assert soak.grown([*flat[:16], *(2 * n for n in flat[16:])]) > 50


def test_different_results_are_found():
    x = torch.ones(3)
    soak.same("this", [x], [x.clone()])
    with pytest.raises(UserError, match="this: the result differs"):
        soak.same("this", [x], [x + torch.finfo(x.dtype).eps])
