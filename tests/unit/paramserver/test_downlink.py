"""Replies leave whole and in order, as far as they are wanted, and their buffers come back once."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from common import chunks, wire
from common.messages import Chunk, Offer, Reply, Version
from paramserver.downlink import Downlink
from tests.cluster import LARGE, SMALL

V = Version(1, 3)


class Out:
    """One reply, and how often its buffer was given back."""

    def __init__(self, downlink: Downlink, layout: Any, session: str = "s", connection: int = 1) -> None:
        self.plan = chunks.plan(layout, "fp32")
        self.data = np.random.default_rng(1).integers(0, 256, self.plan.bytes, np.uint8)
        self.given_back = 0
        self.first = downlink.offer(
            lambda reply, payload: Offer(session, connection, "evaluate", "", reply, False, payload),
            self.data,
            self.plan,
            V,
            (session, connection, b"peer"),
            self.back,
            now=0.0,
        )
        offer = wire.decode(self.first.frames)
        assert isinstance(offer, Offer)
        self.reply: Reply = offer.reply

    def back(self) -> None:
        self.given_back += 1


def test_one_chunk_rides_in_the_announcement() -> None:
    downlink = Downlink()
    out = Out(downlink, SMALL)
    assert out.first.hold == out.reply.id != 0
    assert bytes(out.first.frames[1]) == out.data.tobytes()
    assert (out.reply.bytes, out.reply.codec, out.reply.version) == (out.plan.bytes, "fp32", V)
    assert not out.given_back
    downlink.released(out.reply.id)
    assert out.given_back == 1
    assert len(downlink) == 0
    downlink.released(out.reply.id)
    assert out.given_back == 1


names = st.sampled_from(["read", "cancel", "foreign", "old", "other"])
events = st.lists(st.one_of(st.integers(0, 5), names), max_size=25)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(events)
def test_whatever_happens_the_buffer_comes_back_once_and_not_while_it_is_read(steps: list[Any]) -> None:
    downlink = Downlink()
    out = Out(downlink, LARGE)
    assert out.first.hold == 0, "there is nothing to read in an announcement"
    sent: list[int] = []
    reading, until, cancelled = 0, 0, False
    for step in steps:
        sends = []
        match step:
            case "read" if reading:
                reading -= 1
                downlink.released(out.reply.id)
            case "cancel":
                cancelled = True
                downlink.cancel("s")
            case "foreign":
                assert downlink.more(out.reply.id, "thief", 1, 9, 0.0) == []
            case "old":
                assert downlink.more(out.reply.id, "s", 0, 9, 0.0) == []
            case "other":
                downlink.cancel("another session")
                assert downlink.more(out.reply.id + 1, "s", 1, 9, 0.0) == []
            case int():
                sends = downlink.more(out.reply.id, "s", 1, step, 0.0)
                until = until if cancelled else max(until, step)
        for send in sends:
            chunk = wire.decode(send.frames)
            assert isinstance(chunk, Chunk)
            piece = out.plan.chunks[chunk.index]
            assert bytes(chunk.payload) == out.data[piece.offset : piece.offset + piece.size].tobytes()
            assert send.hold == out.reply.id
            sent.append(chunk.index)
            reading += 1
        downlink.validate()
        assert sent == list(range(min(until, len(out.plan.chunks)))), "in order, once, and as far as the window"
        over = reading == 0 and (cancelled or len(sent) == len(out.plan.chunks))
        assert out.given_back == over
        assert len(downlink) == (not over)


def test_ids_are_never_used_twice() -> None:
    downlink = Downlink()
    ids = []
    for _ in range(50):
        out = Out(downlink, SMALL)
        downlink.released(out.reply.id)
        ids.append(out.reply.id)
    assert len(set(ids)) == 50
