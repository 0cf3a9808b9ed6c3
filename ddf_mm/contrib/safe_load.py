"""Loads checkpoints of mmengine without executing code that they contain.

``mmengine.runner.checkpoint._safe_torch_load`` allows ``builtins.getattr``, which defeats torch's
restricted unpickler, supports only three of numpy's dtypes, and falls back to unrestricted
unpickling. This module is superfluous once it supports the types of :func:`load` and rejects
everything else.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import OneCycleParamScheduler


def load(filename: str, map_location=None, more_types: Sequence[type] = ()) -> object:
    """Load a file that :func:`torch.save` wrote.

    Supported are tensors and what mmengine saves besides: values of numpy 1 and 2, the log's
    history, states of schedulers, plain Python values, configs.

    Args:
        filename: Path of the file.
        map_location: As for :func:`torch.load`.
        more_types: Further harmless types to allow.

    Raises:
        pickle.UnpicklingError: The file has objects of other types, or was not written by torch.
            The message is to be preceded by the file's name.
    """
    with torch.serialization.safe_globals([*_safe_globals(), *more_types]):
        try:
            return _finished(torch.load(filename, map_location=map_location, weights_only=True))
        # A file that is not a checkpoint is interpreted as a pickle program, with any exception.
        except Exception as error:
            refused = []
            # Fails for files that are not archives of torch 1.6 or later.
            with contextlib.suppress(Exception):
                refused = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(filename))
            # torch wraps its unpickler's message in advice on how to load such a file anyway.
            first = (isinstance(error, pickle.UnpicklingError) and error.__context__) or error
            reason = str(first).strip().splitlines() or [type(first).__name__]
            raise pickle.UnpicklingError(
                f"was not loaded: it contains {', '.join(refused)}, which could execute code; "
                "checkpoints may contain tensors, numbers and text only"
                if refused
                else f"is not a checkpoint that torch can read: {reason[0].partition('. ')[0]}"
            ) from error


class _Placeholder:
    """Placeholder for an object of a pickle that must not be called or built by the unpickler;
    :func:`_finished` replaces it by ``value``."""

    def __init__(self, value: object = None) -> None:
        self.value = value


class _DType(_Placeholder):
    """A numpy dtype, rebuilt from its pickled state.

    numpy's own ``__setstate__`` does not validate flags, sizes and offsets, which determine the
    bytes of an array that are pointers.
    """

    def __init__(self, kind: str, align: bool = False, copy: bool = True) -> None:
        super().__init__(np.dtype(str(kind), align=align))

    def __setstate__(self, state: tuple) -> None:
        _, byte_order, subarray, names, fields, size, *_ = state
        if subarray is not None:
            self.value = np.dtype((subarray[0].value, subarray[1]))
        elif names is not None:
            formats, offsets = zip(*(fields[name][:2] for name in names), strict=True)
            formats = [part.value for part in formats]
            parts = dict(names=names, formats=formats, offsets=offsets, itemsize=size)
            self.value = np.dtype(parts)
        elif self.value.kind in "mM":
            unit, number = state[8][1][:2]
            if unit != b"generic":
                self.value = np.dtype(f"{self.value.kind}8[{number}{unit.decode()}]")
        if byte_order in "<>":
            self.value = self.value.newbyteorder(byte_order)


def _read(shape: tuple, dtype: np.dtype, content: bytes, order: str = "C") -> np.ndarray:
    """An array with the given bytes."""
    if dtype.hasobject:
        raise pickle.UnpicklingError(f"bytes for an array of {dtype}, which holds pointers")
    return np.ndarray(shape, dtype, content, order=order).copy(order)


class _Array(_Placeholder):
    """A numpy array."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, content = state
        order = "F" if is_fortran else "C"
        if isinstance(content, list):
            self.value = np.empty(len(content), dtype.value)
            for i, item in enumerate(content):
                self.value[i] = _finished(item)
            self.value = self.value.reshape(shape, order=order)
        else:
            self.value = _read(shape, dtype.value, content, order)


class _History(HistoryBuffer):
    """The log's history. With HistoryBuffer's own ``__setstate__`` a file could replace the
    statistics functions of the whole class."""

    value = HistoryBuffer

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({k: v for k, v in state.items() if k != "statistics_methods"})
        self.__class__ = HistoryBuffer


# Methods that mmengine's pickles refer to, by `getattr`.
_METHODS = {
    HistoryBuffer: ("min", "max", "current", "mean"),
    OneCycleParamScheduler: ("_annealing_cos", "_annealing_linear"),
}


def _method(owner: object, name: str) -> object:
    if name not in _METHODS.get(getattr(owner, "value", None), ()):
        raise pickle.UnpicklingError(f"getattr({owner!r}, {name!r}) in a checkpoint")
    return getattr(owner.value, name)


def _scalar(dtype: _DType, content: object = b"") -> object:
    return _read((), dtype.value, content)[()]


def _path(value: object) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _safe_globals() -> list[tuple[object, str]]:
    """Objects that mmengine saves, with the names by which torch's unpickler looks them up."""
    found = {
        _path(HistoryBuffer): _History,
        _path(OneCycleParamScheduler): _Placeholder(OneCycleParamScheduler),
        "builtins.getattr": _method,
        "numpy.dtype": _DType,
        "numpy.ndarray": _Array,
    }
    for core in ("numpy.core", "numpy._core"):  # of numpy 1 and 2
        found[f"{core}.multiarray._reconstruct"] = lambda *_: _Array()
        found[f"{core}.multiarray.scalar"] = _scalar
    plain = (bytes, frozenset, range, slice, datetime, timedelta, Path)
    harmless = {ConfigDict, MessageHub, *plain}
    for kind in harmless:
        found[_path(kind)] = kind
    found["pathlib.PosixPath"] = found["pathlib.WindowsPath"] = Path
    for kind in {np.bool_, *np.sctypeDict.values(), *map(type, map(np.dtype, np.typecodes["All"]))}:
        found[_path(kind)] = _Placeholder(kind)
    found["numpy.bool"] = found["numpy.bool_"] = _Placeholder(np.bool_)
    # Statistics functions registered in this process.
    for method in HistoryBuffer._statistics_methods.values():
        found.setdefault(_path(method), _Placeholder(method))
    return [(value, name) for name, value in found.items()]


def _finished(value: object, seen: set[int] | None = None) -> object:
    """``value`` with all placeholders in it replaced."""
    seen = set() if seen is None else seen
    if isinstance(value, _Placeholder):
        return value.value
    if type(value) is tuple:
        return tuple(_finished(item, seen) for item in value)
    if isinstance(value, (HistoryBuffer, MessageHub)):
        _finished(vars(value), seen)
    if isinstance(value, (dict, list)) and id(value) not in seen:
        seen.add(id(value))
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            value[key] = _finished(item, seen)
    return value
