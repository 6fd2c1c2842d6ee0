"""Arrays in external pickles, read by an unpickler that can build nothing else.

A pickle is a program. Here it has only the operations that build numbers, strings, lists, tuples and dictionaries. What
the pickles of NumPy call is replaced by methods and placeholders of this module, which check every argument; a pickle
can set the state of placeholders only. Anything else raises before it has an effect.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
import reprlib
import sys
from collections.abc import Callable
from pathlib import Path
from struct import unpack
from typing import Any

import numpy as np

# The operations of plain values in Python 2 and 3, in the protocols 0 to 5.
OPERATIONS = {
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET",
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
}  # fmt: skip
_NAMES = {ord(operation.code): operation.name for operation in pickletools.opcodes}
_PLAIN = re.compile(r"[iuf][1248]|[SU][1-9]\d{0,3}")  # numbers and strings: no pointers, fields or Python objects
_NDARRAY = object()  # replaces numpy.ndarray, which a pickle names but does not call


class _Dtype:
    """Placeholder of a ``numpy.dtype`` of plain values."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _PLAIN.fullmatch(code):
            shown = reprlib.repr(code)  # a list may hold the same list many times
            raise pickle.UnpicklingError(f"it holds an array of {shown}, which are not plain numbers or strings")
        self.code, self.order = code, "="

    def set_state(self, state: Any) -> None:
        is_plain = isinstance(state, tuple) and len(state) == 8 and state[2:5] == (None, None, None)
        if not is_plain or state[0] != 3 or state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError("it holds an array of more than plain numbers or strings")
        self.order = state[1]


class _Array:
    """Placeholder of a ``numpy.ndarray``, which is ``array`` once it is built."""

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray[Any, Any] | None = None) -> None:
        self.array = array


class _Operations(dict[int, Any]):
    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"it has the operation {_NAMES.get(code, code)}, which plain arrays do not need")


def _with_plain_keys(operation: int, places: slice) -> Callable[[Any], None]:
    """An operation that fills a dictionary, with keys whose hash takes no longer than reading them did."""
    load = pickle._Unpickler.dispatch[operation]

    def loaded(machine: Any) -> None:
        if not all(isinstance(key, str | bytes | int | float | None) for key in machine.stack[places]):
            raise pickle.UnpicklingError("it has keys that are no plain numbers or texts")
        load(machine)

    return loaded


class _Arrays(pickle._Unpickler):  # in Python: its operations can be chosen, its memory is limited by the file
    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    dispatch = _Operations(
        {code: pickle._Unpickler.dispatch[code] for code, name in _NAMES.items() if name in OPERATIONS}
    )

    def __init__(self, file: _File) -> None:
        super().__init__(file, encoding="latin1")
        self.bytes_left = file.size  # of strings that can be encoded; the pickles of NumPy encode each byte once
        self.known: dict[tuple[str, str], Any] = {
            **{(f"numpy.{core}.multiarray", "_reconstruct"): self.reconstruct for core in ("core", "_core")},
            **{(f"numpy.{core}.multiarray", "scalar"): self.scalar for core in ("core", "_core")},
            **{(f"numpy.{core}.numeric", "_frombuffer"): self.array for core in ("core", "_core")},
            ("numpy", "ndarray"): _NDARRAY,
            ("numpy", "dtype"): _Dtype,
            ("_codecs", "encode"): self.encoded,
            ("__builtin__", "bytes"): self.no_bytes,
            ("builtins", "bytes"): self.no_bytes,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self.known[module, name]

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Dtype):
            target.set_state(state)
        elif isinstance(target, _Array) and isinstance(state, tuple) and len(state) == 5 and state[0] == 1:
            _, shape, dtype, is_fortran, data = state
            target.array = self.array(data, dtype, shape, "F" if is_fortran else "C").array
        else:
            raise pickle.UnpicklingError("it sets the state of an object that is not a plain array")

    def load_bytearray8(self) -> None:
        (size,) = unpack("<Q", self.read(8))
        self.append(self.read(size))

    dispatch |= {ord(pickle.BUILD): load_build, ord(pickle.BYTEARRAY8): load_bytearray8}
    dispatch |= {code[0]: _with_plain_keys(code[0], slice(None, None, 2)) for code in (pickle.SETITEMS, pickle.DICT)}
    dispatch |= {pickle.SETITEM[0]: _with_plain_keys(pickle.SETITEM[0], slice(-2, -1))}

    def reconstruct(self, kind: Any, shape: Any, code: Any) -> _Array:
        """NumPy's _reconstruct: an array whose state follows."""
        if kind is not _NDARRAY or shape != (0,):
            raise pickle.UnpicklingError("it begins an array in another way than NumPy")
        return _Array()

    def array(self, data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        """NumPy's _frombuffer: an array of bytes that fit its dtype and shape."""
        if isinstance(data, str):  # from Python 2
            data = self.encoded(data, "latin1")
        is_shape = isinstance(shape, tuple) and len(shape) <= 32
        is_shape = is_shape and all(type(size) is int and 0 <= size < 2**63 for size in shape)
        if not isinstance(data, bytes) or not isinstance(dtype, _Dtype) or not is_shape or order not in ("C", "F"):
            raise pickle.UnpicklingError("it builds an array with other arguments than NumPy")
        plain: np.dtype[Any] = np.dtype(dtype.code).newbyteorder(dtype.order)  # type: ignore[arg-type]
        if math.prod(shape) * plain.itemsize != len(data):
            raise pickle.UnpicklingError(f"it holds an array of {shape} {plain} in {len(data)} bytes")
        if plain.kind == "U" and (np.frombuffer(data, f"{plain.byteorder}u4") > sys.maxunicode).any():
            raise pickle.UnpicklingError("it holds an array of texts with characters that do not exist")
        return _Array(np.frombuffer(data, plain).reshape(shape, order=order))

    def scalar(self, dtype: Any, data: Any) -> Any:
        array = self.array(data, dtype, (), "C").array
        return None if array is None else array.item()

    def encoded(self, text: Any, encoding: Any) -> bytes:
        """The form in which Python 3 writes bytes in the protocols of Python 2."""
        if not isinstance(text, str) or encoding != "latin1" or len(text) > self.bytes_left:
            raise pickle.UnpicklingError("it encodes strings in another way than Python")
        self.bytes_left -= len(text)
        return text.encode("latin1")

    def no_bytes(self) -> bytes:
        return b""


class _File(io.BufferedReader):
    """A file that never reads more than its size: Python allocates the requested memory first."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None or size < self.size else self.size)


def read_arrays(owner: str, path: Path) -> dict[Any, Any]:
    """The arrays, lists and numbers of a pickled dictionary.

    Args:
        owner: name of the data set, for messages.
        path: a regular file, written by Python 2 or 3 with NumPy 1 or 2.

    Raises:
        ValueError: if the pickle is damaged, holds no dictionary, or does anything but build arrays of plain numbers
            or strings.
    """
    try:
        if not path.is_file():
            raise OSError("it is not a regular file")
        with _File(path) as file:
            content = _Arrays(file).load()
    except Exception as error:  # a damaged pickle can raise any type
        cause = str(error) or type(error).__name__
        raise ValueError(f"{owner}: expected a pickle of arrays in {path}, could not read it: {cause}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{owner}: expected a dictionary of arrays in {path}, got {type(content).__name__}")
    return {key: _finished(value, deeper=True) for key, value in content.items()}


def _finished(value: Any, deeper: bool) -> Any:
    """A value with its placeholders replaced by arrays, down to the level at which these files have arrays."""
    if isinstance(value, _Array):
        return value.array
    if deeper and isinstance(value, list):
        return [_finished(item, deeper=False) for item in value]
    if deeper and isinstance(value, dict):
        return {key: _finished(item, deeper=False) for key, item in value.items()}
    return value
