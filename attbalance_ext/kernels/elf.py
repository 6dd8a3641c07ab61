"""Whether a native library is all there."""

from __future__ import annotations

import struct
from pathlib import Path

_ELF_64_LITTLE = b"\x7fELF\x02\x01"
# Where the descriptions of segments and of sections are; how long one is and how many there are, of each.
_HEADER = struct.Struct("<32x QQ 6x HH HH 2x")
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
        table, sections, entry, count, section_entry, section_count = _HEADER.unpack(header)
        if entry != _SEGMENT.size:
            return False
        # Linkers write the sections' descriptions last, behind names and symbols that no segment holds.
        if max(table + entry * count, sections + section_entry * section_count) > size:
            return True
        file.seek(table)
        segments = file.read(entry * count)
    starts = range(0, entry * count, entry)
    return any(sum(_SEGMENT.unpack_from(segments, start)) > size for start in starts)
