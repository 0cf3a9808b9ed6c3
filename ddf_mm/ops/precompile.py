"""Compiles all CUDA kernels for the cache, on a machine with a GPU or without.

    python -m ddf_mm.ops.precompile --arch 75 90 120 [--jobs N]

For containers and clusters, whose processes would compile each kernel at its first use. The cache
is that of the user, or the folder DDF_MM_KERNEL_CACHE.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from torch.hub import tqdm

from ddf_mm.ops import library, nvrtc


def architecture(text: str) -> int:
    """90 of "90" or "9.0"."""
    return int(text.replace(".", "", 1))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ddf_mm.ops.precompile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        type=architecture,
        help="compute capabilities, as 90 or 9.0; by default those of the GPUs present",
    )
    parser.add_argument("--jobs", type=int, default=1, help="kernels compiled at once")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    host = library.cuda_library()
    if host is None:
        why = library.backend_info().get("why", "torch is a CPU build")
        parser.error(f"this install has no CUDA ops: {why}")
    try:
        devices = range(torch.cuda.device_count())
        archs = sorted(
            set(args.arch)
            if args.arch
            else {nvrtc.architecture_for(*torch.cuda.get_device_capability(i)) for i in devices}
        )
        if not archs:
            parser.error("there is no GPU; --arch says for which ones to compile")
        known = nvrtc.architectures()
        if unknown := [str(arch) for arch in archs if arch not in known]:
            parser.error(
                f"NVRTC {nvrtc.version()} does not compile for {', '.join(unknown)}, but for "
                f"{', '.join(map(str, known))}"
            )
        work = [(name, arch) for arch in archs for name in nvrtc.names(host)]
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = [pool.submit(nvrtc.keep_kernel, *of) for of in work]
            try:
                # torch.hub has its own bar if tqdm is not installed, which takes no iterable.
                with tqdm(total=len(runs), unit="kernel") as bar:
                    for run in as_completed(runs):
                        run.result()
                        bar.update(1)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except (nvrtc.NoKernel, OSError) as error:
        raise SystemExit(f"ddf_mm.ops.precompile: error: {error}") from error
    print(
        f"{len(work)} kernels for {', '.join(f'sm_{a}' for a in archs)} are in "
        f"{nvrtc.cache_folder()}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
