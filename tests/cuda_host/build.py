"""Compiles the CUDA sources in ``csrc`` for the host."""

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


def compile_for_host(source: Path, output: Path, csrc: Path, *options: str | Path) -> None:
    """Compiles and, if ``output`` is a library, links."""
    includes = [csrc, csrc / "cuda", HERE, TORCH / "include"]
    # The fortified longjmp aborts on jumps between fibers.
    command = [*COMPILER, "-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE"]
    command += [f"-I{path}" for path in includes]
    command += ["-c"] if output.suffix == ".o" else ["-shared"]
    command += [source, *options, *(["-ldl"] if output.suffix == ".so" else []), "-o", output]
    subprocess.run(list(map(str, command)), check=True)


def compile_kernels_for_host(output: Path, csrc: Path = CSRC) -> None:
    """Compiles all CUDA sources except ops.cu."""
    together = output.with_suffix(".cpp")
    files = [file for file in sorted(csrc.glob("cuda/*.cu")) if file.name != "ops.cu"]
    together.write_text("".join(f'#include "{file}"\n' for file in files))
    compile_for_host(together, output, csrc)


def compile_ops_for_host(
    library: Path, kernels: Path, ops: Path = CSRC / "cuda" / "ops.cu", csrc: Path = CSRC
) -> None:
    """Compiles ops.cu and the emulation of devices, and links them with the kernels."""
    together = library.with_suffix(".cpp")
    together.write_text("".join(f'#include "{file}"\n' for file in (ops, HERE / "ops_on_host.cpp")))
    macros = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    compile_for_host(together, library, csrc, *macros, "-Wl,-Bsymbolic", kernels, *libraries)
