"""What several codecs share: scales of groups, packed codes, sums, halves.

Laws
* A scale is 0 or a normal number: a subnormal one would mean 0 on a thread that flushes those. So a group whose
  largest magnitude is too small to be divided is sent as zeros.
* Unused bits are zero, and no value has two codes: what `check` lets pass is what an honest sender may have sent.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.codecs.base import BLOCK_ELEMENTS, F32, U8, CodecError, Parameter, kernel

LARGEST_F32 = np.finfo(np.float32).max
INFINITE_BITS = np.uint32(0x7F80_0000)
"""Of a float32."""
SMALLEST_SCALE = np.float32(2.0**-126)
"""The smallest normal float32."""
SMALLEST_ABSMAX = np.float32(2.0**-119)
"""A group whose largest magnitude is under this is sent as zeros: its scale could be subnormal, and would mean 0 on a
thread that flushes those."""


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
