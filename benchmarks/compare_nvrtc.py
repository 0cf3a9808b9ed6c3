"""Compile every CUDA kernel by nvcc and by NVRTC; compare registers and instructions.

    python benchmarks/compare_nvrtc.py [--arch 75 90 120] [--source forward_float.cu ...]

Needs nvcc with cuobjdump, cuda-bindings and the compiled CUDA ops; no GPU. Prints the kernels that
differ. The exit status is 1 if NVRTC takes more than a tenth more of either, or if nvcc's kernels
are not those that calls can choose. All kernels of one architecture take about ten minutes on one
core.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from check_cuda_build import (
    CSRC,
    Kernel,
    compile_for,
    demangle,
    find_cuobjdump,
    find_nvcc,
    readable,
    usages,
)
from torch.hub import tqdm

from ddf_mm.ops import library, nvrtc


@dataclass(frozen=True)
class Size:
    registers: int
    instructions: int


def instructions(code: str) -> dict[str, int]:
    """The number of each kernel's instructions, padding included."""
    functions = (part.split("\n", 1) for part in re.split(r"\n\s*Function : ", code)[1:])
    return {n: len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+[^;]*;", body)) for n, body in functions}


def by_nvcc(nvcc: str, cuobjdump: str, arch: str, sources: list[Path]) -> dict[str, Size]:
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in tqdm(sources, desc=f"nvcc, sm_{arch}"):
            compiled = compile_for(nvcc, cuobjdump, arch, source, folder)
            counts = instructions(compiled.code)
            sizes |= {
                name: Size(usage.registers, counts[name])
                for name, usage in usages(compiled.report).items()
                if Kernel.of(name) is not None
            }
    return sizes


def missing(names: list[str]) -> list[str]:
    """What the ops can launch but is not in ``names``, and the reverse."""
    host = library.cuda_library()
    if host is None:
        raise SystemExit(f"compare_nvrtc.py: error: no CUDA ops: {library.backend_info()}")
    types = {"ddf::cuda::Half": "__half", "ddf::cuda::BFloat16": "__nv_bfloat16"}
    listed = {re.sub("|".join(types), lambda m: types[m[0]], n) for n in nvrtc.names(host)}
    return sorted(listed ^ set(names))


def by_nvrtc(cuobjdump: str, arch: str, names: list[str]) -> dict[str, Size]:
    sizes = {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        for name in tqdm(names, desc=f"NVRTC, sm_{arch}"):
            symbol, code = nvrtc.compile_kernel(name, int(arch))
            if demangle(symbol.decode()) != name:
                raise SystemExit(f"compare_nvrtc.py: error: {name} is {symbol.decode()}")
            Path(file.name).write_bytes(code)
            usage, sass = (
                subprocess.run(
                    [cuobjdump, of, file.name], text=True, capture_output=True, check=True
                ).stdout
                for of in ("-res-usage", "-sass")
            )
            (registers,) = re.findall(r"REG:(\d+)", usage)
            sizes[name] = Size(int(registers), instructions(demangle(sass))[name])
    return sizes


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["75", "90", "120"])
    parser.add_argument("--source", nargs="+", help="of csrc/cuda; by default all")
    args = parser.parse_args()
    nvcc = find_nvcc()
    cuobjdump = find_cuobjdump(nvcc)
    files = [CSRC / "cuda" / s for s in args.source or []] or sorted(CSRC.glob("cuda/*.cu"))
    faults = 0
    for arch in args.arch:
        ours = by_nvcc(nvcc, cuobjdump, arch, files)
        if not args.source and (unequal := missing(sorted(ours))):
            print(f"sm_{arch}: of nvcc or of the ops alone: {', '.join(unequal)} FAULT")
            faults += 1
        theirs = by_nvrtc(cuobjdump, arch, sorted(ours))
        differing = [(readable(n), ours[n], theirs[n]) for n in ours if ours[n] != theirs[n]]
        print(f"sm_{arch}: {len(ours)} kernels, {len(ours) - len(differing)} the same")
        for kernel, a, b in differing:
            more = max(b.registers / a.registers, b.instructions / a.instructions)
            faults += more > 1.1
            print(
                f"  {kernel}: registers {a.registers} by nvcc, {b.registers} by NVRTC; "
                f"instructions {a.instructions}, {b.instructions}{' FAULT' if more > 1.1 else ''}"
            )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
