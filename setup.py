"""Compile policy of ddf_mm: what is compiled, by which tools, and what happens on a failure.

The package's metadata is in pyproject.toml. This file decides what is compiled and prints the
decision in one line that starts with ``ddf_mm:`` (pip shows it with ``-v``). The installation
succeeds without a compiler, a CUDA toolkit or torch; operations that are not compiled use the
formula in plain PyTorch.

Environment variables:
    DDF_MM_WITH_OPS: 0 compiles nothing; 1 fails the installation if ops that the installed torch
        can use cannot be compiled; unset, the installation continues without them.
    FORCE_CUDA: 0 does not compile CUDA ops; 1 compiles their kernels, and fails the installation if
        that is impossible; unset, the kernels are compiled if a toolkit matches torch and a GPU is
        present or TORCH_CUDA_ARCH_LIST names some. Otherwise NVRTC compiles them when they are
        needed (csrc/README.md).
    TORCH_CUDA_ARCH_LIST: as for every torch extension, or ``none`` to leave the kernels to NVRTC,
        as releases do.
    CUDA_HOME, CXX, MAX_JOBS: as for every torch extension.
    DDF_MM_SANITIZE: argument of -fsanitize= for the CPU ops, such as ``address,undefined``; builds
        no CUDA ops. tests/test_sanitizers.py shows how to load such a library.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
# Oldest torch whose stable ABI has everything that csrc/ uses; the library works with every later
# torch.
TORCH_TARGET = (2, 10)
PYTHON_TARGET = "cp310"
# With FORCE_CUDA=1 if no GPU is visible: recent data-centre GPUs, and PTX for later ones.
DEFAULT_ARCHS = "8.0;9.0+PTX"
# The other commands (metadata, sdist) compile nothing, and importing torch takes seconds.
BUILD_COMMANDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


class NoOps(Exception):
    """The ops, or the CUDA ops, cannot be compiled here; has the reason and a remedy."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}, {remedy}")
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True)
class CudaToolkit:
    home: Path
    version: str


def say(text: str) -> None:
    print(f"ddf_mm: {text}", flush=True)


def switch(name: str) -> bool | None:
    """The environment variable ``name`` as a switch; None when it is unset or empty."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"ddf_mm: {name} must be 0 or 1, got {value!r}")
    return {"": None, "0": False, "1": True}[value]


def require_torch() -> None:
    """Raise if torch is missing, or is pip's temporary copy for this build."""
    spec = importlib.util.find_spec("torch")
    folders = Path(spec.origin).parts if spec is not None and spec.origin else ()
    # The torch in an isolated build environment (of pip or build) is another one than the torch
    # that will load the library.
    isolated = any(folder.startswith(("pip-build-env-", "build-env-")) for folder in folders)
    if not folders or isolated:
        raise NoOps(
            "no torch in the build environment",
            "use pip install --no-build-isolation . to build them",
        )


def require_stable_abi() -> None:
    import torch

    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < TORCH_TARGET:
        raise NoOps(
            f"torch {torch.__version__} is older than {'.'.join(map(str, TORCH_TARGET))}",
            "upgrade torch to build them",
        )


def find_compiler() -> str:
    """The C++ compiler's command: CXX, or the first usual name that exists."""
    given = os.environ.get("CXX")
    for command in [given] if given else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(command)[0]):
            return command
    raise NoOps(
        f"the C++ compiler CXX={given} was not found" if given else "no C++ compiler was found",
        "install one (Debian/Ubuntu: apt-get install g++) and install again to build them",
    )


def require_ninja() -> None:
    # The environment's programs are not on PATH unless it is activated.
    scripts = sysconfig.get_path("scripts")
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), scripts])
    if shutil.which("ninja") is None:
        raise NoOps("no ninja was found", "pip install ninja and install again to build them")


def toolkit_version(home: Path) -> str | None:
    """MAJOR.MINOR of the CUDA toolkit in ``home``; None if there is no complete toolkit."""
    nvcc = home / "bin" / "nvcc"
    # nvcc on PATH may be a wrapper script in a folder without headers.
    if not nvcc.is_file() or not (home / "include" / "cuda_runtime.h").is_file():
        return None
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"release (\d+\.\d+)", answer.stdout)
    return match.group(1) if match else None


def usual_cuda_homes(version: str) -> list[Path]:
    on_path = shutil.which("nvcc")
    return [
        Path(f"/usr/local/cuda-{version}"),
        *([Path(on_path).resolve().parent.parent] if on_path else []),
        Path("/usr/local/cuda"),
    ]


def find_cuda(version: str | None) -> CudaToolkit:
    """The CUDA toolkit for a torch built with CUDA ``version`` (MAJOR.MINOR; None: a CPU build).

    If CUDA_HOME is set, no other folder is searched. Otherwise a toolkit of torch's CUDA version is
    preferred to one of the same major version, which is compatible.
    """
    if version is None:
        raise NoOps("torch is a CPU build", "install a CUDA build of torch to build them")
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [Path(given)] if given else usual_cuda_homes(version)
    found = [CudaToolkit(home, kit) for home in homes if (kit := toolkit_version(home))]
    major = version.split(".")[0]
    fitting = [kit for kit in found if kit.version.split(".")[0] == major]
    if fitting:
        return next((kit for kit in fitting if kit.version == version), fitting[0])
    remedy = f"set CUDA_HOME to a CUDA {version} toolkit to build them"
    if found:
        reason = f"the toolkit in {found[0].home} is CUDA {found[0].version}, torch has {version}"
        raise NoOps(reason, remedy)
    raise NoOps(f"no CUDA toolkit in {given}" if given else "no CUDA toolkit was found", remedy)


def toolkit_for_kernels(version: str | None) -> CudaToolkit:
    """The CUDA toolkit that compiles the kernels.

    Raises:
        NoOps: there is none, or no GPU to compile for.
    """
    import torch

    forced = switch("FORCE_CUDA")
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    toolkit = find_cuda(version)
    if archs == "none":
        raise NoOps("TORCH_CUDA_ARCH_LIST=none", "set it to GPUs to compile their kernels")
    if not (forced or archs or torch.cuda.is_available()):
        raise NoOps("no GPU is visible", "set FORCE_CUDA=1 or TORCH_CUDA_ARCH_LIST to compile them")
    return toolkit


def sources(suffix: str) -> list[str]:
    # setuptools needs paths relative to setup.py; sorted for reproducible builds.
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/**/*{suffix}"))


def plan_ops() -> tuple[list[Extension], str]:
    """The libraries to compile, and a message about them.

    Raises:
        NoOps: nothing can be compiled here.
    """
    if switch("DDF_MM_WITH_OPS") is False:
        raise NoOps("DDF_MM_WITH_OPS=0", "unset it to build them")
    cuda_sources = sources(".cu")
    by_name_sources = [path for path in sources(".cpp") if "cuda" in Path(path).parts]
    cpu_sources = [path for path in sources(".cpp") if "cuda" not in Path(path).parts]
    if not cpu_sources:
        raise NoOps("csrc has no C++ sources", "restore the folder csrc to build them")
    require_torch()
    compiler = find_compiler()
    require_ninja()
    # Last, because importing torch takes seconds.
    require_stable_abi()
    import torch

    toolkit = None
    by_name = False
    remark = ""
    sanitize = os.environ.get("DDF_MM_SANITIZE", "")
    if sanitize:
        remark = f"; instrumented by -fsanitize={sanitize}, without CUDA ops"
    elif cuda_sources and switch("FORCE_CUDA") is False:
        remark = "; no CUDA ops: FORCE_CUDA=0, unset it to build them"
    elif cuda_sources:
        try:
            toolkit = toolkit_for_kernels(torch.version.cuda)
        except NoOps as no_cuda:
            # A CPU build of torch could not use them.
            by_name = bool(by_name_sources and torch.version.cuda)
            demanded = switch("DDF_MM_WITH_OPS") and torch.version.cuda and not by_name
            if switch("FORCE_CUDA") or demanded:
                raise
            without = "CUDA ops without kernels, which NVRTC compiles" if by_name else "no CUDA ops"
            remark = f"; {without}: {no_cuda}"

    # torch reads these variables when its build tools are imported.
    os.environ["CXX"] = compiler
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit.home)
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    target = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    common = dict(
        define_macros=[("TORCH_TARGET_VERSION", target)],
        include_dirs=[str(ROOT / "csrc")],
        py_limited_api=True,
    )
    # -g0: Python's flags have -g, which more than doubles the compile time.
    # -Wno-psabi: vectors are passed only between inlined functions.
    # -fno-math-errno: vectorizes square roots.
    cxx = ["-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]
    link = []
    if sanitize:
        link = [f"-fsanitize={sanitize}"]
        cxx += ["-Og", "-g1", "-fno-omit-frame-pointer", "-DDDF_SANITIZED", *link]
        # Save most of the compile time: calls in place of inline checks, and no checks of what
        # AddressSanitizer checks as well.
        cxx += ["--param", "asan-instrumentation-with-call-threshold=0"]
        cxx += ["-fno-sanitize=null,object-size,pointer-overflow", "-fno-sanitize-recover=all"]
    libraries = [
        CppExtension(
            "ddf_mm._C",
            cpu_sources,
            extra_compile_args={"cxx": cxx},
            extra_link_args=link,
            **common,
        )
    ]
    used = f"torch {torch.__version__}, {compiler}"
    # torch's stable headers declare the getter of the current stream only with USE_CUDA.
    cuda = {**common, "define_macros": [*common["define_macros"], ("USE_CUDA", None)]}
    if by_name:
        libraries.append(
            CppExtension(
                "ddf_mm._C_cuda",
                by_name_sources,
                extra_compile_args={"cxx": cxx},
                libraries=["torch_cuda"],
                **cuda,
            )
        )
    if toolkit is None:
        return libraries, f"compiling CPU ops ({used}){remark}"
    # A separate library, so that a CPU-only torch can load the CPU ops of the same wheel.
    flags = {"cxx": cxx, "nvcc": ["-O3"]}
    libraries.append(
        CUDAExtension("ddf_mm._C_cuda", cuda_sources, extra_compile_args=flags, **cuda)
    )
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "the GPUs present")
    used += f", CUDA {toolkit.version} in {toolkit.home} for {archs}"
    return libraries, f"compiling CPU and CUDA ops ({used})"


@contextlib.contextmanager
def output_also_in(log: Path) -> Iterator[None]:
    """Also write the output of this process and its children to ``log``."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with subprocess.Popen(["tee", log], stdin=subprocess.PIPE) as tee:
        try:
            for stream in (1, 2):
                os.dup2(tee.stdin.fileno(), stream)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, old in zip((1, 2), kept, strict=True):
                os.dup2(old, stream)
                os.close(old)


def count_kernels(library: Path) -> int:
    """Number of CUDA kernels in ``library``, counting each instantiation of a template."""
    # The host stub of each kernel has a static variable, whose guard has this name.
    return len(set(re.findall(rb"_ZGVZL\d+__device_stub__\w+", library.read_bytes())))


def build_command() -> type:
    """torch's build_ext, but skips a library that fails to compile unless the ops are required."""
    from setuptools.command.build import build as Build
    from torch.utils.cpp_extension import BuildExtension

    class BuildOps(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            if self.editable_mode:
                # Not its temporary folder, so that the next build compiles only what has changed.
                build = Build(self.distribution)
                build.ensure_finalized()
                self.build_temp = build.build_temp

        def run(self) -> None:
            # Wheels include all libraries in this folder, which may be from an earlier build.
            for old in Path(self.build_lib, "ddf_mm").glob("_C*.so"):
                old.unlink()
            super().run()

        def build_extension(self, ext: Extension) -> None:
            handle, name = tempfile.mkstemp(prefix="ddf_mm_build_", suffix=".log")
            os.close(handle)
            log = Path(name)
            start = time.monotonic()
            try:
                with output_also_in(log):
                    super().build_extension(ext)
            except Exception as error:
                if switch("DDF_MM_WITH_OPS") or (switch("FORCE_CUDA") and "cuda" in ext.name):
                    raise SystemExit(
                        f"ddf_mm: compiling {ext.name} failed ({type(error).__name__});"
                        f" the log is {log}"
                    ) from error
                # setuptools then tolerates the missing file.
                ext.optional = True
                say(f"compiling {ext.name} failed, installing without it; the log is {log}")
            else:
                log.unlink()
                library = Path(self.get_ext_fullpath(ext.name))
                count = count_kernels(library) if "cuda" in ext.name else 0
                kernels = f", {count} kernels" if count else ""
                seconds = time.monotonic() - start
                say(f"compiled {ext.name} in {seconds:.0f} s{kernels}")

    return BuildOps


def main() -> None:
    if not BUILD_COMMANDS.intersection(sys.argv):
        setup()
        return
    # These commands put the libraries into the source tree: remove those of an earlier build, which
    # would remain if this one compiles none.
    if {"develop", "editable_wheel", "--inplace"}.intersection(sys.argv):
        for old in ROOT.glob("ddf_mm/_C*.so"):
            old.unlink()
    try:
        libraries, decision = plan_ops()
    except NoOps as no_ops:
        if switch("DDF_MM_WITH_OPS") or switch("FORCE_CUDA"):
            wish = "DDF_MM_WITH_OPS=1" if switch("DDF_MM_WITH_OPS") else "FORCE_CUDA=1"
            raise SystemExit(f"ddf_mm: {no_ops.reason}, but {wish}; {no_ops.remedy}") from None
        say(f"{no_ops.reason}, installing without compiled ops; {no_ops.remedy}")
        setup()
        return
    say(decision)
    setup(
        ext_modules=libraries,
        cmdclass={"build_ext": build_command()},
        options={"bdist_wheel": {"py_limited_api": PYTHON_TARGET}},
    )


if __name__ == "__main__":
    main()
