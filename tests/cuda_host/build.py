"""Compiles CUDA sources of ``csrc`` for the host."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
TORCH = Path(torch.__file__).parent

NEEDS_HOST = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fibers are glibc's ucontext"),
    pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler"),
]


def compile_for_host(source: Path, library: Path, csrc: Path, *options: str) -> None:
    includes = [csrc, csrc / "cuda", HERE, TORCH / "include"]
    # A jump from fiber to fiber is what the fortified longjmp looks for.
    command = [*COMPILER, "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
    command += [f"-I{path}" for path in includes]
    subprocess.run([*command, str(source), *options, "-ldl", "-o", str(library)], check=True)


def compile_ops_for_host(library: Path, csrc: Path = CSRC) -> None:
    """All that an install compiles by nvcc, with tests/cuda_host/ops_on_host.cpp, as a library."""
    files = [*sorted(csrc.glob("cuda/*.cu")), HERE / "ops_on_host.cpp"]
    together = library.with_suffix(".cpp")
    together.write_text("".join(f'#include "{file}"\n' for file in files))
    compile_for_host(
        together,
        library,
        csrc,
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DUSE_CUDA",
        "-Wno-psabi",
        "-Wl,-Bsymbolic",
        f"-L{TORCH / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    )
