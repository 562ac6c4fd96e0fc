"""Memory for whole vectors, on huge pages, touched before it is needed; and memory for messages, kept for the next.

A page fault costs more than copying the page, so a buffer that is first written to in an exchange makes that exchange
slow. Large buffers are therefore mapped with MADV_HUGEPAGE (where the system has it) and written to once when made.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

HUGE_PAGE_BYTES = 2 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 64 << 20
"""Freed memory that malloc keeps for the next messages, at most."""


def zeros(length: int, dtype: DTypeLike) -> NDArray[Any]:
    """(length,) zeros of `dtype`, in memory that is really there."""
    size = length * np.dtype(dtype).itemsize
    if size < HUGE_PAGE_BYTES:
        array = np.empty(length, dtype)
        array.fill(0)
        return array
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has no huge pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, dtype, length)
    array.fill(0)
    return array


def keep_freed_memory(longest: int) -> None:
    """Have glibc keep the memory that messages of up to so many bytes are received into.

    Given back to the system after every message it would return page by page, each with a fault that costs more than
    copying the page.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, 4 * longest)
