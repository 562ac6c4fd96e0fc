"""What a codec is: a flat float32 vector to bytes and back, one block at a time.

Laws
* A codec works on one *block*: a contiguous range of the flat vector, at most `BLOCK_ELEMENTS` long. Blocks know
  nothing of each other, so they can be encoded, checked, decoded in any order and on any thread.
* `encoded_bytes(n)` is exact. `check` runs before `decode` ever does, and after a passed check `decode` can neither
  fail nor produce a non-finite value; whatever bytes arrive, `check` raises CodecError and nothing else.
* `decode` is deterministic, and the sender applies the *decoded* value to its own copy: both ends hold the same bits.
* Non-finite input is an error of the sender (CodecError with code NON_FINITE), never quantised.
* `data` starts at a multiple of 8 bytes.
* The input is never written to. Nothing is allocated per call that grows with the block.

A codec file offers one value, `CODEC`. Its header gives the definition, bytes per element, bias class, pitfalls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from common.errors import Code, CodecError
from common.kernels import kernel

__all__ = [
    "BLOCK_ELEMENTS",
    "F32",
    "U8",
    "Codec",
    "CodecError",
    "all_finite",
    "copy_finite",
    "expect_bytes",
    "kernel",
    "non_finite",
]

F32: TypeAlias = NDArray[np.float32]
U8: TypeAlias = NDArray[np.uint8]

BLOCK_ELEMENTS = 65_536
"""Longest block, elements: 256 KiB of float32, so that a block and its state stay in a core's L2 cache."""


class Codec(NamedTuple):
    """One codec, as pure functions over one block of n elements.

    encoded_bytes(n) -> exact length of the encoded block, bytes
    encode(x, out)      x: (n,) float32, read only; out: (encoded_bytes(n),) uint8, written whole
    check(data, n)      data: (encoded_bytes(n),) uint8; raises CodecError
    decode(data, x)     data as checked; x: (n,) float32, written whole
    """

    name: str
    summary: str
    paper: str
    bytes_per_element: str
    lossless: bool
    unbiased: bool
    dense: str
    """Codec for one-dimensional and small tensors, which quantise badly; the codec's own name where it needs none."""
    encoded_bytes: Callable[[int], int]
    encode: Callable[[F32, U8], None]
    check: Callable[[U8, int], None]
    decode: Callable[[U8, F32], None]
    error_bound: Callable[[F32], F32]
    """x: (n,) -> (n,) largest |decode(encode(x)) - x| allowed per element; the contract suite holds the codec to it."""
    view: Callable[[U8], F32] | None = None
    """data -> (n,) its values where they lie; None where decoding has to compute."""
    seamless: bool = False
    """Whether two blocks side by side are encoded as the one longer block that they make; blocks may then be longer."""
    open: Callable[[U8, F32], None] | None = None
    """`check` and `decode` in one pass over memory: (data, x), raises CodecError; None where one pass saves nothing."""


def expect_bytes(data: U8, expected: int) -> None:
    """Raise CodecError unless `data` is exactly `expected` bytes long."""
    if data.nbytes != expected:
        raise CodecError(f"The encoded block has {data.nbytes} bytes, {expected} expected.", code=Code.BAD_LENGTH)


def non_finite(what: str) -> CodecError:
    """The error for NaN or infinity in `what`."""
    return CodecError(f"{what} holds NaN or infinity.", code=Code.NON_FINITE)


@kernel
def copy_finite(bits: Any, out: Any, exponent_mask: Any) -> bool:
    """out <- bits and `all_finite` in one pass over memory. bits, out: (n,) floats seen as unsigned integers."""
    bad = 0
    for i in range(bits.size):
        value = bits[i]
        out[i] = value
        bad += (value & exponent_mask) == exponent_mask
    return bad == 0


@kernel
def all_finite(bits: Any, exponent_mask: Any) -> bool:
    """Whether no value of `bits` (floats seen as unsigned integers) has all exponent bits set.

    On bit patterns, so that no compiler flag can ever make isfinite(NaN) true.
    """
    top = bits.dtype.type(0)
    for i in range(bits.size):
        top = max(top, bits.dtype.type(bits[i] & exponent_mask))
    return bool(top < exponent_mask)
