"""Error feedback: nothing is lost but time, and what was not taken leaves no trace."""

from __future__ import annotations

import numpy as np
import pytest

from common import chunks, codecs
from common.codecs import draws
from common.codecs.base import F32
from common.codecs.feedback import Memory, Piece
from common.errors import ConfigError
from common.layout import Layout, Tensor

LAYOUT = Layout((Tensor("weight", (90, 100), "float32", "parameter"), Tensor("bias", (90,), "float32", "parameter")))
N = LAYOUT.elements


def fed_back(name: str) -> str:
    """The name of the codec with feedback, by default or on request."""
    codec = codecs.load(name)
    return codec.name if codec.remembers else f"ef:{name}"


WITH_FEEDBACK = [fed_back(name) for name in codecs.names() if codecs.load(name).feedback != "never"]


def pushed(memory: Memory, plan: chunks.Plan, d: F32, number: int = 1) -> F32:
    """What arrives of D; the memory then waits to be settled."""
    p, data, arrived = d.copy(), np.zeros(plan.bytes, np.uint8), np.zeros_like(d)
    memory.add(p, 0, d.size)
    plan.encode(p, data, key=draws.of_push(0, "w", number), before=memory.before)
    memory.remember(p, plan.pieces(data))
    plan.decode(data, arrived)
    return arrived


@pytest.mark.parametrize("name", WITH_FEEDBACK)
def test_what_arrived_and_what_is_remembered_make_up_the_whole(name: str) -> None:
    plan, memory, random = chunks.plan(LAYOUT, name), Memory(N), np.random.default_rng(1)
    total, arrived = np.zeros(N), np.zeros(N)
    for number in range(30):
        d = random.standard_normal(N, dtype=np.float32) * np.float32(0.1)
        total += d
        arrived += pushed(memory, plan, d, number)
        memory.settle(taken=True)
    np.testing.assert_allclose(arrived + memory.e, total, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in WITH_FEEDBACK if "randomk" not in name])
def test_a_constant_update_arrives_in_the_end(name: str) -> None:
    """The memory stays bounded, so the mean of what arrives comes to the update itself."""
    plan, memory = chunks.plan(LAYOUT, name), Memory(N)
    d = np.random.default_rng(2).standard_normal(N, dtype=np.float32)
    sizes = []
    for number in range(300):
        pushed(memory, plan, d, number)
        memory.settle(taken=True)
        sizes.append(float(np.linalg.norm(memory.e)))
    assert sizes[-1] <= 1.5 * max(sizes[:200]) + 1e-6


@pytest.mark.parametrize("name", WITH_FEEDBACK)
def test_what_was_not_taken_leaves_no_trace(name: str) -> None:
    plan, memory, random = chunks.plan(LAYOUT, name), Memory(N), np.random.default_rng(3)
    d = random.standard_normal(N, dtype=np.float32)
    pushed(memory, plan, d)
    memory.settle(taken=True)
    before = memory.e.tobytes()
    again = pushed(memory, plan, d).tobytes()
    memory.settle(taken=False)
    assert memory.e.tobytes() == before
    assert pushed(memory, plan, d).tobytes() == again
    memory.settle(taken=True)
    memory.settle(taken=True)  # a repeated answer
    memory.settle(taken=False)
    once = memory.e.tobytes()
    memory.settle(taken=True)
    assert memory.e.tobytes() == once != before


def test_of_a_vector_in_fragments_only_the_part_that_is_pushed_moves() -> None:
    memory = Memory(N)
    plans = [chunks.plan(LAYOUT, "ef:int8", part, 3) for part in range(3)]
    d = np.random.default_rng(4).standard_normal(N, dtype=np.float32)
    data = np.zeros(max(plan.bytes for plan in plans), np.uint8)
    moved: list[np.ndarray] = []
    for plan in plans:
        before = memory.e.copy()
        plan.encode(d, data)
        memory.remember(d, plan.pieces(data[: plan.bytes]))
        memory.settle(taken=True)
        moved.append(np.flatnonzero(memory.e != before))
        blocks = plan.blocks[: plan.parameter_blocks]
        assert blocks[0].first <= moved[-1].min()
        assert moved[-1].max() < blocks[-1].last


def test_worked_numbers_of_the_scaled_sign() -> None:
    sign = codecs.load("sign")

    def errors(g: list[float]) -> list[list[float]]:
        memory, found, data = Memory(2), [], np.zeros(sign.encoded_bytes(2), np.uint8)
        for _ in range(3):
            p = np.array(g, np.float32)
            memory.add(p, 0, 2)
            sign.encode(p, data)
            memory.remember(p, [Piece(slice(0, 2), lambda x: sign.decode(data, x), None)])
            memory.settle(taken=True)
            found.append([round(float(one), 5) for one in memory.e])
        return found

    assert errors([1.0, -0.5]) == [[0.25, 0.25], [0.5, 0.5], [0.75, -0.75]]
    assert errors([0.2, 0.6]) == [[-0.2, 0.2], [-0.4, 0.4], [0.4, 0.4]]


@pytest.mark.parametrize("name", [name for name in codecs.names() if codecs.load(name).feedback == "never"])
def test_a_codec_without_bias_has_none(name: str) -> None:
    with pytest.raises(ConfigError, match="nothing to feed back"):
        codecs.load(f"ef:{name}")
