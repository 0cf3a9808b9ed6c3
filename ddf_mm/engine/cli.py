"""Command line conventions of ``tools/``: common options and one-line error messages."""

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from mmengine.config import DictAction

from ddf_mm.contrib.gloo import destroy_process_group
from ddf_mm.contrib.memory import keep_memory

TRACEBACK_VARIABLE = "DDF_MM_TRACEBACK"

EPILOG = (
    "An error is reported in one line on stderr, which names the step that failed, and the exit "
    "status is 2 (command line) or 1 (anything else). A traceback precedes the line if the error "
    f"occurred during training iterations, or with {TRACEBACK_VARIABLE}=1 in the environment."
)

CONFIG_OPTIONS = (
    "override settings of the config, merged before any other option takes effect. A list is "
    'KEY="[a,b]" or KEY=a,b, a nested one KEY="[(a,b),(c,d)]", quoted and without white space'
)
# Ranks other than 0 wait this many seconds before they report a failure, so that a failure of all
# ranks is reported once: the launcher ends the waiting ranks when rank 0 exits.
RANK_ZERO_SECONDS = 10.0
# Longest text of an exception in a message; some list every weight of a model.
_MOST_CHARACTERS = 1000
# The attribute of an error that holds the arguments of its innermost phase.
_PHASE = "_ddf_mm_phase"


class UserError(Exception):
    """An error that the user can correct; the message is one line: what was given, what is needed.
    The exit status of the tool is 2 for errors of the command line, otherwise 1."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def phase(doing: str, about: str = "", steps: bool = False) -> Iterator[None]:
    """Name the step that a block performs (``doing``), for the message of an error raised in it; of
    nested blocks the innermost is reported. ``about`` has details such as the files that are read.
    ``steps``: training iterations, whose errors may be bugs and are reported with a traceback."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, _PHASE):
            setattr(error, _PHASE, (doing, about, steps))
        raise


class ConfigOptions(DictAction):
    """mmengine's ``DictAction``, but syntax errors are reported by the parser."""

    def __init__(self, option_strings, dest, nargs="+", metavar="KEY=VALUE", help=CONFIG_OPTIONS):
        super().__init__(option_strings, dest, nargs, metavar=metavar, help=help)

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
    """An ``argparse`` parser that reports an error in one line, once per distributed job."""

    def __init__(self, **kwargs):
        kwargs.setdefault("epilog", EPILOG)
        super().__init__(**kwargs)

    def error(self, message: str):
        _wait_for_rank_zero()
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
    parser.add_argument("--cfg-options", action=ConfigOptions)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how the processes of a distributed job are started; on a machine without an "
        "accelerator they communicate by gloo",
    )
    # The spelling that `torch.distributed.launch` passes depends on its version.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def wants_traceback() -> bool:
    """Whether the environment asks for the full traceback of every error."""
    return os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0")


def rank() -> int:
    """Rank of this process from the launcher's variables, also before there is a process group."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def _wait_for_rank_zero() -> None:
    if rank() != 0:
        time.sleep(RANK_ZERO_SECONDS)


def _one_line(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}…"


def summarize(problems: dict[str, list[str]], most: int) -> str:
    """One line that lists at most ``most`` names for each problem; empty if there are none."""
    parts = []
    for kind, names in problems.items():
        more = f" and {len(names) - most} more" if len(names) > most else ""
        parts += [f"{kind}: {', '.join(names[:most])}{more}"] if names else []
    return "; ".join(parts)


def _text(error: BaseException) -> str:
    return ": ".join(filter(None, [type(error).__name__, _one_line(error)]))


def describe(error: Exception) -> str:
    """One line with the step that failed, the error, and its first cause unless the error's text
    includes it."""
    if isinstance(error, UserError):
        # If a data loader's worker raised it, its traceback precedes the message.
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
    """Run a tool and report its failure in one line on stderr that starts with the tool's name.

    A traceback precedes the line if requested, or if the error was raised outside of all phases or
    during training iterations. Ranks other than 0 report only after ``RANK_ZERO_SECONDS``."""
    keep_memory()
    try:
        main()
    except Exception as error:
        _wait_for_rank_zero()
        known = isinstance(error, UserError) or not getattr(error, _PHASE, (True,))[-1]
        if wants_traceback() or not known:
            traceback.print_exc()
        where = f" (rank {rank()})" if rank() != 0 else ""
        print(f"{prog}: error{where}: {describe(error)}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code if isinstance(error, UserError) else 1)
    destroy_process_group()
