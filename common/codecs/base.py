"""What a codec is: a flat float32 vector to bytes and back, one block at a time.

Laws
* A codec works on one *block*: a contiguous range of the flat vector, at most `BLOCK_ELEMENTS` long. Blocks know
  nothing of each other, so they can be encoded, checked, decoded in any order and on any thread.
* `encoded_bytes(n)` is exact. `check` runs before `decode` ever does, and after a passed check `decode` can neither
  fail nor produce a non-finite value; whatever bytes arrive, `check` raises CodecError and nothing else.
* `decode` is deterministic, and the sender applies the *decoded* value to its own copy: both ends hold the same bits.
* Non-finite input is an error of the sender (CodecError with code NON_FINITE), never quantised; so is a magnitude above
  `largest` (code ENCODING).
* `data` starts at a multiple of 8 bytes.
* The input is never written to. Nothing is allocated per call that grows with the block.
* Where a codec rounds at random, the key says how: the same block and key give the same bytes, on CPU and device.
* The device half gives the same bytes and decodes to the same bits; where a scale is a sum, one ulp of scale away;
  where all is sums, what the bytes decode to is the same up to `tolerance`.

A codec file offers one value, `CODEC`, with what its parameters are by default. Its header gives the definition, bytes
per element, bias class, pitfalls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from common.errors import Code, CodecError
from common.kernels import ALIGNED_BYTES, EXPONENT, exponent, goes_far, kernel, put, settle

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ALIGNED_BYTES",
    "BLOCK_ELEMENTS",
    "EXPONENT",
    "F32",
    "U8",
    "Codec",
    "CodecError",
    "Device",
    "Parameter",
    "all_finite",
    "copy_finite",
    "expect_bytes",
    "exponent",
    "goes_far",
    "kernel",
    "non_finite",
    "out_of_range",
    "put",
    "settle",
]

F32: TypeAlias = NDArray[np.float32]
U8: TypeAlias = NDArray[np.uint8]

BLOCK_ELEMENTS = 65_536
"""Longest block, elements: 256 KiB of float32, so that a block and its state stay in a core's L2 cache."""


class Encode(Protocol):
    """encode(x, out, key): out <- x."""

    def __call__(self, x: F32, out: U8, key: int = 0) -> None: ...


class Device(NamedTuple):
    """The same codec on tensors, wherever they lie: what comes out lies on the same device. Raises as `encode` does.

    encode(x, key)      x: (n,) float32 -> (encoded_bytes(n),) uint8
    decode(data, n)     data: (encoded_bytes(n),) uint8, as checked -> (n,) float32
    warm(x, key, before) `encode` that starts from an earlier block, before: (encoded_bytes(n),) uint8

    together: they also take many blocks of one length at once, x: (blocks, n) and data: (blocks, encoded_bytes(n)).
    """

    encode: Callable[[Tensor, int], Tensor]
    decode: Callable[[Tensor, int], Tensor]
    warm: Callable[[Tensor, int, Tensor], Tensor] | None = None
    together: bool = False


class Parameter(NamedTuple):
    """What may follow a codec's name: `name:value`. read raises ValueError for a text that is none; write undoes it."""

    name: str
    default: Any
    read: Callable[[str], Any]
    meaning: str
    """What is allowed."""
    example: str
    """An allowed text that is not the default."""
    write: Callable[[Any], str] = str


class Codec(NamedTuple):
    """One codec, as pure functions over one block of n elements.

    encoded_bytes(n) -> exact length of the encoded block, bytes
    encode(x, out, key) x: (n,) float32, read only; out: (encoded_bytes(n),) uint8, written whole; key: 64 random bits
    check(data, n)      data: (encoded_bytes(n),) uint8; raises CodecError
    decode(data, x)     data as checked; x: (n,) float32, written whole
    """

    name: str
    summary: str
    paper: str
    when: str
    """When to use it, in a clause."""
    bytes_per_element: str
    lossless: bool
    unbiased: bool
    dense: str
    """Codec for one-dimensional and small tensors, which quantise badly; the codec's own name where it needs none."""
    feedback: Literal["never", "optional", "default", "always"]
    """Whether what encoding loses is added to the next update (`common.codecs.feedback`)."""
    contraction: float | None
    """delta with E|x - decoded|^2 <= (1 - delta) |x|^2 for every x in its range; None where there is none above 0."""
    encoded_bytes: Callable[[int], int]
    encode: Encode
    check: Callable[[U8, int], None]
    decode: Callable[[U8, F32], None]
    error_bound: Callable[[F32], F32]
    """x: (n,) -> (n,) largest |decode(encode(x)) - x| allowed per element; the contract suite holds the codec to it."""
    device: Device
    view: Callable[[U8], F32] | None = None
    """data -> (n,) its values where they lie; None where decoding has to compute."""
    seamless: bool = False
    """Whether two blocks side by side are encoded as the one longer block that they make; blocks may then be longer."""
    open: Callable[[U8, F32, int], None] | None = None
    """`check` and `decode` in one pass over memory: (data, x, size), raises CodecError; size: bytes of the vector that
    x is part of. None where one pass saves nothing."""
    add: Callable[[U8, F32, np.float32, F32, int], bool] | None = None
    """add(data, c, weight, out, size): c += weight x, x being what `decode` gives, and out <- c, in one pass over
    memory and to the same bits; whether all c are finite. out: (n,), or (0,) where nobody wants it; size: bytes of the
    vector that it is part of. None where that saves nothing."""
    stochastic: bool = False
    """Does the key matter?"""
    same_bytes: bool = True
    """Does every device give the same bytes? Not where a scale is a sum, whose last bit is up to the order."""
    tolerance: float = 0.0
    """How far apart, as a share of |x|, may lie what the bytes of two devices decode to, and a decoded vector and what
    it is encoded to once more: 0 but where every value is a sum."""
    largest: float = float(np.finfo(np.float32).max)
    """Magnitudes above are refused."""
    parameters: tuple[Parameter, ...] = ()
    make: Callable[..., Codec] | None = None
    """make(*values of all parameters) -> the codec with these."""
    warm: Callable[[F32, U8, int, U8], None] | None = None
    """warm(x, out, key, before): `encode` that starts from where an earlier update ended, before: (encoded_bytes(n),)
    uint8, the same block of the last that was taken. None where each update stands for itself."""
    of_columns: Callable[[int], Codec] | None = None
    """The same for blocks that are whole rows of a matrix with so many columns. None where shapes are nothing to it."""
    unscaled: Codec | None = None
    """What error feedback works on, where that is not this very codec."""
    remembers: bool = False
    """Whether the sender feeds back what encoding loses. It is nothing to the receiver."""

    @property
    def carries_parameters(self) -> bool:
        """Whether it can carry parameters as they are, not only what they changed by: it rounds, and that is all."""
        return self.feedback in ("never", "optional") and not (self.stochastic or self.remembers)


def expect_bytes(data: U8, expected: int) -> None:
    """Raise CodecError unless `data` is exactly `expected` bytes long."""
    if data.nbytes != expected:
        raise CodecError(f"The encoded block has {data.nbytes} bytes, {expected} expected.", code=Code.BAD_LENGTH)


def non_finite(what: str) -> CodecError:
    """The error for NaN or infinity in `what`."""
    return CodecError(f"{what} holds NaN or infinity.", code=Code.NON_FINITE)


def out_of_range(largest: float) -> CodecError:
    """The error for a magnitude that the codec has no code for."""
    return CodecError(f"The vector to encode holds a magnitude above {largest:g}, the largest of this codec.")


@kernel
def all_finite(bits: Any, exponent_mask: Any) -> bool:
    """Whether no value of `bits` (floats seen as unsigned integers) has all exponent bits set.

    On bit patterns, so that no compiler flag can ever make isfinite(NaN) true.
    """
    top = bits.dtype.type(0)
    for i in range(bits.size):
        top = max(top, bits.dtype.type(bits[i] & exponent_mask))
    return bool(top < exponent_mask)


@kernel
def copy_finite(bits: Any, out: Any, exponent_mask: Any, far: Any) -> bool:
    """out <- bits and `all_finite` in one pass over memory. bits, out: (n,) floats seen as unsigned integers; far: see
    `common.kernels.put`."""
    top = bits.dtype.type(0)
    for i in range(bits.size):
        value = bits[i]
        put(out, i, value, far)
        top = max(top, bits.dtype.type(value & exponent_mask))
    settle(far)
    return bool(top < exponent_mask)
