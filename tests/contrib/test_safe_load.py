"""safe_load loads what mmengine saves with any numpy, and nothing that could execute code."""

from __future__ import annotations

import datetime
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import OneCycleParamScheduler

from ddf_mm.contrib import safe_load


def reloaded(value: object, tmp_path: Path) -> object:
    torch.save(dict(value=value), tmp_path / "a.pth")
    return safe_load.load(str(tmp_path / "a.pth"))["value"]


def example_dtypes() -> list[np.dtype]:
    kinds = [np.dtype(kind) for kind in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"]
    kinds += [np.dtype(kind) for kind in ("S3", "U3", "V3", "M8", "M8[25ns]", "m8[D]")]
    kinds += [np.dtype([("a", "<f4"), ("b", ">i2", (2,)), ("c", [("d", "U2")])])]
    kinds += [np.dtype([("a", "u1"), ("b", "f8")], align=True), np.dtype(("f4", (2, 2)))]
    return kinds + [kind.newbyteorder(">") for kind in kinds]


@pytest.mark.parametrize("dtype", example_dtypes(), ids=str)
def test_numpy_of_every_dtype(tmp_path, dtype):
    matrix = np.zeros((2, 3), dtype)
    if dtype.kind in "biufc":
        matrix[...] = np.arange(6).reshape(2, 3)
    else:
        matrix.reshape(-1).view(np.uint8)[...] = np.arange(matrix.nbytes) % 2
    for array in (matrix, np.asfortranarray(matrix), matrix[:0], matrix[0, 0:1].reshape(-1)[0:1]):
        got, (inside,) = reloaded((array, [array]), tmp_path)
        for copy in (got, inside):
            assert type(copy) is np.ndarray and copy.dtype == array.dtype
            np.testing.assert_array_equal(copy, array)
            assert copy.flags.f_contiguous == array.flags.f_contiguous
            copy[...] = array  # it may be written to
    scalar = matrix.reshape(-1)[-1]
    got = reloaded(scalar, tmp_path)
    assert got.dtype == scalar.dtype and got == scalar
    assert reloaded(dtype, tmp_path) == dtype


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_names_of_numpy_1_and_2(tmp_path, core):
    other = "numpy._core" if core == "numpy.core" else "numpy.core"
    path = tmp_path / "a.pth"
    content = pickle.dumps(dict(a=np.arange(3), b=np.float32(2)), 2)
    content = content.replace(f"{other}.multiarray".encode(), f"{core}.multiarray".encode())
    assert f"{core}.multiarray".encode() in content
    magic = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})]
    path.write_bytes(b"".join([*magic, content, pickle.dumps([], 2)]))  # torch's older format
    got = safe_load.load(str(path))
    assert got["a"].tolist() == [0, 1, 2] and type(got["b"]) is np.float32


def test_objects_strings_and_types_of_numpy(tmp_path):
    array = np.empty(3, object)
    array[:] = [1, "a", np.ones(2)]
    got = reloaded(dict(array=array, kinds=[np.float32, np.bool_, type(np.dtype("f8"))]), tmp_path)
    assert got["array"][:2].tolist() == [1, "a"] and got["array"][2].tolist() == [1, 1]
    assert got["kinds"] == [np.float32, np.bool_, type(np.dtype("f8"))]
    assert reloaded([np.str_(""), np.str_("ä"), np.bytes_(b"")], tmp_path) == ["", "ä", b""]


def test_what_mmengine_saves(tmp_path):
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    history.update(np.float64(3.0), 2)
    hub = MessageHub("a hub")  # mmengine reads these, too
    hub.update_scalar("loss", 3.0)
    plain = dict(
        metainfo=ConfigDict(palette=[dict(rgb=np.arange(3))]),
        path=Path("a/b"),
        time=datetime.datetime(2026, 1, 2),
        values=(frozenset([1]), slice(1, 2), range(3), b"", b"x", np.random.get_state()),
    )
    got = reloaded(dict(history=history, hub=hub, plain=plain), tmp_path)
    assert type(got["history"]) is HistoryBuffer and got["history"].current() == 3.0
    assert got["history"].statistics("max") == 3.0
    assert got["hub"].get_scalar("loss").current() == 3.0
    assert type(got["plain"]["metainfo"]) is ConfigDict
    np.random.set_state(got["plain"]["values"][-1])
    assert pickle.dumps(got["plain"]) == pickle.dumps(plain)


def test_metadata_of_a_state_dict_stays(tmp_path):
    weights = torch.nn.BatchNorm1d(2).state_dict()
    assert reloaded(weights, tmp_path)._metadata == weights._metadata


def test_schedulers_that_save_a_method(tmp_path):
    for name in ("_annealing_cos", "_annealing_linear"):
        method = getattr(OneCycleParamScheduler, name)
        assert reloaded(dict(anneal_func=method), tmp_path)["anneal_func"] is method


def _own_statistic(history):
    return 7


def test_statistics_are_those_of_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(HistoryBuffer, "_statistics_methods", dict(own=_own_statistic))
    history = HistoryBuffer([1.0], [1])
    assert reloaded(history, tmp_path).statistics("own") == 7
    history._statistics_methods = dict(mean=HistoryBuffer.max, current=print)
    torch.save(history, tmp_path / "a.pth")
    monkeypatch.setattr(HistoryBuffer, "_statistics_methods", {})
    with pytest.raises(pickle.UnpicklingError, match="print"):
        safe_load.load(str(tmp_path / "a.pth"))
    history._statistics_methods = dict(mean=HistoryBuffer.max)
    assert reloaded(history, tmp_path).statistics("mean") == 1
    assert HistoryBuffer._statistics_methods["mean"] is HistoryBuffer.mean


class _Reduced:
    """An object whose pickle calls a function and sets a state."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def _pointers(flags: int) -> _Reduced:
    """A float64 dtype with a field that is an object, whose address would be read from the file."""
    fields = {"a": (np.dtype("O"), 0)}
    state = (3, "<", None, ("a",), fields, 8, 8, flags)
    return _Reduced(np.dtype, "f8", False, True, state=state)


ATTACKS = {
    "getattr of an allowed class": (_Reduced(getattr, HistoryBuffer, "__init__"), "__init__"),
    "getattr of a result": (
        _Reduced(getattr, _Reduced(getattr, HistoryBuffer, "min"), "__globals__"),
        "__globals__",
    ),
    "call of a method": (_Reduced(HistoryBuffer.min, 1), ""),
    "program": (_Reduced(eval, "1"), "eval"),
    "numpy reads a file": (_Reduced(np.load, "a.npy"), "load"),
    "type of numpy called": (_Reduced(np.void, 8), ""),
    "addresses": (
        _Reduced(np.empty(0).__reduce__()[0], np.ndarray, (0,), b"b",
                 state=(1, (1,), _pointers(0), False, bytes(range(8)))),
        "holds pointers",
    ),
    "address": (
        _Reduced(np.float64(0).__reduce__()[0], _pointers(0), bytes(8)),
        "holds pointers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks(tmp_path, attack):
    value, message = ATTACKS[attack]
    with pytest.raises(pickle.UnpicklingError, match=message):
        reloaded(value, tmp_path)
