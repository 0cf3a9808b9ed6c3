"""What setup.py compiles and prints, on a small project with a copy of setup.py.

The builds run the hooks that pip calls, in a separate process without network.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = [
    "CUDA_HOME",
    "CUDA_PATH",
    "CXX",
    "DDF_MM_SANITIZE",
    "DDF_MM_WITH_OPS",
    "FORCE_CUDA",
    "TORCH_CUDA_ARCH_LIST",
]
COMPILED = r"ddf_mm: compiled ddf_mm\._C in \d+ s"
# Without torch headers, to compile fast.
TRIVIAL = "int ddf_mm_test() { return 0; }\n"
BROKEN = "this is not C++\n"
# Schema and kernel with the stable ABI, as in csrc/.
STABLE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

using torch::stable::Tensor;

Tensor zeros_as(const Tensor& x) {
  Tensor out = torch::stable::empty_like(x);
  torch::stable::zero_(out);
  return out;
}

STABLE_TORCH_LIBRARY(ddf_mm_policy_test, m) { m.def("zeros_as(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(ddf_mm_policy_test, CPU, m) { m.impl("zeros_as", TORCH_BOX(&zeros_as)); }
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with this setup.py and pyproject.toml, no Python code and one C++ source."""
    folder = tmp_path / "project"
    (folder / "ddf_mm").mkdir(parents=True)
    for name in ["setup.py", "pyproject.toml", "ddf_mm/version.py"]:
        shutil.copy(ROOT / name, folder / name)
    (folder / "README.md").touch()
    (folder / "ddf_mm" / "__init__.py").touch()
    add_source(folder, "csrc/cpu/kernel.cpp", TRIVIAL)
    return folder


def add_source(project: Path, name: str, text: str) -> None:
    path = project / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def build(
    project: Path, *, hook: str = "build_wheel", before: str = "", **variables: str | Path
) -> subprocess.CompletedProcess[str]:
    """Build into ``project/out`` with pip's hook, with only ``variables`` as environment."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    env.update({name: str(value) for name, value in variables.items()})
    code = f"{before}\nfrom setuptools import build_meta\nbuild_meta.{hook}('out')"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        check=False,
    )


def lines_of(result: subprocess.CompletedProcess[str]) -> list[str]:
    """The decision of a build, after checking that it succeeded."""
    assert result.returncode == 0, result.stdout
    said = [line for line in result.stdout.splitlines() if line.startswith("ddf_mm: ")]
    return [line for line in said if not re.fullmatch(COMPILED, line)]


def wheel_of(project: Path) -> zipfile.ZipFile:
    (path,) = (project / "out").glob("*.whl")
    return zipfile.ZipFile(path)


def libraries_in(wheel: zipfile.ZipFile) -> list[str]:
    return sorted(name for name in wheel.namelist() if name.endswith(".so"))


def fake_toolkit(home: Path, version: str, headers: bool = True) -> Path:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    if headers:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").touch()
    return home


@pytest.fixture
def setup_module(project: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, which does not run setup()."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("ddf_mm_setup", project / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ddf_mm_setup", module)
    spec.loader.exec_module(module)
    return module


NO_TORCH = (
    "ddf_mm: no torch in the build environment, installing without compiled ops;"
    " use pip install --no-build-isolation . to build them"
)


class TestWithoutOps:
    """Installations that compile nothing: one line says why, and the wheel is pure Python."""

    def check(self, project: Path, result: subprocess.CompletedProcess[str], line: str) -> None:
        assert lines_of(result) == [line]
        wheel = wheel_of(project)
        assert libraries_in(wheel) == []
        assert wheel.filename.endswith("-py3-none-any.whl")

    def test_no_torch(self, project):
        hidden = "import sys; sys.modules['torch'] = None"
        self.check(project, build(project, before=hidden), NO_TORCH)

    @pytest.mark.parametrize("overlay", ["pip-build-env-1a2b3c", "build-env-1a2b3c"])
    def test_torch_of_an_isolated_build(self, project, tmp_path, overlay):
        package = tmp_path / overlay / "overlay" / "lib" / "torch"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise AssertionError('torch was imported')")
        self.check(project, build(project, PYTHONPATH=package.parent), NO_TORCH)

    def test_old_torch(self, project, tmp_path):
        package = tmp_path / "site" / "torch"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("__version__ = '2.9.1+cpu'")
        line = (
            "ddf_mm: torch 2.9.1+cpu is older than 2.10, installing without compiled ops;"
            " upgrade torch to build them"
        )
        self.check(project, build(project, PYTHONPATH=package.parent), line)

    def test_no_compiler(self, project, tmp_path):
        line = (
            "ddf_mm: no C++ compiler was found, installing without compiled ops; install one"
            " (Debian/Ubuntu: apt-get install g++) and install again to build them"
        )
        self.check(project, build(project, PATH=tmp_path), line)

    def test_compiler_that_is_not_there(self, project):
        result = build(project, CXX="no-such-compiler -O1")
        line = (
            "ddf_mm: the C++ compiler CXX=no-such-compiler -O1 was not found, installing without"
            " compiled ops; install one (Debian/Ubuntu: apt-get install g++) and install again to"
            " build them"
        )
        self.check(project, result, line)

    def test_unwanted(self, project):
        line = "ddf_mm: DDF_MM_WITH_OPS=0, installing without compiled ops; unset it to build them"
        self.check(project, build(project, DDF_MM_WITH_OPS="0"), line)

    def test_no_sources(self, project):
        shutil.rmtree(project / "csrc")
        line = (
            "ddf_mm: csrc has no C++ sources, installing without compiled ops;"
            " restore the folder csrc to build them"
        )
        self.check(project, build(project), line)

    def test_no_ninja(self, setup_module, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(setup_module.sysconfig, "get_path", lambda name: str(tmp_path))
        with pytest.raises(setup_module.NoOps, match="no ninja was found, pip install ninja"):
            setup_module.require_ninja()

    def test_demanded_ops_are_an_error(self, project, tmp_path):
        result = build(project, PATH=tmp_path, DDF_MM_WITH_OPS="1")
        assert result.returncode != 0
        assert result.stdout.splitlines()[-1] == (
            "ddf_mm: no C++ compiler was found, but DDF_MM_WITH_OPS=1; install one"
            " (Debian/Ubuntu: apt-get install g++) and install again to build them"
        )
        assert not list((project / "out").glob("*.whl"))

    @pytest.mark.parametrize("name", ["DDF_MM_WITH_OPS", "FORCE_CUDA"])
    def test_unknown_switch_value(self, project, name):
        add_source(project, "csrc/cuda/kernel.cu", TRIVIAL)
        result = build(project, **{name: "yes"})
        assert result.returncode != 0
        expected = f"ddf_mm: {name} must be 0 or 1, got 'yes'"
        assert result.stdout.splitlines()[-1] == expected


def test_metadata_and_sdist_do_not_import_torch(project):
    hidden = "import sys; sys.modules['torch'] = None"
    assert lines_of(build(project, hook="build_sdist", before=hidden)) == []


def test_compiled_library_serves(project):
    add_source(project, "csrc/cpu/kernel.cpp", STABLE)
    result = build(project)
    (line,) = lines_of(result)
    assert line.startswith(f"ddf_mm: compiling CPU ops (torch {torch.__version__}, ")
    assert re.search(COMPILED, result.stdout)
    wheel = wheel_of(project)
    assert "-cp310-abi3-" in wheel.filename
    (name,) = libraries_in(wheel)
    library = wheel.extract(name, project / "unpacked")
    torch.ops.load_library(library)
    zeros = torch.ops.ddf_mm_policy_test.zeros_as(torch.ones(2, 3))
    assert torch.equal(zeros, torch.zeros(2, 3))


class TestCompileFailure:
    def test_install_goes_on_without_the_library(self, project):
        lines_of(build(project))
        assert libraries_in(wheel_of(project)) == ["ddf_mm/_C.abi3.so"]

        # The library of the previous build, still in build/, must not get into this wheel.
        add_source(project, "csrc/cpu/kernel.cpp", BROKEN)
        _, line = lines_of(build(project))
        said, _, log = line.partition("; the log is ")
        assert said == "ddf_mm: compiling ddf_mm._C failed, installing without it"
        text = Path(log).read_text()
        Path(log).unlink()
        assert "kernel.cpp:1:" in text
        assert libraries_in(wheel_of(project)) == []

    def test_editable_install_drops_the_old_library(self, project):
        library = project / "ddf_mm" / "_C.abi3.so"
        lines_of(build(project, hook="build_editable"))
        assert library.is_file()
        add_source(project, "csrc/cpu/kernel.cpp", BROKEN)
        _, line = lines_of(build(project, hook="build_editable"))
        Path(line.partition("; the log is ")[2]).unlink()
        assert not library.exists()

    def test_wheel_takes_the_objects_of_the_editable_install(self, project):
        lines_of(build(project, hook="build_editable"))
        (compiled,) = project.glob("build/temp.*/csrc/cpu/kernel.o")
        before = compiled.stat().st_mtime_ns
        lines_of(build(project))
        assert compiled.stat().st_mtime_ns == before
        add_source(project, "csrc/cpu/kernel.cpp", TRIVIAL + "\n")
        lines_of(build(project))
        assert compiled.stat().st_mtime_ns > before

    def test_demanded_ops_are_an_error(self, project):
        add_source(project, "csrc/cpu/kernel.cpp", BROKEN)
        result = build(project, DDF_MM_WITH_OPS="1")
        assert result.returncode != 0
        last = result.stdout.splitlines()[-1]
        assert last.startswith("ddf_mm: compiling ddf_mm._C failed (")
        Path(last.partition("; the log is ")[2]).unlink()


class TestCudaToolkit:
    """The toolkit that is used for a torch built with CUDA 13.0."""

    def find(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch, homes: list[Path]):
        monkeypatch.setattr(module, "usual_cuda_homes", lambda wanted: homes)
        return module.find_cuda("13.0")

    def test_same_version_is_preferred(self, setup_module, monkeypatch, tmp_path):
        homes = [fake_toolkit(tmp_path / name, name) for name in ["12.8", "13.1", "13.0"]]
        assert self.find(setup_module, monkeypatch, homes).home == tmp_path / "13.0"

    def test_same_major_version_will_do(self, setup_module, monkeypatch, tmp_path):
        homes = [fake_toolkit(tmp_path / name, name) for name in ["12.8", "13.1"]]
        assert self.find(setup_module, monkeypatch, homes).version == "13.1"

    def test_other_major_version(self, setup_module, monkeypatch, tmp_path):
        homes = [fake_toolkit(tmp_path / "11.8", "11.8")]
        with pytest.raises(setup_module.NoOps, match=r"11\.8 is CUDA 11\.8, torch has 13\.0"):
            self.find(setup_module, monkeypatch, homes)

    def test_wrapper_script_is_no_toolkit(self, setup_module, monkeypatch, tmp_path):
        homes = [fake_toolkit(tmp_path / "13.0", "13.0", headers=False), tmp_path / "absent"]
        with pytest.raises(setup_module.NoOps, match="no CUDA toolkit was found"):
            self.find(setup_module, monkeypatch, homes)

    def test_cuda_home_decides_alone(self, setup_module, monkeypatch, tmp_path):
        monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "12.8", "12.8")))
        homes = [fake_toolkit(tmp_path / "13.0", "13.0")]
        with pytest.raises(setup_module.NoOps, match="set CUDA_HOME to a CUDA 13.0 toolkit"):
            self.find(setup_module, monkeypatch, homes)

    def test_cpu_build_of_torch(self, setup_module):
        with pytest.raises(setup_module.NoOps, match="torch is a CPU build"):
            setup_module.find_cuda(None)


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is a CPU build")
class TestKernels:
    """With a toolkit: whether nvcc compiles the kernels, and for which GPUs."""

    @pytest.fixture(autouse=True)
    def sources(self, project, monkeypatch, tmp_path):
        for name in ("a.cu", "b/c.cu", "by_name.cpp"):
            add_source(project, f"csrc/cuda/{name}", TRIVIAL)
        monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda", torch.version.cuda)))

    def visible(self, monkeypatch, gpu: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)

    @pytest.mark.parametrize(
        "gpu, variables, chosen",
        [
            (True, {}, "the GPUs present"),
            (True, {"TORCH_CUDA_ARCH_LIST": "8.6;8.9+PTX"}, "8.6;8.9+PTX"),
            (False, {"TORCH_CUDA_ARCH_LIST": "8.6;8.9+PTX"}, "8.6;8.9+PTX"),
            (False, {"FORCE_CUDA": "1"}, "8.0;9.0+PTX"),
        ],
    )
    def test_compiled_ahead(self, setup_module, monkeypatch, gpu, variables, chosen):
        self.visible(monkeypatch, gpu)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        (_, cuda), sentence = setup_module.plan_ops()
        assert sentence.endswith(f" for {chosen})")
        assert os.environ.get("TORCH_CUDA_ARCH_LIST", "the GPUs present") == chosen
        assert cuda.sources == ["csrc/cuda/a.cu", "csrc/cuda/b/c.cu"]

    @pytest.mark.parametrize(
        "gpu, archs, reason",
        [(False, "", "no GPU is visible, set FORCE_CUDA=1"), (True, "none", "ARCH_LIST=none, ")],
    )
    def test_left_to_nvrtc(self, setup_module, monkeypatch, gpu, archs, reason):
        self.visible(monkeypatch, gpu)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
        (_, cuda), sentence = setup_module.plan_ops()
        assert "; CUDA ops without kernels, which NVRTC compiles: " in sentence
        assert reason in sentence
        assert cuda.sources == ["csrc/cuda/by_name.cpp"]

    def test_demanded_kernels_for_no_gpu_are_an_error(self, setup_module, monkeypatch):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "none")
        monkeypatch.setenv("FORCE_CUDA", "1")
        with pytest.raises(setup_module.NoOps, match="TORCH_CUDA_ARCH_LIST=none, set it to GPUs"):
            setup_module.plan_ops()


def test_instrumented_build(setup_module, project, monkeypatch):
    add_source(project, "csrc/cuda/kernel.cu", TRIVIAL)
    monkeypatch.setenv("DDF_MM_SANITIZE", "undefined")
    (library,), sentence = setup_module.plan_ops()
    assert sentence.endswith("; instrumented by -fsanitize=undefined, without CUDA ops")
    assert "-fsanitize=undefined" in library.extra_compile_args["cxx"]
    assert "-fsanitize=undefined" in library.extra_link_args


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is a CPU build")
class TestCudaMismatch:
    @pytest.fixture(autouse=True)
    def cuda_source(self, project):
        add_source(project, "csrc/cuda/kernel.cu", BROKEN)

    def reason(self, home: Path) -> str:
        return f"the toolkit in {home} is CUDA 9.0, torch has {torch.version.cuda}"

    def test_cpu_ops_are_compiled(self, project, tmp_path):
        home = fake_toolkit(tmp_path / "cuda", "9.0")
        (line,) = lines_of(build(project, CUDA_HOME=home))
        assert line.startswith("ddf_mm: compiling CPU ops (")
        assert f"no CUDA ops: {self.reason(home)}, set CUDA_HOME to a CUDA" in line
        assert libraries_in(wheel_of(project)) == ["ddf_mm/_C.abi3.so"]

    def test_cuda_ops_are_compiled_without_kernels(self, project, tmp_path):
        """Where there are sources for that."""
        add_source(project, "csrc/cuda/by_name.cpp", TRIVIAL)
        home = fake_toolkit(tmp_path / "cuda", "9.0")
        result = build(project, CUDA_HOME=home, DDF_MM_WITH_OPS="1")
        decision, compiled = lines_of(result)
        assert f"; CUDA ops without kernels, which NVRTC compiles: {self.reason(home)}" in decision
        assert re.fullmatch(r"ddf_mm: compiled ddf_mm\._C_cuda in \d+ s", compiled)
        wheel = wheel_of(project)
        assert libraries_in(wheel) == ["ddf_mm/_C.abi3.so", "ddf_mm/_C_cuda.abi3.so"]
        result = build(project, CUDA_HOME=home, FORCE_CUDA="1")
        assert f"ddf_mm: {self.reason(home)}, but FORCE_CUDA=1; " in result.stdout

    @pytest.mark.parametrize("wish", ["FORCE_CUDA", "DDF_MM_WITH_OPS"])
    def test_demanded_ops_are_an_error(self, project, tmp_path, wish):
        home = fake_toolkit(tmp_path / "cuda", "9.0")
        result = build(project, CUDA_HOME=home, **{wish: "1"})
        assert result.returncode != 0
        assert result.stdout.splitlines()[-1].startswith(
            f"ddf_mm: {self.reason(home)}, but {wish}=1; "
        )

    def test_cuda_ops_left_out(self, project):
        (line,) = lines_of(build(project, FORCE_CUDA="0", DDF_MM_WITH_OPS="1"))
        assert line.endswith("; no CUDA ops: FORCE_CUDA=0, unset it to build them")
