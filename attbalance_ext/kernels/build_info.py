"""How a native library was built: what CMake compiled into it (csrc/build_info.cpp.in)."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

_MARK = b"attbalance_ext build "


def build_info(library: Path) -> dict[str, str]:
    """``version`` of the package, ``pytorch`` it was compiled with, stable ``abi`` it needs, ``compiler``, ``cuda``,
    ``architectures``; {} where the file does not say. It is read, not loaded."""
    if not library.exists() or not library.stat().st_size:
        return {}
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(_MARK)
        end = content.find(b"\0", start)
        if start < 0 or end < 0:
            return {}
        try:
            found = json.loads(content[start + len(_MARK) : end])
        except ValueError:
            return {}
    return {name: value for name, value in found.items() if value}
