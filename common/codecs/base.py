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
* The device half gives the same bytes and decodes to the same bits; where a scale is a sum, one ulp of scale away.

A codec file offers one value, `CODEC`, with what its parameters are by default. Its header gives the definition, bytes
per element, bias class, pitfalls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from common.errors import Code, CodecError
from common.kernels import kernel

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BLOCK_ELEMENTS",
    "F32",
    "INFINITE_BITS",
    "LARGEST_F32",
    "LARGEST_HALF",
    "SMALLEST_ABSMAX",
    "SMALLEST_SCALE",
    "U8",
    "Codec",
    "CodecError",
    "Device",
    "Parameter",
    "absmax_bits",
    "all_finite",
    "check_codes",
    "check_rest",
    "check_scales",
    "copy_finite",
    "expect_bytes",
    "from_half",
    "group_maxima",
    "group_parameter",
    "holds_lowest",
    "kernel",
    "largest_scale",
    "non_finite",
    "out_of_range",
    "sum_of_magnitudes",
    "sum_of_squares",
    "to_half",
]

F32: TypeAlias = NDArray[np.float32]
U8: TypeAlias = NDArray[np.uint8]

BLOCK_ELEMENTS = 65_536
"""Longest block, elements: 256 KiB of float32, so that a block and its state stay in a core's L2 cache."""


LARGEST_F32 = np.finfo(np.float32).max
INFINITE_BITS = np.uint32(0x7F80_0000)
"""Of a float32."""
SMALLEST_SCALE = np.float32(2.0**-126)
"""The smallest normal float32."""
SMALLEST_ABSMAX = np.float32(2.0**-119)
"""A group whose largest magnitude is under this is sent as zeros: its scale could be subnormal, and would mean 0 on a
thread that flushes those."""


class Encode(Protocol):
    """encode(x, out, key): out <- x."""

    def __call__(self, x: F32, out: U8, key: int = 0) -> None: ...


class Device(NamedTuple):
    """The same codec on tensors, wherever they lie: what comes out lies on the same device. Raises as `encode` does.

    encode(x, key)      x: (n,) float32 -> (encoded_bytes(n),) uint8
    decode(data, n)     data: (encoded_bytes(n),) uint8, as checked -> (n,) float32
    """

    encode: Callable[[Tensor, int], Tensor]
    decode: Callable[[Tensor, int], Tensor]


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
    open: Callable[[U8, F32], None] | None = None
    """`check` and `decode` in one pass over memory: (data, x), raises CodecError; None where one pass saves nothing."""
    stochastic: bool = False
    """Does the key matter?"""
    same_bytes: bool = True
    """Does every device give the same bytes? Not where a scale is a sum, whose last bit is up to the order."""
    largest: float = float(LARGEST_F32)
    """Magnitudes above are refused."""
    parameters: tuple[Parameter, ...] = ()
    make: Callable[..., Codec] | None = None
    """make(*values of all parameters) -> the codec with these."""
    unscaled: Codec | None = None
    """What error feedback works on, where that is not this very codec."""
    remembers: bool = False
    """Whether the sender feeds back what encoding loses. It is nothing to the receiver."""

    @property
    def carries_parameters(self) -> bool:
        """Whether it can carry parameters as they are, not only what they changed by: it rounds, and that is all."""
        return self.feedback in ("never", "optional") and not (self.stochastic or self.remembers)


def group_parameter(default: int, *, least: int = 16) -> Parameter:
    """Elements that share a scale."""

    def read(text: str) -> int:
        group = int(text)
        if not least <= group <= BLOCK_ELEMENTS or group & (group - 1):
            raise ValueError(text)
        return group

    meaning = f"elements that share a scale: a power of two from {least} to {BLOCK_ELEMENTS}"
    return Parameter("group", default, read, meaning, example="64")


def group_maxima(x: F32, group: int) -> F32:
    """(n,) -> (n,) the largest magnitude in the group of each element."""
    return np.repeat(np.maximum.reduceat(np.abs(x), np.arange(0, x.size, group)), group)[: x.size]


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


def largest_scale(levels: int) -> np.float32:
    """The last scale of which `levels` are finite: FLT_MAX / levels, rounded down."""
    scale = np.float32(LARGEST_F32 / np.float32(levels))
    while levels * float(scale) > float(LARGEST_F32):
        scale = np.nextafter(scale, np.float32(0.0))
    return scale


def check_scales(scales: F32, largest: np.float32, smallest: np.float32 = SMALLEST_SCALE) -> None:
    """Raise CodecError unless every scale is 0 or a normal number from `smallest` to `largest`."""
    if not _scales_pass(scales.view(np.uint32), smallest.view(np.uint32), largest.view(np.uint32)):
        raise CodecError(f"A scale of the encoded block is neither 0 nor from {smallest:g} to {largest:g}.")


@kernel
def _scales_pass(bits: Any, smallest_bits: Any, largest_bits: Any) -> bool:
    """A set sign bit makes a pattern too large, and so do infinity and NaN."""
    bad = 0
    for i in range(bits.size):
        bad += bits[i] != 0 and (bits[i] < smallest_bits or bits[i] > largest_bits)
    return bad == 0


def check_codes(codes: U8, bits: int, n: int) -> None:
    """Raise CodecError where a code of `bits` (2 or 4) has only its highest bit set, or what follows the n codes is not
    zero. The former would be a second zero, or the one magnitude without a negative."""
    if (_nibbles if bits == 4 else _quarters)(*_words(codes)):
        raise CodecError("The encoded block holds a code that no sender uses.")
    check_rest(codes, bits * n)


def check_rest(codes: U8, used_bits: int) -> None:
    """Raise CodecError unless the bits of the last byte that hold no code are zero."""
    if used_bits % 8 and codes[-1] >> used_bits % 8:
        raise CodecError("The last byte of the encoded block holds more than its codes.")


def holds_lowest(codes: U8) -> bool:
    """Whether a byte is -128, or a sign without magnitude: 0x80."""
    return bool(_lowest(*_words(codes)))


def _words(codes: U8) -> tuple[Any, U8]:
    """Four bytes at a time, and those that are left over. `codes` starts at a multiple of 4."""
    whole = codes.size & ~3
    return codes[:whole].view(np.uint32), codes[whole:]


@kernel
def _lowest(words: Any, rest: Any) -> bool:
    found = np.uint32(0)
    for i in range(words.size):
        found = np.uint32(found | _lowest_in(np.uint32(words[i])))
    for i in range(rest.size):
        found = np.uint32(found | _lowest_in(np.uint32(rest[i] | 0x0101_0100)))
    return bool(found != 0)


@kernel
def _lowest_in(word: Any) -> Any:
    """A byte of t is zero: only then a bit is borrowed from above it."""
    t = np.uint32(word ^ np.uint32(0x8080_8080))
    return np.uint32(np.uint32(t - np.uint32(0x0101_0101)) & ~t & np.uint32(0x8080_8080))


@kernel
def _nibbles(words: Any, rest: Any) -> bool:
    found = np.uint32(0)
    for i in range(words.size):
        found = np.uint32(found | _nibble_in(np.uint32(words[i])))
    for i in range(rest.size):
        found = np.uint32(found | _nibble_in(np.uint32(rest[i])))
    return bool(found != 0)


@kernel
def _nibble_in(word: Any) -> Any:
    """Four bits are 1000."""
    below = np.uint32(word << np.uint32(1)) | np.uint32(word << np.uint32(2)) | np.uint32(word << np.uint32(3))
    return np.uint32(word & np.uint32(~below) & np.uint32(0x8888_8888))


@kernel
def _quarters(words: Any, rest: Any) -> bool:
    found = np.uint32(0)
    for i in range(words.size):
        found = np.uint32(found | _quarter_in(np.uint32(words[i])))
    for i in range(rest.size):
        found = np.uint32(found | _quarter_in(np.uint32(rest[i])))
    return bool(found != 0)


@kernel
def _quarter_in(word: Any) -> Any:
    """Two bits are 10."""
    return np.uint32(word & np.uint32(~np.uint32(word << np.uint32(1))) & np.uint32(0xAAAA_AAAA))


@kernel
def sum_of_magnitudes(x: Any) -> Any:
    """In float64, eight sums side by side that are added in order: any order gives the same float32, nearly always."""
    a = b = c = d = e = f = g = h = 0.0
    whole = x.size - x.size % 8
    for i in range(0, whole, 8):
        a += np.float64(abs(x[i]))
        b += np.float64(abs(x[i + 1]))
        c += np.float64(abs(x[i + 2]))
        d += np.float64(abs(x[i + 3]))
        e += np.float64(abs(x[i + 4]))
        f += np.float64(abs(x[i + 5]))
        g += np.float64(abs(x[i + 6]))
        h += np.float64(abs(x[i + 7]))
    for i in range(whole, x.size):
        a += np.float64(abs(x[i]))
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@kernel
def sum_of_squares(x: Any) -> Any:
    """The same of the squares."""
    a = b = c = d = e = f = g = h = 0.0
    whole = x.size - x.size % 8
    for i in range(0, whole, 8):
        a += np.float64(x[i]) * np.float64(x[i])
        b += np.float64(x[i + 1]) * np.float64(x[i + 1])
        c += np.float64(x[i + 2]) * np.float64(x[i + 2])
        d += np.float64(x[i + 3]) * np.float64(x[i + 3])
        e += np.float64(x[i + 4]) * np.float64(x[i + 4])
        f += np.float64(x[i + 5]) * np.float64(x[i + 5])
        g += np.float64(x[i + 6]) * np.float64(x[i + 6])
        h += np.float64(x[i + 7]) * np.float64(x[i + 7])
    for i in range(whole, x.size):
        a += np.float64(x[i]) * np.float64(x[i])
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@kernel
def absmax_bits(bits: Any) -> Any:
    """Bits of the largest magnitude: magnitudes order as their bits do, and infinity and NaN lie above all."""
    absmax = np.uint32(0)
    for i in range(bits.size):
        absmax = max(absmax, np.uint32(bits[i] & 0x7FFF_FFFF))
    return absmax


LARGEST_HALF = 65_504.0
_LARGEST_HALF_BITS = np.uint32(0x477F_E000)  # of a float32, like the next one
_NORMAL_HALF_BITS = np.uint32(0x3880_0000)  # 2^-14, the smallest normal half
_NORMAL_HALF_CODE = np.uint32(0x0400)
_TINY_STEP = np.float32(2.0**-24)
_HALF = np.float32(0.5)  # in [0.5, 1) a float32 has steps of 2^-24: adding it rounds as a subnormal half must be


@kernel
def to_half(bits: Any) -> Any:
    """Code of the half nearest to a float32 given by its bits, clipped to the finite ones; ties to even."""
    m = np.uint32(min(np.uint32(bits & 0x7FFF_FFFF), _LARGEST_HALF_BITS))
    normal = np.uint32(m - 0x3800_0000 + 0x0FFF + ((m >> 13) & 1)) >> 13  # exponent bias 127 -> 15
    tiny = np.uint32(np.float32(np.uint32(m).view(np.float32) + _HALF).view(np.uint32) - 0x3F00_0000)
    return np.uint32(normal if m >= _NORMAL_HALF_BITS else tiny) | (bits >> 16) & 0x8000


@kernel
def from_half(code: Any) -> Any:
    """Bits of the float32 that a half means, given by its finite code."""
    m = np.uint32(code & 0x7FFF)
    normal = np.uint32((m << 13) + 0x3800_0000)
    tiny = np.float32(np.float32(m) * _TINY_STEP).view(np.uint32)
    return np.uint32(normal if m >= _NORMAL_HALF_CODE else tiny) | np.uint32(code & 0x8000) << 16


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
