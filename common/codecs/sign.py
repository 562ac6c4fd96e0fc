"""`sign`: one bit per element, of the mean magnitude. 1/8 + 4/1024 bytes per element, biased; always error feedback.

    scale = sum |x| / length    bit = x < 0, so that zero counts as plus    decoded = +- scale      per group of 1024

    encoded block:  float32 scale [ceil(n / 1024)]   8 bits a byte [ceil(n / 8)]       the first bit is the lowest

`sign:128` has groups of 128. The scale makes it a contraction, by (sum |x|)^2 / (length |x|^2) >= 1 / length; a bare
sign is none and need not converge, and the scale |x| / sqrt(length) expands sparse vectors. The sum is taken in
float64. Pitfalls: zeros come back as the scale (feedback takes it out again); a scale under 2^-126 is sent as 0, and
then its group decodes to zeros. Bits that the last byte has left over are zero.
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
    SMALLEST_SCALE,
    absmax_bits,
    check_rest,
    check_scales,
    group_parameter,
    sum_of_magnitudes,
)

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 1024
"""Elements that share a scale, by default."""


@kernel
def _encode(x: Any, bits: Any, scales: Any, codes: Any, length: Any) -> bool:
    for g in range(scales.size):
        group = slice(g * length, (g + 1) * length)
        if absmax_bits(bits[group]) >= INFINITE_BITS:
            return False
        part = x[group]
        scale = np.float32(sum_of_magnitudes(part) / part.size)
        scales[g] = scale if scale >= SMALLEST_SCALE else np.float32(0.0)
        _pack(part, codes[g * length // 8 : (g + 1) * length // 8])
    return True


@kernel
def _pack(x: Any, codes: Any) -> None:
    whole = x.size // 8
    for b in range(whole):
        i = 8 * b
        low = (x[i] < 0) | (x[i + 1] < 0) << 1 | (x[i + 2] < 0) << 2 | (x[i + 3] < 0) << 3
        high = (x[i + 4] < 0) << 4 | (x[i + 5] < 0) << 5 | (x[i + 6] < 0) << 6 | (x[i + 7] < 0) << 7
        codes[b] = low | high
    if x.size % 8:
        last = 0
        for i in range(8 * whole, x.size):
            last |= (x[i] < 0) << (i - 8 * whole)
        codes[whole] = last


@kernel
def _decode(scales: Any, codes: Any, bits: Any, length: Any) -> None:
    """bits: the values, as unsigned integers. A scale of 0 has no sign."""
    for g in range(scales.size):
        scale = scales[g]
        part = bits[g * length : (g + 1) * length]
        packed = codes[g * length // 8 : (g + 1) * length // 8]
        if scale == 0:
            part[:] = 0
            continue
        for b in range(part.size // 8):
            code = np.uint32(packed[b])
            for place in range(8):
                part[8 * b + place] = scale | (code >> np.uint32(place)) << np.uint32(31)
        for i in range(part.size - part.size % 8, part.size):
            part[i] = scale | (np.uint32(packed[i // 8]) >> np.uint32(i % 8)) << np.uint32(31)


def make(group: int) -> Codec:
    def split(n: int) -> int:
        """Where the scales end."""
        return 4 * -(-n // group)

    def encoded_bytes(n: int) -> int:
        return split(n) + (n + 7) // 8

    def encode(x: F32, out: U8, key: int = 0) -> None:
        at = split(x.size)
        if not _encode(x, x.view(np.uint32), out[:at].view(np.float32), out[at:], group):
            raise non_finite("The vector to encode")

    def check(data: U8, n: int) -> None:
        expect_bytes(data, encoded_bytes(n))
        check_scales(data[: split(n)].view(np.float32), LARGEST_F32)
        check_rest(data[split(n) :], n)

    def decode(data: U8, x: F32) -> None:
        at = split(x.size)
        _decode(data[:at].view(np.uint32), data[at:], x.view(np.uint32), group)

    def error_bound(x: F32) -> F32:
        """How far |x| is from the mean magnitude, with the rounding of that mean."""
        starts = np.arange(0, x.size, group)
        magnitude = np.abs(x).astype(np.float64)
        means = np.add.reduceat(magnitude, starts) / np.diff(starts, append=x.size)
        scale = np.repeat(means, group)[: x.size]
        off = np.abs(magnitude - scale) + scale * 2.0**-20
        return np.where(scale < 2 * SMALLEST_SCALE, magnitude + scale, off).astype(np.float32)

    def device_encode(x: Tensor, key: int) -> Tensor:
        import torch

        tensors.require_finite(x)
        rows, n = tensors.groups(x, group), x.numel()
        sums = rows.abs().sum(1, keepdim=True, dtype=torch.float64)
        scale = (sums / tensors.lengths(n, group, x.device)).float()
        scale = scale.where(scale >= float(SMALLEST_SCALE), scale.new_zeros(()))
        return tensors.as_bytes(scale, tensors.pack(x < 0, 1))

    def device_decode(data: Tensor, n: int) -> Tensor:
        import torch

        scale = data[: split(n)].view(torch.float32)[:, None]
        minus = tensors.groups(tensors.unpack(data[split(n) :], 1, n), group).bool()
        return torch.where(minus & (scale > 0), -scale, scale).view(-1)[:n]

    return Codec(
        name="sign",
        summary=f"1 bit per element, the mean magnitude of every {group:,}",
        paper="Karimireddy et al., arXiv 1901.09847",
        when="a thirtieth of the bytes where steps are many and small",
        bytes_per_element=f"1/8 + 4/{group}",
        lossless=False,
        unbiased=False,
        dense="fp16",
        feedback="always",
        contraction=1.0 / group,
        encoded_bytes=encoded_bytes,
        encode=encode,
        check=check,
        decode=decode,
        error_bound=error_bound,
        device=Device(device_encode, device_decode),
        same_bytes=False,
        parameters=(group_parameter(GROUP),),
        make=make,
    )


CODEC = make(GROUP)
