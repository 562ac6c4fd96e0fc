"""`bf16`: the upper half of a float32. 2 bytes per element, biased by rounding only, little-endian.

    code = round(clip(x, -MAX, MAX)), to nearest, ties to even      MAX = 3.3895e38, |error| <= max(|x| 2^-8, 2^-134)

Why clip: from 3.3962e38 on rounding would end at infinity. Pitfalls: 8 significant bits stall an accumulator
(256 + 1 = 256), so sum in float32 and send differences, not weights; -0 keeps its sign.

The kernels work on bit patterns, and the sign plays no part in rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.codecs.base import F32, U8, Codec, all_finite, expect_bytes, kernel, non_finite

EXPONENT = np.uint16(0x7F80)

INFINITE_BITS = np.uint32(0x7F80_0000)
LARGEST_BITS = np.uint32(0x7F7F_0000)


@kernel
def _encode(bits: Any, codes: Any) -> bool:
    top = np.uint32(0)
    for i in range(bits.size):
        magnitude = np.uint32(bits[i] & 0x7FFF_FFFF)
        top = max(top, magnitude)
        m = np.uint32(min(magnitude, LARGEST_BITS))
        codes[i] = np.uint32(m + 0x7FFF + ((m >> 16) & 1)) >> 16 | (bits[i] >> 16) & 0x8000
    return bool(top < INFINITE_BITS)


@kernel
def _decode(codes: Any, bits: Any) -> None:
    for i in range(codes.size):
        bits[i] = np.uint32(codes[i]) << 16


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
    return np.maximum(np.abs(x) * np.float32(2.0**-8), np.float32(2.0**-134))


CODEC = Codec(
    name="bf16",
    summary="bfloat16, the range of single precision with 8 significant bits",
    paper="Kalamkar et al., arXiv 1905.12322",
    bytes_per_element="2",
    lossless=False,
    unbiased=False,
    dense="bf16",
    encoded_bytes=lambda n: 2 * n,
    encode=encode,
    check=check,
    decode=decode,
    error_bound=error_bound,
    seamless=True,
)
