"""`bf16` is torch's own bfloat16, bit for bit, except that it clips where torch goes to infinity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.codecs.base import F32, U8
from common.codecs.bf16 import CODEC
from common.errors import Code, CodecError

FINITE_CODES = np.flatnonzero(np.arange(1 << 16) & 0x7F80 != 0x7F80).astype(np.uint16)
LARGEST = torch.finfo(torch.bfloat16).max


def codes(x: F32) -> list[int]:
    out = np.empty(2 * x.size, np.uint8)
    CODEC.encode(x, out)
    return [int(code) for code in out.view(np.uint16)]


def values(data: U8) -> F32:
    x = np.empty(data.size // 2, np.float32)
    CODEC.decode(data, x)
    return x


def ties_and_neighbours() -> F32:
    """Every code, the middle to the next one, and the single-precision numbers beside each, both signs."""
    middles = FINITE_CODES.astype(np.uint32) << 16 | 0x8000
    exact = np.concatenate([middles - 0x8000, middles])
    bits = np.concatenate([exact, exact + 1, middles - 1])
    return bits[bits & 0x7FFF_FFFF < 0x7F7F_8000].view(np.float32)  # from there on torch has infinity


@pytest.mark.parametrize(
    ("x", "code"),
    [
        (0.1, 0x3DCD),
        (1 / 3, 0x3EAB),
        (1 + 2**-8, 0x3F80),  # ties to even
        (1 + 3 * 2**-8, 0x3F82),
        (257.0, 0x4380),  # 256 + 1 = 256
        (3.39e38, 0x7F7F),
        (3.4e38, 0x7F7F),  # infinity, without the clip
        (float(np.finfo(np.float32).max), 0x7F7F),
        (0.0, 0x0000),
        (2.0**-134, 0x0000),
        (2.0**-133, 0x0001),
        (1e-45, 0x0000),
    ],
)
def test_worked_numbers(x: float, code: int) -> None:
    assert codes(np.array([x, -x], np.float32)) == [code, code | 0x8000]


def test_every_tie_and_its_neighbours_round_as_torch_rounds() -> None:
    x = ties_and_neighbours()
    assert codes(x) == torch.from_numpy(x).to(torch.bfloat16).view(torch.uint16).tolist()


def test_all_magnitudes_round_as_torch_rounds() -> None:
    bits = np.random.default_rng(16).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    x = bits.view(np.float32)[bits & 0x7F80_0000 != 0x7F80_0000]
    assert codes(x) == torch.from_numpy(x).clamp(-LARGEST, LARGEST).to(torch.bfloat16).view(torch.uint16).tolist()


def test_every_finite_code_decodes_as_in_torch_and_encodes_to_itself() -> None:
    data = FINITE_CODES.view(np.uint8)
    CODEC.check(data, FINITE_CODES.size)
    x = values(data)
    assert x.tobytes() == torch.from_numpy(FINITE_CODES).view(torch.bfloat16).float().numpy().tobytes()
    assert codes(x) == FINITE_CODES.tolist()


@pytest.mark.parametrize("code", [0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFFF], ids=hex)
def test_infinity_and_nan_on_the_wire_are_refused(code: int) -> None:
    with pytest.raises(CodecError) as caught:
        CODEC.check(np.array([0x3F80, code], np.uint16).view(np.uint8), 2)
    assert caught.value.code is Code.NON_FINITE
