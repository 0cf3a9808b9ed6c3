"""tools/analysis/get_flops.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddf_mm.ops import backend_info

pytestmark = pytest.mark.skipif(
    backend_info()["cpu"] != "compiled", reason="the formula in plain PyTorch has no FLOP count"
)
ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


def run(*arguments: str) -> subprocess.CompletedProcess:
    tool = ROOT / "tools" / "analysis" / "get_flops.py"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, tool, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )


def rows(printed: str) -> dict[str, list[str]]:
    """The rows of the table, by the cell of the first column."""
    lines = [line.strip("│ ").split("│") for line in printed.splitlines() if "│" in line]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}


def test_classification_table():
    """Figures of ResNet: He et al. count 3.8 and 7.6 GMAC with the stride on the first 1x1."""
    pytest.importorskip("mmpretrain")
    folder = CONFIGS / "classification"
    done = run(
        folder / "ddf-mul-resnet50_8xb128_in1k.py", folder / "ddf-add-resnet101_8xb128_in1k.py"
    )
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout) == {
        "ddf-mul-resnet50_8xb128_in1k": ["224x224", "16.84 M", "2.27", "0.012", "0.55"],
        "with ResNet-50": ["224x224", "25.56 M", "4.09", "0.000", "1.00"],
        "ddf-add-resnet101_8xb128_in1k": ["224x224", "28.15 M", "4.03", "0.020", "0.52"],
        "with ResNet-101": ["224x224", "44.55 M", "7.80", "0.000", "1.00"],
    }


def test_small_images():
    pytest.importorskip("mmpretrain")
    recipe = CONFIGS / "classification" / "ddf-mul-resnet50_8xb16_cifar10.py"
    done = run(recipe, "--shape", "32")
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout) == {
        "ddf-mul-resnet50_8xb16_cifar10": ["32x32", "14.81 M", "0.70", "0.004", "0.54"],
        "with ResNet-50": ["32x32", "23.52 M", "1.30", "0.000", "1.00"],
    }


def test_a_scoped_name_and_four_channels(tmp_path):
    pytest.importorskip("mmpretrain")
    config = tmp_path / "four.py"
    config.write_text("""
_base_ = "mmpretrain::resnet/resnet50_8xb32_in1k.py"
model = dict(backbone=dict(type="ddf_mm.DDFResNet", in_channels=4))
data_preprocessor = dict(mean=[0.0] * 4, std=[1.0] * 4, to_rgb=False)
""")
    done = run(config, "mmpretrain::resnet/resnet50_8xb32_in1k.py", "--shape", "64")
    assert done.returncode == 0, done.stderr
    table = rows(done.stdout)
    assert list(table) == ["four", "with ResNet-50", "resnet50_8xb32_in1k"]
    # The stem's 64 kernels of 7 x 7 for the fourth channel.
    twin, three = (float(table[name][1].split()[0]) for name in ("with ResNet-50", list(table)[2]))
    assert twin >= three and float(table["four"][1].split()[0]) == pytest.approx(16.85, abs=0.01)


def test_options():
    pytest.importorskip("mmpretrain")
    config = CONFIGS / "classification" / "ddf-mul-resnet26_digits.py"
    done = run(config, "--shape", "32", "--no-resnet")
    assert done.returncode == 0, done.stderr
    ((name, cells),) = rows(done.stdout).items()
    assert name == "ddf-mul-resnet26_digits"
    assert cells[0] == "32x32"
    for arguments, message in [
        (["no.py"], "config 'no.py' is not a file"),
        ([config, "--shape", "0"], "--shape takes one or two positive numbers, got [0]"),
        ([config, "--shape", "1", "2", "3"], "--shape takes one or two positive numbers"),
    ]:
        done = run(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
