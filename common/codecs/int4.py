"""`int4`: symmetric linear quantisation to 15 levels. .5 + 4/128 bytes per element, biased by rounding only.

    scale = max |x| / 7         q = round(x / scale), ties to even       decoded = q scale       per group of 128

    encoded block:  float32 scale [ceil(n / 128)]   two q a byte [ceil(n / 2)]     the first q in the lower four bits

`int4:32` has groups of 32. |error| <= scale / 2, so that of ordinary noise 1 to 2 % of the square is lost: by default
with error feedback. Scales as in int8. q is in two's complement, -8 is refused, and so is anything in the four bits
that an odd length leaves over.
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
    SMALLEST_ABSMAX,
    absmax_bits,
    check_codes,
    check_scales,
    group_maxima,
    group_parameter,
    largest_scale,
)

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 128
"""Elements that share a scale, by default."""

LEVELS = np.float32(7.0)
LARGEST_SCALE = largest_scale(7)


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
def _quantise(x: Any, absmax: Any, codes: Any) -> Any:
    if absmax < SMALLEST_ABSMAX:
        codes[:] = 0
        return np.float32(0.0)
    scale = min(absmax / LEVELS, LARGEST_SCALE)
    for i in range(x.size // 2):
        low, high = np.int32(np.rint(x[2 * i] / scale)), np.int32(np.rint(x[2 * i + 1] / scale))
        codes[i] = (low & 15) | (high & 15) << 4
    if x.size % 2:
        codes[x.size // 2] = np.int32(np.rint(x[x.size - 1] / scale)) & 15
    return scale


@kernel
def _decode(scales: Any, codes: Any, x: Any, length: Any) -> None:
    for g in range(scales.size):
        _scale(codes[g * length // 2 : (g + 1) * length // 2], scales[g], x[g * length : (g + 1) * length])


@kernel
def _scale(codes: Any, scale: Any, x: Any) -> None:
    for i in range(x.size // 2):
        code = np.int32(codes[i])
        x[2 * i] = scale * np.float32(((code & 15) ^ 8) - 8)
        x[2 * i + 1] = scale * np.float32((code >> 4 ^ 8) - 8)
    if x.size % 2:
        x[x.size - 1] = scale * np.float32((np.int32(codes[x.size // 2]) ^ 8) - 8)


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
        check_scales(data[: split(n)].view(np.float32), LARGEST_SCALE)
        check_codes(data[split(n) :], 4, n)

    def decode(data: U8, x: F32) -> None:
        at = split(x.size)
        _decode(data[:at].view(np.float32), data[at:], x, group)

    def error_bound(x: F32) -> F32:
        """Half a step, and the rounding of one division and one product."""
        magnitude, absmax = np.abs(x), group_maxima(x, group)
        rounded = absmax / LEVELS * np.float32(0.5) + magnitude * np.float32(2.0**-21)
        return np.where(absmax < SMALLEST_ABSMAX, magnitude, rounded)

    def device_encode(x: Tensor, key: int) -> Tensor:
        import torch

        tensors.require_finite(x)
        rows = tensors.groups(x, group)
        scale = tensors.scales(rows.abs().amax(1, keepdim=True), 7.0, float(LARGEST_SCALE))
        codes = tensors.divided(rows, scale).round().to(torch.int8) & 15
        return tensors.as_bytes(scale, tensors.pack(tensors.ungrouped(codes, x.shape), 4), blocks=x.shape[:-1])

    def device_decode(data: Tensor, n: int) -> Tensor:
        import torch

        scale = tensors.floats(data[..., : split(n)])
        codes = (tensors.unpack(data[..., split(n) :], 4, n).to(torch.int32) ^ 8) - 8
        return tensors.ungrouped(tensors.groups(codes.float(), group) * scale.view(-1, 1), codes.shape)

    return Codec(
        name="int4",
        summary=f"4 bits per element, a scale for every {group:,}",
        paper="Douillard et al., arXiv 2501.18512 (4 bits); the linear grid is common practice",
        when="an eighth of the bytes, for updates of many local steps",
        bytes_per_element=f"1/2 + 4/{group}",
        lossless=False,
        unbiased=False,
        dense="fp16",
        feedback="default",
        contraction=max(1.0 - group / (4 * 7**2), 0.0) or None,
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
