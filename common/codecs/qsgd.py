"""`qsgd`: s levels of the norm, at random. 1 + 4/128 bytes per element for s = 127, unbiased.

    unit = |x|_2 / s    a = |x_i| / unit    level = floor(a), or one more with probability a - floor(a)
    decoded = sign(x_i) level unit                                                               per group of 128

    encoded block:  float32 unit [ceil(n / 128)]   codes, in two's complement, the first in the lowest bits
    bits a code:    2 for s = 1, 4 for s up to 7, 8 for s up to 127; the lowest negative code is refused

`qsgd:7` has 7 levels, `qsgd:7:64` groups of 64 too. E|decoded - x|^2 <= min(length / s^2, sqrt(length) / s) |x|^2: the
groups are short because that grows with their length. The norm is taken in float64; the unit is rounded once, and x is
measured in the rounded one, so that it stays unbiased. Pitfalls: level s itself occurs (one element alone), so that
s = 128 does not fit; a norm above FLT_MAX is sent as if it were that. Without error feedback, as it errs to both sides
alike. Left out: Elias codes, which pay for sparse levels only.
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
    Parameter,
    expect_bytes,
    kernel,
    non_finite,
)
from common.codecs.parts import (
    INFINITE_BITS,
    SMALLEST_SCALE,
    absmax_bits,
    check_codes,
    check_scales,
    group_parameter,
    holds_lowest,
    largest_scale,
    sum_of_squares,
)

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 127
GROUP = 128


@kernel
def level(value: Any, unit: Any, u: Any, levels: Any) -> Any:
    """The signed level, from one uniform number."""
    a = min(abs(value) / unit, levels)
    whole = np.floor(a)
    found = np.int32(whole) + (np.int32(1) if u < a - whole else np.int32(0))
    return -found if value < 0 else found


@kernel
def _unit(x: Any, levels: Any, largest: Any) -> Any:
    unit = np.float32(min(np.sqrt(sum_of_squares(x)) / np.float64(levels), np.float64(largest)))
    return unit if unit >= SMALLEST_SCALE else np.float32(0.0)


@kernel
def _encode(
    x: Any, bits: Any, units: Any, codes: Any, length: Any, levels: Any, width: Any, largest: Any, key: Any
) -> bool:
    per_byte = 8 // width
    for g in range(units.size):
        first = g * length
        part = x[first : first + length]
        if absmax_bits(bits[first : first + length]) >= INFINITE_BITS:
            return False
        packed = codes[first // per_byte : (first + length) // per_byte]
        unit = units[g] = _unit(part, levels, largest)
        if unit == 0:
            packed[:] = 0
        elif per_byte == 1:
            _bytes(part, unit, levels, packed, key, np.uint64(first))
        else:
            _packed(part, unit, levels, packed, width, key, np.uint64(first))
    return True


@kernel
def _bytes(x: Any, unit: Any, levels: Any, codes: Any, key: Any, first: Any) -> None:
    for i in range(x.size):
        codes[i] = level(x[i], unit, draws.uniform(key, first + np.uint64(i)), levels) & 0xFF


@kernel
def _packed(x: Any, unit: Any, levels: Any, codes: Any, width: Any, key: Any, first: Any) -> None:
    per_byte = 8 // width
    for b in range(codes.size):
        code = np.int32(0)
        for place in range(min(per_byte, x.size - b * per_byte)):
            i = b * per_byte + place
            one = level(x[i], unit, draws.uniform(key, first + np.uint64(i)), levels)
            code |= (one & (1 << width) - 1) << width * place
        codes[b] = code


@kernel
def _decode(units: Any, codes: Any, x: Any, length: Any, width: Any) -> None:
    per_byte, top = 8 // width, 1 << width - 1
    for g in range(units.size):
        unit = units[g]
        part, packed = x[g * length : (g + 1) * length], codes[g * length // per_byte : (g + 1) * length // per_byte]
        if per_byte == 1:
            for i in range(part.size):
                part[i] = unit * np.float32(np.int8(packed[i]))
        else:
            for i in range(part.size):
                code = np.int32(packed[i // per_byte]) >> width * (i % per_byte) & (1 << width) - 1
                part[i] = unit * np.float32((code ^ top) - top)


def make(levels: int, group: int) -> Codec:
    width = 2 if levels == 1 else 4 if levels <= 7 else 8
    per_byte = 8 // width
    largest = largest_scale(levels)
    s = np.float32(levels)

    def split(n: int) -> int:
        """Where the units end."""
        return 4 * -(-n // group)

    def encoded_bytes(n: int) -> int:
        return split(n) + -(-n // per_byte)

    def encode(x: F32, out: U8, key: int = 0) -> None:
        at = split(x.size)
        units, codes = out[:at].view(np.float32), out[at:]
        if not _encode(x, x.view(np.uint32), units, codes, group, s, width, largest, np.uint64(key)):
            raise non_finite("The vector to encode")

    def check(data: U8, n: int) -> None:
        expect_bytes(data, encoded_bytes(n))
        check_scales(data[: split(n)].view(np.float32), largest)
        if width < 8:
            check_codes(data[split(n) :], width, n)
        elif holds_lowest(data[split(n) :]):
            raise CodecError("The encoded block holds -128, a level that no sender uses.")

    def decode(data: U8, x: F32) -> None:
        at = split(x.size)
        _decode(data[:at].view(np.float32), data[at:], x, group, width)

    def error_bound(x: F32) -> F32:
        """One unit."""
        squares = np.add.reduceat(np.square(x.astype(np.float64)), np.arange(0, x.size, group))
        units = np.minimum(np.sqrt(squares) / levels, float(largest)) * (1 + 2.0**-20)
        bound = np.repeat(units, group)[: x.size]
        return np.where(bound < 2 * SMALLEST_SCALE, np.maximum(np.abs(x), bound), bound).astype(np.float32)

    def device_encode(x: Tensor, key: int) -> Tensor:
        import torch

        tensors.require_finite(x)
        rows, n = tensors.groups(x, group), x.numel()
        norms = rows.double().square().sum(1, keepdim=True).sqrt()
        unit = (norms / norms.new_full((), float(levels))).clamp(max=float(largest)).float()
        unit = unit.where(unit >= float(SMALLEST_SCALE), unit.new_zeros(()))
        a = tensors.divided(rows.abs(), unit).view(-1)[:n].clamp(max=float(levels))
        found = a.floor()
        found = (found + (draws.device_uniform(key, n, x.device) < a - found)).to(torch.int32)
        codes = torch.where(x < 0, -found, found) & (1 << width) - 1
        return tensors.as_bytes(unit, tensors.pack(codes, width))

    def device_decode(data: Tensor, n: int) -> Tensor:
        import torch

        unit, top = data[: split(n)].view(torch.float32), 1 << width - 1
        codes = (tensors.unpack(data[split(n) :], width, n).to(torch.int32) ^ top) - top
        return (tensors.groups(codes.float(), group) * unit[:, None]).view(-1)[:n]

    omega = min(group / levels**2, group**0.5 / levels)
    return Codec(
        name="qsgd",
        summary=f"{levels} levels of the norm of every {group:,}, rounded at random",
        paper="Alistarh et al., arXiv 1610.02132",
        when="a quarter to an eighth of the bytes without memory in the worker",
        bytes_per_element=f"{'1' if per_byte == 1 else f'1/{per_byte}'} + 4/{group}",
        lossless=False,
        unbiased=True,
        dense="fp16",
        feedback="never",
        contraction=1.0 - omega if omega < 1 else None,
        encoded_bytes=encoded_bytes,
        encode=encode,
        check=check,
        decode=decode,
        error_bound=error_bound,
        device=Device(device_encode, device_decode),
        same_bytes=False,
        stochastic=True,
        parameters=(
            Parameter("levels", LEVELS, _levels, f"a whole number from 1 to {LEVELS}", "7"),
            group_parameter(GROUP),
        ),
        make=make,
    )


def _levels(text: str) -> int:
    if not 1 <= int(text) <= LEVELS:
        raise ValueError(text)
    return int(text)


CODEC = make(LEVELS, GROUP)
