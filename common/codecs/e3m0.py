"""`e3m0`: a sign and three bits of exponent. .5 + 4/128 bytes per element, biased by rounding only.

    scale = max |x|             decoded = +- scale {0, 1/64, 1/32, 1/16, 1/8, 1/4, 1/2, 1}       per group of 128

to the nearest by arithmetic midpoints (1/128, 3/128, ... 3/4 of the scale), ties to the even code.

    encoded block:  float32 scale [ceil(n / 128)]   two codes a byte [ceil(n / 2)]     the first in the lower four bits
    code:           bit 3 the sign, bits 0 to 2 the place in the grid

`e3m0:32` has groups of 32. Small elements keep their relative size, |error| <= max(|x| / 3, scale / 128); by default
with error feedback. Pitfalls: rounding the exponent down instead of to the nearest shrinks an update by a quarter,
which is a hidden outer learning rate. A scale is 0 or from 2^-119 up, so that 1/64 of it is a normal number; a sign
without magnitude is refused, and so is anything in the four bits that an odd length leaves over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from common.codecs import tensors
from common.codecs.base import (
    F32,
    U8,
    Codec,
    Device,
    expect_bytes,
    kernel,
    non_finite,
)
from common.codecs.parts import (
    INFINITE_BITS,
    LARGEST_F32,
    SMALLEST_ABSMAX,
    absmax_bits,
    check_codes,
    check_scales,
    group_maxima,
    group_parameter,
)

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 128
"""Elements that share a scale, by default."""

FIRST_EXPONENT = 120
"""Exponent field of 1/128; that of 1/64 is code 1, that of 1 is code 7."""
FIRST_MIDPOINT = np.float32(2.0**-7)
HALF_BUT_ONE = 0x003F_FFFF


@kernel
def _code(value: Any, scale: Any) -> Any:
    """Rounding of a ratio's mantissa to nothing, half to the even exponent; code and exponent are odd together."""
    ratio = abs(value) / scale
    bits = np.int32(np.float32(ratio).view(np.int32))
    rounded = (bits + HALF_BUT_ONE + (bits >> 23 & 1) >> 23) - FIRST_EXPONENT
    code = max(np.int32(rounded), np.int32(1)) if ratio > FIRST_MIDPOINT else np.int32(0)
    return code | (np.int32(8) if code > 0 and value < 0 else np.int32(0))


@kernel
def _encode(x: Any, bits: Any, scales: Any, codes: Any, length: Any) -> bool:
    for g in range(scales.size):
        group = slice(g * length, (g + 1) * length)
        absmax = absmax_bits(bits[group])
        if absmax >= INFINITE_BITS:
            return False
        packed = codes[g * length // 2 : (g + 1) * length // 2]
        scales[g] = _quantise(x[group], np.uint32(absmax).view(np.float32), packed)
    return True


@kernel
def _quantise(x: Any, scale: Any, codes: Any) -> Any:
    if scale < SMALLEST_ABSMAX:
        codes[:] = 0
        return np.float32(0.0)
    for i in range(x.size // 2):
        codes[i] = _code(x[2 * i], scale) | _code(x[2 * i + 1], scale) << 4
    if x.size % 2:
        codes[x.size // 2] = _code(x[x.size - 1], scale)
    return scale


@kernel
def _decode(scales: Any, codes: Any, x: Any, length: Any) -> None:
    for g in range(scales.size):
        _scale(codes[g * length // 2 : (g + 1) * length // 2], scales[g], x[g * length : (g + 1) * length])


@kernel
def _factor(code: Any) -> Any:
    """The grid, as bit patterns: it can then be computed for many at once."""
    magnitude = code & 7
    exponent = np.int32(magnitude + FIRST_EXPONENT) << 23 if magnitude > 0 else np.int32(0)
    return np.int32(exponent | (code & 8) << 28).view(np.float32)


@kernel
def _scale(codes: Any, scale: Any, x: Any) -> None:
    for i in range(x.size // 2):
        code = np.int32(codes[i])
        x[2 * i] = scale * _factor(np.int32(code & 15))
        x[2 * i + 1] = scale * _factor(np.int32(code >> 4))
    if x.size % 2:
        x[x.size - 1] = scale * _factor(np.int32(codes[x.size // 2]))


def make(group: int) -> Codec:
    def split(n: int) -> int:
        """Where the scales end."""
        return 4 * -(-n // group)

    def encoded_bytes(n: int) -> int:
        return split(n) + (n + 1) // 2

    def encode(x: F32, out: U8, key: int = 0) -> None:
        at = split(x.size)
        if not _encode(x, x.view(np.uint32), out[:at].view(np.float32), out[at:], group):
            raise non_finite("The vector to encode")

    def check(data: U8, n: int) -> None:
        expect_bytes(data, encoded_bytes(n))
        check_scales(data[: split(n)].view(np.float32), LARGEST_F32, SMALLEST_ABSMAX)
        check_codes(data[split(n) :], 4, n)

    def decode(data: U8, x: F32) -> None:
        at = split(x.size)
        _decode(data[:at].view(np.float32), data[at:], x, group)

    def error_bound(x: F32) -> F32:
        magnitude, absmax = np.abs(x), group_maxima(x, group)
        rounded = np.maximum(magnitude * np.float32((1 + 2.0**-20) / 3), absmax * np.float32(2.0**-7))
        return np.where(absmax < SMALLEST_ABSMAX, magnitude, rounded)

    def device_encode(x: Tensor, key: int) -> Tensor:
        import torch

        tensors.require_finite(x)
        rows = tensors.groups(x, group)
        absmax = rows.abs().amax(1, keepdim=True)
        scale = absmax.where(absmax >= float(SMALLEST_ABSMAX), absmax.new_zeros(()))
        ratio = tensors.divided(rows.abs(), scale)
        bits = ratio.view(torch.int32)
        rounded = ((bits + HALF_BUT_ONE + (bits >> 23 & 1)) >> 23) - FIRST_EXPONENT
        codes = rounded.clamp(min=1).where(ratio > float(FIRST_MIDPOINT), rounded.new_zeros(()))
        codes = codes | ((codes > 0) & (rows < 0)).to(torch.int32) << 3
        return tensors.as_bytes(scale, tensors.pack(tensors.ungrouped(codes, x.shape), 4), blocks=x.shape[:-1])

    def device_decode(data: Tensor, n: int) -> Tensor:
        import torch

        scale = tensors.floats(data[..., : split(n)])
        codes = tensors.unpack(data[..., split(n) :], 4, n).to(torch.int32)
        exponents = (codes & 7) + FIRST_EXPONENT << 23
        factors = (exponents.where(codes & 7 > 0, exponents.new_zeros(())) | (codes & 8) << 28).view(torch.float32)
        return tensors.ungrouped(tensors.groups(factors, group) * scale.view(-1, 1), codes.shape)

    return Codec(
        name="e3m0",
        summary=f"4 bits per element: a sign and a power of two, a scale for every {group:,}",
        paper="Douillard et al., arXiv 2501.18512",
        when="an eighth of the bytes where an update's elements differ much in size, as in DiLoCo",
        bytes_per_element=f"1/2 + 4/{group}",
        lossless=False,
        unbiased=False,
        dense="fp16",
        feedback="default",
        contraction=max(1.0 - 1 / 9 - group / 2**14, 0.0) or None,
        encoded_bytes=encoded_bytes,
        encode=encode,
        check=check,
        decode=decode,
        error_bound=error_bound,
        device=Device(device_encode, device_decode, together=True),
        parameters=(group_parameter(GROUP),),
        make=make,
    )


CODEC = make(GROUP)
