"""Files that are whole or not there.

For mmengine: superfluous once ``mmengine.fileio.LocalBackend.put`` and ``put_text`` write beside
their place and rename. Today they write in place, and a process that is killed leaves a part of a
checkpoint.
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
    """A new file that takes the place of another in one step, once the block has ended.

    Whatever happens before, the end of the process included, leaves the place as it was.

    Args:
        path: Where the file is to be.

    Yields:
        Where to write it meanwhile: in the same folder, with the same suffix, hidden.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    part = Path(name)
    try:
        os.close(handle)
        yield part
        # The place must not be taken by a file whose content is still on its way to the disk.
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class WholeFileBackend(LocalBackend):
    """mmengine's storage of local files, which writes each of them in one step."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes to a file and make its folder if need be."""
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            part.write_bytes(obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write text to a file and make its folder if need be."""
        self.put(obj.encode(encoding), filepath)


def write_whole_files() -> None:
    """Let mmengine, in this process, write local files in one step."""
    register_backend("local", WholeFileBackend, force=True, prefixes="")
