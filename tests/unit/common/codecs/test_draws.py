"""The generator: its published numbers, and the same numbers from the kernel, from Python and from tensors."""

from __future__ import annotations

import numpy as np
import pytest

from common.codecs import draws

KEYS = [0, 1, 1234567, (1 << 63) + 5, (1 << 64) - 1]


def test_published_numbers() -> None:
    """The first five of SplitMix64 with seed 1234567, as its reference implementation gives them."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [draws.of_block(1234567, i) for i in range(5)] == expected


@pytest.mark.parametrize("key", KEYS)
def test_kernel_python_and_tensors_agree(key: int) -> None:
    expected = [draws.of_block(key, i) for i in range(100)]
    assert [int(draws.bits(np.uint64(key), np.uint64(i))) for i in range(100)] == expected
    assert [int(one) & draws.WORD for one in draws.device_bits(key, 100, "cpu")] == expected
    uniform = [float(draws.uniform(np.uint64(key), np.uint64(i))) for i in range(100)]
    assert uniform == draws.device_uniform(key, 100, "cpu").tolist() == [(one >> 40) / 2**24 for one in expected]


def test_whoever_differs_in_anything_draws_something_else() -> None:
    keys = {draws.of_push(seed, worker, number) for seed in (0, 1) for worker in ("a", "b") for number in (1, 2, 11)}
    assert len(keys) == 12
    assert draws.of_push(0, "a", 1) == draws.of_push(0, "a", 1)


def test_uniform_numbers_are_uniform() -> None:
    u = draws.device_uniform(7, 1 << 18, "cpu").double()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(float(u.mean()) - 0.5) < 5 / np.sqrt(12 * u.numel())
    counts = np.histogram(u.numpy(), bins=64, range=(0, 1))[0]
    assert np.square(counts - u.numel() / 64).sum() / (u.numel() / 64) < 63 + 5 * np.sqrt(126)
