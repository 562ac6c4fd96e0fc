"""`terngrad`: its worked numbers."""

from __future__ import annotations

import numpy as np
import pytest

from common.codecs.terngrad import CODEC, code
from common.errors import CodecError
from tests.unit.common.codecs.vectors import U, V, decoded, encoded


def test_worked_numbers() -> None:
    found = [int(code(x, np.float32(2.0), u)) for x, u in zip(V, U, strict=True)]
    assert [{0: 0, 1: 1, 3: -1}[one] for one in found] == [0, -1, 0, 1, 0, 0, 0, 0]


def test_the_mean_square_is_the_scale_times_the_sum_of_magnitudes() -> None:
    x = np.tile(V, 8192)
    y = decoded(CODEC, encoded(CODEC, x), x.size).reshape(-1, 8).astype(np.float64)
    assert np.square(y).sum(1).mean() == pytest.approx(10.5, rel=0.02)
    np.testing.assert_allclose(np.abs(y).mean(0) / 2.0, [0.15, 0.6, 0.025, 1.0, 0.35, 0.0, 0.45, 0.05], atol=0.02)


def test_code_2_is_refused() -> None:
    data = encoded(CODEC, V)
    data[-1] = 0x20
    with pytest.raises(CodecError, match="no sender uses"):
        CODEC.check(data, V.size)
