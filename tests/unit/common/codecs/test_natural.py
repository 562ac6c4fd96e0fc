"""`natural`: its worked numbers, and both ends of its window."""

from __future__ import annotations

import numpy as np
import pytest

from common.codecs.natural import CODEC, LARGEST, SMALLEST
from common.errors import CodecError
from tests.unit.common.codecs.vectors import decoded, encoded

N = 1 << 16


def shares(value: float) -> dict[float, float]:
    """What it becomes, and how often."""
    y = decoded(CODEC, encoded(CODEC, np.full(N, value, np.float32)), N)
    found, counts = np.unique(y, return_counts=True)
    return dict(zip(found.tolist(), (counts / N).tolist(), strict=True))


@pytest.mark.parametrize(
    ("value", "near", "far", "p_far"),
    [(2.5, 2, 4, 0.25), (0.3, 0.25, 0.5, 0.2), (-0.7, -0.5, -1, 0.4), (4 / 3, 1, 2, 1 / 3)],
)
def test_worked_numbers(value: float, near: float, far: float, p_far: float) -> None:
    found = shares(value)
    assert found.keys() == {near, far}
    assert found[far] == pytest.approx(p_far, abs=5 * np.sqrt(0.25 / N))


def test_the_largest_variance_is_an_eighth() -> None:
    x = np.full(N, 4 / 3, np.float32)
    lost = decoded(CODEC, encoded(CODEC, x), N).astype(np.float64) - x
    assert np.square(lost).mean() / (16 / 9) == pytest.approx(0.125, rel=0.02)


def test_powers_of_two_are_exact_over_the_whole_window() -> None:
    x = np.float32(2.0) ** np.arange(-99, 28, dtype=np.float32)
    assert (x[0], x[-1]) == (SMALLEST, LARGEST)
    for key in range(20):
        assert decoded(CODEC, encoded(CODEC, x, key), x.size).tobytes() == x.tobytes()


def test_underflow_is_a_matter_of_chance_too() -> None:
    found = shares(-float(SMALLEST) / 4)
    assert found.keys() == {0.0, -float(SMALLEST)}
    assert found[-float(SMALLEST)] == pytest.approx(0.25, abs=5 * np.sqrt(0.25 / N))


def test_a_sign_without_magnitude_is_refused() -> None:
    with pytest.raises(CodecError, match="sign without"):
        CODEC.check(np.array([1, 0x80], np.uint8), 2)
