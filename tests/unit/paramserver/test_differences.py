"""Replies that are differences to what the worker holds: one message at a time. Under faults: `tests.simulation`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import chunks, codecs
from common.codecs.base import F32
from common.layout import Layout, Tensor
from common.messages import NOWHERE, Ack, Fault, Grant, More, Offer, Pull, Resume
from paramserver import memory
from paramserver.core import ServerCore
from tests.cluster import LARGE, SMALL, Desk, Hand

MODEL = Layout(
    (
        Tensor("w", (300, 700), "float32", "parameter"),
        Tensor("b", (8,), "float32", "parameter"),
        Tensor("mean", (6,), "float32", "buffer"),
    )
)
"""Several blocks, body, dense and buffers, in one message."""
PLAIN = Layout(MODEL.tensors[:2])
"""Without buffers: its updates may be added before they are checked, and answered with the center as it is."""


class Holder:
    """A worker that remembers what it holds, as `worker.core` does, and names it."""

    def __init__(self, desk: Desk, name: str = "w") -> None:
        self.desk = desk
        self.hand = desk.join(name)
        self.merged = self.hand.merged
        self.x: F32 = np.zeros(desk.layout.parameters, np.float32)
        self.number = 0
        self.random = np.random.default_rng(len(name))

    def update(self) -> F32:
        """(elements,) some progress."""
        return (self.random.standard_normal(self.desk.layout.elements) * 0.01).astype(np.float32)

    def push(self, update: F32 | None = None, **changes: Any) -> Any:
        """The next update; the answer, not merged."""
        self.number += 1
        update = self.update() if update is None else update
        return self.hand.push(self.number, update, **({"merged": self.merged} | changes))

    def merge(self, ack: Any, fragment: int = 0) -> None:
        """Add the reply to what is held."""
        shard = self.desk.core.shard
        assert shard is not None
        plan = shard.downs[fragment]
        assert (ack.reply.codec, ack.reply.bytes) == (plan.codec, len(ack.payload))
        q = np.zeros(plan.elements, np.float32)
        plan.decode(np.frombuffer(ack.payload, np.uint8), q)
        self.x[plan.part] += q[plan.part]
        self.merged = ack.reply.id

    def expect_same(self) -> None:
        """What it holds is what the server says that it holds, bit for bit."""
        replica = self.desk.core.sessions[self.hand.session].replica
        assert replica is not None
        assert replica.tobytes() == self.x.tobytes()


def desk(layout: Layout = MODEL, **settings: Any) -> Desk:
    return Desk(layout, **{"replies": "difference", "reply_codec": "int8"} | settings)


def center(desk: Desk) -> F32:
    assert desk.core.shard is not None
    return desk.core.shard.center.copy()


def session(holder: Holder) -> Any:
    return holder.desk.core.sessions[holder.hand.session]


@pytest.mark.parametrize("layout", [MODEL, PLAIN])
@pytest.mark.parametrize("reply_codec", ["int8", "plain:int4", "plain:topk:0.05", "natural", "bf16:stochastic", "fp16"])
def test_both_add_the_decoded_difference(reply_codec: str, layout: Layout) -> None:
    found = desk(layout, reply_codec=reply_codec)
    a, b = Holder(found, "a"), Holder(found, "bb")
    for _ in range(5):
        for holder in (a, b):
            holder.merge(holder.push())
            holder.expect_same()
    error = np.abs(a.x - center(found)[: layout.parameters]).max()
    assert 0 < error < 0.1, "it follows the center, and does not reach it"


@pytest.mark.parametrize("reply_codec", ["plain:int4", "plain:topk:0.05", "plain:powersgd"])
def test_what_a_reply_lost_comes_with_the_next(reply_codec: str) -> None:
    found = desk(reply_codec=reply_codec)
    a = Holder(found)
    a.merge(a.push())
    after = [np.linalg.norm(a.x - center(found)[: MODEL.parameters])]
    for _ in range(5):
        a.merge(a.push(np.zeros(MODEL.elements, np.float32)))
        a.expect_same()
        after.append(np.linalg.norm(a.x - center(found)[: MODEL.parameters]))
    assert all(second < first for first, second in itertools.pairwise(after))


@pytest.mark.parametrize(("reply_codec", "same"), [("natural", False), ("int8", True)])
def test_each_reply_is_rounded_by_chance_of_its_own(reply_codec: str, same: bool) -> None:
    found = desk(reply_codec=reply_codec)
    a, b = Holder(found, "a"), Holder(found, "b")
    first, second = a.push(), b.push(np.zeros(MODEL.elements, np.float32))
    body = [bytes(ack.payload)[:100_000] for ack in (first, second)]  # buffers are averaged, and so are not the same
    assert (body[0] == body[1]) == same, "both are the same difference"


def test_buffers_and_pulls_are_the_center_as_it_is() -> None:
    found = desk()
    a = Holder(found)
    ack = a.push()
    shard = found.core.shard
    assert shard is not None
    values = np.zeros(MODEL.elements, np.float32)
    shard.downs[0].decode(np.frombuffer(ack.payload, np.uint8), values)
    assert values[MODEL.parameters :].tobytes() == center(found)[MODEL.parameters :].tobytes()
    offer = a.hand.pull("evaluate")
    assert offer.reply.codec == "fp32"
    assert bytes(offer.payload)[: 4 * MODEL.elements] == center(found).tobytes()


def test_int4_differences_are_a_seventh_and_int8_ones_a_quarter_of_the_center() -> None:
    """For a model large enough that what goes dense does not count; int8 needs its scales beside the quarter."""
    layout = Layout((Tensor("w", (1000, 1000), "float32", "parameter"),))
    whole = chunks.plan(layout, "fp32").bytes
    share = {name: whole / chunks.plan(layout, name).bytes for name in ("int8", "plain:int4", "plain:topk")}
    assert 3.98 < share["int8"] < 4.0
    assert 7.5 < share["plain:int4"] < 8.0
    assert share["plain:topk"] > 100


# Exactly once


def test_a_lost_reply_is_sent_again_byte_for_byte_though_the_center_moved_on() -> None:
    found = desk()
    a, b = Holder(found, "a"), Holder(found, "b")
    update = a.update()
    first = a.push(update)
    b.merge(b.push())
    for _ in range(3):
        a.hand = a.hand.resume(1)
        again = a.hand.push(1, update, merged=a.merged)
        assert bytes(again.payload) == bytes(first.payload)
        assert again.version == first.version
    a.merge(again)
    a.expect_same()
    a.merge(a.push())
    a.expect_same()


def test_the_slot_is_free_once_the_reply_is_confirmed() -> None:
    found = desk()
    a = Holder(found)
    a.merge(a.push())
    assert found.state()[2] == 1
    a.hand.send(More(a.hand.session, a.hand.connection, a.merged, 0))
    assert found.state()[2] == 0
    a.merge(a.push())
    a.expect_same()


def test_a_push_that_does_not_name_what_the_replica_is_is_refused() -> None:
    found = desk()
    a = Holder(found)
    old = a.merged
    a.merge(a.push())
    before = found.state()
    a.number += 1
    for message in a.hand.pieces(a.number, a.update(), merged=old):
        a.hand.send(message)
    [grant] = a.hand.heard(Grant)
    assert (grant.decision, grant.code) == ("refuse", "base_version")
    assert found.state()[:2] == before[:2]
    a.x[:] = np.frombuffer(a.hand.anchor().payload, np.float32)[: MODEL.parameters]
    a.merged = a.hand.merged
    a.expect_same()
    a.merge(a.push())
    a.expect_same()


def test_an_old_pull_that_comes_late_leaves_nobody_with_other_bits() -> None:
    """The network may keep a pull back that was sent before another: the server then anchors a worker that went on."""
    found = desk()
    a = Holder(found)
    a.merge(a.push())
    a.hand.send(Pull(a.hand.session, a.hand.connection, "anchor", "", NOWHERE, 77))
    a.number += 1
    for message in a.hand.pieces(a.number, a.update(), merged=a.merged):
        a.hand.send(message)
    assert [grant.code for grant in a.hand.heard(Grant)] == ["base_version"]


def test_the_same_while_the_push_waits_for_its_turn() -> None:
    found = desk()
    a, b = Holder(found, "a"), Holder(found, "b")
    a.merge(a.push())
    found.by_itself = False
    b.push()  # is being applied
    a.hand.heard()
    for message in a.hand.pieces(2, a.update(), merged=a.merged):
        a.hand.send(message)
    a.hand.send(Pull(a.hand.session, a.hand.connection, "anchor", "", NOWHERE, 77))  # goes before pushes
    found.finish()
    [ack] = a.hand.heard(Ack)
    assert (ack.outcome, ack.code) == ("rejected", "base_version")


def test_a_reply_is_not_sent_again_to_whom_it_means_nothing() -> None:
    found = desk()
    a = Holder(found)
    update = a.update()
    a.push(update)
    a.hand.send(Pull(a.hand.session, a.hand.connection, "anchor", "", NOWHERE, 77))
    again = a.hand.resume(1)
    for message in again.pieces(1, update, merged=a.merged):
        again.send(message)
    assert [fault.code for fault in again.heard(Fault)] == ["stale"]
    assert again.resume(1).welcome.resumed == "record", "so it anchors anew"


def test_a_crash_of_the_server_makes_everybody_anchor_anew(tmp_path: Path) -> None:
    found = desk(directory=tmp_path)
    a = Holder(found)
    a.merge(a.push())
    found.core.durability.save()
    found.wait(100.0)
    recovered = found.saved()
    assert not any("replica" in name for name in recovered.arrays)
    second = Desk(MODEL, epoch=2, recovered=recovered, **found.settings.model_dump(exclude={"bind"}))
    hand = a.hand.redial(second)
    assert hand.hello(resume=Resume(a.hand.session, 1, 1, a.merged)).resumed == "record"
    a.desk, a.hand = second, hand
    a.x[:] = np.frombuffer(hand.anchor().payload, np.float32)[: MODEL.parameters]
    a.merged = hand.merged
    a.merge(a.push())
    a.expect_same()


# Late replies


def held(found: Desk) -> tuple[Holder, Holder]:
    """Two in a round, the first of whom is held."""
    a, b = Holder(found, "a"), Holder(found, "b")
    assert a.push().outcome == "held"
    return a, b


def test_who_was_held_is_answered_with_a_difference_of_its_own() -> None:
    found = desk(rule="local_sgd")
    a, b = held(found)
    a.hand.heard()
    b.merge(b.push())
    [ack] = a.hand.heard(Ack)
    a.merge(ack)
    a.expect_same()
    b.expect_same()
    assert (ack.outcome, ack.version) == ("applied", found.core.version)


def test_who_comes_back_before_its_late_reply_is_made_is_sent_it_once() -> None:
    found = desk(rule="local_sgd")
    a, b = held(found)
    found.by_itself = False
    b.push()
    found.work()  # b's push closes the round
    again = a.hand.resume(1)
    assert session(a).owed is not None
    assert not session(a).owed.made
    for message in again.pieces(1, 1.0, merged=a.merged):
        again.send(message)
    assert not again.heard(Ack), "it is being made"
    found.finish()
    [ack] = again.heard(Ack)
    a.hand = again
    a.merge(ack)
    a.expect_same()


@pytest.mark.parametrize("when", ["waiting", "being made"])
def test_a_late_reply_to_whom_is_gone_leaves_no_slot_behind(when: str) -> None:
    found = desk(rule="local_sgd")
    a, b = held(found)
    found.by_itself = False
    b.push()
    found.work()
    assert session(a).owed is not None
    if when == "waiting":
        a.hand.bye()
        found.finish()
    else:
        job = found.jobs.popleft()
        a.hand.bye()
        assert found.state()[2] == 2, "the kernel still writes to it"
        found.jobs.appendleft(job)
        found.finish()
    b.hand.bye()
    found.finish()
    assert found.state()[2] == 0


def test_who_anchored_before_its_late_reply_was_made_is_given_none() -> None:
    found = desk(max_clock_gap=1)
    a, b, c = (Holder(found, name) for name in ("a", "b", "c"))
    a.merge(a.push())
    assert a.push().outcome == "held", "two ahead of b and c"
    b.merge(b.push())
    found.by_itself = False
    c.hand.send(Pull(c.hand.session, c.hand.connection, "evaluate", "", NOWHERE, c.merged))  # keeps the others waiting
    a.hand.send(Pull(a.hand.session, a.hand.connection, "anchor", "", NOWHERE, a.merged))
    c.push()  # so that a can be answered
    b.push()  # between the anchor and the late reply
    a.hand.heard()
    found.finish()
    [offer] = [message for message in a.hand.heard() if isinstance(message, Offer)]
    a.x[:] = np.frombuffer(offer.payload, np.float32)[: MODEL.parameters]
    assert (a.x != center(found)[: MODEL.parameters]).any(), "b came after it"
    a.expect_same()


def test_nor_while_it_waited_for_a_slot() -> None:
    found = desk(rule="local_sgd", pool_mib=3)
    a, b = held(found)
    ack = b.push()
    assert found.core.state.hosted.slots.limit == found.state()[2] == 1, "that of b's reply"
    assert session(a).owed is None
    a.hand.heard()
    a.hand.anchor()
    a.hand.heard()
    b.hand.send(More(b.hand.session, b.hand.connection, ack.reply.id, 0))
    assert found.state()[2] == 0
    assert not a.hand.heard(Ack)


def test_a_late_reply_has_the_first_slot_that_is_free() -> None:
    found = desk(rule="local_sgd", pool_mib=3)
    a, b = held(found)
    ack = b.push()
    a.hand.heard()
    b.hand.send(More(b.hand.session, b.hand.connection, ack.reply.id, 0))
    [late] = a.hand.heard(Ack)
    a.merge(late)
    a.expect_same()


# What it goes with


def test_a_fragment_moves_its_part_of_the_replica() -> None:
    settings = {"rule": "diloco", "rule_settings": {"fragments": 3}, "local_steps": 3}
    found = desk(MODEL, **settings)
    a = Holder(found)
    for turn in range(7):
        part = turn % 3
        before = a.x.copy()
        a.merge(a.push(fragment=part), part)
        a.expect_same()
        assert found.core.shard is not None
        moved = np.flatnonzero(a.x != before)
        cut = found.core.shard.downs[part].part
        assert cut.start <= moved.min() <= moved.max() < cut.stop


def test_elastic_differences_may_travel_in_any_codec_that_contracts() -> None:
    found = desk(rule="easgd", rule_settings={"beta": 0.5}, workers=2, reply_codec="plain:topk:0.05")
    a = Holder(found)
    assert a.hand.welcome.settings["replica"] is False
    ack = a.push()
    assert ack.reply.codec == "plain:topk:0.05"
    assert a.hand.anchor().reply.codec == "fp32"


def test_in_shared_memory_the_bytes_stay_until_they_are_named() -> None:
    found = desk(machine="here")
    a, b = Holder(found, "a"), Holder(found, "b")
    a.hand.share()
    lies = found.attach()
    update = a.update()
    first = a.push(update)
    kept = lies.tobytes()
    assert kept[: first.reply.bytes] == bytes(first.payload)
    b.merge(b.push())
    a.hand.beat()
    assert lies.tobytes() == kept
    a.hand = a.hand.resume(1)
    again = a.hand.push(1, update, merged=a.merged)
    assert bytes(again.payload) == bytes(first.payload)
    a.merge(again)
    a.expect_same()


def test_a_worker_that_cannot_add_is_refused_before_a_byte_has_moved() -> None:
    found = desk()
    answer = Hand(found).hello(codecs=codecs.names())
    assert (answer.code, "for differences" in answer.sentence) == ("unknown_codec", True)


def test_replicas_count_in_the_sum_and_not_in_the_shadow(tmp_path: Path) -> None:
    whole = Desk(LARGE, reply_codec="int8", directory=tmp_path).settings
    plans = [memory.plan(s, LARGE) for s in (whole, whole.model_copy(update={"replies": "difference"}))]
    vector = 4 * LARGE.parameters
    assert plans[1].replica == vector
    assert (plans[1].total(3) - plans[1].total(2)) - (plans[0].total(3) - plans[0].total(2)) == vector
    assert plans[1].snapshots == 2 * chunks.plan(LARGE, "fp32").bytes, "pulls are whole"
    assert "replicas" in plans[1].sentence(2)


def test_nothing_is_kept_where_replies_are_whole() -> None:
    found = Desk(SMALL)
    hand = found.join()
    assert found.core.sessions[hand.session].replica is None
    assert isinstance(found.core, ServerCore)
