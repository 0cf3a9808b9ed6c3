"""The stages of gpu_check.sh, with scripts that replace Python (for a GPU) and the sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
ABOUT = "2026-01-01  Some GPU  torch 2.11"
# Logs each call; fails in calls that contain $FAIL_AT; writes times like benchmark.py.
PYTHON = f"""#!/usr/bin/env bash
case "$1" in
    -) echo "{ABOUT}"; echo 9.0; exit 0 ;;
    -c)
        [[ "$2" != *backend_info* ]] || echo "backend" >> "$CALLS"
        [[ "$2" != *xdist* && ! ( -n "${{NO_PYTEST:-}}" && "$2" == *pytest* ) ]]; exit ;;
    */benchmark_table.py) exec "{sys.executable}" "$@" ;;
esac
echo "$TORCH_CUDA_ARCH_LIST $*" >> "$CALLS"
while [ $# -gt 0 ]; do
    case "$1" in
        "${{FAIL_AT:-nothing}}") echo "broken"; exit 3 ;;
        --json) cp "$REPORT" "$2" ;;
    esac
    shift
done
echo fine
"""
SANITIZER = """#!/usr/bin/env bash
[ "$2" != "${FAIL_AT:-nothing}" ] || exit 1
[[ "$*" == *"--kernel-regex kns=_ZN3ddf4cuda --error-exitcode 1"* ]] || exit 1
shift 6
"$@"
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A report of benchmark.py for one small shape."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    options = "--device cpu --shapes 1,8,4,4 --repeats 1 --peers copy --json"
    command = [sys.executable, TOOLS / "benchmark.py", "op", *options.split(), path]
    subprocess.run(command, check=True)
    return path


@pytest.fixture
def check(tmp_path, report):
    """Runs gpu_check.sh with these scripts; returns the process, OUT and the calls of Python."""
    (tmp_path / "bin").mkdir()
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    out, calls = tmp_path / "out", tmp_path / "calls"

    def run(*arguments: str, **environment: str):
        environment = {
            **os.environ,
            "PYTHON": str(tmp_path / "bin" / "python"),
            "CUDA_HOME": str(tmp_path),
            "CALLS": str(calls),
            "REPORT": str(report),
            "TORCH_CUDA_ARCH_LIST": "",
            **environment,
        }
        command = ["bash", str(TOOLS / "gpu_check.sh"), *arguments, str(out)]
        process = subprocess.run(
            command, env=environment, text=True, capture_output=True, check=False
        )
        return process, out, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_every_stage(check):
    process, out, calls = check()
    assert process.returncode == 0, process.stderr
    assert calls[0] == "none setup.py -q build_ext --inplace"
    assert "-m ddf_mm.ops.precompile --jobs" in calls[1] and calls[2] == "backend"
    assert calls[4] == "9.0 setup.py -q build_ext --inplace"
    for call in (calls[3], calls[5]):
        assert "-m pytest -q -m cuda tests/ops" in call
    assert sum("small_cases" in call for call in calls) == 3
    assert sum("benchmark.py op --device cuda" in call for call in calls) == 9
    stages = ["nvrtc", "build", "test", "memcheck", "racecheck", "synccheck", "bench"]
    for stage in stages:
        assert (out / f"gpu_check_{stage}.txt").read_text().startswith(ABOUT)
    names = {path.name for path in out.glob("*.json")}
    assert {"op_cuda_forward.json", "op_cuda_backward_kernel_size_5.json"} <= names
    assert len(names) == 9
    assert "| forward | float32 | 3 | 1 | 1,8,4,4 |" in (out / "gpu_check.md").read_text()
    with tarfile.open(out / "gpu_check.tar.gz") as archive:
        packed = {Path(name).name for name in archive.getnames()}
    assert packed == names | {f"gpu_check_{stage}.txt" for stage in stages} | {"gpu_check.md"}


def test_one_stage_alone(check):
    process, out, calls = check("test")
    assert process.returncode == 0
    assert len(calls) == 1
    assert {path.name for path in out.iterdir()} == {"gpu_check_test.txt", "gpu_check.tar.gz"}


def test_python3_is_taken_where_there_is_no_python(check, tmp_path):
    """As on a machine with Debian's or Ubuntu's Python alone."""
    folder = tmp_path / "path"
    folder.mkdir()
    for name in ("bash", "dirname", "mkdir", "tee", "tar", "gzip", "cat", "cp"):
        (folder / name).symlink_to(shutil.which(name))
    (folder / "python3").symlink_to(tmp_path / "bin" / "python")
    process, _, calls = check("test", PYTHON="", PATH=str(folder))
    assert process.returncode == 0, process.stderr
    assert len(calls) == 1


@pytest.mark.parametrize(
    "word, failed, count",
    [
        ("setup.py", "build: compiling", 2),
        ("ddf_mm.ops.precompile", "nvrtc: kernels", 1),
        ("tests/tools/test_benchmark.py", "test: CUDA tests", 2),
        ("racecheck", "racecheck: racecheck", 1),
        ("backward", "bench: op_cuda_backward_stride_2", 3),
    ],
)
def test_a_failure_is_reported_and_stops_nothing(check, word, failed, count):
    process, out, _ = check(FAIL_AT=word)
    assert process.returncode == 1
    errors = process.stderr.splitlines()
    assert len(errors) == count and f"gpu_check.sh: error: failed: {failed}" in errors
    assert (out / "gpu_check.md").exists()


def test_what_is_missing_is_said_in_one_line(check, tmp_path):
    process, _, calls = check("test", "memcheck", NO_PYTEST="1")
    assert process.returncode == 1 and not calls
    assert "test: pytest is not installed: pip install pytest" in process.stderr
    (tmp_path / "bin" / "compute-sanitizer").unlink()
    process, _, calls = check("memcheck", PATH="/usr/bin:/bin")
    assert process.returncode == 1 and not calls
    assert "compute-sanitizer was not found" in process.stderr


def test_no_gpu_is_an_error(tmp_path):
    """With the real Python; only on a machine without a GPU."""
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    command = ["bash", str(TOOLS / "gpu_check.sh"), "test", str(tmp_path)]
    process = subprocess.run(command, env=hidden, text=True, capture_output=True, check=False)
    assert process.returncode == 1
    assert "torch finds no CUDA device" in process.stderr


def test_a_word_that_is_no_stage(tmp_path):
    command = ["bash", str(TOOLS / "gpu_check.sh"), str(tmp_path), "build"]
    process = subprocess.run(command, text=True, capture_output=True, check=False)
    assert process.returncode == 2 and "at most one OUT" in process.stderr
