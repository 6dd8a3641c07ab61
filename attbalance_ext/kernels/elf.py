"""Whether a native library is all there."""

from __future__ import annotations

import struct
from pathlib import Path

_ELF_64_LITTLE = b"\x7fELF\x02\x01"
_HEADER = struct.Struct("<32x Q 14x HH 6x")  # where the segments' descriptions are, the size of one, how many
_SEGMENT = struct.Struct("<8x Q 16x Q 16x")  # where a segment is in the file, how long


def is_cut_short(library: Path) -> bool:
    """Whether the file ends before what it describes, as after a copy that was broken off.

    The system maps such a file all the same, and the process dies where it first touches what is missing. Files of
    other formats are left to the loader, which says what is wrong with them.
    """
    size = library.stat().st_size
    with library.open("rb") as file:
        header = file.read(_HEADER.size)
        if not header.startswith(_ELF_64_LITTLE) or len(header) < _HEADER.size:
            return False
        table, entry, count = _HEADER.unpack(header)
        if entry != _SEGMENT.size:
            return False
        file.seek(table)
        segments = file.read(entry * count)
    if len(segments) < entry * count:
        return True
    starts = range(0, entry * count, entry)
    return any(sum(_SEGMENT.unpack_from(segments, start)) > size for start in starts)
