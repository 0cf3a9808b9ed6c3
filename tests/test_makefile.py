"""What `make` installs when, and the errors of the installer.

No package is installed: the Makefile runs with a fake requirements/install.sh, and install.sh with
a fake Python.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Records the requested part; fails for the part named in the file `fails`.
RECORDER = """
echo "$1" >> calls
mkdir -p "$VENV/bin"
for tool in python ruff clang-format mypy torch-abi-audit auditwheel; do
  printf '#!/bin/sh\\n' > "$VENV/bin/$tool"
  chmod +x "$VENV/bin/$tool"
done
! grep -qsx "$1" fails
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    (tmp_path / "requirements" / "install.sh").write_text(RECORDER)
    for folder in ["tools", "tests"]:
        (tmp_path / folder).mkdir()
    (tmp_path / "tests" / "test_installed.sh").write_text('echo "$1 beside $VENV"\n')
    (tmp_path / "tools" / "demo.sh").write_text('echo "demo with $PYTHON"\n')
    (tmp_path / "tools" / "demo_scenes.sh").write_text('echo "$1 with $PYTHON"\n')
    for name in ["setup.py", "pyproject.toml"]:
        (tmp_path / name).touch()
    return tmp_path


def make(checkout: Path, *arguments: str, succeeds: bool = True) -> list[str]:
    """The parts that ``make arguments`` installs."""
    calls = checkout / "calls"
    calls.unlink(missing_ok=True)
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "VENV")}
    result = subprocess.run(
        ["make", *arguments], cwd=checkout, env=env, text=True, capture_output=True, check=False
    )
    assert (result.returncode == 0) == succeeds, result.stdout + result.stderr
    return calls.read_text().split() if calls.exists() else []


def change(path: Path) -> None:
    later = time.time() + 10
    os.utime(path, (later, later))


PACKAGE = ["venv", "build", "package"]
DEMO = ["venv", "build", "classification", "package"]
SCENES = ["venv", "toolchain", "build", "classification", "package", "detection"]
TEST = ["venv", "toolchain", "build", "classification", "package", "detection", "dev"]


@pytest.mark.parametrize(
    "target, parts",
    [
        ("demo", DEMO),
        ("demo-detection", SCENES),
        ("demo-segmentation", SCENES),
        ("test", TEST),
        ("test-fast", [*PACKAGE, "dev"]),
        ("test-floor-torch", [*PACKAGE, "floor-torch"]),
        ("test-oldest-torch", [*PACKAGE, "oldest-torch"]),
        ("test-newest-torch", [*PACKAGE, "newest-torch"]),
        ("compare-nvrtc", PACKAGE),
        ("wheel", ["venv", "build", "release"]),
        ("docs", [*DEMO, "dev"]),
        ("lint", ["venv", "dev"]),
        ("format", ["venv", "dev"]),
    ],
)
def test_installs_what_the_target_needs_once(checkout, target, parts):
    assert make(checkout, target) == parts
    assert make(checkout, target) == []


def test_demo_then_test_installs_the_rest(checkout):
    make(checkout, "demo")
    assert make(checkout, "test") == ["toolchain", "detection", "dev"]


@pytest.mark.parametrize(
    "changed, parts",
    [
        ("requirements/build.txt", ["build", "classification", "package", "detection"]),
        ("requirements/classification.txt", ["classification", "detection"]),
        ("requirements/detection.txt", ["detection"]),
        ("requirements/dev.txt", ["dev"]),
        ("requirements/docs.txt", ["dev"]),
        ("setup.py", ["package"]),
        ("pyproject.toml", ["package"]),
    ],
)
def test_changed_file_installs_its_part_again(checkout, changed, parts):
    make(checkout, "test")
    change(checkout / changed)
    assert make(checkout, "test") == parts


def test_failed_install_is_tried_again(checkout):
    (checkout / "fails").write_text("detection\n")
    assert make(checkout, "test", succeeds=False) == TEST[:-1]
    assert make(checkout, "test", succeeds=False) == ["detection"]
    (checkout / "fails").unlink()
    assert make(checkout, "test") == ["detection", "dev"]


def test_environment_elsewhere(checkout):
    assert make(checkout, "lint", "VENV=elsewhere/env") == ["venv", "dev"]
    assert (checkout / "elsewhere" / "env" / ".stamps" / "dev").exists()
    assert not (checkout / ".venv").exists()


def test_clean_keeps_the_environment(checkout):
    make(checkout, "test")
    for name in ["build", "ddf_mm/__pycache__"]:
        (checkout / name).mkdir(parents=True)
    (checkout / "ddf_mm" / "_C.abi3.so").touch()
    assert make(checkout, "clean") == []
    assert not (checkout / "build").exists()
    assert list((checkout / "ddf_mm").iterdir()) == []
    # The deleted library is built again.
    assert make(checkout, "test") == ["package"]


class TestInstaller:
    """install.sh with a fake Python that simulates a machine."""

    def install(
        self, folder: Path, part: str, python: str, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run install.sh with a shell script of body ``python`` as its Python."""
        stand_in = folder / "python"
        stand_in.write_text(f"#!/bin/bash\n{python}\n")
        stand_in.chmod(0o755)
        env = {name: value for name, value in os.environ.items() if name != "CI"}
        env |= {"PYTHON": str(stand_in), "VENV": str(folder / "venv"), **variables}
        return subprocess.run(
            ["bash", ROOT / "requirements" / "install.sh", part],
            cwd=folder,
            env=env,
            text=True,
            capture_output=True,
            check=False,
        )

    def check_error(self, result: subprocess.CompletedProcess[str], text: str) -> None:
        """The only output is one line that says what to do."""
        assert result.returncode != 0
        (line,) = result.stderr.splitlines()
        assert line.startswith("ddf_mm: ")
        assert text in line

    def test_no_python(self, tmp_path):
        result = self.install(tmp_path, "venv", "", PYTHON="no-such-python")
        self.check_error(result, "no-such-python was not found: install Python >= 3.10")

    def test_old_python(self, tmp_path):
        result = self.install(
            tmp_path, "venv", '[ "$1" = --version ] && echo Python 3.8.1; [ "$1" != -c ]'
        )
        self.check_error(result, "is Python 3.8.1, Python >= 3.10 is needed")

    def test_no_venv_module(self, tmp_path):
        python = 'case "$2" in *ensurepip*|*virtualenv*) exit 1;; esac'
        result = self.install(tmp_path, "venv", python)
        self.check_error(result, "(Debian/Ubuntu: apt-get install python3-venv)")

    def test_virtualenv_helps_out(self, tmp_path):
        python = 'case "$*" in *ensurepip*) exit 1;; "-m virtualenv"*) mkdir "${!#}";; esac'
        result = self.install(tmp_path, "venv", python)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "venv").is_dir()

    def test_unknown_part(self, tmp_path):
        self.check_error(self.install(tmp_path, "everything", ""), "unknown part 'everything'")

    def environment(self, folder: Path, python: str) -> None:
        """A virtual environment whose Python is a shell script of body ``python``."""
        path = folder / "venv" / "bin" / "python"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/bash\n{python}\n")
        path.chmod(0o755)

    # cv2 can be imported once the headless build is installed.
    HEADLESS = r"""
        case "$*" in
          *"import cv2"*) [ -f headless ] || { echo "ImportError: libGL.so.1" >&2; exit 1; } ;;
          *'version("opencv-python")'*) echo 4.9.0 ;;
          *"uninstall"*) echo "$*" >> pip ;;
          *opencv-python-headless==*) echo "$*" >> pip; touch headless ;;
        esac"""

    def test_opencv_without_libgl(self, tmp_path):
        self.environment(tmp_path, self.HEADLESS)
        result = self.install(tmp_path, "classification", "")
        assert result.returncode == 0, result.stderr
        (line,) = [line for line in result.stdout.splitlines() if "opencv" in line]
        assert line.endswith("opencv-python-headless 4.9.0 takes its place")
        assert (tmp_path / "pip").read_text().splitlines() == [
            "-m pip uninstall -q -y opencv-python",
            "-m pip install -q --no-deps --force-reinstall opencv-python-headless==4.9.0",
        ]

    # mmcv has no ops; `pip wheel` makes a wheel whose ops load once it is installed.
    MMCV = r"""
        case "$*" in
          *"import torch, mmcv._ext"*) [ -f ops ] || { echo "no mmcv._ext" >&2; exit 1; } ;;
          *version_info*) echo cp311 ;;
          *sysconfig*) echo "$INCLUDE" ;;
          *"pip wheel"*)
            echo build >> pip
            printf '  [1/2] c++ a.cpp\n  [2/2] c++ b.cpp\n'
            while [ "$1" != -w ]; do shift; done
            [ ! -f broken ] || exit 1
            touch "$2/onedl_mmcv-1-cp311.whl" ;;
          *"pip install"*onedl_mmcv*.whl)
            echo install >> pip
            if [ -f bad-wheel ]; then rm bad-wheel; else touch ops; fi ;;
        esac"""

    def detection(self, folder: Path) -> subprocess.CompletedProcess[str]:
        include = folder / "include"
        return self.install(
            folder, "detection", "", XDG_CACHE_HOME=str(folder / "cache"), INCLUDE=str(include)
        )

    @pytest.fixture
    def mmcv(self, tmp_path: Path) -> Path:
        """The folder where wheels of mmcv with ops are kept."""
        self.environment(tmp_path, self.MMCV)
        (tmp_path / "include").mkdir()
        (tmp_path / "include" / "Python.h").touch()
        build = (ROOT / "requirements" / "build.txt").read_text()
        (pin,) = re.findall(r"^torch==(.*)$", build, flags=re.MULTILINE)
        return tmp_path / "cache" / "ddf_mm" / "wheels" / f"torch{pin}-cp311"

    def calls(self, folder: Path) -> list[str]:
        return (folder / "pip").read_text().split() if (folder / "pip").exists() else []

    def test_mmcv_ops_are_built_once(self, tmp_path, mmcv):
        result = self.detection(tmp_path)
        assert result.returncode == 0, result.stderr
        assert "ddf_mm: mmcv's ops: 2 of 2 files compiled" in result.stdout.splitlines()
        assert self.calls(tmp_path) == ["build", "install"]
        assert [path.name for path in mmcv.glob("*.whl")] == ["onedl_mmcv-1-cp311.whl"]

        # Another environment installs the cached wheel; this one needs nothing.
        (tmp_path / "ops").unlink()
        assert self.detection(tmp_path).returncode == 0
        assert self.detection(tmp_path).returncode == 0
        assert self.calls(tmp_path) == ["build", "install", "install"]

    def test_wheel_without_loadable_ops_is_built_again(self, tmp_path, mmcv):
        mmcv.mkdir(parents=True)
        (mmcv / "onedl_mmcv-0-cp311.whl").touch()
        (tmp_path / "bad-wheel").touch()
        result = self.detection(tmp_path)
        assert result.returncode == 0, result.stderr
        assert "onedl_mmcv-0-cp311.whl has no ops that load with this torch" in result.stderr
        assert self.calls(tmp_path) == ["install", "build", "install"]

    def test_failed_build_is_an_error(self, tmp_path, mmcv):
        (tmp_path / "broken").touch()
        result = self.detection(tmp_path)
        assert result.returncode != 0
        last = result.stderr.splitlines()[-1]
        assert last == f"ddf_mm: building mmcv's ops failed; the log is {mmcv / 'build.log'}"
        assert "[2/2] c++ b.cpp" in (mmcv / "build.log").read_text()

    def toolchain(self, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        variables = {"XDG_CACHE_HOME": str(folder / "cache"), **variables}
        return self.install(folder, "toolchain", "", INCLUDE=str(folder / "include"), **variables)

    def test_toolchain(self, tmp_path, mmcv):
        compiler = tmp_path / "my-compiler"
        compiler.touch(mode=0o755)
        assert self.toolchain(tmp_path, CXX=f"{compiler} -O1").returncode == 0

        compiler.unlink()
        result = self.toolchain(tmp_path, CXX=f"{compiler} -O1")
        self.check_error(result, f"{compiler} was not found (Debian/Ubuntu: apt-get install g++)")

    def test_missing_python_headers(self, tmp_path, mmcv):
        (tmp_path / "include" / "Python.h").unlink()
        result = self.toolchain(tmp_path, CXX="bash")
        self.check_error(result, "install python3-dev (Debian/Ubuntu: apt-get install python3-dev)")

    def test_no_toolchain_is_needed_for_a_wheel_that_is_there(self, tmp_path, mmcv):
        (tmp_path / "include" / "Python.h").unlink()
        mmcv.mkdir(parents=True)
        (mmcv / "onedl_mmcv-0-cp311.whl").touch()
        assert self.toolchain(tmp_path, CXX="no-such-compiler").returncode == 0
