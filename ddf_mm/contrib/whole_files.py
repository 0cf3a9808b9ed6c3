"""Atomic writing of files.

For mmengine: superfluous once ``mmengine.fileio.LocalBackend.put`` and ``put_text`` write to a
temporary file and rename it. Today they write in place, and a process that is killed leaves an
incomplete checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Replaces a file atomically when the block ends.

    If an exception or the end of the process interrupts the block, ``path`` is left unchanged.

    Args:
        path: The file to create or replace.

    Yields:
        The temporary file to write, a hidden file in the same folder with the same suffix.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    part = Path(name)
    try:
        os.close(handle)
        yield part
        # The content must be on the disk before the name refers to it.
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class WholeFileBackend(LocalBackend):
    """mmengine's backend for local files, with atomic writing."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes to a file; create its folder if necessary."""
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            part.write_bytes(obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write text to a file; create its folder if necessary."""
        self.put(obj.encode(encoding), filepath)


def write_whole_files() -> None:
    """Make mmengine write local files atomically in this process."""
    register_backend("local", WholeFileBackend, force=True, prefixes="")
