"""Distributed training on a CPU.

For mmengine: superfluous once ``mmengine.dist.init_dist(launcher, backend="gloo")`` does not call
``torch.cuda.set_device`` on a machine without a GPU, which it does for every backend today.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from unittest import mock

import torch
from mmengine.dist import init_dist
from torch import distributed as dist


def init_gloo(launcher: str, **dist_cfg: object) -> None:
    """Start the process group on a machine without an accelerator.

    mmengine's runners use an existing group.

    Args:
        launcher: ``'pytorch'``, ``'slurm'`` or ``'mpi'``, whose environment variables are set.
        **dist_cfg: ``env_cfg.dist_cfg`` of the config; its backend is replaced.
    """
    # Reading it sets the default start method, which init_dist would otherwise replace by `spawn`.
    multiprocessing.get_start_method()
    # Without this variable, init_dist divides by the number of GPUs.
    os.environ.setdefault("SLURM_LOCALID", "0")
    with mock.patch.object(torch.cuda, "set_device"):
        init_dist(launcher, **{**dist_cfg, "backend": "gloo"})


def destroy_process_group() -> None:
    """Destroy the process group, if there is one, after the objects that use it.

    The runner and its model refer to each other, so only the garbage collector frees them. A
    ``DistributedDataParallel`` that is freed at interpreter shutdown, after its group, may abort
    the process (SIGABRT).
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
