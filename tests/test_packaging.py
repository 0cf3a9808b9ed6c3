"""Contents of wheel, source archive and editable install, and that they work in another folder.

All are built from a copy of the project, without network and compiled ops.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from mmengine.config.utils import MODULE2PACKAGE

import ddf_mm
from ddf_mm.ops import nvrtc

ROOT = Path(__file__).resolve().parents[1]
# Includes what other tests write and delete at the same time.
NOT_SOURCE = shutil.ignore_patterns(
    *(".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "*.so"),
    *("build", "dist", "work_dirs"),
)
MIM_SUFFIXES = {".py", ".yml", ".json", ".sh", ".md"}
# Tools that work only in a checkout.
CHECKOUT_ONLY = {"demo.sh", "demo_scenes.sh", "gpu_check.sh"}


def run_hook(project: Path, hook: str, out: Path) -> Path:
    """The file that the build hook ``hook`` makes from ``project``."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(out)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env={**os.environ, "DDF_MM_WITH_OPS": "0"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return out / result.stdout.splitlines()[-1]


def run_python(code: str, cwd: Path, path: Path) -> list[str]:
    """The lines that ``code`` prints in ``cwd``, with ``path`` before the installed packages."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "project"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=NOT_SOURCE)
    return folder


@pytest.fixture(scope="module")
def wheel(project: Path) -> Path:
    return run_hook(project, "build_wheel", project.parent)


@pytest.fixture(scope="module")
def sdist(project: Path) -> Path:
    return run_hook(project, "build_sdist", project.parent)


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder with the wheel installed into it by pip."""
    target = wheel.parent / "target"
    command = ["install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    return target


def package_files(project: Path) -> set[str]:
    """What a wheel must hold: modules, HTML template, marker of annotations, headers of the CUDA
    kernels, and what .mim links to."""
    modules = {
        str(path.relative_to(project))
        for path in (project / "ddf_mm").rglob("*")
        if path.suffix in [".py", ".html"] and ".mim" not in path.parts
    }
    linked = {
        f"ddf_mm/.mim/{path.relative_to(project)}"
        for folder in ["configs", "tools"]
        for path in (project / folder).rglob("*")
        if path.suffix in MIM_SUFFIXES and path.name not in CHECKOUT_ONLY
    }
    headers = {
        f"ddf_mm/{path.relative_to(project)}"
        for pattern in ["csrc/*.h", "csrc/cuda/*.cuh"]
        for path in project.glob(pattern)
    }
    return modules | linked | headers | {"ddf_mm/.mim/model-index.yml", "ddf_mm/py.typed"}


def names_in(wheel: Path) -> set[str]:
    """The files of a wheel other than its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_holds_the_package_and_nothing_else(project, wheel):
    names = names_in(wheel)
    assert names == package_files(project)
    # The comparison above would hold for an empty project too.
    assert {
        "ddf_mm/ops/__init__.py",
        "ddf_mm/.mim/configs/classification/ddf-mul-resnet26_digits.py",
        "ddf_mm/.mim/configs/classification/metafile.yml",
        "ddf_mm/.mim/tools/train.py",
        "ddf_mm/.mim/tools/dist_train.sh",
        "ddf_mm/csrc/cuda/kernels.cuh",
    } <= names


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    assert f"Name: ddf-mm\nVersion: {ddf_mm.__version__}\n" in metadata
    assert "Requires-Python: >=3.10\n" in metadata
    required = re.findall(r"^Requires-Dist: (.*)$", metadata, flags=re.MULTILINE)
    always = [requirement for requirement in required if "extra ==" not in requirement]
    # Not mmcv and mmengine, whose distributions have several names; torch without an upper bound.
    assert len(always) == 1
    assert re.fullmatch(r"torch>=[\d.]+", always[0])
    extras = set(re.findall(r"^Provides-Extra: (.*)$", metadata, flags=re.MULTILINE))
    assert extras == {"classification", "cuda", "detection"}


def test_extras_allow_what_the_tests_run_on():
    """The lower bounds of the extras are the pins of requirements/."""
    pins = dict(
        line.split("==")
        for name in ["classification", "detection"]
        for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
        if "==" in line
    )
    bounds = dict(re.findall(r'"(onedl-\w+)>=([\d.]+),', (ROOT / "pyproject.toml").read_text()))
    assert len(pins) == 5
    assert bounds == pins


def test_sdist_holds_what_builds_and_tests_the_package(project, sdist, tmp_path):
    shutil.unpack_archive(sdist, tmp_path)
    (unpacked,) = tmp_path.iterdir()
    expected = {
        str(path.relative_to(project))
        for folder in ["benchmarks", "configs", "csrc", "requirements", "tests", "tools"]
        for path in (project / folder).rglob("*")
        if path.is_file()
    }
    expected |= {"Makefile", "README.md", "LICENSE", "CHANGELOG.md", "setup.py", "pyproject.toml"}
    assert not [name for name in sorted(expected) if not (unpacked / name).is_file()]
    rebuilt = run_hook(unpacked, "build_wheel", tmp_path)
    assert names_in(rebuilt) == package_files(project)


CHECK_INSTALL = """
from pathlib import Path
import mmengine.config.utils as utils
from mmengine.utils import get_installed_path
import ddf_mm, ddf_mm.ops, ddf_mm.models
print(Path(ddf_mm.__file__).parent)
print(ddf_mm.__version__)
package = get_installed_path(utils.MODULE2PACKAGE["ddf_mm"])
print(utils._get_external_cfg_base_path(package, "classification/ddf-mul-resnet26_digits.py"))
"""


def test_installed_wheel_works_from_another_folder(installed, tmp_path):
    folder, version, config = run_python(CHECK_INSTALL, tmp_path, installed)
    assert Path(folder) == installed / "ddf_mm"
    assert version == ddf_mm.__version__
    # mmengine finds the configs of this package, not those of another installation.
    assert Path(config).is_relative_to(installed)


CHECK_NVRTC = """
from ddf_mm.ops import nvrtc
print(nvrtc.HEADERS)
print(nvrtc.compile_kernel("ddf::cuda::reduce_partials<float>", 90).code[:4])
"""


@pytest.mark.skipif(
    torch.version.cuda is None or not nvrtc.is_installed(), reason="no NVRTC or no cuda-bindings"
)
def test_installed_wheel_has_the_kernels_for_nvrtc(installed, tmp_path):
    headers, code = run_python(CHECK_NVRTC, tmp_path, installed)
    assert Path(headers) == installed / "ddf_mm" / "csrc"
    assert code == r"b'\x7fELF'"


CHECK_ECOSYSTEM = """
from mmengine.config import Config
from mmengine.hub import get_config, get_model
import ddf_mm
print(get_config("ddf_mm::classification/ddf-mul-resnet50_8xb128_in1k.py").filename)
print(type(get_model("ddf_mm::classification/ddf-mul-resnet26_digits.py").backbone).__name__)
print(Config.fromfile("mine.py").model.backbone.depth)
from ddf_mm.utils import register_all_modules
register_all_modules()
import mmpretrain
print(len(mmpretrain.list_models("*ddf*")))
print(mmpretrain.ModelHub.get("ddf-mul-resnet26_digits").config.filename)
print(Config.fromfile("segmentor.py").model.type)
"""


def test_installed_wheel_serves_the_ecosystem(installed, tmp_path):
    """The hub, `_base_`, mmpretrain's zoo and `mmseg::`, without the checkout."""
    pytest.importorskip("mmpretrain")
    pytest.importorskip("mmseg")
    recipe = "classification/ddf-mul-resnet50_8xb128_in1k.py"
    (tmp_path / "mine.py").write_text(
        f'_base_ = "ddf_mm::{recipe}"\nmodel = dict(backbone=dict(depth=26))\n'
    )
    (tmp_path / "segmentor.py").write_text(
        '_base_ = "mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py"\n'
    )
    printed = run_python(CHECK_ECOSYSTEM, tmp_path, installed)
    # OneDL's mmpretrain prints lines too.
    *_, config, backbone, depth, number, named, segmentor = [
        line for line in printed if "OneDL" not in line
    ]
    configs = installed / "ddf_mm" / ".mim" / "configs"
    assert Path(config) == configs / recipe
    assert (backbone, depth, segmentor) == ("DDFResNet", "26", "EncoderDecoder")
    assert int(number) == len(list((configs / "classification").glob("*.py")))
    assert Path(named).is_relative_to(configs)


def test_installed_tools_run(installed, tmp_path):
    script = installed / "ddf_mm" / ".mim" / "tools" / "train.py"
    result = subprocess.run(
        [sys.executable, script, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "--work-dir" in result.stdout


def test_editable_install_works_from_another_folder(project, tmp_path):
    # As pip installs it: unpacked into a folder whose .pth files Python reads at startup.
    site = tmp_path / "site"
    with zipfile.ZipFile(run_hook(project, "build_editable", tmp_path)) as archive:
        archive.extractall(site)
    # This project's own editable install must not be found first.
    code = (
        "import site, sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        f"site.addsitedir({str(site)!r})\n"
    )
    folder, _, config = run_python(code + CHECK_INSTALL, tmp_path, site)
    assert Path(folder) == project / "ddf_mm"
    assert Path(config).is_relative_to(project)


def test_mmengine_looks_beside_the_imported_package():
    """The official mmengine looks for a distribution first.

    It assumes that the package is in the folder of the distribution's metadata, which is wrong for
    an editable install. Without a distribution of this name it looks for the module.
    """
    with pytest.raises(PackageNotFoundError):
        distribution(MODULE2PACKAGE["ddf_mm"])


def test_mim_links_lead_to_the_top_level():
    for name in ["configs", "tools", "model-index.yml"]:
        link = ROOT / "ddf_mm" / ".mim" / name
        assert os.readlink(link) == f"../../{name}"
        assert link.exists()
    assert os.readlink(ROOT / "ddf_mm" / "csrc") == "../csrc"
