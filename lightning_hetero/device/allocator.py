"""Sets a CPU rank's memory allocator so that it keeps what a step frees for the next one.

glibc takes every block above a threshold (32 MiB at most, which one activation of a segmentation network exceeds) fresh
from the kernel and gives it back when it is freed. The kernel clears each page of it again, in every step.
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # from glibc's malloc.h
_NEVER = 2**31 - 1  # the largest number that mallopt takes
_TOP_PAD = 256 * 2**20  # bytes by which the heap grows at least; measured with it, ResNet-18 and FCN on 64x64 pixels


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, from now on until it ends.

    Blocks of every size then come from the heap, and the heap never shrinks: the process stays as large as it has been
    at its largest, and fragments may add to that. Nothing happens where the C library is not glibc; an allocator that
    was loaded in its place (jemalloc, tcmalloc) is left as it is.

    Returns:
        Whether the C library has accepted it.
    """
    try:
        if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return False
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, ValueError):  # another operating system or C library
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _TOP_PAD))
    accepted = [mallopt(name, value) == 1 for name, value in settings]
    return all(accepted)
