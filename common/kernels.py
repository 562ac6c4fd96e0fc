"""How CPU kernels are compiled: once, cached on disk, without the interpreter lock; and how they write what is long.

    @kernel                        a function over blocks
    put(out, i, value, far)        inside one: out[i] = value, past the caches where `far` (`goes_far`) says so
    settle(far)                    at its end: what was written past the caches is seen by whoever is told

Laws
* A kernel works in place on one block of flat arrays, allocates nothing and raises nothing.
* Never `fastmath` (it makes isfinite(NaN) true) and never `parallel=True` (two threads on numba's default
  threading layer abort the process); `tests/test_architecture.py` checks both.
* A kernel is generic in its float type: the server runs it in float32, the proofs in float64.
* What is longer than the caches is written past them: the line that it replaces is not read first, which is a third of
  the traffic of a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_intrinsic: Callable[[Any], Any] = intrinsic  # the first argument of what it decorates is numba's own affair

FAR_BYTES = 8 << 20
"""What is so long is gone from the caches before it is needed again."""
ALIGNED_BYTES = 64
EXPONENT = np.uint32(0x7F80_0000)
"""Of float32: all these bits set mean NaN or infinity."""

F = TypeVar("F", bound=Callable[..., object])


def kernel(function: F) -> F:
    """Compile `function` on first use, releasing the interpreter lock while it runs."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no folder for the cache can be written to: then every process compiles for itself
        return cast(F, numba.njit(**options)(function))


def callback(function: Callable[..., None], signature: str) -> int:
    """Address of `function`, compiled, for C code that calls it on any thread; it stays for ever."""
    try:
        made: Any = numba.cfunc(signature, cache=True)(function)
    except RuntimeError:  # as for a kernel
        made = numba.cfunc(signature)(function)
    _callbacks.append(made)
    return int(made.address)


_callbacks: list[Any] = []


@kernel
def exponent(value: Any) -> Any:
    """The bits of a float32 that are all set where it is NaN or infinite."""
    return np.uint32(np.float32(value).view(np.uint32) & EXPONENT)


def goes_far(out: Any, size: int) -> bool:
    """Whether `out`: (n,), a part of a vector of `size` bytes, is written past the caches."""
    return size >= FAR_BYTES and out.ctypes.data % ALIGNED_BYTES == 0


@kernel
def put(out: Any, i: Any, value: Any, far: Any) -> None:
    """out[i] = value. Of a loop over all of `out` the compiler makes two, one for each `far`, in vectors."""
    if far:
        _put_past_caches(out, i, value)
    else:
        out[i] = value


@kernel
def settle(far: Any) -> None:
    """What was put before is seen by every thread and process that hears of it after."""
    if far:
        _fence()


@_intrinsic
def _put_past_caches(typing: Any, out: Any, i: Any, value: Any) -> Any:
    """It claims that every element is aligned, which holds of those that whole vectors begin with; without the claim
    there are no vectors. The machine writes a single element wherever it lies."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        stored = builder.store(arguments[2], builder.gep(array.data, [arguments[1]]), align=ALIGNED_BYTES)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(out, types.intp, out.dtype), generate


@_intrinsic
def _fence(typing: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate
