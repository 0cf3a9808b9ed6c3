"""Starts the processes of ``tools/dist_*.sh``: ``python -m ddf_mm.engine.torchrun N SCRIPT …``.

It is ``torchrun`` with OpenMMLab's environment variables (NNODES, NODE_RANK, MASTER_ADDR, PORT) and
without the launcher's own traceback: the processes report their errors on stderr, and torchrun's
long report would hide them.
"""

import logging
import os
import signal
import sys

from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from ddf_mm.engine.cli import wants_traceback


def _fail(message: str, code: int = 1) -> None:
    print(f"torchrun: error: {message}", file=sys.stderr)
    sys.exit(code)


def main(argv: list[str]) -> None:
    """Run ``argv[0]`` processes of the script and arguments ``argv[1:]`` on this machine; exit with
    the status of the first process that fails."""
    if len(argv) < 2 or not argv[0].isdecimal() or int(argv[0]) == 0:
        given = argv[0] if argv else ""
        _fail(f"the number of processes (GPUS) must be positive, got {given!r}", code=2)
    # torchrun's default of one thread for each process would leave most cores of a CPU idle.
    available = getattr(os, "sched_getaffinity", None)
    cores = len(available(0)) if available else os.cpu_count() or 1
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(argv[0]))))
    os.environ.setdefault("MKL_NUM_THREADS", threads)
    options = [
        f"--nproc_per_node={argv[0]}",
        f"--nnodes={os.environ.get('NNODES', '1')}",
        f"--node_rank={os.environ.get('NODE_RANK', '0')}",
        f"--master_addr={os.environ.get('MASTER_ADDR', '127.0.0.1')}",
        f"--master_port={os.environ.get('PORT', '29500')}",
    ]
    if wants_traceback():
        return torchrun(options + argv[1:])
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun(options + argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            _fail(f"{signal.Signals(-failure.exitcode).name} ended rank {rank}")
        sys.exit(failure.exitcode or 1)
    except DistNetworkError as error:
        _fail(f"{' '.join(str(error).split())} (set PORT to choose another port)")


if __name__ == "__main__":
    main(sys.argv[1:])
