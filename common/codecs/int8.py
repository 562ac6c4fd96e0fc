"""`int8`: symmetric linear quantisation by groups. 1 + 4/1024 bytes per element, biased by rounding only.

    scale = max |x| / 127       q = round(x / scale), ties to even       decoded = q scale       per group of 1024

    encoded block:  float32 scale [ceil(n / 1024)]   int8 q [n]          little-endian; the last group may be shorter

`int8:256` has groups of 256. |error| <= scale / 2. Symmetric, because zero then stays exactly zero; by groups, because
one outlier coarsens only the elements beside it. A group whose max |x| is under 2^-119 gets scale 0 and decodes to
zeros: its scale would be subnormal, and would mean 0 on a thread that flushes those. No scale is above FLT_MAX / 127,
so that 127 scale stays finite. An honest scale is thus 0 or a normal number up to there, an honest q never -128, and
`check` lets nothing else pass. Pitfall: -0 decodes to +0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from common.codecs import tensors
from common.codecs.base import (
    ALIGNED_BYTES,
    EXPONENT,
    F32,
    U8,
    Codec,
    CodecError,
    Device,
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
    SMALLEST_ABSMAX,
    absmax_bits,
    check_scales,
    group_maxima,
    group_parameter,
    holds_lowest,
    largest_scale,
)

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 1024
"""Elements that share a scale, by default."""

LEVELS = np.float32(127.0)
LARGEST_SCALE = largest_scale(127)


@kernel
def _encode(x: Any, bits: Any, scales: Any, codes: Any, length: Any) -> bool:
    for g in range(scales.size):
        group = slice(g * length, (g + 1) * length)
        absmax = absmax_bits(bits[group])
        if absmax >= INFINITE_BITS:
            return False
        scales[g] = _quantise(x[group], np.uint32(absmax).view(np.float32), codes[group])
    return True


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
def _decode(scales: Any, codes: Any, x: Any, length: Any) -> None:
    for g in range(scales.size):
        group = slice(g * length, (g + 1) * length)
        _scale(codes[group], scales[g], x[group])


@kernel
def _scale(codes: Any, scale: Any, x: Any) -> None:
    for i in range(codes.size):
        x[i] = scale * np.float32(codes[i])


@kernel
def _add(scales: Any, codes: Any, c: Any, weight: Any, length: Any, out: Any, far: Any) -> bool:
    finite = True
    for g in range(scales.size):
        group = slice(g * length, (g + 1) * length)
        finite &= _add_scaled(codes[group], scales[g], c[group], weight, out[group], far)
    settle(far)
    return finite


@kernel
def _add_scaled(codes: Any, scale: Any, c: Any, weight: Any, out: Any, far: Any) -> bool:
    wanted, top = out.size > 0, np.uint32(0)
    for i in range(codes.size):
        c[i] += weight * (scale * np.float32(codes[i]))
        top = max(top, exponent(c[i]))
        if wanted:
            put(out, i, c[i], far)
    return bool(top < EXPONENT)


def make(group: int) -> Codec:
    def split(n: int) -> int:
        """Where the scales end."""
        return 4 * -(-n // group)

    def encode(x: F32, out: U8, key: int = 0) -> None:
        at = split(x.size)
        if not _encode(x, x.view(np.uint32), out[:at].view(np.float32), out[at:].view(np.int8), group):
            raise non_finite("The vector to encode")

    def check(data: U8, n: int) -> None:
        expect_bytes(data, split(n) + n)
        check_scales(data[: split(n)].view(np.float32), LARGEST_SCALE)
        if holds_lowest(data[split(n) :]):
            raise CodecError("The encoded block holds -128; the codes of int8 are -127 to 127.")

    def decode(data: U8, x: F32) -> None:
        at = split(x.size)
        _decode(data[:at].view(np.float32), data[at:].view(np.int8), x, group)

    def add(data: U8, c: F32, weight: np.float32, out: F32, size: int) -> bool:
        at, far = split(c.size), goes_far(out, size) and 4 * group % ALIGNED_BYTES == 0
        return bool(_add(data[:at].view(np.float32), data[at:].view(np.int8), c, weight, group, out, far))

    def error_bound(x: F32) -> F32:
        """Half a step, and the rounding of one division and one product."""
        magnitude, absmax = np.abs(x), group_maxima(x, group)
        rounded = absmax / LEVELS * np.float32(0.5) + magnitude * np.float32(2.0**-21)
        return np.where(absmax < SMALLEST_ABSMAX, magnitude, rounded)

    def device_encode(x: Tensor, key: int) -> Tensor:
        import torch

        tensors.require_finite(x)
        rows = tensors.groups(x, group)
        scale = tensors.scales(rows.abs().amax(1, keepdim=True), 127.0, float(LARGEST_SCALE))
        codes = tensors.divided(rows, scale).round().to(torch.int8)
        return tensors.as_bytes(scale, tensors.ungrouped(codes, x.shape), blocks=x.shape[:-1])

    def device_decode(data: Tensor, n: int) -> Tensor:
        import torch

        scale, codes = tensors.floats(data[..., : split(n)]), data[..., split(n) :].view(torch.int8)
        return tensors.ungrouped(tensors.groups(codes.float(), group) * scale.view(-1, 1), codes.shape)

    return Codec(
        name="int8",
        summary=f"8 bits per element, a scale for every {group:,}",
        paper="Jacob et al., arXiv 1712.05877",
        when="a quarter of the bytes at hardly any loss: the first to try on a slow link",
        bytes_per_element=f"1 + 4/{group}",
        lossless=False,
        unbiased=False,
        dense="fp16",
        feedback="optional",
        contraction=max(1.0 - group / (4 * 127**2), 0.0) or None,
        encoded_bytes=lambda n: split(n) + n,
        encode=encode,
        check=check,
        decode=decode,
        error_bound=error_bound,
        device=Device(device_encode, device_decode, together=True),
        add=add,
        parameters=(group_parameter(GROUP),),
        make=make,
    )


CODEC = make(GROUP)
