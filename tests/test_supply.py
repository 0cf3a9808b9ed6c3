"""An installation needs only torch, no compiler and no network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Includes what other tests write and delete at the same time.
NOT_SOURCE = shutil.ignore_patterns(
    *(".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "*.so"),
    *("build", "dist", "work_dirs"),
)

SMOKE = """
import json, warnings
warnings.simplefilter("ignore")
import torch
import ddf_mm
from ddf_mm.layers import DDFPack, DDFUpPack
from ddf_mm.models import DDFResNet
from ddf_mm.ops import backend_info, ddf, ddf_reference
from mmengine.config import Config

x, cf, sf = torch.randn(1, 4, 5, 6), torch.randn(1, 4, 3, 3), torch.randn(1, 9, 5, 6)
assert torch.allclose(ddf(x, cf, sf), ddf_reference(x, cf, sf), atol=1e-5)
assert DDFUpPack(8)(DDFPack(8, stride=2)(torch.randn(1, 8, 6, 6))).shape == (1, 8, 6, 6)
backbone = DDFResNet(26, stem_channels=8, base_channels=8)
backbone(torch.randn(2, 3, 32, 32))[-1].sum().backward()
with open("config.py", "w") as file:
    file.write("_base_ = 'ddf_mm::_base_/models/ddf_resnet50.py'")
assert Config.fromfile("config.py").model.backbone.depth == 50
print(json.dumps([ddf_mm.__file__, ddf_mm.__version__, backend_info()["cpu"]]))
"""

NO_NETWORK = """
import socket

def refuse(*args, **kwargs):
    raise AssertionError(f"the network was asked for: {args}")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
"""


def run(command: list[object], cwd: Path, **variables: str) -> str:
    """The output of a command, stderr first; fails if the command fails."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**kept, **variables},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr + done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "project", symlinks=True, ignore=NOT_SOURCE)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run([sys.executable, "-c", code], folder / "project")
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def installed(sdist) -> tuple[Path, str]:
    """The Python of an environment with the source archive installed, and pip's output.

    It also has the packages in the site-packages folder of this environment, which an editable
    installation of this project is not in.
    """
    folder = sdist.parent / "environment"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    missing = subprocess.run(
        [python, "-c", "import ddf_mm"], cwd=sdist.parent, capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=False,
    )  # fmt: skip
    assert "No module named 'ddf_mm'" in missing.stderr
    said = run(
        [python, "-m", "pip", "install", "-v", "--no-index", "--no-deps", "--no-build-isolation",
         sdist],
        sdist.parent,
        CXX="no-such-compiler",
    )  # fmt: skip
    return python, said


def test_source_archive_installs_without_a_compiler(installed, tmp_path):
    python, said = installed
    assert "no-such-compiler was not found, installing without compiled ops" in said
    file, version, backend = eval(run([python, "-c", SMOKE], tmp_path).splitlines()[-1])
    assert Path(file).is_relative_to(python.parents[1])
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", version)
    assert backend == "reference"


def test_nothing_asks_for_the_network(installed, tmp_path):
    python, _ = installed
    run([python, "-c", NO_NETWORK + SMOKE], tmp_path)
    asks = NO_NETWORK + "import urllib.request as r; r.urlopen('http://localhost:9')"
    with pytest.raises(AssertionError, match="the network was asked for"):
        run([python, "-c", asks], tmp_path)


def test_no_module_but_torch_is_needed_for_the_ops(installed, tmp_path):
    python, _ = installed
    block = "import sys; sys.modules.update(dict.fromkeys(['mmengine', 'mmcv', 'onnx']))\n"
    run([python, "-c", block + "import ddf_mm.ops"], tmp_path)


def test_every_requirement_has_a_pin_or_an_upper_bound():
    """A new major release of a dependency cannot break CI."""
    for path in (ROOT / "requirements").glob("*.txt"):
        for line in path.read_text().splitlines():
            if line and not line.startswith("#"):
                assert "==" in line or re.search(r">=[\d.]+,<[\d.]+(;|$)", line), (path.name, line)
