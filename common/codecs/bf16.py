"""`bf16`: the upper half of a float32. 2 bytes per element, biased by rounding only, little-endian.

    code = round(clip(x, -MAX, MAX)), to nearest, ties to even      MAX = 3.3895e38, |error| <= max(|x| 2^-8, 2^-134)

`bf16:stochastic`: unbiased. The lower 16 bits of x, seen as a number, are the chance in 65,536 to round away from zero;
|error| < max(|x| 2^-7, 2^-133), and from MAX on it is clipped all the same.

Why clip: from 3.3962e38 on rounding would end at infinity. Pitfalls: 8 significant bits stall an accumulator
(256 + 1 = 256), so sum in float32 and send differences, not weights; -0 keeps its sign.

The kernels work on bit patterns, and the sign plays no part in rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from common.codecs import draws, tensors
from common.codecs.base import (
    EXPONENT,
    F32,
    U8,
    Codec,
    Device,
    Parameter,
    all_finite,
    expect_bytes,
    exponent,
    goes_far,
    kernel,
    non_finite,
    put,
    settle,
)
from common.codecs.parts import (
    INFINITE_BITS,
)

if TYPE_CHECKING:
    from torch import Tensor

HALF_EXPONENT = np.uint16(0x7F80)
LARGEST_BITS = np.uint32(0x7F7F_0000)
LARGEST = float(LARGEST_BITS.view(np.float32))
NEAREST, STOCHASTIC = "nearest", "stochastic"


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
def _encode_at_random(bits: Any, codes: Any, key: Any) -> bool:
    top = np.uint32(0)
    for i in range(bits.size):
        magnitude = np.uint32(bits[i] & 0x7FFF_FFFF)
        top = max(top, magnitude)
        m = np.uint32(min(magnitude, LARGEST_BITS))
        drawn = np.uint32(draws.bits(key, np.uint64(i)) >> np.uint64(48))
        codes[i] = np.uint32(m + drawn) >> 16 | (bits[i] >> 16) & 0x8000
    return bool(top < INFINITE_BITS)


@kernel
def _decode(codes: Any, bits: Any) -> None:
    for i in range(codes.size):
        bits[i] = np.uint32(codes[i]) << 16


@kernel
def _add(codes: Any, c: Any, weight: Any, out: Any, far: Any) -> bool:
    wanted, top = out.size > 0, np.uint32(0)
    for i in range(c.size):
        c[i] += weight * np.uint32(np.uint32(codes[i]) << 16).view(np.float32)
        top = max(top, exponent(c[i]))
        if wanted:
            put(out, i, c[i], far)
    settle(far)
    return bool(top < EXPONENT)


def encode(x: F32, out: U8, key: int = 0) -> None:
    if not _encode(x.view(np.uint32), out.view(np.uint16)):
        raise non_finite("The vector to encode")


def encode_at_random(x: F32, out: U8, key: int = 0) -> None:
    if not _encode_at_random(x.view(np.uint32), out.view(np.uint16), np.uint64(key)):
        raise non_finite("The vector to encode")


def check(data: U8, n: int) -> None:
    expect_bytes(data, 2 * n)
    if not all_finite(data.view(np.uint16), HALF_EXPONENT):
        raise non_finite("The update")


def decode(data: U8, x: F32) -> None:
    _decode(data.view(np.uint16), x.view(np.uint32))


def add(data: U8, c: F32, weight: np.float32, out: F32, size: int) -> bool:
    return bool(_add(data.view(np.uint16), c, weight, out, goes_far(out, size)))


def error_bound(x: F32) -> F32:
    return np.maximum(np.abs(x) * np.float32(2.0**-8), np.float32(2.0**-134))


def error_bound_at_random(x: F32) -> F32:
    return np.maximum(np.abs(x) * np.float32(2.0**-7), np.float32(2.0**-133))


def device_encode(x: Tensor, key: int) -> Tensor:
    tensors.require_finite(x)
    return tensors.as_bytes(x.clamp(-LARGEST, LARGEST).bfloat16(), blocks=x.shape[:-1])


def device_encode_at_random(x: Tensor, key: int) -> Tensor:
    import torch

    tensors.require_finite(x)
    bits = x.clamp(-LARGEST, LARGEST).view(torch.int32)
    drawn = (draws.device_bits(key, x.numel(), x.device) >> 48 & 0xFFFF).to(torch.int32)
    codes = (bits & 0x7FFF_FFFF) + drawn >> 16 | bits >> 16 & 0x8000
    return tensors.as_bytes(codes.to(torch.int16))


def device_decode(data: Tensor, n: int) -> Tensor:
    import torch

    return data.contiguous().view(torch.bfloat16).float()


def _read(text: str) -> bool:
    if text not in (NEAREST, STOCHASTIC):
        raise ValueError(text)
    return text == STOCHASTIC


def _write(stochastic: bool) -> str:
    return STOCHASTIC if stochastic else NEAREST


def make(stochastic: bool) -> Codec:
    if not stochastic:
        return CODEC
    return CODEC._replace(
        summary="bfloat16, rounded at random so that errors cancel",
        unbiased=True,
        feedback="never",
        contraction=1.0 - 2.0**-16,
        encode=encode_at_random,
        error_bound=error_bound_at_random,
        device=Device(device_encode_at_random, device_decode),
        stochastic=True,
    )


CODEC = Codec(
    name="bf16",
    summary="bfloat16, the range of single precision with 8 significant bits",
    paper="Kalamkar et al., arXiv 1905.12322",
    when="half the bytes, for updates of any size",
    bytes_per_element="2",
    lossless=False,
    unbiased=False,
    dense="bf16",
    feedback="optional",
    contraction=1.0 - 2.0**-16,
    encoded_bytes=lambda n: 2 * n,
    encode=encode,
    check=check,
    decode=decode,
    error_bound=error_bound,
    device=Device(device_encode, device_decode, together=True),
    parameters=(Parameter("rounding", False, _read, f"{NEAREST} or {STOCHASTIC}", STOCHASTIC, _write),),
    make=make,
    seamless=True,
    add=add,
)
