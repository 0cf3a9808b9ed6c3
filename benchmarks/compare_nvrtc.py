"""Compile every CUDA kernel by nvcc and by NVRTC; compare registers and instructions.

    python benchmarks/compare_nvrtc.py [--arch 75 90 120] [--source forward_float.cu ...]

Needs nvcc with cuobjdump, cuda-bindings and the compiled CUDA ops; no GPU. Prints the kernels that
differ. The exit status is 1 if one of NVRTC's has more than a tenth more instructions for each
output in its hot loop, or fewer resident warps by more than a tenth; or if nvcc's kernels are not
those that calls can choose. The number of all instructions is no measure, since the two compilers
unroll loops differently. All kernels of one architecture take about ten minutes on one core.
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
    hot_loops,
    readable,
    resident_warps,
    usages,
)
from torch.hub import tqdm

from ddf_mm.ops import library, nvrtc


@dataclass(frozen=True)
class Size:
    registers: int
    instructions: int  # padding included
    per_output: float | None  # instructions of the hot loop; None if its outputs are not known

    def slower(self, other: Size) -> bool:
        """Whether this is slower than ``other`` by more than a tenth."""
        if resident_warps(self.registers) < 0.9 * resident_warps(other.registers):
            return True
        return self.per_output is not None and self.per_output > 1.1 * other.per_output

    def __str__(self) -> str:
        loop = "" if self.per_output is None else f", {self.per_output:.1f} per output"
        return f"{self.registers} registers, {self.instructions} instructions{loop}"


def sizes(code: str, registers: dict[str, int]) -> dict[str, Size]:
    """The sizes of our kernels in a disassembly."""
    functions = (part.split("\n", 1) for part in re.split(r"\n\s*Function : ", code)[1:])
    found = {}
    hot = hot_loops(code)
    for name, body in functions:
        if kernel := Kernel.of(name):
            count = len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+[^;]*;", body))
            found[name] = Size(registers[name], count, kernel.slots(len(hot[name])))
    return found


def by_nvcc(nvcc: str, cuobjdump: str, arch: str, sources: list[Path]) -> dict[str, Size]:
    found: dict[str, Size] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in tqdm(sources, desc=f"nvcc, sm_{arch}"):
            compiled = compile_for(nvcc, cuobjdump, arch, source, folder)
            registers = {n: usage.registers for n, usage in usages(compiled.report).items()}
            found |= sizes(compiled.code, registers)
    return found


def missing(names: list[str]) -> list[str]:
    """What the ops can launch but is not in ``names``, and the reverse."""
    host = library.cuda_library()
    if host is None:
        raise SystemExit(f"compare_nvrtc.py: error: no CUDA ops: {library.backend_info()}")
    types = {"ddf::cuda::Half": "__half", "ddf::cuda::BFloat16": "__nv_bfloat16"}
    listed = {re.sub("|".join(types), lambda m: types[m[0]], n) for n in nvrtc.names(host)}
    return sorted(listed ^ set(names))


def by_nvrtc(cuobjdump: str, arch: str, names: list[str]) -> dict[str, Size]:
    found = {}
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
            found[name] = sizes(demangle(sass), {name: int(registers)})[name]
    return found


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
            fault = b.slower(a)
            faults += fault
            print(f"  {kernel}: {a} by nvcc; {b} by NVRTC{' FAULT' if fault else ''}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
