"""Pickles read as data: plain types and the numbers of NumPy arrays. Nothing that a file names is ever called.

A pickle is a program for a small stack machine that may import and call anything. This reader knows the few names
that annotation files use and puts functions of its own in their place; NumPy is not asked to rebuild anything.
Opcodes that only make other objects do not exist here.

It takes memory in proportion to the file. The machine is Python's own in Python: the C one believes the lengths that a
file claims. And what a file hands to functions is counted, for it can hand them the same bytes again and again.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import Any, ClassVar

from attbalance_ext.grounding.errors import UserError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""First of the pickles in a file of ``torch.save`` from before it wrote archives."""
_LARGEST = 4096
"""Bytes of a NumPy array or scalar. Those in annotations hold a box or a name."""
_HANDED_PER_BYTE = 4
"""Of a file, to functions and states. An honest file hands on what it holds once, or twice, as text and as bytes."""
_LEGACY_PREAMBLE = 3
"""Magic number, version of the protocol and sizes of C types come before the object."""


class Refused(Exception):
    """The file asks for more than data."""


def load_pickle(path: Path) -> Any:
    """The object in a pickle of plain types, protocols 0 to 5, Python 2's included.

    Plain types: dict, list, tuple, set, str, bytes, int, float, bool, None. Text of Python 2 is read as UTF-8, and as
    Latin-1 where it is not.

    Raises:
        UserError: the file is missing, damaged or holds anything else; the message names it. No code in it is run.
    """
    return _guarded(path, lambda content: _unpickle(io.BytesIO(content)))


def load_saved(path: Path) -> Any:
    """The object that ``torch.save`` wrote, as an archive or in the older format, of plain types and NumPy's numbers.

    A NumPy array becomes a list of Python numbers or strings, a NumPy scalar one of them. Tensors are refused.

    Raises:
        UserError: as ``load_pickle``.
    """
    return _guarded(path, _unpickle_saved)


def _guarded(path: Path, read: Callable[[bytes], Any]) -> Any:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        return read(content)
    except Refused as error:
        raise UserError(f"{path} is refused, nothing in it was run: {error}") from None
    except _DAMAGE as error:
        raise UserError(f"{path} is damaged or of another kind ({type(error).__name__}: {error})") from None


_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    RuntimeError,
    MemoryError,
)
"""What the machine raises on bytes that are no pickle."""


def _unpickle_saved(content: bytes) -> Any:
    if content.startswith(b"PK\x03\x04"):
        return _unpickle(io.BytesIO(_archived(content)))
    file = io.BytesIO(content)
    magic = _unpickle(file)
    if not isinstance(magic, int) or magic != _LEGACY_MAGIC:
        raise ValueError("it was not written by torch.save")
    for _ in range(_LEGACY_PREAMBLE - 1):
        _unpickle(file)
    return _unpickle(file)


def _archived(content: bytes) -> bytes:
    """The pickle in an archive, which torch.save stores uncompressed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
        if len(entries) != 1 or entries[0].compress_type != zipfile.ZIP_STORED:
            raise ValueError("it was not written by torch.save")
        return archive.read(entries[0])


def _unpickle(file: io.BytesIO) -> Any:
    """The next object in ``file``, which is left behind it."""
    start = file.tell()
    try:
        return _Machine(file, encoding="utf-8").load()
    except UnicodeDecodeError:
        file.seek(start)
        return _Machine(file, encoding="latin1").load()


class _Array(list[Any]):
    """What a file calls an ndarray: the list of its values, set by the state that NumPy stores."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        values = _numbers(dtype, data)
        if len(shape) > 2 or math.prod(shape) != len(values) or (is_fortran and len(shape) > 1):
            raise ValueError("an array's shape does not fit its data")
        self[:] = _folded(values, shape)


def _folded(values: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """Values in C order as nested lists."""
    for width in reversed(shape[1:]):
        if width < 1:
            raise ValueError("an array has no values")
        values = [values[i : i + width] for i in range(0, len(values), width)]
    return values


class _DType:
    """What a file calls a dtype: its code, as "f8", and its byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str):
            raise TypeError(f"a dtype is named by text, not by a {type(code).__name__}")
        self.code = code
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


_STRUCT_CODES = {
    "b1": "?",
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
    "f2": "e",
    "f4": "f",
    "f8": "d",
}


def _numbers(dtype: _DType, data: bytes | str) -> list[Any]:
    """The values of an array or scalar: numbers, or strings of fixed width."""
    raw = _bytes(data)
    if code := _STRUCT_CODES.get(dtype.code):
        return [value for (value,) in struct.iter_unpack(f"{dtype.order}{code}", raw)]
    text = re.fullmatch("([US])([1-9][0-9]{0,3})", dtype.code)
    if text is None:
        raise Refused(f"it holds a NumPy array of {dtype.code[:20]!r}, which is neither numbers nor text")
    is_unicode = text[1] == "U"
    width = int(text[2]) * (4 if is_unicode else 1)
    codec = ("utf-32-be" if dtype.order == ">" else "utf-32-le") if is_unicode else "latin1"
    return [raw[i : i + width].decode(codec).rstrip("\0") for i in range(0, len(raw), width)]


def _bytes(data: bytes | str) -> bytes:
    """Bytes, which Python 2 called text."""
    if len(data) > _LARGEST:
        raise Refused(f"it holds an array of {len(data)} bytes; boxes and names have at most {_LARGEST}")
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _scalar(dtype: _DType, data: bytes | str) -> Any:
    (value,) = _numbers(dtype, data)
    return value


def _encode(text: str, codec: str) -> bytes:
    """Bytes, as protocols before 3 store them."""
    if codec != "latin1":
        raise Refused(f"it encodes text in {codec!r}")
    return _bytes(text)


def _set(items: Iterable[Any] = ()) -> set[Any]:
    values = list(items)
    _check_keys(values)
    return set(values)


def _check_keys(keys: Iterable[Any]) -> None:
    """Only scalars are hashed: hashing a tuple nested a million times over would overflow the stack."""
    for key in keys:
        if not isinstance(key, str | bytes | int | float | None):
            raise Refused(f"it has a {type(key).__name__} as a key")


_KNOWN: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("builtins", "set"): _set,
    ("__builtin__", "set"): _set,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    **{
        (f"numpy.{core}.multiarray", name): stand_in
        for core in ("core", "_core")
        for name, stand_in in (("_reconstruct", lambda *_: _Array()), ("scalar", _scalar))
    },
}


def _check_build(machine: _Machine) -> None:
    if not isinstance(machine.stack[-2], _Array | _DType):
        raise Refused("it sets the state of an object")
    machine.hand_over(machine.stack[-1])


_OBJECTS = frozenset(
    (pickle.INST + pickle.OBJ + pickle.NEWOBJ + pickle.NEWOBJ_EX + pickle.PERSID + pickle.BINPERSID)
    + (pickle.EXT1 + pickle.EXT2 + pickle.EXT4 + pickle.NEXT_BUFFER + pickle.READONLY_BUFFER + pickle.BYTEARRAY8)
)
"""Opcodes that plain types never need. The last makes as many bytes as the file claims before it looks for them."""

_CHECKS: dict[int, Callable[[_Machine], None]] = {
    pickle.BUILD[0]: _check_build,
    pickle.REDUCE[0]: lambda machine: machine.hand_over(machine.stack[-1]),
    pickle.SETITEM[0]: lambda machine: _check_keys(machine.stack[-2:-1]),
    pickle.SETITEMS[0]: lambda machine: _check_keys(machine.stack[::2]),
    pickle.DICT[0]: lambda machine: _check_keys(machine.stack[::2]),
    pickle.ADDITEMS[0]: lambda machine: _check_keys(machine.stack),
    pickle.FROZENSET[0]: lambda machine: _check_keys(machine.stack),
}
"""What is looked at before an opcode acts. The stack is what lies above the last mark."""


def _refuse(_: Any) -> None:
    raise Refused("it makes an object of a class, or one kept outside of the pickle")


def _checked(load: Callable[[Any], None], check: Callable[[_Machine], None]) -> Callable[[Any], None]:
    def checked(machine: Any) -> None:
        check(machine)
        load(machine)

    return checked


class _Machine(pickle._Unpickler):
    """Python's unpickler without imports, without objects of classes, and with scalars alone as keys."""

    stack: list[Any]

    def __init__(self, file: io.BytesIO, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self._size = len(file.getbuffer())
        self._handed = 0

    def hand_over(self, given: Any) -> None:
        """Count what a function or a state is given: values, characters and bytes, one level deep as they are read."""
        values = given if isinstance(given, tuple | list) else (given,)
        self._handed += len(values) + sum(len(value) for value in values if isinstance(value, Sized))
        if self._handed > _HANDED_PER_BYTE * self._size:
            raise Refused(f"it uses the same values again and again; a file of {self._size} bytes does not need that")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: _refuse if code in _OBJECTS else _checked(load, _CHECKS[code]) if code in _CHECKS else load
        for code, load in pickle._Unpickler.dispatch.items()
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise Refused(f"it asks for {f'{module}.{name}'!r}") from None
