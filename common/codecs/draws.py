"""Random numbers for codecs that round at random: not drawn one after the other, but computed from where they go.

    of_push(seed, worker, number)     key of one push
    of_reply(seed, worker, number)    key of the reply to it, where that is a difference
    of_block(key, first)              key of its block that starts at element `first`
    bits(key, i)                      64 random bits for element i of that block

    bits = mix(key + (i + 1) 0x9E3779B97F4A7C15)          SplitMix64: Steele, Lea, Flood, OOPSLA 2014

Laws
* The same (seed, worker, number, index) gives the same bits, in any order, on any thread, on CPU and device.
* Two pushes, two blocks and two elements share nothing but the generator.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from common.codecs.base import kernel

if TYPE_CHECKING:
    from torch import Tensor

GOLDEN = 0x9E37_79B9_7F4A_7C15
FIRST = 0xBF58_476D_1CE4_E5B9
SECOND = 0x94D0_49BB_1331_11EB
WORD = (1 << 64) - 1

_GOLDEN, _FIRST, _SECOND = np.uint64(GOLDEN), np.uint64(FIRST), np.uint64(SECOND)
_27, _30, _31 = np.uint64(27), np.uint64(30), np.uint64(31)
_40 = np.uint64(40)
_STEP = np.float32(2.0**-24)


def of_push(seed: int, worker: str, number: int) -> int:
    """The key of one push, 64 bits."""
    text = f"{seed}/{number}/{worker}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def of_reply(seed: int, worker: str, number: int) -> int:
    """The key of the reply to one push, 64 bits; another one than that of the push."""
    text = f"{seed}/{number}/{worker}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"reply").digest(), "little")


def of_block(key: int, first: int) -> int:
    """The key of the block that starts at element `first`: `bits` of a whole number of Python."""
    z = (key + (first + 1) * GOLDEN) & WORD
    z = (z ^ z >> 30) * FIRST & WORD
    z = (z ^ z >> 27) * SECOND & WORD
    return z ^ z >> 31


@kernel
def bits(key: Any, i: Any) -> Any:
    """64 random bits. key, i: uint64."""
    z = key + (i + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> _30)) * _FIRST
    z = (z ^ (z >> _27)) * _SECOND
    return z ^ (z >> _31)


@kernel
def uniform(key: Any, i: Any) -> Any:
    """float32, one of the 2^24 multiples of 2^-24 in [0, 1)."""
    return np.float32(np.int32(bits(key, i) >> _40)) * _STEP


def device_bits(key: int, n: int, device: Any) -> Tensor:
    """(n,) int64 on `device`: the bits of elements 0 to n - 1."""
    import torch

    z = torch.arange(1, n + 1, dtype=torch.int64, device=device) * signed(GOLDEN) + signed(key)
    z = (z ^ _shifted(z, 30)) * signed(FIRST)
    z = (z ^ _shifted(z, 27)) * signed(SECOND)
    return z ^ _shifted(z, 31)


def device_uniform(key: int, n: int, device: Any) -> Tensor:
    """(n,) float32 on `device`: the uniform numbers of elements 0 to n - 1."""
    import torch

    return _shifted(device_bits(key, n, device), 40).to(torch.float32) * 2.0**-24


def signed(word: int) -> int:
    """The same 64 bits as torch's signed integer, whose arithmetic wraps around."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(z: Tensor, by: int) -> Tensor:
    """A logical shift to the right: zeros come in from the left."""
    return (z >> by) & ((1 << 64 - by) - 1)
