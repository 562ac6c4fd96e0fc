"""`topk`: of every 4096 elements the hundredth with the largest magnitudes. 3.5 bytes for each that is sent, biased;
always with error feedback.

    k = ceil(density length)    the k largest |x|, ties to the lowest index, as halves               per chunk of 4096
    decoded = those, and zero everywhere else

    encoded block:  float16 value [all k]   indices, 12 bits each, chunk by chunk; the last chunk may be shorter
    or (int8):      float32 scale [chunks]  int8 q [all k]   indices                        scale = max |x| / 127
    indices:        ascending within their chunk, two in three bytes, low bits first; half a byte left over is zero

`topk:0.05` sends a twentieth, `topk:0.05:int8` its values in one byte instead of two. It contracts by the density:
|x - decoded|^2 <= (1 - density) |x|^2, up to the rounding of values. Chunks let no part of a model starve, and make an
index short; a threshold for the whole vector would do neither. Values are clipped to 65504, and vanish under 2^-25:
feedback keeps both. Indices that are not ascending, or beyond the end, are refused: no element is written twice.

The threshold is searched on bit patterns, which order as magnitudes do, from that of the chunk before on: each step
counts in one pass over 16 KiB, and most chunks need five or six. Left out: values of 2 bits; unions of supports on the
way down.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from common.codecs import tensors
from common.codecs.base import (
    F32,
    U8,
    Codec,
    CodecError,
    Device,
    Parameter,
    all_finite,
    expect_bytes,
    kernel,
    non_finite,
)
from common.codecs.parts import (
    INFINITE_BITS,
    LARGEST_HALF,
    SMALLEST_ABSMAX,
    absmax_bits,
    check_scales,
    from_half,
    holds_lowest,
    largest_scale,
    to_half,
)

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 4096
DENSITY = 0.01
HALVES, BYTES = "fp16", "int8"
STRIP = 32
"""Elements that are looked at together when the chosen are gathered."""

LEVELS = np.float32(127.0)
LARGEST_SCALE = largest_scale(127)
HALF_EXPONENT = np.uint16(0x7C00)
BINADE = 1 << 23


@kernel
def _count(bits: Any, threshold: Any) -> Any:
    """Magnitudes of at least `threshold`."""
    count = np.int32(0)
    for i in range(bits.size):
        count = np.int32(count + (np.uint32(bits[i] & 0x7FFF_FFFF) >= threshold))
    return count


@kernel
def _threshold(bits: Any, k: Any, top: Any, hint: Any) -> Any:
    """(t, exact): exactly k magnitudes have bits from t on; or more have, and fewer than k have more than t.

    top: the largest; hint: where to look first, or 0. Which k that makes does not depend on the way there.
    """
    low, high = np.int64(0), np.int64(top) + np.int64(1)
    count_low, count_high = bits.size, 0.5
    middle, reach = (np.int64(hint), np.int64(BINADE // 8)) if 0 < hint < high else (high - BINADE, np.int64(BINADE))
    turn = 0
    while high - low > 1:
        middle = min(max(middle, low + 1), high - 1)
        count = _count(bits, np.uint32(middle))
        if count == k:
            return np.uint32(middle), True
        if count > k:
            low, count_low = middle, count
        else:
            high, count_high = middle, max(count, 0.5)
        turn += 1
        if low == 0:
            middle, reach = high - reach, 4 * reach
        elif turn % 4:  # counts fall about exponentially, so their logarithms are interpolated
            share = np.log(count_low / k) / np.log(count_low / count_high)
            middle = low + np.int64(share * (high - low))
        else:
            middle = (low + high) // 2
    return np.uint32(low), False


@kernel
def _select(bits: Any, threshold: Any, ties: Any, halves: Any, bytes_: Any, scale: Any, indices: Any) -> None:
    """Values and indices of the magnitudes above the threshold, and of the first `ties` that equal it, ascending."""
    found = 0
    for start in range(0, bits.size, STRIP):
        strip = bits[start : start + STRIP]
        if absmax_bits(strip) < threshold:
            continue
        for i in range(strip.size):
            magnitude = np.uint32(strip[i] & 0x7FFF_FFFF)
            if magnitude < threshold or (magnitude == threshold and ties == 0):
                continue
            if magnitude == threshold:
                ties -= 1
            if halves.size:
                half = to_half(strip[i])
                halves[found] = half if half & 0x7FFF else 0  # zero has no sign
            elif scale > 0:
                bytes_[found] = np.int8(np.rint(np.uint32(strip[i]).view(np.float32) / scale))
            else:
                bytes_[found] = 0
            _put(indices, found, start + i)
            found += 1


@kernel
def _put(indices: Any, place: Any, index: Any) -> None:
    """12 bits; the places are filled in order."""
    at = 3 * (place // 2)
    if place % 2:
        indices[at + 1] |= (index & 0xF) << 4
        indices[at + 2] = index >> 4
    else:
        indices[at] = index & 0xFF
        indices[at + 1] = index >> 8


@kernel
def _index(data: Any, place: Any) -> Any:
    at = 3 * (place // 2)
    if place % 2:
        return np.int32(data[at + 1]) >> 4 | np.int32(data[at + 2]) << 4
    return np.int32(data[at]) | (np.int32(data[at + 1]) & 0xF) << 8


@kernel
def _encode(bits: Any, scales: Any, halves: Any, bytes_: Any, indices: Any, k: Any, last_k: Any) -> bool:
    """Of `halves` and `bytes_` one is empty."""
    chunks = (bits.size + CHUNK - 1) // CHUNK
    threshold = np.uint32(0)
    for c in range(chunks):
        part = bits[c * CHUNK : (c + 1) * CHUNK]
        top = absmax_bits(part)
        if top >= INFINITE_BITS:
            return False
        scale = np.float32(0.0)
        if scales.size:
            absmax = np.uint32(top).view(np.float32)
            scale = np.float32(0.0) if absmax < SMALLEST_ABSMAX else min(absmax / LEVELS, LARGEST_SCALE)
            scales[c] = scale
        own_k = k if c < chunks - 1 else last_k
        own = indices[c * ((3 * k + 1) // 2) :]
        threshold, exact = _threshold(part, own_k, top, threshold)
        ties = own_k if exact else own_k - _count(part, threshold + np.uint32(1))
        _select(part, threshold, ties, halves[c * k :], bytes_[c * k :], scale, own)
    return True


@kernel
def _indices_pass(indices: Any, n: Any, k: Any, last_k: Any) -> bool:
    """Ascending and in range in each chunk, and nothing in what is left over."""
    chunks = (n + CHUNK - 1) // CHUNK
    for c in range(chunks):
        own_k = k if c < chunks - 1 else last_k
        start = c * ((3 * k + 1) // 2)
        own = indices[start : start + (3 * own_k + 1) // 2]
        before = np.int32(-1)
        for j in range(own_k):
            index = _index(own, j)
            if index <= before:
                return False
            before = index
        if before >= min(CHUNK, n - c * CHUNK) or (own_k % 2 and own[own.size - 1] > 0xF):
            return False
    return True


@kernel
def _decode(scales: Any, halves: Any, bytes_: Any, indices: Any, bits: Any, k: Any, last_k: Any) -> None:
    bits[:] = 0
    chunks = (bits.size + CHUNK - 1) // CHUNK
    values = 0
    for c in range(chunks):
        own_k = k if c < chunks - 1 else last_k
        part = bits[c * CHUNK : (c + 1) * CHUNK]
        own = indices[c * ((3 * k + 1) // 2) :]
        if halves.size:
            for j in range(own_k):
                part[_index(own, j)] = from_half(halves[values + j])
        else:
            for j in range(own_k):
                value = np.float32(scales[c] * np.float32(bytes_[values + j]))
                part[_index(own, j)] = value.view(np.uint32)
        values += own_k


def make(density: float, values: str) -> Codec:
    in_halves = values == HALVES

    def k_of(length: int) -> int:
        return min(length, max(1, math.ceil(density * length - 1e-9)))

    k = k_of(CHUNK)

    def cut(n: int) -> tuple[int, int, int, int]:
        """k of the last chunk; where scales, values and indices end."""
        chunks = -(-n // CHUNK)
        last_k = k_of(n - (chunks - 1) * CHUNK)
        sent = (chunks - 1) * k + last_k
        scales = 0 if in_halves else 4 * chunks
        end = scales + (2 if in_halves else 1) * sent
        return last_k, scales, end, end + (chunks - 1) * ((3 * k + 1) // 2) + (3 * last_k + 1) // 2

    def parts(data: U8, n: int) -> tuple[int, F32, Any, Any, U8]:
        """k of the last chunk, scales, halves, bytes, indices."""
        last_k, scales, end, _ = cut(n)
        halves = data[scales : end if in_halves else scales].view(np.uint16)
        bytes_ = data[scales : scales if in_halves else end].view(np.int8)
        return last_k, data[:scales].view(np.float32), halves, bytes_, data[end:]

    def encode(x: F32, out: U8, key: int = 0) -> None:
        last_k, scales, halves, bytes_, indices = parts(out, x.size)
        if not _encode(x.view(np.uint32), scales, halves, bytes_, indices, k, last_k):
            raise non_finite("The vector to encode")

    def check(data: U8, n: int) -> None:
        expect_bytes(data, cut(n)[3])
        last_k, scales, halves, bytes_, indices = parts(data, n)
        if in_halves and not all_finite(halves, HALF_EXPONENT):
            raise non_finite("The update")
        if not in_halves:
            check_scales(scales, LARGEST_SCALE)
            if holds_lowest(bytes_.view(np.uint8)):
                raise CodecError("The encoded block holds -128; the values are -127 to 127.")
        if not _indices_pass(indices, n, k, last_k):
            raise CodecError("The indices of the encoded block are not ascending within their chunk.")

    def decode(data: U8, x: F32) -> None:
        last_k, scales, halves, bytes_, indices = parts(data, x.size)
        _decode(scales, halves, bytes_, indices, x.view(np.uint32), k, last_k)

    def device_encode(x: Tensor, key: int) -> Tensor:
        import torch

        tensors.require_finite(x)
        scales, found, packed = [], [], []
        whole = x.numel() - x.numel() % CHUNK
        for rows in (x[:whole].view(-1, CHUNK), x[whole:].view(1, -1)):
            if rows.numel() == 0:
                continue
            own_k = k_of(rows.shape[1])
            magnitude = rows.abs().view(torch.int32)
            chosen = magnitude.sort(dim=1, descending=True, stable=True).indices[:, :own_k].sort(1).values
            sent = rows.gather(1, chosen)
            if in_halves:
                found.append(sent.clamp(-LARGEST_HALF, LARGEST_HALF).half().view(-1) + 0.0)  # zero has no sign
            else:
                scale = tensors.scales(rows.abs().amax(1, keepdim=True), 127.0, float(LARGEST_SCALE))
                scales.append(scale.view(-1))
                found.append(tensors.divided(sent, scale).round().to(torch.int8).view(-1))
            packed.append(_packed(chosen).reshape(-1))
        return tensors.as_bytes(*scales, *found, *packed)

    def device_decode(data: Tensor, n: int) -> Tensor:
        import torch

        last_k, at, end, _ = cut(n)
        chunks = -(-n // CHUNK)
        if in_halves:
            values = data[:end].view(torch.float16).float()
        else:
            scales = data[:at].view(torch.float32)
            counts = torch.full((chunks,), k, device=data.device)
            counts[-1] = last_k
            values = scales.repeat_interleave(counts) * data[at:end].view(torch.int8).float()
        rest, per_chunk = data[end:], (3 * k + 1) // 2
        split = (chunks - 1) * per_chunk
        whole, last = rest[:split].view(chunks - 1, per_chunk), rest[split:].view(1, -1)
        starts = torch.arange(0, n, CHUNK, device=data.device)[:, None]
        places = [starts[:-1] + _unpacked(whole, k), starts[-1:] + _unpacked(last, last_k)]
        x = torch.zeros(n, dtype=torch.float32, device=data.device)
        x[torch.cat([each.reshape(-1) for each in places])] = values
        return x

    each = "2 + 1.5" if in_halves else "1 + 1.5"
    return Codec(
        name="topk",
        summary=f"the {k} largest of every {CHUNK:,} elements",
        paper="Stich et al., arXiv 1809.07599; chunks as in SparseLoCo, arXiv 2508.15706",
        when="a hundredth of the bytes, for slow links and updates of many local steps",
        bytes_per_element=f"{density:g} ({each}){'' if in_halves else f' + 4/{CHUNK}'}",
        lossless=False,
        unbiased=False,
        dense="fp16",
        feedback="always",
        contraction=density * (1.0 - 2.0**-13),
        encoded_bytes=lambda n: cut(n)[3],
        encode=encode,
        check=check,
        decode=decode,
        error_bound=np.abs,
        device=Device(device_encode, device_decode),
        parameters=(
            Parameter(
                "density", DENSITY, _density, "a share of the elements, above 0 and at most 1", "0.05", "{:g}".format
            ),
            Parameter("values", HALVES, _values, f"{HALVES} or {BYTES}", BYTES),
        ),
        make=make,
    )


def _packed(chosen: Tensor) -> Tensor:
    """(chunks, k) -> (chunks, ceil(1.5 k)) uint8."""
    import torch

    chunks, k = chosen.shape
    pairs = torch.cat([chosen, chosen.new_zeros(chunks, k % 2)], 1).view(chunks, -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    three = torch.stack([first & 0xFF, first >> 8 | (second & 0xF) << 4, second >> 4], 2)
    return three.to(torch.uint8).view(chunks, -1)[:, : (3 * k + 1) // 2]


def _unpacked(data: Tensor, k: int) -> Tensor:
    """(chunks, ceil(1.5 k)) uint8 -> (chunks, k) int64."""
    import torch

    chunks, width = data.shape
    filled = torch.cat([data, data.new_zeros(chunks, -width % 3)], 1).to(torch.int64)
    three = filled.view(chunks, (width + 2) // 3, 3)
    first, second = three[..., 0] | (three[..., 1] & 0xF) << 8, three[..., 1] >> 4 | three[..., 2] << 4
    return torch.stack([first, second], 2).flatten(1)[:, :k]


def _density(text: str) -> float:
    density = float(f"{float(text):g}")
    if not 0 < density <= 1:
        raise ValueError(text)
    return density


def _values(text: str) -> str:
    if text not in (HALVES, BYTES):
        raise ValueError(text)
    return text


CODEC = make(DENSITY, HALVES)
