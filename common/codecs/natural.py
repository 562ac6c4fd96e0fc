"""`natural`: powers of two, at random. 1 byte per element, unbiased.

    2^a <= |x| < 2^(a + 1):     decoded = sign(x) 2^a or sign(x) 2^(a + 1),  P(up) = |x| / 2^a - 1      -99 <= a <= 27
    |x| < 2^-99:                decoded = 0 or sign(x) 2^-99,                P(up) = |x| 2^99

    code:  bit 7 the sign, bits 0 to 6 the exponent + 100; 0 is zero, and a sign without magnitude is refused

That is: the mantissa is dropped, and its value is the chance to round up. E|decoded - x|^2 <= |x|^2 / 8, whatever x is:
no scale is needed, so an outlier spoils nothing. The paper has nine bits; these seven of exponent are a window, beyond
which a magnitude over 2^27 is refused rather than bent. Without error feedback, as it errs to both sides alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from common.codecs import draws, tensors
from common.codecs.base import (
    F32,
    U8,
    Codec,
    CodecError,
    Device,
    expect_bytes,
    kernel,
    non_finite,
    out_of_range,
)
from common.codecs.parts import (
    INFINITE_BITS,
    holds_lowest,
)

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = np.float32(2.0**-99)
LARGEST = np.float32(2.0**27)
LARGEST_BITS = LARGEST.view(np.uint32)
OFFSET = 27
"""Exponent field of a float32, minus code."""
INVERSE = np.float32(2.0**99)
LONE_SIGN = 0x80


@kernel
def code(bits: Any, drawn: Any) -> Any:
    """One byte, from 24 random bits. bits, drawn: uint32."""
    magnitude = np.uint32(bits & 0x7FFF_FFFF)
    rounded = (magnitude + (drawn >> np.uint32(1)) >> np.uint32(23)) - np.uint32(OFFSET)
    chance = np.float32(magnitude.view(np.float32) * INVERSE)
    tiny = np.uint32(1) if np.float32(np.int32(drawn)) * np.float32(2.0**-24) < chance else np.uint32(0)
    found = np.uint32(rounded if chance >= np.float32(1.0) else tiny)
    return found | (np.uint32(bits >> np.uint32(24)) & np.uint32(LONE_SIGN) if found > 0 else np.uint32(0))


@kernel
def _encode(bits: Any, codes: Any, key: Any) -> Any:
    """The bits of the largest magnitude."""
    top = np.uint32(0)
    for i in range(bits.size):
        top = max(top, np.uint32(bits[i] & 0x7FFF_FFFF))
        codes[i] = code(np.uint32(bits[i]), np.uint32(draws.bits(key, np.uint64(i)) >> np.uint64(40)))
    return top


@kernel
def _decode(codes: Any, bits: Any) -> None:
    for i in range(codes.size):
        exponent = np.uint32(codes[i] & 0x7F)
        magnitude = (exponent + np.uint32(OFFSET)) << np.uint32(23) if exponent > 0 else np.uint32(0)
        bits[i] = magnitude | np.uint32(codes[i] & 0x80) << np.uint32(24)


def encode(x: F32, out: U8, key: int = 0) -> None:
    top = _encode(x.view(np.uint32), out, np.uint64(key))
    if top > LARGEST_BITS:
        raise non_finite("The vector to encode") if top >= INFINITE_BITS else out_of_range(float(LARGEST))


def check(data: U8, n: int) -> None:
    expect_bytes(data, n)
    if holds_lowest(data):
        raise CodecError("The encoded block holds a sign without a magnitude.")


def decode(data: U8, x: F32) -> None:
    _decode(data, x.view(np.uint32))


def error_bound(x: F32) -> F32:
    return np.maximum(np.abs(x), SMALLEST)


def device_encode(x: Tensor, key: int) -> Tensor:
    import torch

    tensors.require_finite(x)
    if bool((x.abs() > float(LARGEST)).any()):
        raise out_of_range(float(LARGEST))
    drawn = (draws.device_bits(key, x.numel(), x.device) >> 40 & 0xFF_FFFF).to(torch.int32)
    magnitude = x.abs()
    rounded = (magnitude.view(torch.int32) + (drawn >> 1) >> 23) - OFFSET
    chance = magnitude * float(INVERSE)
    tiny = (drawn.float() * 2.0**-24 < chance).to(torch.int32)
    codes = torch.where(chance >= 1.0, rounded, tiny)
    codes = codes | ((codes > 0) & (x < 0)).to(torch.int32) << 7
    return codes.to(torch.uint8)


def device_decode(data: Tensor, n: int) -> Tensor:
    import torch

    codes = data.to(torch.int32)
    magnitude = (codes & 0x7F) + OFFSET << 23
    return (magnitude.where(codes & 0x7F > 0, magnitude.new_zeros(())) | (codes & 0x80) << 24).view(torch.float32)


CODEC = Codec(
    name="natural",
    summary="powers of two, rounded at random",
    paper="Horvath et al., arXiv 1905.10988",
    when="a quarter of the bytes without scales or memory, whatever the elements' sizes",
    bytes_per_element="1",
    lossless=False,
    unbiased=True,
    dense="fp16",
    feedback="never",
    contraction=7.0 / 8.0,
    encoded_bytes=lambda n: n,
    encode=encode,
    check=check,
    decode=decode,
    error_bound=error_bound,
    device=Device(device_encode, device_decode),
    stochastic=True,
    largest=float(LARGEST),
)
