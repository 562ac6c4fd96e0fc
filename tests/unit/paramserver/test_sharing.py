"""Shared memory through the server's door: who is given it, that replies in it are the replies, and that it ends once.

The outside is the test: it maps nothing, and a plain array stands for the server's memory. Every Desk checks
`validate()` after each event.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common import chunks, rules
from common.codecs.base import F32, U8
from common.config import ServerSettings
from common.layout import Layout, Tensor
from common.messages import (
    Ack,
    Bye,
    Chunk,
    Fault,
    Grant,
    Message,
    Offer,
    Optimizer,
    Place,
    Resume,
    Share,
    Shared,
    Welcome,
)
from common.node import Unsendable
from common.rules.base import sum_of
from common.wire import encode
from paramserver import daemon, memory, status
from paramserver.core import Attached, Stop
from paramserver.daemon import warm
from tests.cluster import LARGE, POISON, SMALL, Desk, Hand
from tests.unit.paramserver.test_core import BOTH

HERE = "a machine"
PLAIN = Optimizer("SGD", 0.1, 0.0, 1, False, 0.0)


def desk(layout: Layout = SMALL, **settings: Any) -> Desk:
    """A server on a machine where memory may be shared."""
    return Desk(layout, machine=HERE, **settings)


def sharing(found: Desk, name: str = "w") -> tuple[Hand, U8]:
    """A worker that shares memory, and what its replies lie in."""
    hand = found.join(name)
    hand.share()
    given = found.attach()
    [shared] = hand.heard(Shared)
    assert shared.place is not None
    return hand, given


def replies(found: Desk, hand: Hand, since: int = 0) -> list[tuple[Any, bytes]]:
    """Each reply that was sent to a connection: the message that announced it, and its bytes, however they came."""
    said = [message for peer, message in found.sent[since:] if peer == hand.peer]
    complete: list[tuple[Any, bytes]] = []
    for message in said:
        if isinstance(message, Ack | Offer) and message.reply is not None:
            data = bytes(message.payload) or b"".join(
                bytes(piece.payload)
                for piece in said
                if isinstance(piece, Chunk) and piece.transfer == message.reply.id
            )
            assert len(data) == message.reply.bytes
            complete.append((message, data))
    return complete


def lies_in(found: Desk, given: U8, message: Message) -> bool:
    """Whether the payload of a message that was sent is no copy, but lies in that memory."""
    [index] = [i for i, (_, sent) in enumerate(found.sent) if sent is message]
    lying = found.lying[index]
    return lying is not None and np.shares_memory(lying, given)


def exchanged(found: Desk, hands: Sequence[Hand], values: Sequence[np.ndarray]) -> None:
    """Three rounds of pushes, each worker's turn after turn, over all fragments."""
    fragments = rules.load(found.settings.rule).fragments(found.settings.rule_config())
    for number in range(1, 3 * fragments + 1):
        for hand, value in zip(hands, values, strict=True):
            since = len(found.sent)
            for piece in hand.pieces(number, value * np.float32(number), fragment=(number - 1) % fragments):
                hand.send(piece)
            by_peer = {hand.peer: hand for hand in hands}
            for peer, ack in found.sent[since:]:
                if isinstance(ack, Ack) and ack.reply is not None:
                    by_peer[peer].more(ack.reply.id)
                    by_peer[peer].more(ack.reply.id, 0)


# Asking for it


def test_it_is_offered_attached_and_told() -> None:
    found = desk(LARGE)
    hand = found.join()
    assert hand.welcome.settings["machine"] == HERE
    hand.share(process=11, descriptor=12, mark="ab")
    [wanted] = found.attaching
    plan = chunks.plan(LARGE, "fp32")
    assert (wanted.peer, wanted.session, wanted.connection) == (hand.peer, hand.session, hand.connection)
    assert wanted.place == Place(11, 12, plan.bytes, "ab")
    assert (wanted.update_bytes, wanted.reply_bytes) == (plan.bytes, plan.bytes)
    assert not hand.heard(Shared), "not before it is there"
    found.attach()
    [shared] = hand.heard(Shared)
    assert shared.place.bytes == plan.bytes
    assert not shared.sentence


def test_it_is_as_large_as_the_largest_fragment_in_the_codec_of_its_way() -> None:
    found = desk(LARGE, rule="diloco", rule_settings={"fragments": 3}, local_steps=4, codec="int8", reply_codec="bf16")
    found.join().share()
    [wanted] = found.attaching
    assert wanted.update_bytes == max(chunks.plan(LARGE, "int8", part, 3).bytes for part in range(3))
    assert wanted.reply_bytes == max(chunks.plan(LARGE, "bf16", part, 3).bytes for part in range(3))


def test_a_server_that_shares_with_nobody_says_so() -> None:
    found = Desk(LARGE)
    hand = found.join()
    assert hand.welcome.settings["machine"] == ""
    hand.share()
    [shared] = hand.heard(Shared)
    assert shared.place is None
    assert "shares none" in shared.sentence
    assert not found.attaching


def test_memory_that_cannot_be_attached_costs_nothing_but_the_word() -> None:
    found = desk(LARGE)
    hand = found.join()
    hand.share()
    found.cannot_attach()
    [shared] = hand.heard(Shared)
    assert shared.place is None
    assert shared.sentence == "It is elsewhere."
    assert any("w " in sentence and "elsewhere" in sentence for sentence in found.said)
    assert hand.push(1).reply is not None
    [(_, data)] = replies(found, hand)[1:]
    assert set(np.frombuffer(data, np.float32)) == {1.0, 0.0}, "padding is zero"
    hand.bye()
    assert found.detached == [], "there is nothing to end"


def test_observers_have_none_to_share() -> None:
    found = desk()
    found.join()
    observer = Hand(found, "o")
    observer.hello(role="observer")
    observer.share()
    [fault] = observer.heard(Fault)
    assert fault.code == "unexpected"
    assert not found.attaching


def test_before_there_is_a_session_nobody_shares() -> None:
    found = desk()
    stranger = Hand(found)
    stranger.session, stranger.connection = "t", 1
    stranger.share()
    assert stranger.heard(Fault)[0].code == "stale"
    assert not found.attaching


def test_while_others_supply_the_weights_it_may_be_shared() -> None:
    """The model is known from the first Hello on."""
    found = desk()
    first, second = Hand(found, "a"), Hand(found, "b")
    first.hello()
    second.hello()
    second.share()
    first.share()
    for _ in range(2):
        found.attach()
    assert [hand.heard(Shared)[0].place is not None for hand in (first, second)] == [True, True]
    first.initialise()
    second.anchor()
    assert second.push(1).outcome == "applied"


@pytest.mark.parametrize(
    "absurd",
    [
        {"process": (1 << 53) - 1},
        {"descriptor": (1 << 53) - 1, "process": 0},
        {"bytes": 0},
        {"bytes": (1 << 53) - 1},
        {"mark": ""},
        {"mark": "../../etc/passwd"},
        {"mark": "f" * 1000},
    ],
)
def test_absurd_places_are_the_shells_to_refuse(absurd: dict[str, Any]) -> None:
    """The core passes them on as they are; what is expected comes from the model and not from the peer."""
    found = desk()
    hand = found.join()
    before = found.state()
    hand.share(**absurd)
    [wanted] = found.attaching
    plan = chunks.plan(SMALL, "fp32")
    assert (wanted.update_bytes, wanted.reply_bytes) == (plan.bytes, plan.bytes)
    found.cannot_attach()
    assert found.state() == before


@pytest.mark.parametrize("field", ["process", "descriptor", "bytes"])
@pytest.mark.parametrize("value", [-1, 1 << 53, 1.5, "1", None, True])
def test_what_is_no_place_is_malformed(field: str, value: Any) -> None:
    found = desk()
    hand = found.join()
    place = {"process": 1, "descriptor": 2, "bytes": 3, "mark": "00"} | {field: value}
    hand.raw([bytes(frame) for frame in encode(Share(hand.session, hand.connection, Place(**place)))])
    [fault] = hand.heard(Fault)
    assert fault.code == "malformed"
    assert not found.attaching


def test_what_is_offered_twice_on_a_connection_counts_once() -> None:
    """Or else a worker could have the server make memory without end, and lose sight of what it shares already."""
    found = desk()
    hand = found.join()
    for _ in range(3):
        hand.share()
    assert len(found.attaching) == 1
    given = found.attach()
    hand.share(mark="01")
    assert not found.attaching
    [shared] = hand.heard(Shared)
    assert shared.place is not None
    ack = hand.push(1)
    assert lies_in(found, given, ack)
    hand.bye()
    assert found.detached == [hand.peer]


# Replies


@pytest.mark.parametrize("rule", rules.names())
@pytest.mark.parametrize(("codec", "reply_codec"), [("fp32", "fp32"), ("int8", "bf16")])
@BOTH
def test_replies_are_the_same_bytes_with_and_without_it(
    rule: str, codec: str, reply_codec: str, layout: Layout
) -> None:
    """Under every rule; and all that answer a push, at once or late, lie in the memory."""
    random = np.random.default_rng(3)
    values = [random.normal(size=layout.elements).astype(np.float32) for _ in range(2)]
    outcomes = []
    for shares in (False, True):
        found = desk(layout, rule=rule, codec=codec, reply_codec=reply_codec, lease_s=1000)
        optimizer = Optimizer("SGD", 0.1, 0.9, 1, True, 0.0) if rule == "eamsgd" else PLAIN
        hands = [found.join(name, optimizer=optimizer) for name in "ab"]
        given = {}
        for hand in hands if shares else []:
            hand.share()
            given[hand.peer] = found.attach()
        if rule == "lsgd":
            for hand in hands:
                hand.report(0)
        exchanged(found, hands, values)
        shard = found.core.shard
        assert shard is not None
        said = [
            [
                (m.number if isinstance(m, Ack) else 0, m.version if isinstance(m, Ack) else m.reply.version, data)
                for m, data in replies(found, hand)
            ]
            for hand in hands
        ]
        acks = [
            [(m.number, m.outcome) for peer, m in found.sent if isinstance(m, Ack) and peer == h.peer] for h in hands
        ]
        outcomes.append((said, acks, shard.center.tobytes()))
        whole = [m for _, m in found.sent if isinstance(m, Ack) and m.reply is not None and len(m.payload)]
        if shares:
            pushed = [m for hand in hands for m, _ in replies(found, hand) if isinstance(m, Ack)]
            lying = [m for m in pushed if any(lies_in(found, memory, m) for memory in given.values())]
            assert len(lying) == len(pushed), "all of them lie in the memory, and come whole"
            assert all(found.core.sessions[hand.session].memory is given[hand.peer] for hand in hands)
        else:
            assert layout is SMALL or not whole
    assert outcomes[0] == outcomes[1]


@BOTH
@pytest.mark.parametrize("rule", ["downpour", "easgd"])
def test_the_reply_is_written_where_the_worker_reads_it(rule: str, layout: Layout) -> None:
    found = desk(layout, rule=rule)
    hand, given = sharing(found)
    assert (given == POISON).all(), "nothing before the first push"
    ack = hand.push(1, 2.0)
    plan = chunks.plan(layout, "fp32")
    assert len(ack.payload) == plan.bytes
    assert lies_in(found, given, ack)
    assert bytes(ack.payload) == given.tobytes()
    before = given.copy()
    hand.pull("evaluate")
    hand.pull("anchor")
    assert (given == before).all(), "pulls are sent in messages"
    hand.push(2, 5.0)
    assert not (given == before).all()


def test_what_is_sent_whole_frees_its_slot_when_it_was_handed_over() -> None:
    found = desk(LARGE)
    hand, _ = sharing(found)
    for number in range(1, 40):
        hand.push(number)
        assert found.state()[2] == 0
    assert len(found.core.downlink) == 0


def test_more_asked_of_a_reply_that_came_whole_sends_nothing() -> None:
    found = desk(LARGE)
    hand, _ = sharing(found)
    ack = hand.push(1)
    hand.heard()
    hand.more(ack.reply.id)
    assert hand.heard() == []


def test_late_replies_lie_in_it_too() -> None:
    """Whoever is held waits for nothing else."""
    found = desk(LARGE, rule="local_sgd", workers=2)
    (a, first), (b, second) = sharing(found, "a"), sharing(found, "b")
    assert a.push(1, 1.0).outcome == "held"
    assert (first == POISON).all()
    b.push(1, 3.0)
    for hand, given in ((a, first), (b, second)):
        [ack] = [
            m
            for peer, m in found.sent
            if peer == hand.peer and isinstance(m, Ack) and m.outcome == "applied" and m.number
        ]
        assert lies_in(found, given, ack)
        assert set(np.frombuffer(ack.payload, np.float32)) == {2.0, 0.0}


@pytest.mark.parametrize("when", ["before the round closes", "when its reply is encoded"])
def test_late_reply_to_a_connection_that_is_replaced(when: str) -> None:
    found = desk(LARGE, rule="local_sgd", workers=2)
    (a, old), (b, _) = sharing(found, "a"), sharing(found, "b")
    a.push(1, 1.0)
    late = when == "when its reply is encoded"
    if not late:
        again = a.resume(1)
        again.share()
        new = found.attach()
        again.send(again.begun(1))
    found.by_itself = False
    for message in b.pieces(1, 3.0):
        b.send(message)
    found.work()
    if late:
        again = a.resume(1)
        again.share()
        new = found.attach()
    found.by_itself = True
    found.finish()
    if late:
        again.send(again.begun(1))
    assert again.welcome.resumed == "live"
    [ack] = [m for m in again.heard(Ack) if m.outcome == "applied"]
    assert (ack.number, set(np.frombuffer(ack.payload, np.float32))) == (1, {2.0, 0.0})
    assert lies_in(found, new, ack)
    assert not lies_in(found, old, ack)
    assert a.heard(Ack) == []


def test_what_is_owed_is_the_same_bytes_on_every_connection() -> None:
    """It lies in the memory of the first; that of the others stays as it is until their first push."""
    found = desk(LARGE, rule="easgd", workers=2)
    a, given = sharing(found, "a")
    b = found.join("b")
    a.push(1, 4.0)
    expected = given.tobytes()
    b.push(1, 8.0)
    for shares in (False, True, True):
        a = a.resume(1)
        new = None
        if shares:
            a.share()
            new = found.attach()
        a.push(1, 4.0)
        assert replies(found, a)[-1][1] == expected
        assert given.tobytes() == expected
        assert new is None or (new == POISON).all()
    ack = a.push(2, 1.0)
    assert new is not None
    assert lies_in(found, new, ack)
    assert given.tobytes() == expected


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("at", [0, 65_536, 599_999, 600_006])
def test_a_refused_push_changes_nothing(codec: str, at: int) -> None:
    """Though it may have been added by then: not to the center."""
    found = desk(LARGE, codec=codec)
    hand, _ = sharing(found)
    hand.push(1, 2.0)
    before = found.state()
    pieces = hand.pieces(2, 1.0)
    data = np.frombuffer(pieces[0].payload, np.uint8).copy()  # type: ignore[union-attr]
    block = next(b for b in hand.desk.core.shard.ups[0][codec].blocks if b.first <= at < b.last)  # type: ignore[union-attr]
    width = 4 if codec == "fp32" else 2
    offset = block.offset + width * (at - block.first)
    data[offset : offset + width] = [0, 0, 0xC0, 0x7F][4 - width :]
    hand.send(replace(pieces[0], payload=data.data))
    assert hand.heard((Ack,))[-1].code == "non_finite"
    assert found.state() == before
    assert found.core.sessions[hand.session].clock == 1
    assert hand.push(3, 1.0).outcome == "applied"
    assert set(found.core.shard.center) == {3.0}  # type: ignore[union-attr]


def test_an_update_that_is_finite_and_a_center_that_is_no_longer() -> None:
    """It is the center that diverged, as it would have without shared memory."""
    found = desk(LARGE)
    hand, _ = sharing(found)
    hand.push(1, 3e38)
    hand.push(2, 3e38)
    assert found.core.state.diverged


def test_bytes_beyond_the_vector_must_be_zero() -> None:
    found = desk(LARGE)
    hand, _ = sharing(found)
    before = found.state()
    [push] = hand.pieces(1, 1.0)
    data = np.frombuffer(push.payload, np.uint8).copy()  # type: ignore[union-attr]
    data[-1] = 1
    hand.send(replace(push, payload=data.data))
    assert hand.heard((Ack,))[-1].code == "encoding"
    assert found.state() == before


def test_what_changes_while_it_is_added_never_makes_two_centers() -> None:
    """The worker writes on all the time: each push is applied or refused, and what it was told is the center."""
    found = desk(LARGE, rejected_per_minute=100_000)
    hand, given = sharing(found)
    data = np.zeros(hand.pieces(1)[0].begin.bytes, np.uint8)  # type: ignore[union-attr]
    values, over = data.view(np.float32)[: LARGE.elements], threading.Event()

    def write() -> None:
        random = np.random.default_rng(0)
        while not over.is_set():
            values[random.integers(LARGE.elements)] = random.choice([0.0, 1.0, np.nan])
            if random.random() < 0.01:
                values[:] = 0.0

    writer = threading.Thread(target=write)
    writer.start()
    outcomes: set[str] = set()
    try:
        for number in range(1, 5000):  # the two threads may take turns in any way
            if number > 60 and len(outcomes) == 2:
                break
            [push] = hand.pieces(number, 0.0)
            hand.send(replace(push, payload=data.data.toreadonly()))
            ack = hand.heard((Ack,))[-1]
            outcomes.add(ack.outcome)
            center = found.core.shard.center  # type: ignore[union-attr]
            assert np.isfinite(center).all()
            if ack.outcome == "applied":
                assert given[: center.nbytes].tobytes() == center.tobytes()
    finally:
        over.set()
        writer.join()
    assert outcomes == {"applied", "rejected"}


def test_an_update_of_two_chunks_that_would_fit_one_message() -> None:
    layout = Layout((Tensor("w", (271, 1000), "float32", "parameter"),))
    found = desk(layout)
    hand, given = sharing(found)
    assert len(found.core.shard.ups[0]["fp32"].chunks) == 2  # type: ignore[union-attr]
    ack = hand.push(1, 2.0)
    assert ack.outcome == "applied"
    assert lies_in(found, given, ack)
    assert set(found.core.shard.center) == {2.0}  # type: ignore[union-attr]


def test_an_update_that_is_as_long_as_no_update_is_refused() -> None:
    found = desk(LARGE)
    hand, _ = sharing(found)
    [push] = hand.pieces(1, 1.0)
    hand.send(replace(push, payload=push.payload[:-8]))  # type: ignore[union-attr]
    assert hand.heard((Ack,))[-1].code == "bad_length"


# Other connections


@pytest.mark.parametrize("rule", ["downpour", "gem", "easgd"])
@pytest.mark.parametrize("shares_again", [False, True])
def test_connection_that_is_replaced_while_its_push_is_applied(rule: str, shares_again: bool) -> None:
    """The kernels still write for the old one; the reply comes to the new one in chunks, from there, and is right."""
    serial = Desk(LARGE, rule=rule)
    alone = serial.join()
    alone.push(1, 2.0)
    expected = replies(serial, alone)[-1][1]

    found = desk(LARGE, rule=rule, by_itself=True)
    hand, old = sharing(found)
    found.by_itself = False
    for message in hand.pieces(1, 2.0):
        hand.send(message)
    if rule != "downpour":
        found.work()  # the update is taken first
    assert len(found.jobs) == 1
    again = hand.redial()
    again.hello(resume=Resume(hand.session, 1, 0, hand.merged))
    assert again.welcome.resumed == "live"
    assert found.detached == [hand.peer]
    new = None
    if shares_again:
        again.share()
        new = found.attach()
    found.by_itself = True
    found.work()
    [ack] = again.heard(Ack)
    assert (ack.number, ack.outcome, len(ack.payload)) == (1, "applied", 0)
    again.more(ack.reply.id)
    assert replies(found, again)[-1][1] == expected
    if new is not None:
        assert (new == POISON).all(), "what was written for the old connection is not in the memory of the new"
        second = again.push(2, 2.0)
        assert lies_in(found, new, second)
    assert old.tobytes() == expected
    assert found.detached == [hand.peer]
    found.finish()
    assert again.push(3, 1.0).outcome == "applied"
    assert found.state()[2] == (rule == "easgd" and new is None), "one reply is owed in its slot, or none"


def test_memory_that_is_there_only_when_the_job_runs_is_not_written_to() -> None:
    found = desk(LARGE)
    hand = found.join()
    hand.share()
    found.by_itself = False
    for message in hand.pieces(1, 2.0):
        hand.send(message)
    given = found.attach()
    found.by_itself = True
    found.work()
    [ack] = hand.heard(Ack)
    assert len(ack.payload) == 0
    hand.more(ack.reply.id)
    assert set(np.frombuffer(replies(found, hand)[-1][1], np.float32)) == {2.0, 0.0}
    assert (given == POISON).all()
    assert lies_in(found, given, hand.push(2))


@pytest.mark.parametrize("how", ["bye", "silence", "reconnect", "malformed", "bye while its push is applied"])
def test_it_ends_once_with_its_connection(how: str) -> None:
    found = desk(lease_s=10.0)
    hand, _ = sharing(found)
    other, _ = sharing(found, "other")
    match how:
        case "bye":
            hand.bye()
        case "silence":
            for _ in range(3):
                found.wait(4.0)
                other.beat()
        case "reconnect":
            hand.resume(0)
        case "malformed":
            for _ in range(found.settings.malformed_in_a_row):
                hand.raw([b"?"])
        case _:
            found.by_itself = False
            for message in hand.pieces(1):
                hand.send(message)
            hand.bye()
            assert found.detached == []
            found.by_itself = True
            found.finish()
            assert any(isinstance(m, Ack) and m.number == 1 for m in hand.heard())
    assert found.detached == [hand.peer]
    if how != "reconnect":
        assert found.core.sessions[hand.session].memory is None
    hand.bye()
    found.wait(3.0)
    assert found.detached == [hand.peer]


@pytest.mark.parametrize("how", ["bye", "silence", "reconnect", "reconnect on the same connection"])
def test_memory_that_comes_too_late_is_given_up(how: str) -> None:
    found = desk(lease_s=10.0)
    hand = found.join()
    hand.share()
    match how:
        case "bye":
            hand.bye()
        case "silence":
            found.wait(20.0)
        case "reconnect":
            hand.resume(0)
        case _:
            hand.hello(resume=Resume(hand.session, 0, 0, 0))
    assert found.detached == []
    found.attach()
    assert found.detached == [hand.peer]
    assert not hand.heard(Shared)
    assert all(session.memory is None for session in found.core.sessions.values())


def test_word_that_it_failed_too_late_is_no_harm() -> None:
    found = desk()
    hand = found.join()
    hand.share()
    again = hand.resume(0)
    again.share()
    found.cannot_attach()
    assert not again.heard(Shared)
    given = found.attach()
    assert lies_in(found, given, again.push(1))


def test_memory_for_a_session_that_never_was() -> None:
    found = desk()
    found.event(Attached(b"nobody", "t9-9", 4, np.zeros(9, np.uint8), Place(1, 2, 9, "00")))
    assert found.detached == [b"nobody"]


def test_a_peer_that_cannot_be_written_to_gets_its_reply_on_the_next_connection() -> None:
    found = desk(LARGE)
    hand, _ = sharing(found)
    found.by_itself = False
    for message in hand.pieces(1, 2.0):
        hand.send(message)
    found.work()
    found.event(Unsendable(hand.peer, "the memory that it lies in is no longer shared"))
    found.finish()
    found.by_itself = True
    again = hand.resume(1)
    again.push(1, 2.0)
    assert set(np.frombuffer(replies(found, again)[-1][1], np.float32)) == {2.0, 0.0}
    assert found.state()[2] == 0


def test_a_server_that_stops_ends_it_with_the_process() -> None:
    found = desk()
    hand, _ = sharing(found)
    found.event(Stop("enough"))
    assert found.exited
    assert hand.heard(Bye)


# What is said of it


def test_status_tells_who_shares() -> None:
    found = desk()
    sharing(found, "a")
    found.join("b")
    rows = {row["name"]: row["shares_memory"] for row in status.describe(found.core, found.now)["workers"]}
    assert rows == {"a": True, "b": False}


def test_what_is_shared_is_part_of_the_sum() -> None:
    found = desk(LARGE, reply_codec="bf16")
    found.join("b")
    before = status.describe(found.core, found.now)["memory_bytes"]
    sharing(found, "a")
    grown = status.describe(found.core, found.now)["memory_bytes"] - before
    per_worker = chunks.plan(LARGE, "fp32").bytes + chunks.plan(LARGE, "bf16").bytes
    plan = memory.plan(found.settings, LARGE)
    assert grown == plan.per_session + per_worker == plan.total(2, 1) - plan.total(1)


def test_the_limit_counts_what_is_about_to_be_shared() -> None:
    """Attaching takes time: those who ask meanwhile are not all given what is there once."""
    settings = desk(LARGE, rule="gem", pool_mib=12).settings
    plan = memory.plan(settings, LARGE)
    limit = -(-plan.total(3, 1) // 2**20)
    assert plan.total(3, 2) > limit << 20
    found = desk(LARGE, rule="gem", pool_mib=12, memory_limit_mib=limit)
    hands = [found.join(name) for name in "abc"]
    for hand in hands:
        hand.share()
    assert len(found.attaching) == 1
    for hand in hands[1:]:
        [shared] = hand.heard(Shared)
        assert "memory_limit_mib" in shared.sentence
    found.attach()
    assert status.describe(found.core, found.now)["memory_bytes"] <= limit << 20
    hands[0].bye()
    again = hands[1].resume(0)
    again.share()
    assert len(found.attaching) == 1, "there is room again"
    found.cannot_attach()
    assert found.core.state.sharing == 0


def test_who_joins_later_finds_what_is_left_by_those_who_share() -> None:
    settings = desk(LARGE, rule="gem", pool_mib=12).settings
    plan = memory.plan(settings, LARGE)
    limit = -(-plan.total(1, 1) // 2**20)
    assert plan.total(2) <= limit << 20 < plan.total(2, 1)
    found = desk(LARGE, rule="gem", pool_mib=12, memory_limit_mib=limit)
    first, _ = sharing(found, "a")
    refused = Hand(found, "b").hello()
    assert isinstance(refused, Fault)
    assert refused.code == "full"
    assert "--no-shared-memory" in refused.fix
    first.resume(0)  # on this connection it has offered none yet
    assert isinstance(Hand(found, "b").hello(), Welcome)


def test_welcome_after_a_lost_one_names_the_machine() -> None:
    found = desk()
    hand = found.join()
    [*_, welcome] = [hand.hello(), *hand.heard(Welcome)]
    assert welcome.settings["machine"] == HERE
    assert not hand.heard(Grant)


def test_the_kernels_that_read_memory_of_workers_are_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written to is another kernel: compiled with the first push, it would keep everybody waiting."""
    taken: list[bool] = []
    take = chunks.Plan.take

    def spy(plan: chunks.Plan, chunk: chunks.Chunk, payload: U8, data: U8) -> None:
        taken.append(payload.flags.writeable)
        take(plan, chunk, payload, data)

    monkeypatch.setattr(chunks.Plan, "take", spy)
    warm(ServerSettings())
    assert set(taken) == {True, False}


def test_the_kernel_that_tries_updates_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short update is tried where it lies: in memory that cannot be written to, or in its message, at any address."""
    tried: list[tuple[bool, bool]] = []

    def spy(c: F32, d: F32, *rest: Any) -> bool:
        tried.append((d.flags.writeable, d.flags.aligned))
        return sum_of(c, d, *rest)

    monkeypatch.setattr(daemon, "sum_of", spy)
    warm(ServerSettings())
    assert set(tried) == {(False, True), (True, False)}
