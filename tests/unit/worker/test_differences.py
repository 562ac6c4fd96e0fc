"""What a worker's core holds where replies are differences: it moves with whole replies and anchors, and nothing else.

Every element of the center is the number of its version, and so is every element of a difference.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.layout import Layout
from common.messages import Ack, Begin, Chunk, Fault, More, Offer, Push, Version, Welcome
from tests.cluster import LARGE, SMALL
from tests.unit.worker.test_core import BOTH, SETTINGS, Bench
from worker import events


class Adds(Bench):
    """A core that is told to add what replies say to what it holds."""

    def welcome(self, **changes: Any) -> Welcome:
        return super().welcome(**({"settings": SETTINGS | {"replica": True, "confirm": True}} | changes))

    def named(self) -> int:
        """The reply that the push which was just sent names."""
        [begin] = [message.begin if isinstance(message, Push) else message for message in self.told((Push, Begin))]
        return int(begin.merged)

    def expect(self, value: float, buffers: float) -> None:
        """What was delivered last, and what is held."""
        news = self.news((events.Settled, events.Fetched))[-1]
        n = self.layout.parameters
        assert (news.values[:n] == value).all()
        assert (news.values[n:] == buffers).all()
        assert self.core._replica is not None
        assert (self.core._replica == value).all()


def joined(layout: Layout) -> Adds:
    bench = Adds(layout)
    bench.hears(bench.welcome())
    bench.anchor(Version(1, 7))
    bench.expect(7, 7)
    bench.told()
    return bench


@BOTH
def test_a_reply_is_added_to_what_is_held_but_for_buffers(layout: Layout) -> None:
    bench = joined(layout)
    for number, version, held in ((1, 8, 15), (2, 9, 24)):
        bench.pushes(Version(1, 7))
        bench.ack(number, Version(1, version))
        bench.expect(held, version)
        assert [more.transfer for more in bench.told(More) if more.until == 0] == [200 + number]
    bench.pushes(Version(1, 9))
    assert bench.named() == 202


@BOTH
def test_what_is_delivered_is_the_trainers_own(layout: Layout) -> None:
    bench = joined(layout)
    bench.pushes(Version(1, 7))
    bench.ack(1, Version(1, 8))
    [settled] = bench.news(events.Settled)
    settled.values.fill(np.nan)
    bench.pushes(Version(1, 8), spare=settled.values)
    bench.ack(2, Version(1, 9))
    bench.expect(24, 9)


@BOTH
def test_a_reply_that_arrives_twice_is_added_once(layout: Layout) -> None:
    bench = joined(layout)
    bench.pushes(Version(1, 7))
    for _ in range(2):
        bench.ack(1, Version(1, 8))
    assert len(bench.news(events.Settled)) == 1
    assert bench.core._replica is not None
    assert (bench.core._replica == 15).all()
    bench.told()
    bench.pushes(Version(1, 8))
    assert bench.named() == 201


def test_half_a_reply_moves_nothing_and_the_same_bytes_come_again() -> None:
    bench = joined(LARGE)
    bench.pushes(Version(1, 7))
    reply, data = bench.reply(Version(1, 8), 201)
    ack = Ack("s", 1, 1, "applied", "", "", Version(1, 8), Version(1, 0), 1.0, False, 1, reply, b"")
    first = bench.core.plan("fp32").chunks[0]
    for _ in range(2):  # also the piece that came twice is added to the old
        bench.hears(ack, Chunk("s", 1, 201, first.first, data[: first.size]))
    assert bench.core._replica is not None
    assert (bench.core._replica == 7).all()
    bench.does(events.LinkLost())
    bench.hears(bench.welcome(connection=2, resumed="live"))
    bench.told()
    bench.ack(1, Version(1, 8), connection=2)
    bench.expect(15, 8)


@BOTH
def test_an_anchor_is_what_is_held_from_then_on(layout: Layout) -> None:
    """The session is gone: what its last reply would have been added to is of no use any more."""
    bench = joined(layout)
    bench.pushes(Version(1, 7))
    bench.hears(Fault("", 0, "stale", "gone", "", 0))
    bench.hears(bench.welcome(session="t", connection=3))
    assert [type(one) for one in bench.news(events.Orphaned)] == [events.Orphaned]

    def announce(reply: Any, data: bytes) -> Offer:
        return Offer("t", 3, "anchor", "", reply, False, data)

    reply, data = bench.reply(Version(1, 30), 5)
    plan = bench.core.plan("fp32")
    if len(plan.chunks) == 1:
        bench.hears(announce(reply, data))
    else:
        bench.hears(announce(reply, b""))
        for index, chunk in enumerate(plan.chunks):
            bench.hears(Chunk("t", 3, 5, index, data[chunk.offset : chunk.offset + chunk.size]))
    bench.expect(30, 30)
    bench.told()
    bench.pushes(Version(1, 30))
    assert bench.named() == 5


def test_pulls_to_look_change_nothing() -> None:
    bench = joined(SMALL)
    bench.does(events.PullWanted("evaluate"))
    bench.down(lambda reply, data: Offer("s", 1, "evaluate", "", reply, False, data), Version(1, 50), 9)
    [fetched] = bench.news(events.Fetched)
    assert (fetched.values == 50).all()
    assert bench.core._replica is not None
    assert (bench.core._replica == 7).all()


def test_a_difference_before_any_anchor_raises_doubt() -> None:
    bench = Bench(SMALL)
    bench.hears(bench.welcome())
    bench.anchor()
    bench.pushes()
    adds = SETTINGS | {"replica": True}
    bench.does(events.LinkLost())
    bench.hears(bench.welcome(connection=2, resumed="live", settings=adds))
    bench.ack(1, Version(1, 8), connection=2)
    assert not bench.news(events.Settled)
    assert bench.core.phase == "greeting"
