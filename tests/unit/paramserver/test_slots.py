"""A slot has one owner, comes back once, and there are never more than the bound."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from paramserver.slots import Slot, Slots, slot_count


def grow(slots: Slots, workers: int) -> None:
    """Make all that so many workers miss."""
    for _ in range(slots.missing(workers)):
        slots.add(*slots.make())
    assert slots.missing(workers) == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.lists(st.one_of(st.just("take"), st.integers(0, 20), st.integers(-20, -1)), max_size=60))
def test_whatever_happens_each_slot_has_one_owner(limit: int, steps: list[object]) -> None:
    """take; give the n-th that is out; grow to so many workers."""
    slots = Slots(limit, 16, 8)
    out: list[Slot] = []
    made = 0
    for step in steps:
        match step:
            case "take":
                slot = slots.take()
                assert (slot is None) == (len(out) == made)
                if slot is not None:
                    assert slot.index not in {other.index for other in out}
                    out.append(slot)
            case int() if step < 0:
                made = max(made, min(-step, limit))
                grow(slots, -step)
            case int() if out:
                slots.give(out.pop(step % len(out)))
        slots.validate()
        assert slots.taken == len(out)
        assert slots.count == made <= limit
    assert {(slot.update.size, slot.reply.size) for slot in out} <= {(16, 8)}


def test_giving_back_twice_is_a_defect() -> None:
    slots = Slots(2, 8, 8)
    grow(slots, 2)
    slot = slots.take()
    assert slot is not None
    slots.give(slot)
    with pytest.raises(KeyError):
        slots.give(slot)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(-(1 << 30), 1 << 40), st.integers(1, 1 << 34), st.integers(1, 1 << 16))
def test_count_fits_the_pool_and_the_sessions(pool: int, slot: int, sessions: int) -> None:
    if pool < slot:
        with pytest.raises(ConfigError, match="pool_mib"):
            slot_count(pool, slot, sessions)
        return
    count = slot_count(pool, slot, sessions)
    assert 1 <= count <= sessions
    assert count * slot <= pool
    assert count == sessions or (count + 1) * slot > pool
