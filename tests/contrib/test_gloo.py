from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys

from fork_server import ROOT

SCRIPT = """
import multiprocessing
import weakref

from torch import distributed as dist
from torch import nn

from ddf_mm.contrib import gloo

gloo.destroy_process_group()  # there is none yet
gloo.init_gloo("pytorch", backend="nccl", timeout=60)
print(dist.get_backend(), dist.get_world_size(), multiprocessing.get_start_method())
model = nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
model.itself = [model]
reference = weakref.ref(model)
del model
gloo.destroy_process_group()
print(reference() is None, dist.is_initialized())
"""


def test_a_group_without_a_gpu_and_its_end():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    job |= dict(CUDA_VISIBLE_DEVICES="-1", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **job},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    start = multiprocessing.get_all_start_methods()[0]  # the system's own
    assert done.stdout.split() == ["gloo", "1", start, "True", "False"]
