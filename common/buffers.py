"""Memory for whole vectors: on huge pages, touched before it is needed.

A page fault costs more than copying the page, so a buffer that is first written to in an exchange makes that exchange
slow. Large buffers are therefore mapped with MADV_HUGEPAGE (where the system has it) and written to once when made.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

HUGE_PAGE_BYTES = 2 << 20


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
