from __future__ import annotations

import pytest
from mmengine.fileio import get_file_backend
from mmengine.fileio.backends.registry_utils import backends, prefix_to_backends

from ddf_mm.contrib import whole_files


@pytest.fixture
def registered():
    before = dict(backends), dict(prefix_to_backends)
    whole_files.write_whole_files()
    yield
    backends.update(before[0])
    prefix_to_backends.update(before[1])


def test_mmengine_writes_files_atomically(tmp_path, registered, monkeypatch):
    path = tmp_path / "new folder" / "file.txt"
    backend = get_file_backend(str(path), backend_args=None)
    backend.put_text("old ü", path)
    assert path.read_text("utf-8") == "old ü"
    assert path.stat().st_mode & 0o777 == 0o644

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(whole_files.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        backend.put(b"new", path)
    assert path.read_text("utf-8") == "old ü"
    assert list(path.parent.iterdir()) == [path]
