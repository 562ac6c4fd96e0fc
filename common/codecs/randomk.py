"""`randomk`: one element of every hundred, at random. 4/100 bytes per element; unbiased, or with error feedback.

    stratum j: elements [j s, (j + 1) s), s = 1 / density     one of them, drawn by (key, j), each as likely
    `randomk`      decoded = (its length) x there, zero elsewhere        unbiased: E|decoded - x|^2 = (s - 1) |x|^2
    `ef:randomk`   decoded = x there, zero elsewhere                     contracts by density on average, with feedback

    encoded block:  uint64 key     float32 value [ceil(n / s)]           no index: the key says where they belong

Scaling and feedback together would count everything twice, so there is one or the other. `randomk:0.05` takes every
twentieth. One of each stratum instead of k of all: the length is then known, and so are all chances, 1 / s exactly;
only pairs differ from a draw without strata. Pitfalls: the scaled one is mostly noise, use it where many workers are
averaged; a scaled value beyond FLT_MAX is clipped. At the same density `topk` keeps far more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from common.codecs import draws, tensors
from common.codecs.base import (
    BLOCK_ELEMENTS,
    F32,
    U8,
    Codec,
    Device,
    Parameter,
    all_finite,
    expect_bytes,
    kernel,
    non_finite,
)
from common.codecs.parts import (
    LARGEST_F32,
)

if TYPE_CHECKING:
    from torch import Tensor

DENSITY = 0.01
EXPONENT = np.uint32(0x7F80_0000)
KEY_BYTES = 8
_32 = np.uint64(32)


@kernel
def place(key: Any, j: Any, length: Any) -> Any:
    """Which of `length` elements stratum j sends, from 0. key, j, length: uint64."""
    return np.int64((draws.bits(key, j) >> _32) * length >> _32)


@kernel
def _encode(x: Any, values: Any, stride: Any, scaled: Any, key: Any) -> None:
    for j in range(values.size):
        start = j * stride
        length = min(stride, x.size - start)
        value = x[start + place(key, np.uint64(j), np.uint64(length))]
        if scaled:
            value = np.float32(value * np.float32(length))
        values[j] = min(max(value, -LARGEST_F32), LARGEST_F32)


@kernel
def _decode(values: Any, x: Any, stride: Any, key: Any) -> None:
    x[:] = 0
    for j in range(values.size):
        start = j * stride
        length = min(stride, x.size - start)
        x[start + place(key, np.uint64(j), np.uint64(length))] = values[j]


def make(density: float, *, scaled: bool = True) -> Codec:
    stride = round(1 / density)

    def encoded_bytes(n: int) -> int:
        return KEY_BYTES + 4 * -(-n // stride)

    def encode(x: F32, out: U8, key: int = 0) -> None:
        if not all_finite(x.view(np.uint32), EXPONENT):
            raise non_finite("The vector to encode")
        out[:KEY_BYTES].view(np.uint64)[0] = key
        _encode(x, out[KEY_BYTES:].view(np.float32), stride, scaled, np.uint64(key))

    def check(data: U8, n: int) -> None:
        expect_bytes(data, encoded_bytes(n))
        if not all_finite(data[KEY_BYTES:].view(np.uint32), EXPONENT):
            raise non_finite("The update")

    def decode(data: U8, x: F32) -> None:
        _decode(data[KEY_BYTES:].view(np.float32), x, stride, data[:KEY_BYTES].view(np.uint64)[0])

    def error_bound(x: F32) -> F32:
        """All of it, or what scaling adds."""
        magnitude = np.abs(x).astype(np.float64)
        added = magnitude * (stride - 1) * (1 + 2.0**-20) if scaled else magnitude
        return np.minimum(np.maximum(magnitude, added), float(LARGEST_F32)).astype(np.float32)

    def places(key: int, n: int, device: Any) -> tuple[Tensor, Tensor]:
        """(strata,) the elements that are sent, and the lengths of their strata."""
        import torch

        starts = torch.arange(0, n, stride, dtype=torch.int64, device=device)
        lengths = (n - starts).clamp(max=stride)
        upper = draws.device_bits(key, starts.numel(), device) >> 32 & 0xFFFF_FFFF
        return starts + (upper * lengths >> 32), lengths

    def device_encode(x: Tensor, key: int) -> Tensor:
        import torch

        tensors.require_finite(x)
        sent, lengths = places(key, x.numel(), x.device)
        values = x[sent] * lengths.float() if scaled else x[sent]
        values = values.clamp(-float(LARGEST_F32), float(LARGEST_F32))
        return tensors.as_bytes(torch.tensor([draws.signed(key)], dtype=torch.int64, device=x.device), values)

    def device_decode(data: Tensor, n: int) -> Tensor:
        import torch

        key = int(data[:KEY_BYTES].view(torch.int64).item()) & draws.WORD
        x = torch.zeros(n, dtype=torch.float32, device=data.device)
        x[places(key, n, data.device)[0]] = data[KEY_BYTES:].view(torch.float32)
        return x

    return Codec(
        name="randomk",
        summary=f"one of every {stride:,} elements, at random",
        paper="Stich et al., arXiv 1809.07599",
        when="as little work as possible for as few bytes; to compare topk with",
        bytes_per_element=f"4/{stride} + 8/{BLOCK_ELEMENTS}",
        lossless=False,
        unbiased=scaled,
        dense="fp16",
        feedback="optional",
        contraction=None if scaled else 1.0 / stride,
        encoded_bytes=encoded_bytes,
        encode=encode,
        check=check,
        decode=decode,
        error_bound=error_bound,
        device=Device(device_encode, device_decode),
        stochastic=True,
        parameters=(
            Parameter("density", DENSITY, _density, "1 over a whole number, such as 0.05", "0.05", "{:g}".format),
        ),
        make=make,
        unscaled=make(density, scaled=False) if scaled else None,
    )


def _density(text: str) -> float:
    """The one that is really used."""
    density = float(text)
    if not 1 / BLOCK_ELEMENTS <= density <= 0.5:
        raise ValueError(text)
    return density


CODEC = make(DENSITY)
