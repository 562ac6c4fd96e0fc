"""`fp16`: half precision. 2 bytes per element, biased by rounding only, little-endian IEEE 754 binary16.

    code = round(clip(x, -65504, 65504)), to nearest, ties to even          |error| <= max(|x| 2^-11, 2^-25)

Why clip: 65520 would round to infinity, and one such element would poison the center. Pitfalls: below 2^-14 the steps
stay 2^-24 wide, so that updates under 2^-25 vanish; -0 keeps its sign.

numba has no float16 on the CPU, numpy converts some fifteen times slower, and torch needs a copy for the clip and
brings threads of its own. So the kernels work on bit patterns, in one pass; they equal torch in every bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.codecs.base import F32, U8, Codec, all_finite, expect_bytes, kernel, non_finite

LARGEST = 65_504.0
EXPONENT = np.uint16(0x7C00)

INFINITE_BITS = np.uint32(0x7F80_0000)  # of a float32, like the next two
LARGEST_BITS = np.uint32(0x477F_E000)
NORMAL_BITS = np.uint32(0x3880_0000)  # 2^-14, the smallest normal half
NORMAL_CODE = np.uint32(0x0400)
TINY_STEP = np.float32(2.0**-24)
HALF = np.float32(0.5)  # in [0.5, 1) a float32 has steps of 2^-24: adding it rounds as a subnormal half must be


@kernel
def _encode(bits: Any, codes: Any) -> bool:
    top = np.uint32(0)
    for i in range(bits.size):
        magnitude = np.uint32(bits[i] & 0x7FFF_FFFF)
        top = max(top, magnitude)
        m = np.uint32(min(magnitude, LARGEST_BITS))
        normal = np.uint32(m - 0x3800_0000 + 0x0FFF + ((m >> 13) & 1)) >> 13  # exponent bias 127 -> 15
        tiny = np.uint32(np.float32(np.uint32(m).view(np.float32) + HALF).view(np.uint32) - 0x3F00_0000)
        codes[i] = np.uint32(normal if m >= NORMAL_BITS else tiny) | (bits[i] >> 16) & 0x8000
    return bool(top < INFINITE_BITS)


@kernel
def _decode(codes: Any, bits: Any) -> None:
    for i in range(codes.size):
        m = np.uint32(codes[i] & 0x7FFF)
        normal = np.uint32((m << 13) + 0x3800_0000)
        tiny = np.float32(np.float32(m) * TINY_STEP).view(np.uint32)
        bits[i] = np.uint32(normal if m >= NORMAL_CODE else tiny) | np.uint32(codes[i] & 0x8000) << 16


def encode(x: F32, out: U8) -> None:
    if not _encode(x.view(np.uint32), out.view(np.uint16)):
        raise non_finite("The vector to encode")


def check(data: U8, n: int) -> None:
    expect_bytes(data, 2 * n)
    if not all_finite(data.view(np.uint16), EXPONENT):
        raise non_finite("The update")


def decode(data: U8, x: F32) -> None:
    _decode(data.view(np.uint16), x.view(np.uint32))


def error_bound(x: F32) -> F32:
    magnitude = np.abs(x)
    rounding = np.maximum(magnitude * np.float32(2.0**-11), np.float32(2.0**-25))
    return np.maximum(rounding, magnitude - np.float32(LARGEST))


CODEC = Codec(
    name="fp16",
    summary="half precision, clipped to its finite range",
    paper="IEEE 754",
    bytes_per_element="2",
    lossless=False,
    unbiased=False,
    dense="fp16",
    encoded_bytes=lambda n: 2 * n,
    encode=encode,
    check=check,
    decode=decode,
    error_bound=error_bound,
    seamless=True,
)
