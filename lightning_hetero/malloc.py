"""Tells the C library's allocator to keep what was freed, for CPU ranks."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # as glibc's malloc.h numbers them
_PAD = 256 * 2**20  # bytes


def keep_freed_memory() -> bool:
    """Make glibc reuse freed memory instead of asking the kernel for fresh pages at each activation.

    Returns:
        whether it does; False for other C libraries and systems.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version") or not hasattr(library, "mallopt"):
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, _PAD))
    done = [library.mallopt(name, value) for name, value in settings]  # 1: done
    return all(done)
