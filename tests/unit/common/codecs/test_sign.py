"""`sign`: its worked numbers, the order of its bits, and zeros."""

from __future__ import annotations

import numpy as np
import pytest

from common.codecs.sign import CODEC
from common.errors import CodecError
from tests.unit.common.codecs.vectors import V, decoded, encoded, relative_error


def test_worked_numbers() -> None:
    data = encoded(CODEC, V)
    assert data[:4].view(np.float32)[0] == pytest.approx(0.65625, rel=1e-6)
    assert data[4] == 0x92, "the first element is the lowest bit, zero counts as plus"
    assert relative_error(CODEC, V) == pytest.approx(0.496483, rel=1e-5)


def test_one_element_of_many_is_spread_and_still_contracts() -> None:
    x = np.zeros(16, np.float32)
    x[5] = 1.0
    assert relative_error(CODEC, x) == pytest.approx(0.9375), "with the scale |x| / sqrt(d) it would be 1.5"


def test_zeros_stay_zeros_of_either_sign() -> None:
    for x in (np.zeros(9, np.float32), np.full(9, -0.0, np.float32)):
        assert decoded(CODEC, encoded(CODEC, x), 9).tobytes() == bytes(36)


def test_bits_beyond_the_end_are_refused() -> None:
    data = encoded(CODEC, V[:5])
    data[-1] |= 0x20
    with pytest.raises(CodecError, match="more than its codes"):
        CODEC.check(data, 5)
