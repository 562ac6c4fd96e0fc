"""`int8`: symmetric linear quantisation by groups. 1 + 4/1024 bytes per element, biased by rounding only.

    scale = max |x| / 127       q = round(x / scale), ties to even       decoded = q scale       per group of 1024

    encoded block:  float32 scale [ceil(n / 1024)]   int8 q [n]          little-endian; the last group may be shorter

|error| <= scale / 2. Symmetric, because zero then stays exactly zero; by groups, because one outlier coarsens only the
elements beside it. A group whose max |x| is under 2^-119 gets scale 0 and decodes to zeros: its scale would be
subnormal, and would mean 0 on a thread that flushes those. No scale is above FLT_MAX / 127, so that 127 scale stays
finite. An honest scale is thus 0 or a normal number up to there, an honest q never -128, and `check` lets nothing else
pass. Pitfall: -0 decodes to +0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.codecs.base import (
    F32,
    U8,
    Codec,
    CodecError,
    expect_bytes,
    kernel,
    non_finite,
)

GROUP = 1024
"""Elements that share a scale."""

LEVELS = np.float32(127.0)
SMALLEST_ABSMAX = np.float32(2.0**-119)

INFINITE_BITS = np.uint32(0x7F80_0000)
SMALLEST_SCALE_BITS = np.uint32(0x0080_0000)  # 2^-126, the smallest normal float32
LARGEST_SCALE_BITS = np.uint32(0x7C01_0203)  # FLT_MAX / 127 rounded down: rounded to nearest, 127 of it are infinity
LARGEST_SCALE = LARGEST_SCALE_BITS.view(np.float32)


@kernel
def _encode(x: Any, bits: Any, scales: Any, codes: Any) -> bool:
    for g in range(scales.size):
        group = slice(g * GROUP, (g + 1) * GROUP)
        absmax = _absmax_bits(bits[group])
        if absmax >= INFINITE_BITS:
            return False
        scales[g] = _quantise(x[group], np.uint32(absmax).view(np.float32), codes[group])
    return True


@kernel
def _absmax_bits(bits: Any) -> Any:
    """Magnitudes order as their bits do, and a NaN lies above all."""
    absmax = np.uint32(0)
    for i in range(bits.size):
        absmax = max(absmax, np.uint32(bits[i] & 0x7FFF_FFFF))
    return absmax


@kernel
def _quantise(x: Any, absmax: Any, codes: Any) -> Any:
    if absmax < SMALLEST_ABSMAX:
        codes[:] = 0
        return np.float32(0.0)
    scale = min(absmax / LEVELS, LARGEST_SCALE)
    for i in range(x.size):
        codes[i] = np.int8(np.rint(x[i] / scale))
    return scale


@kernel
def _scales_pass(bits: Any) -> bool:
    """Zero, or normal and small enough; a set sign bit makes a pattern too large, and so do infinity and NaN."""
    bad = 0
    for i in range(bits.size):
        bad += bits[i] != 0 and (bits[i] < SMALLEST_SCALE_BITS or bits[i] > LARGEST_SCALE_BITS)
    return bad == 0


@kernel
def _decode(scales: Any, codes: Any, x: Any) -> None:
    for g in range(scales.size):
        group = slice(g * GROUP, (g + 1) * GROUP)
        _scale(codes[group], scales[g], x[group])


@kernel
def _scale(codes: Any, scale: Any, x: Any) -> None:
    for i in range(codes.size):
        x[i] = scale * np.float32(codes[i])


def encoded_bytes(n: int) -> int:
    return _scale_bytes(n) + n


def _scale_bytes(n: int) -> int:
    return 4 * -(-n // GROUP)


def encode(x: F32, out: U8) -> None:
    split = _scale_bytes(x.size)
    if not _encode(x, x.view(np.uint32), out[:split].view(np.float32), out[split:].view(np.int8)):
        raise non_finite("The vector to encode")


def check(data: U8, n: int) -> None:
    expect_bytes(data, encoded_bytes(n))
    split = _scale_bytes(n)
    if not _scales_pass(data[:split].view(np.uint32)):
        raise CodecError("A scale of the encoded block is neither 0 nor a normal number from 2^-126 to FLT_MAX / 127.")
    if data[split:].view(np.int8).min() == -128:
        raise CodecError("The encoded block holds -128; the codes of int8 are -127 to 127.")


def decode(data: U8, x: F32) -> None:
    split = _scale_bytes(x.size)
    _decode(data[:split].view(np.float32), data[split:].view(np.int8), x)


def error_bound(x: F32) -> F32:
    """Half a step, and the rounding of one division and one product."""
    magnitude = np.abs(x)
    absmax = np.repeat(np.maximum.reduceat(magnitude, np.arange(0, x.size, GROUP)), GROUP)[: x.size]
    rounded = absmax / LEVELS * np.float32(0.5) + magnitude * np.float32(2.0**-21)
    return np.where(absmax < SMALLEST_ABSMAX, magnitude, rounded)


CODEC = Codec(
    name="int8",
    summary="8 bits per element, a scale for every 1024",
    paper="Jacob et al., arXiv 1712.05877",
    bytes_per_element="1 + 4/1024",
    lossless=False,
    unbiased=False,
    dense="fp16",
    encoded_bytes=encoded_bytes,
    encode=encode,
    check=check,
    decode=decode,
    error_bound=error_bound,
)
