"""`int4`: its worked numbers, its layout on the wire, and what a stranger may send."""

from __future__ import annotations

import numpy as np
import pytest

from common import codecs
from common.codecs.int4 import CODEC, GROUP, LARGEST_SCALE
from common.errors import Code, CodecError
from tests.unit.common.codecs.vectors import V, decoded, encoded, relative_error


def test_worked_numbers() -> None:
    data = encoded(CODEC, V)
    assert data[:4].view(np.float32)[0] == pytest.approx(0.285714, rel=1e-5)
    nibbles = np.stack([data[4:] & 15, data[4:] >> 4], 1).ravel().astype(int)
    assert ((nibbles ^ 8) - 8).tolist() == [1, -4, 0, 7, -2, 0, 3, 0]
    assert relative_error(CODEC, V) == pytest.approx(5.0e-3, rel=0.02)


def test_noise_in_groups_of_32_and_128() -> None:
    x = np.random.default_rng(0).standard_normal(1 << 16, dtype=np.float32)
    assert relative_error(codecs.load("plain:int4:32"), x) == pytest.approx(0.0094, abs=5e-4)
    assert relative_error(CODEC, x) == pytest.approx(0.0139, abs=5e-4)


@pytest.mark.parametrize(("n", "length"), [(1, 5), (2, 5), (3, 6), (128, 68), (129, 73), (65_536, 34_816)])
def test_a_block_is_its_scales_and_then_two_codes_a_byte(n: int, length: int) -> None:
    assert CODEC.encoded_bytes(n) == length


def test_the_largest_scale_is_the_last_that_decodes_to_finite_values() -> None:
    assert np.isfinite(np.float32(7) * LARGEST_SCALE)
    with np.errstate(over="ignore"):
        assert np.isinf(np.float32(7) * np.nextafter(LARGEST_SCALE, np.float32(np.inf)))


@pytest.mark.parametrize("byte", [0x08, 0x80, 0x88])
def test_the_code_that_no_sender_uses_is_refused(byte: int) -> None:
    data = encoded(CODEC, np.ones(2 * GROUP, np.float32))
    data[-1] = byte
    with pytest.raises(CodecError, match="no sender uses") as caught:
        CODEC.check(data, 2 * GROUP)
    assert caught.value.code is Code.ENCODING


def test_what_an_odd_length_leaves_over_is_zero() -> None:
    data = encoded(CODEC, np.ones(3, np.float32))
    assert decoded(CODEC, data, 3).tolist() == [1.0, 1.0, 1.0]
    data[-1] |= 0x10
    with pytest.raises(CodecError, match="more than its codes"):
        CODEC.check(data, 3)
