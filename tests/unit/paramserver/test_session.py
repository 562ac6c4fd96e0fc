"""What a session remembers survives a checkpoint, and a record is small."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from common import chunks
from common.messages import Begin, Scalars, Version
from paramserver.session import Decision, Session, Transfer
from tests.cluster import SMALL, Desk

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
numbers = st.integers(0, 2**53 - 1)
decisions = st.builds(
    Decision,
    numbers,
    st.sampled_from(["none", "applied", "held", "rejected"]),
    text,
    text,
    st.builds(Version, numbers, numbers),
    st.floats(allow_nan=False),
)


def session(**changes: object) -> Session:
    values: dict[str, object] = {
        "token": "t",
        "instance": "i",
        "worker": "w",
        "role": "worker",
        "peer": b"p",
        "connection": 3,
        "lease_end": 10.0,
        "joined": 0.0,
    }
    return Session(**(values | changes))  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(decisions, text, text, text, st.booleans(), st.booleans(), numbers)
def test_recall_is_the_inverse_of_remember(
    decision: Decision, token: str, name: str, instance: str, anchored: bool, live: bool, updates: int
) -> None:
    before = session(token=token, worker=name, instance=instance, decision=decision)
    before.anchored = anchored
    before.counters.updates = updates
    if not live:
        before.end(5.0)
    record = json.loads(json.dumps(before.remember()))
    after = Session.recall(record, now=100.0, lease_s=30.0)
    assert after.remember() == before.remember()
    assert after.decision == before.decision
    assert after.live == live
    assert after.peer == b"", "connections do not survive the server"
    assert after.lease_end == 130.0, "it was the server that was away"


def test_record_is_under_a_kilobyte() -> None:
    full = Decision(2**53 - 1, "rejected", "non_finite", "x" * 300, Version(2**20, 2**40), 1.0)
    record = session(worker="w" * 64, token="t" * 32, instance="i" * 32, decision=full).remember()
    assert len(json.dumps(record)) < 1024


def test_states_are_named_in_the_order_they_happen() -> None:
    desk = Desk(by_itself=False)
    hand = desk.join()
    one = desk.core.sessions[hand.session]
    states = [one.state]
    desk.finish()
    states.append(one.state)
    hand.anchor()
    desk.finish()
    states.append(one.state)
    hand.send(hand.pieces(1)[0])
    states.append(one.state)
    desk.finish()
    states.append(one.state)
    hand.bye()
    states.append(one.state)
    assert states == ["waiting for initial weights", "joining", "training", "queued", "training", "gone"]
    assert "w gone, 1 updates" in repr(one)


def test_end_keeps_only_the_record() -> None:
    desk = Desk(rule="gem")
    hand = desk.join()
    hand.push(1)
    one = desk.core.sessions[hand.session]
    assert one.arrays is not None
    assert one.buffers is not None
    hand.bye()
    assert (one.arrays, one.buffers, one.anchored, one.member) == (None, None, False, False)
    assert one.decision.number == 1


def test_committed_means_that_the_scalars_are_there() -> None:
    begin = Begin("t", 1, "push", 1, 0, "fp32", 8, Version(1, 0), 0)
    transfer = Transfer(begin, chunks.plan(SMALL, "fp32"), 1, 0.0)
    assert not transfer.committed
    transfer.scalars = Scalars(0.0, 1, 1, 0.1)
    assert transfer.committed


def test_observer_is_no_member() -> None:
    assert not session(role="observer").member
    assert session(role="observer").state == "observing"
