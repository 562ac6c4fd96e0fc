"""`topk`: its worked numbers, ties, the packing of indices, and indices that a stranger may send."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import codecs
from common.codecs.base import F32, U8
from common.codecs.topk import CHUNK, CODEC
from common.errors import Code, CodecError
from tests.unit.common.codecs.vectors import V, decoded, encoded, relative_error

QUARTER = codecs.load("topk:0.25")


def reference(x: F32, density: float) -> F32:
    """Chunk by chunk, in plain numpy; a stable sort keeps the lowest index of equals."""
    y = np.zeros_like(x)
    for start in range(0, x.size, CHUNK):
        part = x[start : start + CHUNK]
        k = min(part.size, max(1, int(np.ceil(density * part.size - 1e-9))))
        best = np.argsort(-np.abs(part), kind="stable")[:k]
        y[start + best] = np.clip(part[best], -65504, 65504).astype(np.float16).astype(np.float32)
    return y


def test_worked_numbers() -> None:
    y = decoded(QUARTER, encoded(QUARTER, V), V.size)
    assert np.flatnonzero(y).tolist() == [1, 3]
    assert relative_error(QUARTER, V) == pytest.approx(0.204969, rel=1e-3)


def test_two_indices_in_three_bytes() -> None:
    x = np.zeros(CHUNK, np.float32)
    x[[0x123, 0xABC]] = 1.0
    codec = codecs.load(f"topk:{2 / CHUNK:g}")
    assert encoded(codec, x)[4:].tolist() == [0x23, 0xC1, 0xAB]


def test_ties_go_to_the_lowest_index() -> None:
    x = np.full(8, 0.5, np.float32)
    x[6] = -0.75
    assert np.flatnonzero(decoded(QUARTER, encoded(QUARTER, x), 8)).tolist() == [0, 6]


@given(
    drawn=st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=40),
    seed=st.integers(0, 1 << 32),
    n=st.integers(1, 9000),
    density=st.sampled_from([0.001, 0.01, 0.25, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_selects_as_a_stable_sort_does(drawn: list[float], seed: int, n: int, density: float) -> None:
    """Of few values, so that there are ties."""
    x = np.random.default_rng(seed).choice(np.array(drawn, np.float32), n)
    codec = codecs.load(f"topk:{density:g}")
    np.testing.assert_array_equal(decoded(codec, encoded(codec, x), n), reference(x, density))


@given(seed=st.integers(0, 1 << 32), n=st.integers(1, 9000))
@settings(max_examples=40, deadline=None)
def test_selects_the_largest_of_any_magnitudes(seed: int, n: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint32)
    x = np.where(bits & 0x7F80_0000 == 0x7F80_0000, np.uint32(0), bits).view(np.float32)
    np.testing.assert_array_equal(decoded(CODEC, encoded(CODEC, x), n), reference(x, 0.01))


def forged(*indices: int) -> U8:
    """A block of 8 elements with these two indices."""
    first, second = indices
    data = np.zeros(7, np.uint8)
    data[4:] = first & 0xFF, first >> 8 | (second & 0xF) << 4, second >> 4
    return data


def test_ascending_indices_in_range_pass() -> None:
    QUARTER.check(forged(0, 7), 8)


@pytest.mark.parametrize("indices", [(3, 3), (3, 2), (0, 8), (8, 9), (0, 4095)])
def test_other_indices_are_refused(indices: tuple[int, int]) -> None:
    with pytest.raises(CodecError, match="ascending") as caught:
        QUARTER.check(forged(*indices), 8)
    assert caught.value.code is Code.ENCODING


def test_half_a_byte_left_over_is_zero() -> None:
    data = encoded(QUARTER, V[:4])
    data[-1] |= 0x10
    with pytest.raises(CodecError):
        QUARTER.check(data, 4)
