"""Starts the processes of ``tools/dist_*.sh``: ``python -m ddf_mm.engine.torchrun N SCRIPT …``.

It is ``torchrun`` with OpenMMLab's environment variables (NNODES, NODE_RANK, MASTER_ADDR, PORT)
and without a traceback of its own: the processes have said on stderr what went wrong before their
launcher learns that one of them failed, and its report would bury that.
"""

import logging
import os
import signal
import sys

from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from ddf_mm.engine.cli import wants_traceback


def share_cores(processes: int) -> None:
    """Divide this machine's cores among the processes, unless the environment has done so. With
    torchrun's default of one thread each, most of a CPU would idle.

    Args:
        processes (int): How many processes this machine runs.
    """
    available = getattr(os, "sched_getaffinity", None)
    cores = len(available(0)) if available else os.cpu_count() or 1
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ.setdefault("MKL_NUM_THREADS", threads)


def main(argv: list[str]) -> None:
    """Run a script in several processes; exit with the status of the first one that fails.

    Args:
        argv (list[str]): Number of processes on this machine, path of the script, its arguments.
    """
    if len(argv) < 2 or not argv[0].isdecimal() or int(argv[0]) == 0:
        given = argv[0] if argv else ""
        print(
            f"torchrun: error: the number of processes (GPUS) must be positive, got {given!r}",
            file=sys.stderr,
        )
        sys.exit(2)
    processes, *script = argv
    share_cores(int(processes))
    environment = os.environ.get
    options = [
        f"--nproc_per_node={processes}",
        f"--nnodes={environment('NNODES', '1')}",
        f"--node_rank={environment('NODE_RANK', '0')}",
        f"--master_addr={environment('MASTER_ADDR', '127.0.0.1')}",
        f"--master_port={environment('PORT', '29500')}",
    ]
    if wants_traceback():
        return torchrun(options + script)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun(options + script)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"torchrun: error: {name} ended rank {rank}", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except DistNetworkError as error:
        line = " ".join(str(error).split())
        print(f"torchrun: error: {line} (set PORT to choose another port)", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
