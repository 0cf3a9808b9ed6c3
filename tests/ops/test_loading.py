"""Which library serves, and what is said of it: in other processes, from copies of the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from site import getsitepackages

import pytest

from ddf_mm.ops import backend_info

pytestmark = [pytest.mark.any_torch, pytest.mark.slow]
needs_libraries = pytest.mark.skipif(
    backend_info()["cpu"] != "compiled", reason="there are no libraries to install"
)

USE = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from ddf_mm.ops import backend_info, ddf
    def seen():
        return [[w.filename, str(w.message)] for w in caught if w.category is RuntimeWarning]
    at_import = seen()
    x, cf, sf = torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3), torch.ones(1, 9, 3, 3)
    total = sum(ddf(x, cf, sf).sum().item() for _ in range(2))
    print(json.dumps([at_import, seen(), backend_info(), total]))
"""


def use_in_another_process(folder: Path, **environment: str):
    """Warnings at import and at use, backend_info() and a result of the package in ``folder``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DDF_MM_")}
    result = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(folder), **environment},
        text=True,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def without_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package less its libraries."""
    folder = tmp_path_factory.mktemp("without_library")
    package = Path(sys.modules["ddf_mm"].__file__).parent
    ignored = shutil.ignore_patterns("*.so", "__pycache__", ".mim")
    shutil.copytree(package, folder / "ddf_mm", ignore=ignored)
    return folder


TOTAL = 2 * 2 * 49.0  # two calls, two channels, 49 taps inside


def test_the_reference_can_be_forced():
    folder = Path(sys.modules["ddf_mm"].__file__).parents[1]
    at_import, at_use, info, total = use_in_another_process(folder, DDF_MM_FORCE_REFERENCE="1")
    assert at_import == at_use == []
    assert info["cpu"] == info["default"] == "reference"
    assert info["why"] == "DDF_MM_FORCE_REFERENCE is set"
    assert total == TOTAL


def test_one_warning_without_the_library(without_library):
    at_import, at_use, info, total = use_in_another_process(without_library)
    assert at_import == []
    ((file, message),) = at_use
    assert file == "<string>"  # the line that called ddf
    assert "no compiled ops for cpu" in message and "pip install" in message
    assert info["cpu"] == "reference" and info["why"] in message
    assert total == TOTAL


def test_no_warning_when_the_reference_is_wanted(without_library):
    at_import, at_use, _, _ = use_in_another_process(without_library, DDF_MM_FORCE_REFERENCE="1")
    assert at_import == at_use == []


def test_a_library_that_does_not_load_costs_a_warning_only(without_library, tmp_path):
    shutil.copytree(without_library / "ddf_mm", tmp_path / "ddf_mm")
    (tmp_path / "ddf_mm" / "_C.abi3.so").write_text("no library")
    at_import, at_use, info, total = use_in_another_process(tmp_path)
    assert at_import == [] and len(at_use) == 1
    assert info["cpu"] == "reference"
    assert "_C.abi3.so does not load with torch" in info["why"]
    assert total == TOTAL


@pytest.fixture
def source(without_library, tmp_path: Path) -> Path:
    """A source folder in which nothing was compiled."""
    shutil.copytree(without_library / "ddf_mm", tmp_path / "source" / "ddf_mm")
    (tmp_path / "source" / "setup.py").touch()
    (tmp_path / "source" / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "source" / "csrc" / "cpu" / "ops.cpp").touch()
    return tmp_path / "source"


@pytest.fixture
def site(source: Path, tmp_path: Path) -> Path:
    """A folder of installed packages, with the one of that source folder."""
    shutil.copytree(source / "ddf_mm", tmp_path / "site" / "ddf_mm")
    for compiled in Path(sys.modules["ddf_mm"].__file__).parent.glob("_C*.so"):
        shutil.copy(compiled, tmp_path / "site" / "ddf_mm")
    return tmp_path / "site"


@needs_libraries
@pytest.mark.parametrize("safe_path", ["", "1"])
def test_the_libraries_of_an_install_serve_in_its_source_folder(source, site, safe_path):
    at_import, at_use, info, total = use_in_another_process(
        source, PYTHONPATH=str(site), PYTHONSAFEPATH=safe_path
    )
    assert at_import == at_use == []
    assert info["cpu"] == "compiled"
    assert total == TOTAL


@pytest.mark.parametrize(
    "changed", ["ddf_mm/version.py", "ddf_mm/layers/new.py", "csrc/cpu/ops.cpp"]
)
def test_an_install_of_other_sources_is_named(source, site, changed):
    with (source / changed).open("a") as file:
        file.write("# changed\n")
    os.utime(source / changed, (2**31, 2**31))
    at_import, at_use, info, total = use_in_another_process(source, PYTHONPATH=str(site))
    assert at_import == []
    ((_, message),) = at_use
    assert info["cpu"] == "reference" and info["why"] in message
    assert str(source) in info["why"] and str(site / "ddf_mm") in info["why"]
    assert "start Python in another folder" in info["why"]
    assert total == TOTAL


def test_a_source_folder_that_was_never_installed_says_what_to_do(source):
    package = Path("ddf_mm", "__init__.py")
    if any((Path(entry) / package).is_file() for entry in getsitepackages()):
        pytest.skip("ddf_mm is installed beside the sources")
    info = use_in_another_process(source, PYTHONPATH="")[2]
    assert info["cpu"] == "reference"
    assert "this install has no ddf_mm/_C*.so" in info["why"] and "pip install" in info["why"]
