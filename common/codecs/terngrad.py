"""`terngrad`: minus, zero or plus the largest magnitude, at random. 1/4 + 4/1024 bytes per element, unbiased.

    scale = max |x|             decoded = scale sign(x) b,  P(b = 1) = |x| / scale               per group of 1024

    encoded block:  float32 scale [ceil(n / 1024)]   four codes a byte [ceil(n / 4)]     the first in the lowest bits
    code:           0, 1 (plus), 3 (minus), of two bits

`terngrad:128` has groups of 128. E|decoded|^2 = scale sum |x|: without error feedback, which needs a contraction.
Pitfalls: one large element makes all others of its group noise, so keep groups small where that hurts; the paper clips
at 2.5 standard deviations first, which is biased, and is left out. Code 2 is refused, and so are codes beyond the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from common.codecs import draws, tensors
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
    SMALLEST_SCALE,
    absmax_bits,
    check_codes,
    check_scales,
    group_maxima,
    group_parameter,
)

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 1024
"""Elements that share a scale, by default."""


@kernel
def code(value: Any, scale: Any, u: Any) -> Any:
    """Two bits, from one uniform number."""
    sign = np.int32(3) if value < 0 else np.int32(1)
    return sign if u < abs(value) / scale else np.int32(0)


@kernel
def _encode(x: Any, bits: Any, scales: Any, codes: Any, length: Any, key: Any) -> bool:
    for g in range(scales.size):
        first = g * length
        group = slice(first, first + length)
        absmax = absmax_bits(bits[group])
        if absmax >= INFINITE_BITS:
            return False
        packed = codes[first // 4 : (first + length) // 4]
        scales[g] = _quantise(x[group], np.uint32(absmax).view(np.float32), packed, key, np.uint64(first))
    return True


@kernel
def _quantise(x: Any, scale: Any, codes: Any, key: Any, first: Any) -> Any:
    if scale < SMALLEST_ABSMAX:
        codes[:] = 0
        return np.float32(0.0)
    whole = x.size // 4
    for b in range(whole):
        i = 4 * b
        at = first + np.uint64(i)
        codes[b] = (
            code(x[i], scale, draws.uniform(key, at))
            | code(x[i + 1], scale, draws.uniform(key, at + np.uint64(1))) << 2
            | code(x[i + 2], scale, draws.uniform(key, at + np.uint64(2))) << 4
            | code(x[i + 3], scale, draws.uniform(key, at + np.uint64(3))) << 6
        )
    if x.size % 4:
        last = np.int32(0)
        for i in range(4 * whole, x.size):
            last |= code(x[i], scale, draws.uniform(key, first + np.uint64(i))) << 2 * (i - 4 * whole)
        codes[whole] = last
    return scale


@kernel
def _decode(scales: Any, codes: Any, x: Any, length: Any) -> None:
    for g in range(scales.size):
        scale = scales[g]
        part, packed = x[g * length : (g + 1) * length], codes[g * length // 4 : (g + 1) * length // 4]
        for b in range(part.size // 4):
            for place in range(4):
                part[4 * b + place] = scale * _sign(np.int32(packed[b]) >> 2 * place)
        for i in range(part.size - part.size % 4, part.size):
            part[i] = scale * _sign(np.int32(packed[i // 4]) >> 2 * (i % 4))


@kernel
def _sign(code: Any) -> Any:
    return np.float32((code & 3 ^ 2) - 2)


def make(group: int) -> Codec:
    def split(n: int) -> int:
        """Where the scales end."""
        return 4 * -(-n // group)

    def encoded_bytes(n: int) -> int:
        return split(n) + (n + 3) // 4

    def encode(x: F32, out: U8, key: int = 0) -> None:
        at = split(x.size)
        if not _encode(x, x.view(np.uint32), out[:at].view(np.float32), out[at:], group, np.uint64(key)):
            raise non_finite("The vector to encode")

    def check(data: U8, n: int) -> None:
        expect_bytes(data, encoded_bytes(n))
        check_scales(data[: split(n)].view(np.float32), LARGEST_F32, SMALLEST_SCALE)
        check_codes(data[split(n) :], 2, n)

    def decode(data: U8, x: F32) -> None:
        at = split(x.size)
        _decode(data[:at].view(np.float32), data[at:], x, group)

    def error_bound(x: F32) -> F32:
        magnitude, absmax = np.abs(x), group_maxima(x, group)
        return np.where(absmax < SMALLEST_ABSMAX, magnitude, np.maximum(magnitude, absmax - magnitude))

    def device_encode(x: Tensor, key: int) -> Tensor:
        import torch

        tensors.require_finite(x)
        rows, n = tensors.groups(x, group), x.numel()
        absmax = rows.abs().amax(1, keepdim=True)
        scale = absmax.where(absmax >= float(SMALLEST_ABSMAX), absmax.new_zeros(()))
        p = tensors.divided(rows.abs(), scale).view(-1)[:n]
        codes = torch.where(x < 0, 3, 1) * (draws.device_uniform(key, n, x.device) < p)
        return tensors.as_bytes(scale, tensors.pack(codes, 2))

    def device_decode(data: Tensor, n: int) -> Tensor:
        import torch

        scale = data[: split(n)].view(torch.float32)
        codes = (tensors.unpack(data[split(n) :], 2, n).to(torch.int32) ^ 2) - 2
        return (tensors.groups(codes.float(), group) * scale[:, None]).view(-1)[:n]

    return Codec(
        name="terngrad",
        summary=f"minus, zero or plus, at random, a scale for every {group:,}",
        paper="Wen et al., arXiv 1705.07878",
        when="a sixteenth of the bytes without memory in the worker, where many updates are averaged",
        bytes_per_element=f"1/4 + 4/{group}",
        lossless=False,
        unbiased=True,
        dense="fp16",
        feedback="never",
        contraction=None,
        encoded_bytes=encoded_bytes,
        encode=encode,
        check=check,
        decode=decode,
        error_bound=error_bound,
        device=Device(device_encode, device_decode),
        stochastic=True,
        parameters=(group_parameter(GROUP),),
        make=make,
    )


CODEC = make(GROUP)
