"""`fp16`: half precision. 2 bytes per element, biased by rounding only, little-endian IEEE 754 binary16.

    code = round(clip(x, -65504, 65504)), to nearest, ties to even          |error| <= max(|x| 2^-11, 2^-25)

Why clip: 65520 would round to infinity, and one such element would poison the center. Pitfalls: below 2^-14 the steps
stay 2^-24 wide, so that updates under 2^-25 vanish; -0 keeps its sign.

numba has no float16 on the CPU, numpy converts some fifteen times slower, and torch needs a copy for the clip and
brings threads of its own. So the kernels work on bit patterns, in one pass; they equal torch in every bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from common.codecs import tensors
from common.codecs.base import (
    EXPONENT,
    F32,
    U8,
    Codec,
    Device,
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
    LARGEST_HALF,
    from_half,
    to_half,
)

if TYPE_CHECKING:
    from torch import Tensor

HALF_EXPONENT = np.uint16(0x7C00)


@kernel
def _encode(bits: Any, codes: Any) -> bool:
    top = np.uint32(0)
    for i in range(bits.size):
        top = max(top, np.uint32(bits[i] & 0x7FFF_FFFF))
        codes[i] = to_half(bits[i])
    return bool(top < INFINITE_BITS)


@kernel
def _decode(codes: Any, bits: Any) -> None:
    for i in range(codes.size):
        bits[i] = from_half(codes[i])


@kernel
def _add(codes: Any, c: Any, weight: Any, out: Any, far: Any) -> bool:
    wanted, top = out.size > 0, np.uint32(0)
    for i in range(c.size):
        c[i] += weight * np.uint32(from_half(codes[i])).view(np.float32)
        top = max(top, exponent(c[i]))
        if wanted:
            put(out, i, c[i], far)
    settle(far)
    return bool(top < EXPONENT)


def encode(x: F32, out: U8, key: int = 0) -> None:
    if not _encode(x.view(np.uint32), out.view(np.uint16)):
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
    magnitude = np.abs(x)
    rounding = np.maximum(magnitude * np.float32(2.0**-11), np.float32(2.0**-25))
    return np.maximum(rounding, magnitude - np.float32(LARGEST_HALF))


def device_encode(x: Tensor, key: int) -> Tensor:
    tensors.require_finite(x)
    return tensors.as_bytes(x.clamp(-LARGEST_HALF, LARGEST_HALF).half(), blocks=x.shape[:-1])


def device_decode(data: Tensor, n: int) -> Tensor:
    import torch

    return data.contiguous().view(torch.float16).float()


CODEC = Codec(
    name="fp16",
    summary="half precision, clipped to its finite range",
    paper="IEEE 754",
    when="half the bytes, for updates from 1e-7 to 65,504",
    bytes_per_element="2",
    lossless=False,
    unbiased=False,
    dense="fp16",
    feedback="optional",
    contraction=1.0 - 2.0**-22,
    encoded_bytes=lambda n: 2 * n,
    encode=encode,
    check=check,
    decode=decode,
    error_bound=error_bound,
    device=Device(device_encode, device_decode, together=True),
    seamless=True,
    add=add,
)
