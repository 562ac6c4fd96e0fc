"""Kernels that write past the caches: the same bytes as without, wherever they begin and end."""

from __future__ import annotations

import numpy as np
import pytest

from common.codecs.base import F32, copy_finite
from common.kernels import ALIGNED_BYTES, EXPONENT, FAR_BYTES, goes_far
from common.rules.base import add_update, sum_of

LENGTHS = [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 4096, 4097, 65_535]
GUARD = 64


def aligned(n: int) -> F32:
    """(n,) that begins at a cache line, all NaN, with as many behind it as `guard` looks at."""
    whole = np.full(n + GUARD + ALIGNED_BYTES // 4, np.nan, np.float32)
    first = -whole.ctypes.data % ALIGNED_BYTES // 4
    return whole[first : first + n + GUARD]


def noise(n: int) -> F32:
    return np.random.default_rng(n).normal(size=n).astype(np.float32)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("far", [False, True])
def test_a_copy_is_the_same_and_touches_nothing_else(n: int, far: bool) -> None:
    x, out = noise(n), aligned(n)
    assert copy_finite(x.view(np.uint32), out[:n].view(np.uint32), EXPONENT, far)
    assert (out[:n] == x).all()
    assert np.isnan(out[n:]).all()


@pytest.mark.parametrize("n", [n for n in LENGTHS if n])
def test_a_value_that_is_not_finite_is_found(n: int) -> None:
    for value in (np.nan, np.inf, -np.inf):
        for at in {0, n // 2, n - 1}:
            x, made, copy = noise(n), aligned(n)[:n], aligned(n)[:n]
            x[at] = value
            assert not copy_finite(x.view(np.uint32), made.view(np.uint32), EXPONENT, True)
            assert not sum_of(noise(n), x, np.float32(0.5), made, copy, FAR_BYTES)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("size", [0, FAR_BYTES])
def test_a_sum_is_what_adding_makes_of_it(n: int, size: int) -> None:
    c, d, weight = noise(n), noise(n + 1)[:n], -0.37
    expected = c.copy()
    add_update(None, expected, None, None, d, weight, (), np.zeros(0, np.float32))
    for copied in (0, n):
        made, copy, before = aligned(n), aligned(copied), c.copy()
        assert sum_of(c, d, np.float32(weight), made[:n], copy[:copied], size)
        assert (made[:n].view(np.uint32) == expected.view(np.uint32)).all()
        assert (copy[:copied] == expected[:copied]).all()
        assert np.isnan(made[n:]).all()
        assert np.isnan(copy[copied:]).all()
        assert (c == before).all()


def test_what_is_short_or_begins_elsewhere_stays_in_the_caches() -> None:
    out = aligned(4096)
    assert goes_far(out, FAR_BYTES)
    assert not goes_far(out, FAR_BYTES - 1)
    assert not goes_far(out[1:], FAR_BYTES)
