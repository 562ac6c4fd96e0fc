"""`e3m0`: its worked numbers, its grid with every midpoint, and what a stranger may send."""

from __future__ import annotations

import numpy as np
import pytest

from common.codecs.e3m0 import CODEC
from common.errors import Code, CodecError
from tests.unit.common.codecs.vectors import V, decoded, encoded, relative_error

GRID = np.array([0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1], np.float32)


def test_worked_numbers() -> None:
    y = decoded(CODEC, encoded(CODEC, V), V.size)
    assert y.tolist() == [0.25, -1.0, 0.0625, 2.0, -0.5, 0.0, 1.0, -0.125]
    assert relative_error(CODEC, V) == pytest.approx(0.01363, rel=1e-3)


def test_noise_is_hardly_shrunk() -> None:
    x = np.random.default_rng(0).standard_normal(1 << 16, dtype=np.float32)
    y = decoded(CODEC, encoded(CODEC, x), x.size)
    assert 0.030 <= relative_error(CODEC, x) <= 0.040
    assert 0.96 <= np.dot(x, y) / np.dot(x, x) <= 1.0


def test_every_midpoint_goes_to_the_even_code_and_its_neighbours_to_the_nearest() -> None:
    middles = ((GRID[1:].astype(np.float64) + GRID[:-1]) / 2).astype(np.float32)
    below, above = np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(2))
    x = np.concatenate([np.ones(1, np.float32), middles, below, above, -middles])
    y = decoded(CODEC, encoded(CODEC, x), x.size)[1:].reshape(4, 7)
    even = GRID[[0, 2, 2, 4, 4, 6, 6]]
    assert y.tolist() == [even.tolist(), GRID[:-1].tolist(), GRID[1:].tolist(), (-even).tolist()]
    assert not np.signbit(y[3][0]), "zero has no sign"


@pytest.mark.parametrize("scale", [0.0, 2.0**-119, 1.0, np.finfo(np.float32).max])
def test_scales_that_pass(scale: float) -> None:
    data = encoded(CODEC, V)
    data[:4].view(np.float32)[0] = scale
    CODEC.check(data, V.size)
    assert np.isfinite(decoded(CODEC, data, V.size)).all()


@pytest.mark.parametrize("scale", [-1.0, -0.0, np.inf, np.nan, 2.0**-120])
def test_scales_that_do_not(scale: float) -> None:
    data = encoded(CODEC, V)
    data[:4].view(np.float32)[0] = scale
    with pytest.raises(CodecError, match="scale") as caught:
        CODEC.check(data, V.size)
    assert caught.value.code is Code.ENCODING
