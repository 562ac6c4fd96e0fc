"""`powersgd`: the paper's algorithm, where it starts from, and what rank buys."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common import chunks, codecs
from common.codecs import draws
from common.codecs.base import F32, U8, Codec
from common.codecs.feedback import Memory
from common.codecs.powersgd import COLUMNS, LARGEST_RANK
from common.errors import CodecError, ConfigError
from common.layout import Layout, Tensor
from tests.unit.common.codecs.vectors import decoded, encoded

SHAPES = [(1, 7), (7, 1), (3, 5), (5, 3), (40, 257), (300, 64), (64, 1000), (255, 257)]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def of(shape: tuple[int, int], rank: int) -> Codec:
    """For blocks of that shape."""
    of_columns = codecs.load(f"powersgd:{rank}").of_columns
    assert of_columns is not None
    return of_columns(shape[1])


def noise(shape: tuple[int, int], seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def low_rank(shape: tuple[int, int], rank: int) -> F32:
    return noise((shape[0], rank), 1) @ noise((rank, shape[1]), 2)


def starting_from(q: F32, rows: int) -> U8:
    """A block of which that Q is left. q: (rank, m)."""
    return np.concatenate([np.zeros(rows * len(q), np.float32), q.reshape(-1)]).view(np.uint8)


def warmed(codec: Codec, m: F32, before: U8, key: int = 0) -> U8:
    assert codec.warm is not None
    out = np.full(codec.encoded_bytes(m.size), 0xA5, np.uint8)
    codec.warm(m.reshape(-1), out, key, before)
    codec.check(out, m.size)
    return out


def back(codec: Codec, data: U8, shape: tuple[int, int]) -> F32:
    return decoded(codec, data, shape[0] * shape[1]).reshape(shape)


def lost(m: F32, arrived: F32) -> float:
    """|M - decoded| / |M|."""
    return float(np.linalg.norm(m.astype(np.float64) - arrived) / np.linalg.norm(m.astype(np.float64)))


def reference(m: F32, q: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Algorithm 1 of the paper with one worker, in float64: what arrives of M (n, m), and the next Q (m, rank)."""
    p = np.linalg.qr(m.astype(np.float64) @ q)[0]
    q = m.T.astype(np.float64) @ p
    return p @ q.T, q


@every_shape
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_it_is_the_algorithm_of_the_paper(shape: tuple[int, int], rank: int) -> None:
    rank = min(rank, *shape)
    codec = of(shape, rank)
    q: NDArray[Any] = noise((rank, shape[1]), 3).T
    before = starting_from(np.ascontiguousarray(q.T), shape[0])
    for step in range(4):
        m = noise(shape, 10 + step)
        expected, q = reference(m, q)
        before = warmed(codec, m, before)
        np.testing.assert_allclose(back(codec, before, shape), expected, atol=2e-5 * float(np.abs(expected).max()))


@every_shape
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_matrix_of_that_rank_arrives_as_it_is(shape: tuple[int, int], rank: int) -> None:
    m, codec = low_rank(shape, rank), of(shape, rank)
    assert lost(m, back(codec, encoded(codec, m.reshape(-1)), shape)) < 1e-5


@pytest.mark.parametrize("scale", [2.0**-90, 1.0, 2.0**90])
def test_no_magnitude_matters(scale: float) -> None:
    m, codec = low_rank((50, 60), 3) * np.float32(scale), of((50, 60), 3)
    data = encoded(codec, m.reshape(-1))
    assert lost(m, back(codec, data, m.shape)) < 1e-5
    assert lost(m, back(codec, warmed(codec, m, data), m.shape)) < 1e-5


def test_of_a_constant_matrix_the_second_column_is_nothing_and_is_drawn_anew() -> None:
    m, codec = np.full((20, 30), 0.1, np.float32), of((20, 30), 2)
    data = encoded(codec, m.reshape(-1))
    p, q = np.split(data.view(np.float32), [40])
    assert not p[20:].any()
    assert not q[30:].any()
    other = low_rank((20, 30), 2)
    assert lost(other, back(codec, warmed(codec, other, data), m.shape)) < 1e-5


def test_nothing_to_start_from_is_a_first_update() -> None:
    m, codec = noise((30, 40)), of((30, 40), 2)
    nothing = encoded(codec, np.zeros(1200, np.float32))
    assert not nothing.any()
    assert warmed(codec, m, nothing, key=7).tobytes() == encoded(codec, m.reshape(-1), key=7).tobytes()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_what_is_sent_over_and_over_comes_to_the_best_of_its_rank(rank: int) -> None:
    shape, codec = (90, 110), of((90, 110), rank)
    u, _, vt = np.linalg.svd(noise(shape).astype(np.float64), full_matrices=False)
    values = 0.8 ** np.arange(90)
    m = (u * values @ vt).astype(np.float32)
    data = encoded(codec, m.reshape(-1))
    losses = [lost(m, back(codec, data, shape))]
    for _ in range(60):
        data = warmed(codec, m, data)
        losses.append(lost(m, back(codec, data, shape)))
    best = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(losses))
    assert losses[0] > 1.05 * best
    assert losses[-1] == pytest.approx(best, rel=1e-4)


@every_shape
def test_a_projection_never_enlarges(shape: tuple[int, int]) -> None:
    for seed in range(20):
        m, codec = noise(shape, seed), of(shape, 2)
        assert lost(m, back(codec, encoded(codec, m.reshape(-1), key=seed), shape)) <= 1 + 1e-6


def test_from_random_numbers_it_contracts_on_average_as_promised() -> None:
    """The hardest are those of which no direction is worth more than another: rank / m, and hardly more, arrives."""
    codec, m = of((32, 32), 2), np.eye(32, dtype=np.float32)
    kept = [1 - lost(m, back(codec, encoded(codec, m.reshape(-1), key=key), m.shape)) ** 2 for key in range(200)]
    assert codec.contraction == 2 / 32
    assert np.mean(kept) == pytest.approx(2 / 32, rel=1e-4)


def test_starts_are_as_often_positive_as_negative() -> None:
    codec = of((1, 4096), 1)
    m = np.ones((1, 4096), np.float32)
    data = [encoded(codec, m.reshape(-1), key=draws.of_push(0, "w", n))[:4].view(np.float32)[0] for n in range(400)]
    assert set(np.abs(data)) == {1.0}
    assert abs(np.mean(data)) < 0.25


# From whoever.


def test_the_largest_that_passes_is_finite_and_what_is_larger_does_not_pass() -> None:
    codec = codecs.load(f"powersgd:{LARGEST_RANK}")
    n = 3 * COLUMNS
    data = np.zeros(codec.encoded_bytes(n), np.uint8)
    values = data.view(np.float32)
    p, q = values[: 3 * LARGEST_RANK], values[3 * LARGEST_RANK :]
    p[:], q[:] = -1.0, 2.0**110
    codec.check(data, n)
    assert np.isfinite(decoded(codec, data, n)).all()
    for part, bad in ((p, np.nextafter(np.float32(1), np.float32(2))), (q, 2.0**111), (p, -0.0), (q, 2.0**-127)):
        good = part[5].copy()
        part[5] = bad
        with pytest.raises(CodecError, match="no sender computes"):
            codec.check(data, n)
        part[5] = good


def test_it_cannot_be_weighed_by_auto() -> None:
    with pytest.raises(ConfigError, match="cannot be weighed"):
        codecs.setting("auto:powersgd")


# Devices.


@every_shape
def test_devices_agree_from_wherever_they_start(shape: tuple[int, int]) -> None:
    codec, m = of(shape, 2), noise(shape)
    x, before = m.reshape(-1), encoded(codec, noise(shape, 5).reshape(-1))
    assert codec.device.warm is not None
    for key, data in ((7, before), (7, np.zeros_like(before))):
        there = codec.device.warm(torch.from_numpy(x), key, torch.from_numpy(data)).numpy()
        codec.check(there, x.size)
        apart = np.linalg.norm(decoded(codec, there, x.size) - decoded(codec, warmed(codec, m, data, key), x.size))
        assert apart <= codec.tolerance * np.linalg.norm(x)


# With feedback.

LAYOUT = Layout((Tensor("one", (90, 100), "float32", "parameter"), Tensor("two", (80, 2000), "float32", "parameter")))


def pushed(memory: Memory, plan: chunks.Plan, d: F32, key: int = 0) -> U8:
    """The bytes of D, which then wait to be settled."""
    p, data = d.copy(), np.zeros(plan.bytes, np.uint8)
    memory.add(p, plan.part.start, plan.part.stop)
    plan.encode(p, data, key=key, before=memory.before)
    memory.remember(p, plan.pieces(data))
    return data


def test_the_start_moves_with_what_is_taken_and_with_nothing_else() -> None:
    plan, memory = chunks.plan(LAYOUT, "powersgd"), Memory(LAYOUT.elements)
    d = np.random.default_rng(0).standard_normal(LAYOUT.elements, dtype=np.float32)
    first = pushed(memory, plan, d)
    assert not memory.before
    memory.settle(taken=False)
    assert not memory.before
    assert pushed(memory, plan, d).tobytes() == first.tobytes()
    memory.settle(taken=True)
    for part, _, start in plan.pieces(first):
        assert start is not None
        assert memory.before[part.start].tobytes() == start.tobytes()
    second = pushed(memory, plan, d)
    memory.settle(taken=False)
    assert pushed(memory, plan, d).tobytes() == second.tobytes() != first.tobytes(), "refused: the start is as it was"
    memory.settle(taken=True)
    memory.settle(taken=True)  # a repeated answer
    assert memory.before[0].tobytes() == second[: memory.before[0].size].tobytes()


def test_fragments_have_starts_of_their_own() -> None:
    memory = Memory(LAYOUT.elements)
    plans = [chunks.plan(LAYOUT, "powersgd", part, 3) for part in range(3)]
    d = np.random.default_rng(0).standard_normal(LAYOUT.elements, dtype=np.float32)
    sent = []
    for plan in plans:
        sent.append(pushed(memory, plan, d))
        memory.settle(taken=True)
    factored = {
        part.start: start.tobytes()
        for plan, data in zip(plans, sent, strict=True)
        for part, _, start in plan.pieces(data)
        if start is not None
    }
    assert len(factored) >= 4
    assert {first: data.tobytes() for first, data in memory.before.items()} == factored


def test_what_rank_cannot_hold_arrives_in_the_end() -> None:
    layout = Layout((Tensor("w", (90, 100), "float32", "parameter"),))
    plan, memory = chunks.plan(layout, "powersgd"), Memory(layout.elements)
    d, arrived, total = noise((90, 100)).reshape(-1), np.zeros(9000), np.zeros(9000)
    values = np.zeros(9000, np.float32)
    for number in range(400):
        data = pushed(memory, plan, d, key=number)
        memory.settle(taken=True)
        plan.decode(data, values)
        arrived += values
        total += d
    assert np.linalg.norm(arrived - total) < 0.15 * np.linalg.norm(total)
