"""Compile every CUDA kernel by nvcc and by NVRTC; compare registers and instructions.

    python benchmarks/compare_nvrtc.py [--arch 75 90 120] [--source forward_float.cu ...]

Needs nvcc with cuobjdump, cuda-bindings and the compiled CUDA ops; no GPU. Prints the kernels that
differ. The exit status is 1 if one of NVRTC's has fewer resident warps by more than a tenth, or its
hot loop executes more than a tenth more instructions for each output; or if nvcc's kernels are not
those that calls can choose. Warps are resident in whole blocks. Of a loop the longest path is
counted, as if all of a warp took the same branches: NVRTC makes copies of loops for both sides of a
branch on a kernel argument, of which one runs, and nvcc does not. The number of all instructions is
no measure for the same reason. All kernels of one architecture take about five minutes on one core.
"""

from __future__ import annotations

import argparse
import bisect
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from check_cuda_build import (
    CSRC,
    Kernel,
    compile_for,
    demangle,
    find_cuobjdump,
    find_nvcc,
    hot_lines,
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
    per_output: float | None  # executed in the hot loop; None if its outputs are not known

    def slower(self, other: Size, block_warps: int) -> bool:
        """Whether this is slower than ``other`` by more than a tenth."""
        mine, others = (resident_warps(s.registers, block_warps) for s in (self, other))
        if mine < 0.9 * others:
            return True
        return self.per_output is not None and self.per_output > 1.1 * other.per_output

    def __str__(self) -> str:
        loop = "" if self.per_output is None else f", {self.per_output:.1f} per output"
        return f"{self.registers} registers, {self.instructions} instructions{loop}"


def longest_path(lines: Sequence[tuple[int, str]]) -> int:
    """The most instructions that one iteration of a loop executes, given its lines (address,
    instruction) in the order of the code."""
    addresses = [address for address, _ in lines]
    after = [0] * (len(lines) + 1)  # the longest path from each line
    for i in reversed(range(len(lines))):
        address, text = lines[i]
        next_line = after[i + 1]
        conditional = re.match(r"@|BRA(\.\w+)*\s+!?U?P\d", text)
        if branch := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text):
            target = int(branch.group(1), 16)
            # Backwards: the next iteration, or that of a loop within, whose lines count once.
            taken = after[bisect.bisect_left(addresses, target)] if target > address else 0
            next_line = max(taken, next_line) if conditional else taken
        elif text.startswith("EXIT"):
            next_line = 0
        after[i] = 1 + next_line
    return after[0]


def sizes(code: str, registers: dict[str, int]) -> dict[str, Size]:
    """The sizes of our kernels in a disassembly."""
    functions = (part.split("\n", 1) for part in re.split(r"\n\s*Function : ", code)[1:])
    found = {}
    hot = hot_lines(code)
    for name, body in functions:
        if kernel := Kernel.of(name):
            count = len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+[^;]*;", body))
            found[name] = Size(registers[name], count, kernel.slots(longest_path(hot[name])))
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


def by_nvrtc(cuobjdump: str, arch: str, names: list[str]) -> tuple[dict[str, Size], dict[str, int]]:
    """The sizes of kernels, and the warps of their blocks, which launch bounds state."""
    found, block_warps = {}, {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        for name in tqdm(names, desc=f"NVRTC, sm_{arch}"):
            symbol, code = nvrtc.compile_kernel(name, int(arch))
            if demangle(symbol.decode()) != name:
                raise SystemExit(f"compare_nvrtc.py: error: {name} is {symbol.decode()}")
            Path(file.name).write_bytes(code)
            usage, sass, elf = (
                subprocess.run(
                    [cuobjdump, of, file.name], text=True, capture_output=True, check=True
                ).stdout
                for of in ("-res-usage", "-sass", "-elf")
            )
            (registers,) = re.findall(r"REG:(\d+)", usage)
            (threads,) = re.findall(r"EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s+0x(\w+)", elf)
            block_warps[name] = int(threads, 16) // 32
            found[name] = sizes(demangle(sass), {name: int(registers)})[name]
    return found, block_warps


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
        theirs, block_warps = by_nvrtc(cuobjdump, arch, sorted(ours))
        differing = [n for n in ours if ours[n] != theirs[n]]
        print(f"sm_{arch}: {len(ours)} kernels, {len(ours) - len(differing)} the same")
        for name in differing:
            fault = theirs[name].slower(ours[name], block_warps[name])
            faults += fault
            note = " FAULT" if fault else ""
            print(f"  {readable(name)}: {ours[name]} by nvcc; {theirs[name]} by NVRTC{note}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
