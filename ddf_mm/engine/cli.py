"""Command line conventions of ``tools/``: options of mmengine, and errors that fit in one line."""

import argparse
import os
import re
import sys
import time
import traceback
from collections.abc import Callable

from mmengine.config import DictAction
from torch import distributed as dist

TRACEBACK_VARIABLE = "DDF_MM_TRACEBACK"

EPILOG = (
    "A wrong path, option, package or type name ends in one line on stderr and exit status 2 "
    f"(command line) or 1 (anything else); {TRACEBACK_VARIABLE}=1 in the environment shows the "
    "full traceback instead."
)

# A rank other than 0 that fails leaves this many seconds to rank 0 to report the same failure;
# the launcher ends the waiting rank as soon as rank 0 exits.
RANK_ZERO_SECONDS = 10.0

_UNKNOWN_TYPE = re.compile(r"^(?P<type>\S+) is not in the (?P<registry>.+?) registry")
_UNKNOWN_PATH = re.compile(r"^Failed to get (?P<type>[\w.]+)$")
_UNREADABLE_IMAGE = re.compile(r"AssertionError: failed to load image: (?P<path>.+)$", re.MULTILINE)
_EMPTY_IMAGE = "!buf.empty()"
# What the datasets of mmseg and mmpretrain raise for data that is not there.
_MISSING_DATA = re.compile(r"^(Failed to load `ann_file`|Found 0 files in subfolders of)")


class UserError(Exception):
    """A mistake on the command line, in a config or in a path, told in one line.

    Args:
        message (str): What was given and what is needed.
        exit_code (int): Exit status of the tool: 2 for the command line, 1 for anything else.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


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
    """Add the options that ``train.py`` and ``test.py`` share.

    Args:
        parser (argparse.ArgumentParser): The parser to add them to.
    """
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
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def _leave_it_to_rank_zero() -> None:
    if rank() != 0:
        time.sleep(RANK_ZERO_SECONDS)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def summarize(problems: dict[str, list[str]], most: int) -> str:
    """Say in one line which names have which problem.

    Args:
        problems (dict[str, list[str]]): The names by the kind of problem.
        most (int): Names of a kind that are shown; of the others only the number is.

    Returns:
        str: The line, without the kinds that no name has; empty if there is none.
    """
    parts = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - most} more" if len(names) > most else ""
            parts.append(f"{kind}: {', '.join(names[:most])}{more}")
    return "; ".join(parts)


def _first_import_error(error: ImportError) -> ImportError:
    # mmengine turns the failed import of a `custom_imports` module into ImportErrors that no
    # longer say what was missing.
    first, cause = error, error
    while (cause := cause.__cause__ or cause.__context__) is not None:
        if isinstance(cause, ImportError):
            first = cause
    return first


def describe(error: BaseException) -> str | None:
    """Say in one line what a user has to change, if that is what an exception is about.

    Args:
        error (BaseException): Whatever a run ended with.

    Returns:
        str | None: The line; None for anything that may be a fault of the code, whose traceback
        is worth seeing.
    """
    if isinstance(error, UserError):
        return _one_line(error)
    if isinstance(error, ImportError):
        first = _first_import_error(error)
        if not isinstance(first, ModuleNotFoundError):
            return None
        return f"{_one_line(first)}: install it, or put its folder on PYTHONPATH"
    if isinstance(error, OSError) and error.filename is not None:
        line = f"{error.strerror or type(error).__name__}: {str(error.filename)!r}"
        if not os.path.isabs(str(error.filename)):
            line += f" (a relative path starts at the current folder, {os.getcwd()!r})"
        return line
    if isinstance(error, FileNotFoundError):
        # One raised in a worker of a data loader carries the worker's traceback as its message.
        lines = [line for line in str(error).splitlines() if line.strip()] or ["file not found"]
        return _one_line(lines[-1].removeprefix("FileNotFoundError: "))
    message = str(error.args[0]) if error.args else ""
    if isinstance(error, KeyError) and (match := _UNKNOWN_TYPE.match(message)):
        return (
            f"type {match['type']!r} in the config is not in the {match['registry']} registry: "
            "check its spelling, or name the module that registers it in custom_imports"
        )
    if isinstance(error, RuntimeError) and (match := _UNKNOWN_PATH.match(message)):
        return (
            f"type {match['type']!r} in the config does not exist: check its spelling and that "
            "the package which registers it is installed"
        )
    if isinstance(error, (AssertionError, RuntimeError)) and _MISSING_DATA.match(message):
        return _one_line(message)
    return _unreadable_data(error)


def _unreadable_data(error: BaseException) -> str | None:
    """The file that a dataset or a loading transform failed on, if that is where an error is from.

    The libraries that read files name the file at best in passing: a JSON parser does not know it.
    """
    message = str(error)
    # What a worker of a data loader raises has its traceback in the text alone.
    if found := _UNREADABLE_IMAGE.search(message):
        return f"image {found['path']!r} cannot be read: it is damaged, or no image"
    if _EMPTY_IMAGE in message and "DataLoader worker" in message:
        return "an image of the data is an empty file; with num_workers=0 the message says which"
    reason = _one_line(f"{type(error).__name__}: {(message.splitlines() or [''])[0]}")
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner, results = frame.f_locals.get("self"), frame.f_locals.get("results")
        kind = type(owner).__name__
        ann_file = getattr(owner, "ann_file", None)
        if frame.f_code.co_name == "load_data_list" and isinstance(ann_file, str) and ann_file:
            return f"annotation file {ann_file!r} is not what {kind} reads ({reason})"
        if kind.startswith("Load") and isinstance(results, dict) and "img_path" in results:
            what = "annotations of image" if "Annotation" in kind else "image"
            return f"{what} {results['img_path']!r} cannot be read ({reason})"
    return None


def run(main: Callable[[], None], prog: str) -> None:
    """Run a tool; end it with one line on stderr where :func:`describe` has one.

    In a distributed job rank 0 speaks for all: another rank only reports a failure that rank 0
    did not have within ``RANK_ZERO_SECONDS``.

    Args:
        main (Callable): The tool.
        prog (str): Its name, which starts the line.
    """
    try:
        main()
    except Exception as error:
        message = None if wants_traceback() else describe(error)
        _leave_it_to_rank_zero()
        if message is None:
            raise
        where = f" (rank {rank()})" if rank() != 0 else ""
        print(f"{prog}: error{where}: {message}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code if isinstance(error, UserError) else 1)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
