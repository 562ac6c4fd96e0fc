"""What lag and speed do: weights, refusals, held replies of those who are ahead, and H in proportion to speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.messages import NOWHERE, Ack, Grant, Pull, Push, Scalars, Version
from paramserver import status
from paramserver.core import Stop
from tests.cluster import Desk, Hand
from tests.unit.paramserver.test_core import center

SAVING = {"directory": Path("unused"), "checkpoint_interval_s": 10.0}


def gap(s: int, *names: str, **settings: Any) -> tuple[Desk, list[Hand]]:
    """A server that lets nobody be more than `s` pushes ahead of the slowest."""
    desk = Desk(max_clock_gap=s, **settings)
    return desk, [desk.join(name) for name in names]


# Lag


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, [1.0, 1.0, 1.0, 1.0]),
        ({"lag_weight": "inverse"}, [1.0, 1 / 2, 1 / 3, 1 / 4]),
        ({"lag_weight": "polynomial"}, [1.0, 2**-0.5, 3**-0.5, 4**-0.5]),
        ({"lag_weight": "polynomial", "lag_exponent": 2.0}, [1.0, 1 / 4, 1 / 9, 1 / 16]),
        ({"max_lag": 1, "beyond_max_lag": "weight"}, [1.0, 1.0, 2 / 3, 2 / 4]),
        ({"lag_weight": "inverse", "max_lag": 1, "beyond_max_lag": "weight"}, [1.0, 1 / 2, 2 / 9, 1 / 8]),
    ],
)
def test_weight_of_an_update_by_its_lag(settings: dict[str, Any], weights: list[float]) -> None:
    desk = Desk(**settings)
    hand = desk.join()
    expected = np.float32(0.0)
    for number, weight in enumerate(weights, 1):
        ack = hand.push(number, base=Version(1, 0))
        assert (ack.outcome, ack.weight) == ("applied", pytest.approx(weight, rel=1e-12))
        expected += np.float32(weight) * np.float32(1.0)
    assert center(desk) == {float(expected)}


def test_beyond_the_largest_lag_an_update_is_rejected_without_a_strike() -> None:
    desk = Desk(max_lag=2)
    hand, other = desk.join("a"), desk.join("b")
    for number in (1, 2, 3):
        other.push(number)
    before = desk.state()
    for number in range(1, 8):
        ack = hand.push(number, base=Version(1, 0))
        assert (ack.outcome, ack.code, ack.reply) == ("rejected", "lag", None)
        assert "3 versions" in ack.sentence
    assert desk.state() == before
    session = desk.core.sessions[hand.session]
    assert (session.malformed, len(session.rejections), session.counters.rejected) == (0, 0, 7)
    assert desk.core.out.refusals == {"lag": 7}
    assert hand.push(8, base=Version(1, 1)).outcome == "applied", "two versions are allowed"


def test_a_rejected_update_is_no_push_of_its_clock() -> None:
    _, (a, b) = gap(0, "a", "b", max_lag=0)
    a.push(1)
    assert b.push(1, base=Version(1, 0)).code == "lag"
    assert not a.heard(Ack), "b has not pushed"
    assert b.push(2).outcome == "applied"
    assert [ack.outcome for ack in a.heard(Ack)] == ["applied"]


# The gap of clocks


def test_gap_0_is_bulk_synchronous_with_the_sum() -> None:
    desk, hands = gap(0, "a", "b", "c")
    for number in (1, 2, 3):
        acks = [hand.push(number, fill) for hand, fill in zip(hands, (1.0, 2.0, 4.0), strict=True)]
        assert [ack.outcome for ack in acks] == ["held", "held", "applied"]
        replies = [acks[-1], *(ack for hand in hands[:2] for ack in hand.heard(Ack))]
        assert len(replies) == 3
        assert {ack.reply.version for ack in replies} == {Version(1, 3 * number)}
        assert len({bytes(ack.payload) for ack in replies}) == 1
        assert center(desk) == {7.0 * number}


def test_gap_2_lets_nobody_run_ahead_more_than_that() -> None:
    desk, (fast, slow) = gap(2, "fast", "slow")
    assert [fast.push(number).outcome for number in (1, 2, 3)] == ["applied", "applied", "held"]
    for number in range(1, 5):
        desk.wait(1.0)
        fast.beat()
        assert not fast.heard(Ack)
        slow.push(number)
        [ack] = fast.heard(Ack)
        assert (ack.number, ack.outcome, ack.version) == (number + 2, "applied", Version(1, 2 * number + 1))
        assert ack.reply.version == (1, 2 * number + 2)
        assert fast.push(number + 3).outcome == "held"


@pytest.mark.parametrize("how", ["bye", "lease"])
def test_who_leaves_is_not_waited_for(how: str) -> None:
    desk, (fast, slow, slowest) = gap(0, "fast", "slow", "slowest", lease_s=10)
    fast.push(1)
    slow.push(1)
    if how == "bye":
        slowest.bye()
    else:
        for _ in range(5):
            desk.wait(3.0)
            fast.beat()
            slow.beat()
    for hand in (fast, slow):
        assert [(ack.number, ack.outcome) for ack in hand.heard(Ack)] == [(1, "applied")]


def test_who_joins_starts_at_the_slowest_clock() -> None:
    desk, (fast, slow) = gap(1, "fast", "slow")
    for number in (1, 2, 3):
        fast.push(number)
        slow.push(number)
    late = desk.join("late")
    assert fast.push(4).outcome == "applied"
    assert fast.push(5).outcome == "held"
    assert slow.push(4).outcome == "applied"
    assert not fast.heard(Ack)
    assert late.push(1).outcome == "applied"
    assert [ack.number for ack in fast.heard(Ack)] == [5]


def test_who_anchors_anew_is_waited_for_meanwhile() -> None:
    """While its center is encoded it holds none; the others are not let go for that."""
    desk, (fast, slow) = gap(0, "fast", "slow")
    fast.push(1)
    desk.by_itself = False
    slow.send(Pull(slow.session, slow.connection, "anchor", "", NOWHERE, slow.merged))
    desk.wait(0.1)
    fast.beat()
    desk.finish()
    desk.by_itself = True
    desk.wait(0.1)
    assert not fast.heard(Ack)
    slow.push(1)
    assert [ack.number for ack in fast.heard(Ack)] == [1]


def test_the_late_reply_reaches_who_comes_back_exactly_once() -> None:
    for closed in (False, True):
        desk, (fast, slow) = gap(0, "fast", "slow")
        fast.push(1)
        if closed:
            slow.push(1)
        again = fast.resume(1)
        assert again.welcome.outcome == ("applied" if closed else "held")
        ack = again.push(1, 50.0)
        assert ack.outcome == ("applied" if closed else "held")
        again.send(again.pieces(1, 50.0)[0])
        assert not again.heard(Ack)
        if not closed:
            slow.push(1)
            assert [ack.outcome for ack in again.heard(Ack)] == ["applied"]
        assert center(desk) == {2.0}


def test_who_is_ahead_hears_for_whom_it_waits() -> None:
    desk, (fast, slow) = gap(0, "fast", "slow", lease_s=100)
    fast.push(1)
    desk.wait(31.0)
    fast.beat()
    [grant] = fast.heard(Grant)
    assert grant.decision == "wait"
    assert grant.sentence.endswith("slow.")
    assert any("slow" in line.split() for line in desk.said[-2:])
    assert status.describe(desk.core, desk.now)["waiting_for"] == ["slow to push, by 1 that are held"]
    slow.push(1)
    assert not desk.core.state.waited_for


def test_crash_while_a_reply_is_late() -> None:
    desk, (fast, slow) = gap(0, "fast", "slow", lease_s=100, **SAVING)
    fast.push(1)
    desk.wait(11.0)
    life = Desk(epoch=2, recovered=desk.saved(), max_clock_gap=0, lease_s=100, **SAVING)
    again = fast.resume(1, 0, life)
    assert again.push(1, 50.0).outcome == "held"
    other = slow.resume(0, 0, life)
    assert other.push(1, base=Version(1, 0)).outcome == "applied"
    assert [ack.outcome for ack in again.heard(Ack)] == ["applied"]
    assert center(life) == {2.0}


def test_crash_while_a_reply_is_late_and_the_slowest_never_comes_back() -> None:
    desk, (fast, _) = gap(0, "fast", "slow", lease_s=100, **SAVING)
    fast.push(1)
    desk.wait(11.0)
    life = Desk(epoch=2, recovered=desk.saved(), max_clock_gap=0, lease_s=100, **SAVING)
    again = fast.resume(1, 0, life)
    again.push(1)
    for _ in range(12):
        life.wait(10.0)
        again.beat()
    assert [ack.outcome for ack in again.heard(Ack)] == ["applied"]


def test_a_late_reply_is_due_at_once_to_a_server_that_comes_back_without_a_gap() -> None:
    desk, (fast, _) = gap(0, "fast", "slow", lease_s=100, **SAVING)
    assert fast.push(1).outcome == "held"
    desk.wait(11.0)
    life = Desk(epoch=2, recovered=desk.saved(), lease_s=100, **SAVING)
    again = fast.resume(1, 0, life)
    assert again.push(1, 50.0).outcome == "applied"
    assert center(life) == {1.0}, "the same push, once"


def test_budget_ends_at_once_and_stop_exits_with_late_replies() -> None:
    desk, (fast, _) = gap(0, "fast", "slow", budget_updates=1)
    assert fast.push(1).finished
    assert desk.core.finished
    desk, (fast, _) = gap(0, "fast", "slow")
    fast.push(1)
    desk.event(Stop("test"))
    assert desk.exited


# Speed


@pytest.mark.parametrize("settings", [{}, {"rule": "local_sgd"}, {"max_clock_gap": 1}], ids=["free", "rounds", "gap"])
def test_local_steps_are_in_proportion_to_speed(settings: dict[str, Any]) -> None:
    """Twice and four times as slow: half and a quarter of H. The time that a reply waits is no training."""
    desk = Desk(local_steps=8, local_steps_by="speed", lease_s=10_000, **settings)
    hands = {speed: desk.join(f"{speed} steps/s") for speed in (4.0, 2.0, 1.0)}
    steps, numbers = dict.fromkeys(hands, 8), dict.fromkeys(hands, 0)
    due = {speed: desk.now + 8 / speed for speed in hands}
    for _ in range(60):
        speed = min(due, key=lambda at: due[at])
        desk.wait(due.pop(speed) - desk.now)
        numbers[speed] += 1
        [message] = hands[speed].pieces(numbers[speed])
        assert isinstance(message, Push)
        hands[speed].send(Push(message.begin, Scalars(0.5, 8, steps[speed], 0.1), message.payload))
        for other, hand in hands.items():
            if acks := [ack for ack in hand.heard(Ack) if ack.outcome == "applied"]:
                steps[other] = acks[-1].local_steps
                due[other] = desk.now + steps[other] / other
    assert steps == {4.0: 8, 2.0: 4, 1.0: 2}
    assert max(numbers.values()) - min(numbers.values()) <= 6, "all push about equally often"
    hands[4.0].bye()
    desk.wait(2.0)
    assert desk.core.state.local_steps_of(desk.core.sessions[hands[2.0].session]) == 8, "the fastest that is here"


def test_nothing_is_known_of_speed_at_first() -> None:
    desk = Desk(local_steps=8, local_steps_by="speed")
    hand = desk.join()
    assert hand.welcome.settings["local_steps"] == 8
    assert hand.push(1).local_steps == 8
