"""How CPU kernels are compiled: once, cached on disk, without the interpreter lock.

Laws
* A kernel works in place on one block of flat arrays, allocates nothing and raises nothing.
* Never `fastmath` (it makes isfinite(NaN) true) and never `parallel=True` (two threads on numba's default
  threading layer abort the process); `tests/test_architecture.py` checks both.
* A kernel is generic in its float type: the server runs it in float32, the proofs in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def kernel(function: F) -> F:
    """Compile `function` on first use, releasing the interpreter lock while it runs."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no folder for the cache can be written to: then every process compiles for itself
        return cast(F, numba.njit(**options)(function))
