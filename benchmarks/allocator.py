"""Whether the C allocator gives freed memory back to the system between calls."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)


def keep_freed_memory() -> None:
    """Make malloc keep what is freed, for the rest of the process, as tcmalloc, jemalloc and the GPU's allocator do.

    glibc may return every large buffer to the system when it is freed, and whether it does depends on what happens to
    lie above it on the heap. The next call then pays a page fault for each 4 KiB of gradient it writes, several times
    the cost of the writing itself, in one provider and not in its neighbour.

    Raises OSError where the C library has no such setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        raise OSError("this C library has no mallopt") from None
    if not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)):
        raise OSError("mallopt refused to keep freed memory")
