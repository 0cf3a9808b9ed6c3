"""Command line conventions of ``tools/``: options of mmengine, and errors that fit in one line."""

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from mmengine.config import DictAction

from ddf_mm.contrib.gloo import destroy_process_group

TRACEBACK_VARIABLE = "DDF_MM_TRACEBACK"

EPILOG = (
    "An error ends in one line on stderr, which says what was being done, and exit status 2 "
    "(command line) or 1 (anything else); the traceback of one during training steps precedes it. "
    f"{TRACEBACK_VARIABLE}=1 in the environment shows that of every error."
)

# A rank other than 0 that fails leaves this many seconds to rank 0 to report the same failure;
# the launcher ends the waiting rank as soon as rank 0 exits.
RANK_ZERO_SECONDS = 10.0
# Of an error's own text; some list every weight of a model.
_MOST_CHARACTERS = 1000
# The attribute of an error that holds the arguments of its innermost phase.
_PHASE = "_ddf_mm_phase"


class UserError(Exception):
    """A mistake of a user, told in one line: what was given and what is needed.

    ``exit_code`` is the tool's: 2 for the command line, 1 for anything else.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def phase(doing: str, about: str = "", steps: bool = False) -> Iterator[None]:
    """Name what is ``doing``, for the line that an error within ends a tool with: that of its
    innermost phase, and what else is good to know ``about`` it, such as the files that are read. Of
    an error in the ``steps`` of a training, which may be a fault of the code, there is a traceback.
    """
    try:
        yield
    except Exception as error:
        if not hasattr(error, _PHASE):
            setattr(error, _PHASE, (doing, about, steps))
        raise


class ConfigOptions(DictAction):
    """mmengine's ``DictAction`` whose syntax errors are the parser's."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            key, equals, _ = value.partition("=")
            if not key or not equals:
                raise argparse.ArgumentError(self, f"{value!r} is not of the form KEY=VALUE")
            try:
                super().__call__(parser, namespace, [value], option_string)
            except (AssertionError, ValueError) as error:
                raise argparse.ArgumentError(self, f"{value!r}: {error}") from error


class ArgumentParser(argparse.ArgumentParser):
    """An ``argparse`` parser whose errors are one line, printed once per job."""

    def __init__(self, **kwargs):
        kwargs.setdefault("epilog", EPILOG)
        super().__init__(**kwargs)

    def error(self, message: str):
        _leave_it_to_rank_zero()
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``train.py`` and ``test.py`` share."""
    parser.add_argument(
        "--work-dir", help="folder of logs and checkpoints; default: work_dirs/<name of the config>"
    )
    parser.add_argument(
        "--no-pin-memory", action="store_true", help="switch pin_memory off in all data loaders"
    )
    parser.add_argument(
        "--no-persistent-workers",
        action="store_true",
        help="switch persistent_workers off in all data loaders",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=ConfigOptions,
        metavar="KEY=VALUE",
        help="override settings of the config, merged before any other option takes effect. A "
        'list is KEY="[a,b]" or KEY=a,b, a nested one KEY="[(a,b),(c,d)]"; quote it and leave '
        "out white space",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how the processes of a distributed job are started; on a machine without an "
        "accelerator they talk over gloo",
    )
    # `torch.distributed.launch` passes one spelling or the other, depending on its version.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def wants_traceback() -> bool:
    """Whether the environment asks for the full traceback of every error."""
    return os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0")


def rank() -> int:
    """The rank that the launcher gave to this process (0 without a launcher), which is known
    before a process group exists."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def _leave_it_to_rank_zero() -> None:
    if rank() != 0:
        time.sleep(RANK_ZERO_SECONDS)


def _one_line(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}…"


def summarize(problems: dict[str, list[str]], most: int) -> str:
    """Say in one line which names have which problem, of each at most so many; empty if none."""
    parts = []
    for kind, names in problems.items():
        more = f" and {len(names) - most} more" if len(names) > most else ""
        parts += [f"{kind}: {', '.join(names[:most])}{more}"] if names else []
    return "; ".join(parts)


def _text(error: BaseException) -> str:
    return ": ".join(filter(None, [type(error).__name__, _one_line(error)]))


def describe(error: Exception) -> str:
    """Say in one line what was being done, what went wrong, and what that came from if the error
    does not say it itself."""
    if isinstance(error, UserError):
        # One that a worker of a data loader raised carries its traceback before the message.
        return _one_line(str(error).rpartition("UserError: ")[2])
    first: BaseException = error
    while cause := first.__cause__ or (None if first.__suppress_context__ else first.__context__):
        first = cause
    doing, about, steps = getattr(error, _PHASE, ("", "", True))
    line = (f"while {doing}: " if doing else "") + _text(error)
    if _one_line(first) not in _one_line(error):
        line += f", from {_text(first)}"
    line += f" ({about})" if about else ""
    return line if steps or wants_traceback() else f"{line} ({TRACEBACK_VARIABLE}=1 shows where)"


def run(main: Callable[[], None], prog: str) -> None:
    """Run a tool; end it with one line on stderr, that starts with its name, if it fails, after the
    traceback if it was asked for, or if the error is of no phase or of the steps of a training.

    In a distributed job rank 0 speaks for all: another rank only reports a failure that rank 0 did
    not have within ``RANK_ZERO_SECONDS``."""
    try:
        main()
    except Exception as error:
        _leave_it_to_rank_zero()
        known = isinstance(error, UserError) or not getattr(error, _PHASE, (True,))[-1]
        if wants_traceback() or not known:
            traceback.print_exc()
        where = f" (rank {rank()})" if rank() != 0 else ""
        print(f"{prog}: error{where}: {describe(error)}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code if isinstance(error, UserError) else 1)
    destroy_process_group()
