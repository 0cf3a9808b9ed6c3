"""The options that keep_memory sets in glibc, in processes of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or torch.cuda.is_available(),
    reason="for glibc without a CUDA device",
)

# Page faults of 5 blocks of 40 MB, of which each page is written, after as many as the heap grows
# by at once, 512 MB: each may be the first to use its pages.
FAULTS = """
import resource
import torch
from ddf_mm.contrib.memory import keep_memory
print(keep_memory())
for _ in range(20):
    torch.ones(10**7)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(10**7)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


# Page faults of 20 blocks of 16 MB that lie in different parts of the heap.
HELD = """
import resource
import torch
from ddf_mm.benchmark import timing
timing.hold_heap()
print("held")
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
blocks = [torch.ones(4 * 10**6) for _ in range(20)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(script: str = FAULTS, **environment: str) -> tuple[str, int]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name != "LD_PRELOAD"
    }
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = result.stdout.split()
    return kept, int(faults)


@pytest.fixture(scope="module")
def kept() -> tuple[str, int]:
    return run()


@pytest.mark.parametrize("name, value", [("DDF_MM_KEEP_MEMORY", "0"), ("MALLOC_ARENA_MAX", "2")])
def test_large_blocks_are_used_again_unless_the_environment_turns_it_off(kept, name, value):
    returned = run(**{name: value})
    assert (kept[0], returned[0]) == ("True", "False")
    assert kept[1] < returned[1] / 5


def test_benchmarks_wait_for_no_page_faults():
    assert run(HELD)[1] < run(HELD, DDF_MM_KEEP_MEMORY="0")[1] / 100
