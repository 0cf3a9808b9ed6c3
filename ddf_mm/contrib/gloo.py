"""Distributed training on a CPU.

For mmengine: superfluous once ``mmengine.dist.init_dist(launcher, backend="gloo")`` leaves
``torch.cuda.set_device`` out on a machine without a GPU. Today it asks for a CUDA device there,
whatever the backend.
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

    A runner of mmengine leaves a group alone that exists.

    Args:
        launcher: ``'pytorch'``, ``'slurm'`` or ``'mpi'``, whose variables are in the environment.
        **dist_cfg: Of the config's ``env_cfg``; the backend in it is replaced.
    """
    # Fixes the system's own start method for processes, which init_dist would replace by `spawn`.
    multiprocessing.get_start_method()
    # Without it, init_dist divides by the number of GPUs.
    os.environ.setdefault("SLURM_LOCALID", "0")
    with mock.patch.object(torch.cuda, "set_device"):
        init_dist(launcher, **{**dist_cfg, "backend": "gloo"})


def destroy_process_group() -> None:
    """End the process group, if there is one, after what still uses it.

    The runner and its model refer to each other, so they outlive the last name of theirs. A
    ``DistributedDataParallel`` that is freed when the interpreter ends, after its group, may end
    the process by SIGABRT.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
