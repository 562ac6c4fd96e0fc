"""`int8`: its worked numbers, its layout on the wire, and the edges of its scale."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs.base import F32, U8
from common.codecs.int8 import CODEC, GROUP, LARGEST_SCALE
from common.errors import Code, CodecError

V = np.array([0.3, -1.2, 0.05, 2.0, -0.7, 0.0, 0.9, -0.1], np.float32)
FLT_MAX = np.finfo(np.float32).max
THRESHOLD = np.float32(2.0**-119)


def encoded(x: F32) -> tuple[U8, F32, list[int]]:
    """The block, its scales and its codes."""
    out = np.full(CODEC.encoded_bytes(x.size), 0x80, np.uint8)
    CODEC.encode(x, out)
    CODEC.check(out, x.size)
    groups = -(-x.size // GROUP)
    return out, out[: 4 * groups].view(np.float32), [int(q) for q in out[4 * groups :].view(np.int8)]


def decoded(data: U8, n: int) -> F32:
    x = np.full(n, np.nan, np.float32)
    CODEC.decode(data, x)
    return x


def block(scale: float | np.float32, *codes: int) -> U8:
    """One group, as a stranger might send it."""
    return np.concatenate([np.array([scale], np.float32).view(np.uint8), np.array(codes, np.int8).view(np.uint8)])


def reference(x: F32) -> F32:
    """Decoded values, group by group, in plain numpy."""
    parts = []
    for start in range(0, x.size, GROUP):
        group = x[start : start + GROUP]
        scale = np.abs(group).max() / np.float32(127)
        parts.append(scale * np.rint(group / scale) if np.abs(group).max() >= THRESHOLD else np.zeros_like(group))
    return np.concatenate(parts)


def test_worked_numbers() -> None:
    data, scales, codes = encoded(V)
    assert scales.tolist() == [pytest.approx(0.0157480314, rel=1e-7)]
    assert codes == [19, -76, 3, 127, -44, 0, 57, -6]
    error = decoded(data, V.size).astype(np.float64) - V
    assert np.abs(error).max() == pytest.approx(0.00709, abs=5e-6)
    assert np.square(error).sum() / np.square(V.astype(np.float64)).sum() == pytest.approx(1.52e-5, rel=5e-3)


def test_ties_go_to_even() -> None:
    _, scales, codes = encoded(np.array([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5], np.float32))
    assert scales.tolist() == [1.0]
    assert codes == [127, 0, 2, 2, 0, -2, -2, 126]


@pytest.mark.parametrize(
    ("n", "length"), [(1, 5), (1023, 1027), (1024, 1028), (1025, 1033), (2048, 2056), (65_536, 65_792)]
)
def test_a_block_is_its_scales_and_then_its_codes(n: int, length: int) -> None:
    assert CODEC.encoded_bytes(n) == length
    data, scales, codes = encoded(np.ones(n, np.float32))
    assert data.size == 4 * scales.size + len(codes) == length
    assert scales.size == -(-n // GROUP)
    assert codes == [127] * n


def test_an_outlier_coarsens_only_its_own_group() -> None:
    x = np.full(3 * GROUP - 1, 0.01, np.float32)
    x[GROUP] = 1000.0
    data, _, _ = encoded(x)
    y = decoded(data, x.size)
    assert y[GROUP] == 1000.0
    assert not y[GROUP + 1 : 2 * GROUP].any()
    np.testing.assert_allclose(np.delete(y, slice(GROUP, 2 * GROUP)), 0.01, rtol=1e-6)


@given(
    drawn=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    seed=st.integers(0, 1 << 32),
    n=st.integers(1, 3000),
)
@settings(max_examples=60, deadline=None)
def test_decodes_as_plain_numpy_does(drawn: list[float], seed: int, n: int) -> None:
    x = np.random.default_rng(seed).choice(np.array(drawn, np.float32), n)
    data, _, _ = encoded(x)
    np.testing.assert_array_equal(decoded(data, n), reference(x))


def test_a_group_under_the_threshold_is_sent_as_zeros() -> None:
    under = np.nextafter(THRESHOLD, np.float32(0))
    x = np.concatenate([np.full(GROUP, under, np.float32), np.full(GROUP, -THRESHOLD, np.float32)])
    data, scales, codes = encoded(x)
    assert scales[0] == 0.0
    assert scales[1] >= np.finfo(np.float32).smallest_normal
    assert codes == [0] * GROUP + [-127] * GROUP
    y = decoded(data, x.size)
    assert y[:GROUP].tobytes() == bytes(4 * GROUP)
    np.testing.assert_allclose(y[GROUP:], -THRESHOLD, rtol=2.0**-23)


def test_negative_zero_becomes_zero() -> None:
    data, _, _ = encoded(np.array([-0.0, 1.0], np.float32))
    assert decoded(data, 2).tobytes() == np.array([0.0, 1.0], np.float32).tobytes()


def test_the_largest_scale_is_the_last_that_decodes_to_finite_values() -> None:
    assert np.isfinite(np.float32(127) * LARGEST_SCALE)
    with np.errstate(over="ignore"):
        assert np.isinf(np.float32(127) * np.nextafter(LARGEST_SCALE, np.float32(np.inf)))
    data, scales, codes = encoded(np.array([FLT_MAX, -FLT_MAX, FLT_MAX / 2], np.float32))
    assert scales.tolist() == [LARGEST_SCALE]
    assert codes == [127, -127, 64]
    np.testing.assert_allclose(decoded(data, 2), [FLT_MAX, -FLT_MAX], rtol=2.0**-23)


@pytest.mark.parametrize("scale", [0.0, 2.0**-126, 1.0, LARGEST_SCALE], ids=str)
def test_any_scale_that_decodes_to_normal_numbers_passes(scale: float) -> None:
    data = block(scale, -127, 127, 0)
    CODEC.check(data, 3)
    assert np.isfinite(decoded(data, 3)).all()


@pytest.mark.parametrize(
    "scale",
    [
        np.nan,
        np.inf,
        -np.inf,
        -1.0,
        -0.0,
        2.0**-127,
        np.finfo(np.float32).smallest_subnormal,
        np.nextafter(LARGEST_SCALE, np.float32(np.inf)),
        FLT_MAX,
    ],
    ids=str,
)
def test_any_other_scale_is_refused_in_any_group(scale: float) -> None:
    data, _, _ = encoded(np.ones(2 * GROUP + 1, np.float32))
    for group in range(3):
        forged = data.copy()
        forged[: 3 * 4].view(np.float32)[group] = scale
        with pytest.raises(CodecError, match="scale") as caught:
            CODEC.check(forged, 2 * GROUP + 1)
        assert caught.value.code is Code.ENCODING


def test_the_code_that_no_sender_uses_is_refused() -> None:
    with pytest.raises(CodecError, match="-128") as caught:
        CODEC.check(block(1.0, 0, -128), 2)
    assert caught.value.code is Code.ENCODING
