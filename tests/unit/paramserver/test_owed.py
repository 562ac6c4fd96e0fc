"""Replies that are owed: the very same bytes again, until the worker has them; and their slots, which never leak.

Every Desk checks `validate()` after each event: a slot that lost its owner shows at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.layout import Layout, Tensor
from common.messages import Ack, Grant, More, Resume, Version
from common.node import Tick, Unsendable
from paramserver.core import Stop
from tests.cluster import LARGE, SMALL, Desk, Hand
from tests.unit.paramserver.test_core import BOTH

ALPHA = {"beta": 0.5}
BIG = Layout((Tensor("w", (250, 1000), "float32", "parameter"),))
"""One message, and few of them fit a pool of a MiB."""


def elastic(*names: str, **settings: Any) -> tuple[Desk, list[Hand]]:
    """A server under elastic averaging with alpha .25, and workers."""
    desk = Desk(**{"rule": "easgd", "rule_settings": ALPHA, "workers": 2} | settings)
    return desk, [desk.join(name) for name in names]


def values(ack: Ack) -> list[float]:
    """The first three elements of a reply."""
    return np.frombuffer(ack.payload, np.float32)[:3].tolist()


def confirm(hand: Hand, ack: Ack) -> None:
    """All of the reply is here."""
    assert ack.reply is not None
    hand.send(More(hand.session, hand.connection, ack.reply.id, 0))


def taken(desk: Desk) -> int:
    """Slots in use."""
    return desk.state()[2]


def test_a_lost_reply_is_sent_again_byte_for_byte_though_the_center_moved_on() -> None:
    desk, (a, b) = elastic("a", "b")
    first = a.push(1, 4.0)
    assert values(first) == [1.0] * 3
    b.push(1, 8.0)
    before = desk.state()
    for _ in range(3):
        a = a.resume(1)
        assert a.welcome.resumed == "live"
        again = a.push(1, 4.0)
        assert (again.number, again.outcome, again.version) == (1, "applied", first.version)
        assert again.reply.version == first.reply.version
        assert bytes(again.payload) == bytes(first.payload)
        a.send(a.pieces(1, 4.0)[0])
        assert not a.heard(Ack), "once on each connection"
        assert desk.state() == before, "the exchange happened once"


def test_a_lost_reply_of_several_chunks_is_sent_again_byte_for_byte() -> None:
    desk, (a, b) = elastic("a", "b", layout=LARGE, pool_mib=24)

    def fetched(hand: Hand) -> list[bytes]:
        for message in hand.pieces(1, 4.0):
            hand.send(message)
        [ack] = hand.heard(Ack)
        hand.more(ack.reply.id)
        return [bytes(message.payload) for message in hand.heard() if hasattr(message, "index")]

    first = fetched(a)
    b.push(1, 8.0)
    again = a.resume(1)
    assert fetched(again) == first
    assert len(first) == 3
    assert again.push(2, 0.0).outcome == "applied"
    assert taken(desk) == 2


def test_replica_is_what_the_worker_knows_and_one_exchange_is_one() -> None:
    """x - c shrinks by 1 - 2 alpha, whatever was lost in between."""
    desk, (a,) = elastic("a")
    x = anchor = np.zeros(SMALL.elements, np.float32)
    x = x + np.float32(1.7)
    for number in range(1, 6):
        d = x - anchor
        a.push(number, d)
        a = a.resume(number)
        reply = np.frombuffer(a.push(number, d).payload, np.float32)[: SMALL.elements]
        x = x - reply
        anchor = (anchor + d) - reply
        arrays = desk.core.sessions[a.session].arrays
        assert arrays is not None
        assert arrays.replica.tobytes() == anchor[: SMALL.parameters].tobytes()
        shard = desk.core.shard
        assert shard is not None
        assert np.allclose(x[:6] - shard.center[:6], 1.7 * 0.5**number)


@pytest.mark.parametrize("how", ["next push", "confirmed", "bye", "lease", "anchor", "malformed", "bye while read"])
@BOTH
def test_the_slot_of_an_owed_reply_is_free_in_the_end(layout: Layout, how: str) -> None:
    desk, (a, b) = elastic("a", "b", layout=layout, pool_mib=24, lease_s=10)
    ack = a.push(1, 4.0)
    assert taken(desk) == 1
    match how:
        case "next push":
            a.push(2, 0.0)
            assert taken(desk) == 1, "of the next reply"
            a.bye()
        case "confirmed":
            confirm(b, ack)
            assert taken(desk) == 1, "somebody else's word counts nothing"
            confirm(a, ack)
            confirm(a, ack)
        case "bye":
            a.bye()
        case "lease":
            for _ in range(5):
                desk.wait(3.0)
                b.beat()
        case "anchor":
            a.anchor()
        case "malformed":
            for _ in range(3):
                a.raw([b"\xc1"])
        case "bye while read":
            again = a.resume(1)
            desk.by_itself = False
            for message in again.pieces(1, 4.0):
                again.send(message)
            again.bye()
            desk.finish()
            desk.by_itself = True
    assert taken(desk) == 0
    assert len(desk.core.downlink) == 0
    assert b.push(1).outcome == "applied"


def test_cuts_and_stopped_readers_leave_the_reply_owed_and_nothing_else() -> None:
    desk, (a,) = elastic("a", layout=LARGE, pool_mib=24, lease_s=10)
    for message in a.pieces(1, 4.0):
        a.send(message)
    for _ in range(4):
        desk.event(Unsendable(a.peer, "the peer is gone"))
        a = a.resume(1)
        for message in a.pieces(1, 4.0):
            a.send(message)
        [ack] = a.heard(Ack)
        a.more(ack.reply.id, 1)
        assert taken(desk) == 1
    for _ in range(8):  # it beats, and takes nothing more
        desk.wait(3.0)
        a.beat()
    assert len(desk.core.downlink) == 0
    a = a.resume(1)
    assert a.push(1, 4.0).outcome == "applied"
    assert a.push(2, 0.0).outcome == "applied"


@pytest.mark.parametrize("layout", [BIG, LARGE], ids=["big", "large"])
def test_fewer_slots_than_workers_do_not_make_anybody_wait_for_the_training_of_another(layout: Layout) -> None:
    """Who has its reply says so, and its slot is free while it trains: also if it never pushes again."""
    desk, hands = elastic("a", "b", "c", "d", layout=layout, pool_mib=4 if layout is BIG else 10)
    model = desk.core.state.model
    assert model is not None
    assert model.slots.limit == 1
    for number in (1, 2):
        for hand in hands if number == 1 else reversed(hands):
            ack = hand.push(number, 1.0)
            assert ack.outcome == "applied"
            hand.send(More(hand.session, hand.connection, ack.reply.id, 0))
    assert taken(desk) == 0


def test_with_fewer_slots_than_workers_an_unconfirmed_reply_makes_others_wait_but_not_for_ever() -> None:
    desk, (a, b) = elastic("a", "b", layout=BIG, pool_mib=4, lease_s=10)
    a.push(1)
    b.heard()
    for message in b.pieces(1):
        b.send(message)
    assert not b.heard(Ack)
    b.beat()
    assert [grant.decision for grant in b.heard(Grant)] == ["wait"]
    a.send(a.pieces(2)[0])  # gives its slot back, and is behind b
    [ack] = b.heard(Ack)
    assert ack.outcome == "applied"
    confirm(b, ack)
    [ack] = a.heard(Ack)[-1:]
    assert ack.number == 2
    b.push(2)
    assert not b.heard(Ack)
    for _ in range(5):
        desk.wait(3.0)
        b.beat()
    [ack] = b.heard(Ack)
    assert (ack.number, ack.outcome) == (2, "applied"), "the lease of a has ended"


def test_a_reply_that_is_no_longer_kept_is_never_replaced_by_the_center() -> None:
    """The worker would take it for an elastic difference."""
    _, (a, b) = elastic("a", "b")
    ack = a.push(1, 4.0)
    confirm(a, ack)
    again = a.resume(1)
    again.heard()
    again.send(again.pieces(1, 4.0)[0])
    heard = again.heard()
    assert not [message for message in heard if isinstance(message, Ack)]
    assert [message.code for message in heard] == ["stale"]
    later = again.resume(1)
    assert (later.welcome.resumed, later.welcome.last_decided) == ("record", 1)
    later.anchor()
    assert later.push(2, 0.0).outcome == "applied"
    assert b.push(1).outcome == "applied"


@pytest.mark.parametrize("when", ["before", "after"])
def test_after_a_crash_a_worker_with_parameters_of_its_own_anchors_anew(when: str) -> None:
    desk, (a, b) = elastic("a", "b", lease_s=1000, directory=Path("unused"), checkpoint_interval_s=10.0)
    b.push(1, 8.0)
    if when == "before":
        a.push(1, 4.0)
    desk.wait(11.0)
    life = Desk(
        epoch=2,
        recovered=desk.saved(),
        rule="easgd",
        rule_settings=ALPHA,
        workers=2,
        directory=Path("unused"),
        lease_s=1000,
    )
    assert taken(life) == 0
    again = a.resume(1, 0, life)
    assert (again.welcome.resumed, again.welcome.last_decided) == ("record", 1 if when == "before" else 0)
    offer = again.anchor()
    session = life.core.sessions[again.session]
    assert session.arrays is not None
    assert session.arrays.replica.tobytes() == bytes(offer.payload)[: 4 * SMALL.parameters]
    assert again.push(2, 0.0, base=Version(2, life.core.version.version)).outcome == "applied"
    assert life.core.shard is not None
    assert sorted(life.core.shard.decisions["members"]) == ["a", "b"]


def test_stop_with_owed_replies_exits() -> None:
    desk, hands = elastic("a", "b")
    for hand in hands:
        hand.push(1)
    desk.event(Stop("test"))
    assert desk.exited


def test_a_second_worker_with_the_token_of_the_first_cannot_fetch_what_is_owed() -> None:
    desk, (a,) = elastic("a")
    a.push(1, 4.0)
    thief = Hand(desk, "thief")
    thief.hello(resume=Resume("guessed", 1, 0, 0))
    thief.session, thief.connection = a.session, a.connection
    thief.heard()
    thief.send(thief.pieces(1, 4.0)[0])
    assert not thief.heard(Ack)
    desk.event(Tick())
    assert taken(desk) == 1
