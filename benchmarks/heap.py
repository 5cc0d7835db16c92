"""Keeps memory that an arm frees for the next arm, as GPU allocators do.

Otherwise the system maps and zeroes memory anew for every large result of every arm, and that dominates the times.
Linux with glibc only; elsewhere nothing happens.
"""

import ctypes
import sys
from ctypes import c_int, c_size_t, c_void_p
from functools import cache

M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
TOUCHED = 5 << 29  # bytes; more than any arm uses at once
HUGE_PAGE, MADV_HUGEPAGE = 2 << 20, 14


def keep() -> None:
    """From now on, the process keeps freed memory."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


@cache
def touch() -> None:
    """Map and zero memory in advance, for large results to reuse."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = c_void_p, [c_size_t], [c_void_p]
    libc.madvise.argtypes = [c_void_p, c_size_t, c_int]
    heap = libc.malloc(TOUCHED)
    if heap:
        start = -(-heap // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(start, (heap + TOUCHED - start) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
        ctypes.memset(heap, 0, TOUCHED)
        libc.free(heap)
