"""How CPU kernels are compiled: once, cached on disk, without the interpreter lock.

Laws
* A kernel works in place on one block of flat arrays, allocates nothing and raises nothing.
* Never `fastmath` (it makes isfinite(NaN) true) and never `parallel=True` (two threads on numba's default
  threading layer abort the process); `tests/test_architecture.py` checks both.
* A kernel is generic in its float type: the server runs it in float32, the proofs in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def kernel(function: F) -> F:
    """Compile `function` on first use, releasing the interpreter lock while it runs."""
    return cast(F, numba.njit(nogil=True, cache=True, error_model="numpy")(function))
