"""Runs scripts in forked processes that share their imports, which take longer than the scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]

SERVER = '''
"""Reads runs, one JSON object per line, and answers each with its exit status."""
import gc
import json
import os
import runpy
import sys

PRELOAD
# The datasets collect garbage, which need not look at all that was imported.
gc.freeze()
for line in sys.stdin:
    run = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(run[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.chdir(run["cwd"])
        os.environ.update(run["env"])
        sys.argv = run["argv"]
        # As when Python starts: the folder of the script, and no other script's.
        sys.path[0] = os.path.dirname(run["argv"][0])
        code = 0
        try:
            runpy.run_path(run["argv"][0], run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
'''


def tool_environment(folder: Path) -> dict[str, str]:
    """The environment of a tool that finds this checkout and the modules in ``folder``."""
    # The toolboxes' warnings about optional parts of mmcv are not errors of the tools.
    return dict(
        os.environ,
        PYTHONPATH=os.pathsep.join([str(ROOT), str(folder)]),
        OMP_NUM_THREADS="1",
        PYTHONWARNINGS="ignore",
        CUDA_VISIBLE_DEVICES="-1",
    )


class ForkServer:
    """A process that has run ``preload`` and forks a child for each script.

    The child then is the script as ``__main__``, in ``folder / "here"``.
    """

    def __init__(self, folder: Path, preload: str) -> None:
        self.folder = folder
        (folder / "here").mkdir(exist_ok=True)
        script = folder / "server.py"
        script.write_text(SERVER.replace("PRELOAD", preload))
        self.process = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=tool_environment(folder),
        )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def run(self, script: Path, *arguments: object, env: dict | None = None) -> SimpleNamespace:
        """The exit status (negative: the signal), stdout and stderr of a script."""
        request = dict(
            argv=[str(script), *map(str, arguments)],
            cwd=str(self.folder / "here"),
            env=env or {},
            stdout=str(self.folder / "stdout.txt"),
            stderr=str(self.folder / "stderr.txt"),
        )
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        # The toolboxes print while they are imported, before the answer.
        for line in self.process.stdout:
            if line.strip().lstrip("-").isdecimal():
                break
        else:
            pytest.fail(f"the server ended with status {self.process.wait()}")
        return SimpleNamespace(
            code=int(line),
            stdout=(self.folder / "stdout.txt").read_text(),
            stderr=(self.folder / "stderr.txt").read_text(),
        )
