"""`powersgd`: two factors of rank 2 instead of a matrix. 4 rank (1/rows + 1/columns) bytes per element, biased; always
error feedback. Vogels, Karimireddy, Jaggi, arXiv 1905.13727.

    M (n x m): the block        P <- M Q        P <- orthonormalised        Q <- M' P        decoded = P Q'

    encoded block:  float32 P [rank][n]   float32 Q [rank][m]

One step of power iteration, from the Q of this block in the last update that was taken: of a matrix that changes
slowly the largest singular values arrive in the end. A first update starts from random numbers, and so does whatever is
sent without feedback, and a column of Q that is zero: nothing would ever come of it again.

A matrix is a tensor seen as (first dimension, all others), and a block as many whole rows as fit 65,536 elements, with
a Q of its own. So a matrix up to that size is exactly what the paper sends. A longer one travels as k ranges of rows,
which keeps more of it and sends more: 4 rank (n + k m) bytes instead of 4 rank (n + m), of 768 x 768 (2.4 MB) 66 KB
instead of 12 KB. What is not shorter than halves that way (of few rows or columns; odd parts where fragments end) is
sent as halves.

`powersgd:4` has rank 4. P P' M is a projection, so what is lost is never larger than the update; from a random Q it is
smaller by rank / m of the square on average, mostly by far more. P and Q are float32, so that a matrix of that rank
arrives as it is; sums are float64. Pitfalls: one outlying element takes a whole rank; magnitudes over 2^100 are
refused. Two devices encode to the same up to rounding, and decode to the same bits. By itself the codec sees rows of
64, the last one filled up with zeros; a plan asks for those of each matrix (`of_columns`).
"""

from __future__ import annotations

import functools
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
    out_of_range,
)
from common.codecs.parts import (
    INFINITE_BITS,
    SMALLEST_SCALE,
    absmax_bits,
)

if TYPE_CHECKING:
    from torch import Tensor

RANK = 2
LARGEST_RANK = 64
COLUMNS = 64
"""Of a block by itself."""
LARGEST = np.float32(2.0**100)
LARGEST_P_BITS = np.float32(1.0).view(np.uint32)
LARGEST_Q_BITS = np.float32(2.0**110).view(np.uint32)
"""A column of the block is at most 2^8 x LARGEST long; LARGEST_RANK products of this are finite."""
SMALLEST_BITS = SMALLEST_SCALE.view(np.uint32)
VANISHED = 2.0**-20
"""A column of P of which so little is left beside those before it holds but rounding."""
STRIP = 256
"""Columns that are summed up at a time, in float64."""
_CENTER = 0.5 - 2.0**-25
"""Of the uniform numbers, which are multiples of 2^-24: without it they are as often positive as negative."""


@kernel
def _encode(x: Any, columns: Any, p: Any, q: Any, absmax: Any, key: Any, sums: Any) -> None:
    """p: (rank, n), q: (rank, m) <- what is sent; q holds where it starts. sums: (STRIP,) scratch."""
    for k in range(p.shape[0]):
        if absmax_bits(q[k].view(np.uint32)) == 0:
            for j in range(columns):
                q[k, j] = draws.uniform(key, np.uint64(k * columns + j)) - _CENTER
        longest = np.uint32(absmax_bits(q[k].view(np.uint32))).view(np.float32)
        _times(x, columns, q[k], p[k], 1.0 / (np.float64(absmax) * np.float64(longest)))
        _orthonormalise(p, k)
        _project(x, columns, p[k], q[k], sums)


@kernel
def _times(x: Any, columns: Any, q: Any, p: Any, scale: Any) -> None:
    """p <- M q, scaled so that no magnitude of M or q matters."""
    for i in range(p.size):
        row = x[i * columns : (i + 1) * columns]
        p[i] = _settled(_dot(row, q[: row.size]) * scale)


@kernel
def _orthonormalise(p: Any, k: Any) -> None:
    """p[k] <- what of it is beside those before it, of length 1; zero, where that is nothing. Twice is enough."""
    own = p[k]
    before = np.sqrt(_dot(own, own))
    for _ in range(2):
        for other in range(k):
            along = _dot(p[other], own)
            for i in range(own.size):
                own[i] = own[i] - along * p[other, i]
    left = np.sqrt(_dot(own, own))
    for i in range(own.size):
        own[i] = _settled(own[i] / left) if left > VANISHED * before else np.float32(0.0)


@kernel
def _project(x: Any, columns: Any, p: Any, q: Any, sums: Any) -> None:
    """q <- M' p."""
    for first in range(0, columns, sums.size):
        last = min(first + sums.size, columns)
        sums[:] = 0.0
        for i in range(p.size):
            row = x[i * columns + first : i * columns + last]
            weight = np.float64(p[i])
            for j in range(row.size):
                sums[j] += weight * row[j]
        for j in range(last - first):
            q[first + j] = _settled(sums[j])


@kernel
def _decode(p: Any, q: Any, x: Any, sums: Any) -> None:
    """x <- P Q'."""
    columns = q.shape[1]
    for i in range(p.shape[1]):
        for first in range(0, columns, sums.size):
            row = x[i * columns + first : min(i * columns + first + sums.size, (i + 1) * columns)]
            sums[:] = 0.0
            for k in range(p.shape[0]):
                weight = np.float64(p[k, i])
                for j in range(row.size):
                    sums[j] += weight * q[k, first + j]
            for j in range(row.size):
                row[j] = _settled(sums[j])


@kernel
def _settled(value: Any) -> Any:
    """float32, and zero where that is not a normal number: what would mean 0 on a thread that flushes those."""
    return np.float32(value) if abs(value) >= SMALLEST_SCALE else np.float32(0.0)


@kernel
def _dot(a: Any, b: Any) -> Any:
    """In float64, eight sums side by side that are added in order."""
    s = t = u = v = w = x = y = z = 0.0
    whole = a.size - a.size % 8
    for i in range(0, whole, 8):
        s += np.float64(a[i]) * np.float64(b[i])
        t += np.float64(a[i + 1]) * np.float64(b[i + 1])
        u += np.float64(a[i + 2]) * np.float64(b[i + 2])
        v += np.float64(a[i + 3]) * np.float64(b[i + 3])
        w += np.float64(a[i + 4]) * np.float64(b[i + 4])
        x += np.float64(a[i + 5]) * np.float64(b[i + 5])
        y += np.float64(a[i + 6]) * np.float64(b[i + 6])
        z += np.float64(a[i + 7]) * np.float64(b[i + 7])
    for i in range(whole, a.size):
        s += np.float64(a[i]) * np.float64(b[i])
    return ((s + t) + (u + v)) + ((w + x) + (y + z))


@kernel
def _within(bits: Any, largest_bits: Any) -> bool:
    """Whether every value is 0, or a normal number of at most that magnitude."""
    bad = 0
    for i in range(bits.size):
        magnitude = bits[i] & np.uint32(0x7FFF_FFFF)
        bad += bits[i] != 0 and (magnitude < SMALLEST_BITS or magnitude > largest_bits)
    return bad == 0


def _on_device(x: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """P (rank, n), Q (rank, m) in float64. x: (n, m) float32; start: (rank, m) float64, Q to start from."""
    import torch

    m, step = x.double(), start / start.abs().amax(1, keepdim=True)
    found: list[Tensor] = []
    for k in range(start.shape[0]):
        own = m @ step[k] / m.abs().max().clamp(min=float(SMALLEST_SCALE) ** 2)
        before = own.norm()
        for _ in range(2):
            for other in found:
                own = own - (other @ own) * other
        left = own.norm()
        found.append(torch.where(left > VANISHED * before, own / left, torch.zeros_like(own)))
    p = _settled_tensor(torch.stack(found))
    return p, _settled_tensor(p.double() @ m)


def _settled_tensor(values: Tensor) -> Tensor:
    """float64 -> float32, `_settled`."""
    return values.where(values.abs() >= float(SMALLEST_SCALE), values.new_zeros(())).float()


def _rank(text: str) -> int:
    rank = int(text)
    if not 1 <= rank <= LARGEST_RANK:
        raise ValueError(text)
    return rank


def make(rank: int) -> Codec:
    return _of(rank, COLUMNS)


@functools.lru_cache(maxsize=4096)
def _of(rank: int, columns: int) -> Codec:
    """For blocks that are rows of so many columns, the last one filled up with zeros."""

    def split(n: int) -> int:
        """Where P ends."""
        return 4 * rank * -(-n // columns)

    def encoded_bytes(n: int) -> int:
        return split(n) + 4 * rank * columns

    def factors(data: U8, n: int) -> tuple[F32, F32]:
        """P: (rank, n), Q: (rank, m)."""
        at = split(n)
        return data[:at].view(np.float32).reshape(rank, -1), data[at:].view(np.float32).reshape(rank, columns)

    def power_step(x: F32, p: F32, q: F32, key: int) -> None:
        bits = absmax_bits(x.view(np.uint32))
        if bits >= INFINITE_BITS:
            raise non_finite("The vector to encode")
        absmax = np.uint32(bits).view(np.float32)
        if absmax > LARGEST:
            raise out_of_range(float(LARGEST))
        if absmax == 0:
            p[:] = q[:] = 0.0
        else:
            _encode(x, columns, p, q, absmax, np.uint64(key), np.empty(STRIP))

    def encode(x: F32, out: U8, key: int = 0) -> None:
        p, q = factors(out, x.size)
        q[:] = 0.0
        power_step(x, p, q, key)

    def warm(x: F32, out: U8, key: int, before: U8) -> None:
        p, q = factors(out, x.size)
        q[:] = factors(before, x.size)[1]
        power_step(x, p, q, key)

    def check(data: U8, n: int) -> None:
        expect_bytes(data, encoded_bytes(n))
        at = split(n)
        if not (
            _within(data[:at].view(np.uint32), LARGEST_P_BITS) and _within(data[at:].view(np.uint32), LARGEST_Q_BITS)
        ):
            raise CodecError("A factor of the encoded block holds what no sender computes: NaN, or too large or small.")

    def decode(data: U8, x: F32) -> None:
        _decode(*factors(data, x.size), x, np.empty(STRIP))

    def error_bound(x: F32) -> F32:
        """What is lost of a column is no longer than the column."""
        rows = np.concatenate([x, np.zeros(-x.size % columns, np.float32)]).reshape(-1, columns).astype(np.float64)
        lengths = np.sqrt(np.square(rows).sum(0)) * (1 + 2.0**-14)
        return np.tile(lengths, len(rows))[: x.size].astype(np.float32)

    def device_encode(x: Tensor, key: int) -> Tensor:
        import torch

        return device_warm(x, key, torch.zeros(encoded_bytes(x.numel()), dtype=torch.uint8, device=x.device))

    def device_warm(x: Tensor, key: int, before: Tensor) -> Tensor:
        import torch

        tensors.require_finite(x)
        if bool((x.abs() > float(LARGEST)).any()):
            raise out_of_range(float(LARGEST))
        drawn = draws.device_uniform(key, rank * columns, x.device).double().view(rank, columns) - _CENTER
        start = before[split(x.numel()) :].view(torch.float32).double().view(rank, columns)
        start = start.where(start.any(1, keepdim=True), drawn)
        return tensors.as_bytes(*_on_device(tensors.groups(x, columns), start))

    def device_decode(data: Tensor, n: int) -> Tensor:
        import torch

        at = split(n)
        p, q = (part.view(torch.float32).double().view(rank, -1) for part in (data[:at], data[at:]))
        x = torch.zeros(p.shape[1], columns, dtype=torch.float64, device=data.device)
        for k in range(rank):  # in this order, and each product rounded: the same bits as those of the CPU
            x += p[k][:, None] * q[k]
        return _settled_tensor(x).view(-1)[:n]

    return Codec(
        name="powersgd",
        summary=f"two factors of rank {rank} instead of each matrix",
        paper="Vogels et al., arXiv 1905.13727",
        when="large matrices whose updates change slowly, a fortieth of the bytes",
        bytes_per_element=f"{4 * rank}/rows + {4 * rank}/columns",
        lossless=False,
        unbiased=False,
        dense="fp16",
        feedback="always",
        contraction=min(rank, columns) / columns,
        encoded_bytes=encoded_bytes,
        encode=encode,
        check=check,
        decode=decode,
        error_bound=error_bound,
        device=Device(device_encode, device_decode, device_warm),
        stochastic=True,
        same_bytes=False,
        tolerance=2.0**-16,
        largest=float(LARGEST),
        parameters=(Parameter("rank", RANK, _rank, f"a whole number from 1 to {LARGEST_RANK}", "4"),),
        make=make,
        warm=warm,
        of_columns=functools.partial(_of, rank),
    )


CODEC = make(RANK)
