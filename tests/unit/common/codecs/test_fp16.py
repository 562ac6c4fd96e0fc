"""`fp16` is torch's own half precision, bit for bit, except that it clips where torch goes to infinity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.codecs.base import F32, U8
from common.codecs.fp16 import CODEC
from common.errors import Code, CodecError

FINITE_CODES = np.flatnonzero(np.arange(1 << 16) & 0x7C00 != 0x7C00).astype(np.uint16)


def codes(x: F32) -> list[int]:
    out = np.empty(2 * x.size, np.uint8)
    CODEC.encode(x, out)
    return [int(code) for code in out.view(np.uint16)]


def values(data: U8) -> F32:
    x = np.empty(data.size // 2, np.float32)
    CODEC.decode(data, x)
    return x


def ties_and_neighbours() -> F32:
    """Every positive half, the middle to the next one, and the single-precision numbers beside each, both signs."""
    halves = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)
    following = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    exact = np.concatenate([halves, (halves + following) / 2])
    up, down = np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))
    positive = np.concatenate([exact, up, down])
    return np.concatenate([positive, -positive])


@pytest.mark.parametrize(
    ("x", "code"),
    [
        (0.1, 0x2E66),
        (1 / 3, 0x3555),
        (1 + 2**-11, 0x3C00),  # ties to even
        (1 + 3 * 2**-11, 0x3C02),
        (2.9e-8, 0x0000),
        (2.0**-25, 0x0000),
        (6e-8, 0x0001),
        (3 * 2.0**-25, 0x0002),
        (2.0**-14, 0x0400),
        (65519.99, 0x7BFF),
        (65520.0, 0x7BFF),  # infinity, without the clip
        (3.4e38, 0x7BFF),
        (0.0, 0x0000),
        (1e-45, 0x0000),
    ],
)
def test_worked_numbers(x: float, code: int) -> None:
    assert codes(np.array([x, -x], np.float32)) == [code, code | 0x8000]


def test_every_tie_and_its_neighbours_round_as_torch_rounds() -> None:
    x = ties_and_neighbours()
    assert codes(x) == torch.from_numpy(x).to(torch.float16).view(torch.uint16).tolist()


def test_all_magnitudes_round_as_torch_rounds() -> None:
    bits = np.random.default_rng(16).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    x = bits.view(np.float32)[bits & 0x7F80_0000 != 0x7F80_0000]
    assert codes(x) == torch.from_numpy(x).clamp(-65504, 65504).to(torch.float16).view(torch.uint16).tolist()


def test_every_finite_code_decodes_as_in_torch_and_encodes_to_itself() -> None:
    data = FINITE_CODES.view(np.uint8)
    CODEC.check(data, FINITE_CODES.size)
    x = values(data)
    assert x.tobytes() == torch.from_numpy(FINITE_CODES).view(torch.float16).float().numpy().tobytes()
    assert codes(x) == FINITE_CODES.tolist()


@pytest.mark.parametrize("code", [0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF], ids=hex)
def test_infinity_and_nan_on_the_wire_are_refused(code: int) -> None:
    with pytest.raises(CodecError) as caught:
        CODEC.check(np.array([0x3C00, code], np.uint16).view(np.uint8), 2)
    assert caught.value.code is Code.NON_FINITE
