"""`qsgd`: its worked numbers, and its widths."""

from __future__ import annotations

import numpy as np
import pytest

from common import codecs
from common.codecs.qsgd import CODEC, level
from tests.unit.common.codecs.vectors import U, V, decoded, encoded


def test_worked_numbers() -> None:
    norm = np.sqrt(np.square(V.astype(np.float64)).sum())
    unit = np.float32(norm / 4)
    np.testing.assert_allclose(
        np.abs(V) / unit, [0.458748, 1.834991, 0.076458, 3.058318, 1.070411, 0, 1.376243, 0.152916], rtol=1e-5
    )
    found = [int(level(x, unit, u, np.float32(4))) for x, u in zip(V, U, strict=True)]
    assert found == [0, -2, 0, 3, -1, 0, 1, -1]


@pytest.mark.parametrize(("levels", "omega"), [(1, 1.00702), (2, 0.26809), (4, 0.05883), (8, 0.016389), (16, 0.005637)])
def test_variance(levels: int, omega: float) -> None:
    codec = codecs.load(f"qsgd:{levels}:16")
    x = np.tile(np.concatenate([V, np.zeros(8, np.float32)]), 4096)
    squares = [
        np.square(decoded(codec, encoded(codec, x, key), x.size).astype(np.float64) - x).sum() for key in range(8)
    ]
    assert np.mean(squares) / np.square(x.astype(np.float64)).sum() == pytest.approx(omega, rel=0.03)


def test_one_element_alone_has_the_highest_level() -> None:
    x = np.zeros(128, np.float32)
    x[7] = -3.7
    data = encoded(CODEC, x)
    assert data[4:].view(np.int8)[7] == -127
    np.testing.assert_allclose(decoded(CODEC, data, 128)[7], -3.7, rtol=1e-6)


@pytest.mark.parametrize(("levels", "length"), [(1, 36), (2, 68), (7, 68), (8, 132), (127, 132)])
def test_widths(levels: int, length: int) -> None:
    assert codecs.load(f"qsgd:{levels}").encoded_bytes(128) == length
