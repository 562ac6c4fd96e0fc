"""The vector that the worked numbers are about, and a block as a codec's functions take it."""

from __future__ import annotations

import numpy as np

from common.codecs.base import F32, U8, Codec

V = np.array([0.3, -1.2, 0.05, 2.0, -0.7, 0.0, 0.9, -0.1], np.float32)
U = np.array([0.5, 0.1, 0.9, 0.2, 0.7, 0.3, 0.6, 0.05], np.float32)
"""Uniform numbers, one for each element."""


def encoded(codec: Codec, x: F32, key: int = 0) -> U8:
    out = np.full(codec.encoded_bytes(x.size), 0xA5, np.uint8)
    codec.encode(x, out, key)
    codec.check(out, x.size)
    return out


def decoded(codec: Codec, data: U8, n: int) -> F32:
    x = np.full(n, np.nan, np.float32)
    codec.decode(data, x)
    return x


def relative_error(codec: Codec, x: F32) -> float:
    """|x - decoded|^2 / |x|^2."""
    lost = decoded(codec, encoded(codec, x), x.size).astype(np.float64) - x
    return float(np.square(lost).sum() / np.square(x.astype(np.float64)).sum())
