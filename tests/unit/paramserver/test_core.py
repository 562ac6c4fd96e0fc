"""The server through its door: who may join, what is applied how often, what a refusal leaves behind, and how it ends.

Every Desk checks `validate()` after each event, and that the wire can read whatever the server says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import chunks, codecs, wire
from common.config import ServerSettings
from common.layout import Layout, Tensor
from common.messages import (
    NOWHERE,
    Ack,
    Answer,
    Beat,
    Begin,
    Bye,
    Chunk,
    Commit,
    Fault,
    Grant,
    More,
    Offer,
    Optimizer,
    Pull,
    Push,
    Query,
    Resume,
    Version,
    Welcome,
)
from common.node import Received, Tick, Unsendable
from paramserver import memory
from paramserver.core import SaveFailed, Stop
from tests.cluster import LARGE, SMALL, Desk, Hand

BOTH = pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["small", "large"])
SAVING = {"directory": Path("unused"), "checkpoint_interval_s": 10.0}
FILL = 1.0


def center(desk: Desk) -> set[float]:
    """The distinct values of the parameters."""
    shard = desk.core.shard
    assert shard is not None
    return {float(value) for value in np.unique(shard.center[: shard.layout.parameters])}


# Joining and initial weights


@BOTH
def test_first_worker_sends_weights_and_the_others_wait(layout: Layout) -> None:
    desk = Desk(layout)
    first, second = Hand(desk, "a"), Hand(desk, "b")
    assert first.hello().init == "send"
    assert second.hello().init == "wait"
    first.initialise(0.5)
    [welcome] = second.heard(Welcome)
    assert welcome.init == "have"
    assert center(desk) == {0.5}
    third = Hand(desk, "c")
    assert third.hello().init == "have"
    assert third.anchor().reply.version == desk.core.version == (1, 0)


@pytest.mark.parametrize("how", ["silent", "leaves", "breaks the rules"])
def test_next_in_order_is_asked_when_the_first_fails(how: str) -> None:
    desk = Desk(LARGE, init_timeout_s=5, lease_s=60)
    hands = [Hand(desk, name) for name in "abc"]
    for hand in hands:
        hand.hello()
    pieces = hands[0].pieces(0, FILL, kind="init", codec="fp32")
    hands[0].send(pieces[0])
    hands[0].send(pieces[1])
    match how:
        case "silent":
            desk.wait(4.9)
            assert not hands[1].heard(Welcome)
            desk.wait(0.2)
        case "leaves":
            hands[0].bye()
        case "breaks the rules":
            hands[0].send(pieces[1])
    assert [w.init for w in hands[1].heard(Welcome)][-1] == "send"
    assert not [w for w in hands[2].heard(Welcome) if w.init == "send"]
    hands[1].initialise(2.0)
    assert center(desk) == {2.0}


def test_each_chunk_renews_the_time_of_the_one_who_sends_weights() -> None:
    desk = Desk(LARGE, init_timeout_s=5, lease_s=60)
    hand, other = Hand(desk, "a"), Hand(desk, "b")
    hand.hello()
    other.hello()
    begin, *rest = hand.pieces(0, FILL, kind="init", codec="fp32")
    hand.send(begin)
    for message in rest:
        desk.wait(4.0)
        hand.send(message)
    assert center(desk) == {FILL}


def test_slow_weights_of_the_only_worker_are_taken_in_the_end() -> None:
    """Nobody else could supply them: a pause in the middle must not leave both sides waiting for ever."""
    desk = Desk(LARGE, init_timeout_s=5, lease_s=60)
    hand = Hand(desk, "a")
    hand.hello()
    first, *rest = hand.pieces(0, FILL, kind="init", codec="fp32")
    hand.send(first)
    hand.heard()
    desk.wait(6.0)
    assert [w.init for w in hand.heard(Welcome)] == ["wait", "send"], "it is told to start again"
    for message in rest:
        hand.send(message)
    hand.initialise(2.0)
    assert center(desk) == {2.0}


def test_late_one_is_told_that_it_need_not_send_any_more() -> None:
    """Otherwise its weights are refused as an offence when they come."""
    desk = Desk(init_timeout_s=5, lease_s=60)
    late, other = Hand(desk, "a"), Hand(desk, "b")
    late.hello()
    other.hello()
    desk.wait(5.1)
    assert [w.init for w in other.heard(Welcome)][-1] == "send"
    assert [w.init for w in late.heard(Welcome)][-1:] == ["wait"]


@BOTH
@pytest.mark.parametrize("who", ["stranger", "member", "same worker"])
def test_nobody_overwrites_an_initialised_center(layout: Layout, who: str) -> None:
    desk = Desk(layout)
    owner = desk.join("a")
    owner.push(1, FILL)
    hand = {"stranger": lambda: Hand(desk, "x"), "member": lambda: desk.join("b"), "same worker": lambda: owner}[who]()
    if who == "stranger":
        hand.hello()
    before = desk.state()
    for message in hand.pieces(0, 7.0, kind="init", codec="fp32"):
        hand.send(message)
    assert desk.state() == before
    assert center(desk) == {FILL}


def test_weights_sent_twice_are_loaded_once() -> None:
    """A second copy that comes while the first is loaded changes nothing, whatever it holds."""
    desk = Desk(by_itself=False)
    hand = Hand(desk, "a")
    hand.hello()
    [push] = hand.pieces(0, 1.0, kind="init", codec="fp32")
    [again] = hand.pieces(0, 2.0, kind="init", codec="fp32")
    hand.send(push)
    hand.send(again)
    desk.finish()
    assert center(desk) == {1.0}
    hand.heard()
    hand.send(Pull(hand.session, hand.connection, "anchor", "", NOWHERE, 0))
    desk.finish()
    [offer] = hand.heard(Offer)
    assert np.frombuffer(offer.payload, np.float32)[0] == 1.0


def test_one_who_waits_may_come_back_on_a_fresh_connection() -> None:
    """A broken link before there are weights is no lost server."""
    desk = Desk()
    first, second = Hand(desk, "a"), Hand(desk, "b")
    first.hello()
    second.hello()
    again = second.redial()
    assert isinstance(again.hello(), Welcome)
    assert again.session == second.session, "the same worker, not one more"
    assert len(desk.core.members) == 2
    first.initialise()
    assert [w.init for w in again.heard(Welcome)][-1] == "have"


def test_server_that_lost_its_state_is_not_refilled_by_accident() -> None:
    desk = Desk()
    answer = Hand(desk, "a").hello(resume=Resume("from another life", 5, 5, 0))
    assert isinstance(answer, Fault)
    assert answer.code == "empty_server"
    assert Hand(Desk(adopt=True), "a").hello(resume=Resume("from another life", 5, 5, 0)).init == "send"


# Refused at the door


def test_another_model_is_refused_with_the_tensor_that_differs() -> None:
    desk = Desk()
    desk.join("a")
    other = Layout((Tensor("w", (2, 4), "float32", "parameter"), SMALL.tensors[1]))
    before = desk.state()
    answer = Hand(desk, "b").hello(layout=other)
    assert answer.code == "layout_mismatch"
    assert "'w'" in answer.sentence
    assert "[2, 4]" in answer.sentence
    assert "[2, 3]" in answer.sentence
    assert answer.fix
    assert desk.state() == before


def test_a_refusal_can_be_read_whatever_the_names_are() -> None:
    """Names of tensors and workers are a stranger's: long ones, and ones that no encoder takes."""
    desk = Desk()
    desk.join("a")
    for name in ("x" * 1000, "\udcff", "ü" * 800):
        assert Hand(desk, "b").hello(layout=Layout((Tensor(name, (2, 3), "float32", "parameter"),))).code


def test_two_workers_with_the_longest_name_are_both_welcomed() -> None:
    desk = Desk()
    for _ in range(2):
        assert isinstance(Hand(desk, "n" * 1024).hello(), (Welcome, Fault))


def test_unknown_codec_is_refused() -> None:
    desk = Desk(codec="int8")
    answer = Hand(desk).hello(codecs=("fp32",))
    assert answer.code == "unknown_codec"
    assert "int8" in answer.sentence


def test_a_worker_has_to_know_the_codec_by_its_bare_name_and_feedback_where_it_is_used() -> None:
    assert Hand(Desk(codec="topk:0.05")).hello(codecs=("fp32", "topk")).code == "unknown_codec"
    assert Hand(Desk(codec="auto")).hello(codecs=codecs.names()).code == "unknown_codec"
    for codec, known in (
        ("topk:0.05", ("fp32", "ef", "topk")),
        ("plain:int4:32", ("fp32", "int4")),
        ("auto:bf16", ("auto", "fp32", "bf16")),
    ):
        welcome = Hand(Desk(codec=codec, seed=7)).hello(codecs=known)
        assert welcome.settings["codec"] == codec
        assert welcome.settings["seed"] == 7


@BOTH
def test_where_workers_choose_each_update_comes_in_a_codec_of_its_own(layout: Layout) -> None:
    """What lies in a slot after a longer update does no harm; what is not allowed is refused; memory is as for fp32."""
    desk = Desk(layout, codec="auto")
    hand = desk.join()
    allowed = codecs.choices("auto")
    for number, codec in enumerate((*allowed, *reversed(allowed)), 1):
        assert hand.push(number, 0.5, codec=codec).outcome == "applied"
    assert desk.core.shard is not None
    np.testing.assert_allclose(desk.core.shard.center[: layout.parameters], 3.0, rtol=1e-6)
    assert desk.core.sessions[hand.session].counters.bytes_up == sum(
        chunks.plan(layout, codec).bytes for codec in ("fp32", *allowed, *allowed)
    )
    assert desk.core.state.model is not None
    [slot] = [desk.core.state.model.slots.take()]
    assert slot is not None
    assert slot.update.size == chunks.plan(layout, "fp32").bytes
    desk.core.state.model.slots.give(slot)
    refused = hand.push(7, codec="int4")
    assert (refused.outcome, refused.code) == ("rejected", "unknown_codec")
    assert "agreed is 'fp32' or 'bf16' or 'int8'" in refused.sentence
    with_choice, without = (memory.plan(ServerSettings(codec=codec), layout) for codec in ("auto", "fp32"))
    assert with_choice == without


def test_inner_optimizer_that_the_rule_does_not_take_is_refused() -> None:
    desk = Desk(rule="gem")
    answer = Hand(desk).hello(optimizer=Optimizer("Adam", 1e-3, 0.0, 1, False, 0.0))
    assert answer.code == "optimizer"
    assert "Adam" in answer.sentence
    assert isinstance(Hand(desk).hello(), Welcome)


def test_another_protocol_is_refused() -> None:
    desk = Desk()
    hand = Hand(desk)
    hand.raw([b"\x81\xa8protocol\x63"])
    [fault] = hand.heard(Fault)
    assert fault.code == "protocol_version"


def test_number_of_sessions_is_bounded_also_for_those_who_come_back() -> None:
    desk = Desk(max_sessions=2, lease_s=5)
    early = desk.join("a")
    desk.wait(6)
    for name in "bc":
        desk.join(name)
    assert Hand(desk, "d").hello().code == "full"
    again = early.redial()
    assert again.hello(resume=Resume(early.session, 0, 0, 0)).code == "full"
    assert sum(session.live for session in desk.core.sessions.values()) == 2


def test_memory_is_bounded_and_whoever_is_counted_may_come_back() -> None:
    desk = Desk(LARGE, rule="gem", pool_mib=12, memory_limit_mib=25)
    hands = []
    for name in "abcdef":
        hand = Hand(desk, name)
        answer = hand.hello()
        if isinstance(answer, Fault):
            assert answer.code == "full"
            break
        hands.append(hand)
        if answer.init == "send":
            hand.initialise()
        hand.anchor()
    assert 1 <= len(hands) < 6
    again = hands[-1].redial()
    assert isinstance(again.hello(resume=Resume(hands[-1].session, 0, 0, 0)), Welcome)


def test_model_beyond_the_limit_or_the_pool_is_refused() -> None:
    assert Hand(Desk(LARGE, max_elements=1000)).hello().code == "limit"
    assert Hand(Desk(LARGE, pool_mib=1)).hello().code == "full"


def test_empty_server_forgets_a_model_that_nobody_stands_for() -> None:
    desk = Desk()
    hand = Hand(desk)
    hand.hello()
    hand.bye()
    assert isinstance(Hand(desk).hello(layout=LARGE), Welcome)


# Exactly once


@BOTH
def test_repeats_of_every_message_apply_once_on_the_same_connection(layout: Layout) -> None:
    """What is single comes three times; a chunk that does breaks the transfer, see `test_a_refusal_changes_nothing`."""
    desk = Desk(layout)
    hand = desk.join()
    for number in (1, 2, 3):
        hand.heard()
        for message in hand.pieces(number):
            for _ in range(1 if isinstance(message, Chunk) else 3):
                hand.send(message)
        [ack] = hand.heard(Ack)
        assert (ack.number, ack.outcome) == (number, "applied")
        hand.more(ack.reply.id)
    assert desk.core.version == (1, 3)
    assert center(desk) == {3.0}


@BOTH
@pytest.mark.parametrize("delivered", range(6))
def test_cut_anywhere_and_repeated_on_a_new_connection_applies_once(layout: Layout, delivered: int) -> None:
    desk = Desk(layout)
    hand = desk.join()
    for message in hand.pieces(1)[:delivered]:
        hand.send(message)
    again = hand.resume(1)
    assert again.welcome.resumed == "live"
    answer = again.push(1)
    assert answer.outcome == "applied"
    assert answer.reply is not None, "whose reply was lost is given the center"
    assert desk.core.version == (1, 1)
    assert center(desk) == {1.0}
    later = again.resume(1).push(1)
    assert (later.outcome, later.version, later.number) == (answer.outcome, answer.version, 1)
    assert desk.core.version == (1, 1)


@BOTH
def test_repeat_while_the_first_is_applied_gets_the_answer_of_the_first(layout: Layout) -> None:
    desk = Desk(layout)
    hand = desk.join()
    desk.by_itself = False
    for message in hand.pieces(1):
        hand.send(message)
    assert len(desk.jobs) == 1
    again = hand.resume(1)
    assert again.welcome.last_decided == 0
    for message in again.pieces(1):
        again.send(message)
    desk.finish()
    assert desk.core.version == (1, 1)
    [ack] = again.heard(Ack)
    assert (ack.number, ack.outcome) == (1, "applied")


def test_push_that_its_worker_withdrew_gives_way_to_the_next() -> None:
    desk = Desk(LARGE)
    hand = desk.join()
    begun, *_ = hand.pieces(1)
    hand.send(begun)
    assert desk.core.shard is not None
    hand.heard()
    ack = hand.push(2)
    assert (ack.number, ack.outcome) == (2, "applied")
    assert desk.core.version.version == 1


def test_rejected_number_gets_the_original_answer_and_is_no_new_strike() -> None:
    desk = Desk()
    hand = desk.join()
    first = hand.push(1, np.nan)
    for _ in range(5):
        hand = hand.resume(1)
        again = hand.push(1, 1.0)
        assert (again.outcome, again.code, again.sentence) == ("rejected", first.code, first.sentence)
    assert hand.push(2).outcome == "applied"
    assert center(desk) == {1.0}


def test_messages_of_an_old_connection_are_drained() -> None:
    desk = Desk(LARGE)
    old = desk.join()
    pieces = old.pieces(1)
    new = old.resume(0)
    before, drained = desk.state(), desk.core.drained
    here = (old.session, old.connection)
    for message in [*pieces, Beat(*here, 5), Pull(*here, "anchor", "", NOWHERE, 0)]:
        old.send(message)
    assert desk.state() == before
    assert desk.core.drained == drained + len(pieces) + 2
    assert not old.heard(Grant)
    assert new.push(1).outcome == "applied"


def test_tail_of_an_old_transfer_does_not_reach_a_new_one() -> None:
    desk = Desk(LARGE)
    old = desk.join()
    stale, good = old.pieces(1, 9.0), []
    for message in stale[:2]:
        old.send(message)
    new = old.resume(1)
    good = new.pieces(1, 1.0)
    for index, message in enumerate(good):
        if index < len(stale):
            old.send(stale[index])
        new.send(message)
    assert center(desk) == {1.0}


@pytest.mark.parametrize("wrong", ["token", "connection", "peer", "ended"])
def test_whoever_is_not_the_session_is_told_to_say_hello(wrong: str) -> None:
    desk = Desk()
    hand = desk.join()
    message = hand.pieces(1)[0]
    assert isinstance(message, Push)
    speaker = hand
    match wrong:
        case "token":
            hand.session = "guessed"
        case "connection":
            hand.connection += 1
        case "peer":
            speaker = Hand(desk, "thief")
            speaker.session, speaker.connection = hand.session, hand.connection
        case "ended":
            hand.bye()
            hand.heard()
    before = desk.state()
    speaker.heard()
    speaker.send(speaker.pieces(1)[0])
    [fault] = speaker.heard(Fault)
    assert fault.code == "stale"
    assert desk.state() == before


def test_session_does_not_end_under_a_committed_push() -> None:
    desk = Desk(lease_s=2)
    hand = desk.join()
    desk.by_itself = False
    hand.push(1)
    hand.bye()
    desk.wait(1.0)
    desk.finish()
    assert desk.core.version == (1, 1)
    desk.wait(3.0)
    assert not desk.core.members
    again = hand.resume(1)
    assert (again.welcome.resumed, again.welcome.last_decided, again.welcome.outcome) == ("record", 1, "applied")


def test_lease_that_ends_under_a_committed_push_does_not_make_the_server_spin() -> None:
    desk = Desk(lease_s=2)
    hand = desk.join()
    desk.by_itself = False
    hand.push(1)
    desk.wait(5.0)
    desk.finish()
    desk.wait(1.0)
    assert desk.core.version == (1, 1)
    assert not desk.core.members


# Refusals


def broken(desk: Desk, hand: Hand, how: str) -> str:
    """Send push 1 in a way that is not allowed; the code it must be refused with."""
    pieces = hand.pieces(1)
    begin = pieces[0].begin if isinstance(pieces[0], Push) else pieces[0]
    here = (hand.session, hand.connection)
    small = isinstance(pieces[0], Push)
    changes: dict[str, tuple[str, Any]] = {
        "codec": ("unknown_codec", {"codec": "int8"}),
        "nonsense codec": ("unknown_codec", {"codec": "nonsense"}),
        "length": ("bad_length", {"bytes": begin.bytes + 8}),
        "future": ("base_version", {"base": Version(1, 5)}),
        "next epoch": ("base_version", {"base": Version(2, 0)}),
    }
    if how in changes:
        code, changed = changes[how]
        begin = hand.begun(1, **changed)
        hand.send(Push(begin, pieces[0].scalars, pieces[0].payload) if small else begin)
        return code
    match how:
        case "nan":
            for message in hand.pieces(1, np.nan):
                hand.send(message)
            return "non_finite"
        case "one infinity at the end":
            values = np.ones(desk.layout.elements, np.float32)
            values[-1] = np.inf
            for message in hand.pieces(1, values):
                hand.send(message)
            return "non_finite"
        case "short chunk":
            if small:
                hand.send(Push(pieces[0].begin, pieces[0].scalars, pieces[0].payload[:-4]))
            else:
                hand.send(begin)
                hand.send(Chunk(*here, 1, 0, pieces[1].payload[:-4]))
            return "bad_length"
        case "empty":
            if small:
                hand.send(Push(pieces[0].begin, pieces[0].scalars, b""))
            else:
                hand.send(begin)
                hand.send(Chunk(*here, 1, 0, b""))
            return "bad_length"
        case "truncated":
            hand.send(begin)
            for message in pieces[1:-2]:
                hand.send(message)
            hand.send(Commit(*here, 1, pieces[-1].scalars if not small else pieces[0].scalars))
            return "truncated"
        case "twice":
            hand.send(begin)
            chunk = Chunk(*here, 1, 0, pieces[0].payload) if small else pieces[1]
            hand.send(chunk)
            hand.send(chunk)
            return "bad_chunk"
        case "beyond the end":
            hand.send(begin)
            hand.send(Chunk(*here, 1, 5, b"x"))
            return "bad_chunk"
        case "beyond the window":
            hand.send(begin)
            hand.send(Chunk(*here, 1, 5000, b"x"))
            return "limit"
    raise AssertionError(how)


HOW = ["codec", "nonsense codec", "length", "future", "next epoch", "nan", "one infinity at the end", "short chunk"]
HOW += ["empty", "truncated", "twice", "beyond the end", "beyond the window"]


@BOTH
@pytest.mark.parametrize("how", HOW)
def test_a_refusal_changes_nothing_and_says_why(layout: Layout, how: str) -> None:
    desk = Desk(layout)
    hand, other = desk.join("a"), desk.join("b")
    before = desk.state()
    code = broken(desk, hand, how)
    [ack] = hand.heard(Ack)
    assert (ack.number, ack.outcome, ack.code, ack.reply) == (1, "rejected", code, None)
    assert ack.sentence
    assert desk.state() == before
    assert desk.core.sessions[hand.session].counters.rejected == 1
    for message in hand.pieces(1):  # the rest, and all of it again: drained, and answered once
        hand.send(message)
    assert not hand.heard((Ack, Grant))
    assert desk.state() == before
    assert other.push(1).outcome == "applied"
    assert hand.push(2).outcome == "applied"
    assert center(desk) == {2.0}


def test_initial_weights_that_are_not_finite_are_refused() -> None:
    desk = Desk()
    hand = Hand(desk)
    hand.hello()
    for message in hand.pieces(0, np.nan, kind="init", codec="fp32"):
        hand.send(message)
    [fault] = hand.heard(Fault)
    assert fault.code == "non_finite"
    assert not desk.core.state.initialised


def test_three_new_rejections_in_a_minute_quarantine_and_each_time_for_longer() -> None:
    desk = Desk(lease_s=10_000, checkpoint_interval_s=10)
    hand, other = desk.join("a"), desk.join("b")
    number = 0
    for expected_s in (60.0, 120.0, 240.0):
        for _ in range(3):
            number += 1
            assert hand.push(number, np.nan).outcome == "rejected"
        number += 1
        before = desk.state()
        hand.heard()
        hand.push(number)
        desk.wait(expected_s - 1.0)
        hand.send(hand.pieces(number)[0])
        [grant] = hand.heard(Grant)
        assert (grant.decision, grant.code) == ("refuse", "quarantined")
        assert desk.state() == before
        assert other.push(number).outcome == "applied"
        desk.wait(1.1)
        assert hand.push(number).outcome == "applied", "the number was not decided by the refusal"


def test_rejections_that_are_far_apart_are_no_quarantine() -> None:
    desk = Desk(lease_s=10_000)
    hand = desk.join()
    for number in range(1, 8):
        assert hand.push(number, np.nan).code == "non_finite"
        desk.wait(31.0)
    assert hand.push(8).outcome == "applied"


def test_malformed_messages_in_a_row_end_the_session() -> None:
    desk = Desk()
    hand = desk.join()
    for _ in range(5):
        for _ in range(2):
            hand.raw([b"\xc1"])
        hand.beat()
    assert len(desk.core.members) == 1
    for _ in range(3):
        hand.raw([b"\xc1"])
    assert not desk.core.members


def test_message_that_no_server_takes_is_answered() -> None:
    desk = Desk()
    hand = desk.join()
    hand.send(Answer())
    [fault] = hand.heard(Fault)
    assert fault.code == "unexpected"


# Slots


def test_slots_are_given_in_order_of_arrival_and_none_is_lost() -> None:
    """Whoever holds one vanishes in every possible way; whoever waits is served in order."""
    desk = Desk(LARGE, pool_mib=12, lease_s=20)
    hands = [desk.join(name) for name in "abcdefg"]
    slots = desk.core.state.model
    assert slots is not None
    limit = slots.slots.limit
    assert 1 <= limit < 3
    for hand in hands:
        hand.heard()
        hand.send(hand.pieces(1)[0])
    assert [[g.decision for g in hand.heard(Grant)] for hand in hands] == [["go"]] * limit + [["wait"]] * (7 - limit)
    served = limit
    for index, hand in enumerate(hands):
        pieces = hand.pieces(1)
        match index:
            case 0:
                hand.bye()
            case 1:
                hand.send(pieces[1])
                for _ in range(3):
                    desk.wait(7.0)
                    for other in hands[2:]:
                        other.beat()
            case 2:
                hand.send(pieces[1])
                hand.resume(1)
            case 3:
                hand.send(pieces[1])
                hand.send(pieces[1])
            case _:
                for message in pieces[1:]:
                    hand.send(message)
                [ack] = hand.heard(Ack)
                assert ack.outcome == "applied"
                hand.more(ack.reply.id)
        if served < len(hands):
            assert [g.decision for g in hands[served].heard(Grant)][-1] == "go"
        for later in hands[served + 1 :]:
            assert {g.decision for g in later.heard(Grant)} <= {"wait"}, "each beat is told that it has its place"
        served += 1
    assert slots.slots.taken == 0
    assert center(desk) == {3.0}


def test_whole_pushes_wait_for_a_slot_and_keep_their_order() -> None:
    big = Layout((Tensor("w", (250, 1000), "float32", "parameter"),))
    desk = Desk(big, pool_mib=4)
    hands = [desk.join(name) for name in "abcd"]
    desk.by_itself = False
    for hand in hands:
        hand.send(hand.pieces(1)[0])
    order = []
    while desk.jobs:
        desk.work()
        order += [hand.name for hand in hands for ack in hand.heard(Ack) if ack.outcome == "applied"]
        hands[0].heard()
        while desk.holds:
            desk.release()
    assert sorted(order) == list("abcd")
    assert desk.core.version == (1, 4)
    assert desk.state()[2] == 0


def test_slot_stays_taken_while_the_transport_reads_the_reply() -> None:
    desk = Desk()
    hand = desk.join()
    desk.by_itself = False
    hand.send(hand.pieces(1)[0])
    desk.work()
    [hold] = desk.holds
    frames_before = desk.state()
    hand.resume(1)
    assert desk.state()[2] == frames_before[2] == 1, "also where the receiver is gone meanwhile"
    desk.release()
    assert desk.state()[2] == 0
    assert hold


def test_session_that_never_takes_its_replies_holds_one_slot() -> None:
    """Or else one worker could use up the pool that all share."""
    desk = Desk(LARGE, pool_mib=64)
    greedy, other = desk.join("greedy"), desk.join("other")
    extra = [desk.join(f"more{i}") for i in range(6)]
    assert extra
    for number in range(1, 5):
        for message in greedy.pieces(number):
            greedy.send(message)
    assert desk.state()[2] <= 1
    assert other.push(1).outcome == "applied"


# Pulls


def test_pull_waits_for_one_job_at_most() -> None:
    desk = Desk()
    hands = [desk.join(name) for name in "abcde"]
    hands[0].push(1)
    desk.by_itself = False
    for hand in hands[:4]:
        hand.heard()
        hand.send(hand.pieces(2)[0])
    assert len(desk.jobs) == 1
    hands[4].heard()
    hands[4].send(Pull(hands[4].session, hands[4].connection, "evaluate", "", NOWHERE, 0))
    desk.work()
    desk.work()
    [offer] = hands[4].heard(Offer)
    assert offer.reply.version == (1, 2)
    desk.finish()
    assert desk.core.version == (1, 5)


def test_pulls_of_one_version_share_one_job() -> None:
    desk = Desk()
    hands = [desk.join(name) for name in "abcd"]
    hands[0].push(1)
    desk.by_itself = False
    for hand in hands:
        hand.heard()
        hand.send(Pull(hand.session, hand.connection, "evaluate", "", NOWHERE, 0))
    jobs = 0
    while desk.jobs or desk.holds:
        jobs += bool(desk.jobs)
        desk.work() if desk.jobs else desk.release()
    assert jobs == 1
    assert all(len(hand.heard(Offer)) == 1 for hand in hands)


def test_flood_of_pulls_does_not_keep_others_from_pushing() -> None:
    desk = Desk()
    flood, other = desk.join("flood"), desk.join("other")
    desk.by_itself = False
    for _ in range(200):
        flood.send(Pull(flood.session, flood.connection, "anchor", "", NOWHERE, 0))
    other.heard()
    other.send(other.pieces(1)[0])
    for _ in range(10):
        if desk.jobs:
            desk.work()
        while desk.holds:
            desk.release()
    assert [ack.outcome for ack in other.heard(Ack)] == ["applied"]


def test_readers_that_stop_do_not_keep_others_from_joining_for_ever() -> None:
    """They beat, but take no chunk of what they asked for."""
    desk = Desk(LARGE, lease_s=10)
    first = desk.join("a")
    stopped = []
    for number in (1, 2):
        hand = Hand(desk, f"stopped{number}")
        hand.hello()
        hand.send(Pull(hand.session, hand.connection, "evaluate", "", NOWHERE, 0))
        stopped.append(hand)
        first.push(number)
    late = Hand(desk, "late")
    late.hello()
    late.send(Pull(late.session, late.connection, "anchor", "", NOWHERE, 0))
    for _ in range(10):
        desk.wait(4.0)
        for hand in [*stopped, late, first]:
            hand.beat()
    assert late.heard(Offer), "two who do not read hold both snapshots"


@pytest.mark.parametrize("how", ["leaves", "comes back"])
def test_reader_that_goes_while_its_pull_is_encoded_leaves_nothing_behind(how: str) -> None:
    desk = Desk(LARGE)
    desk.join("a")
    desk.by_itself = False
    hand = Hand(desk, "b")
    hand.hello()
    hand.send(Pull(hand.session, hand.connection, "anchor", "", NOWHERE, 0))
    if how == "leaves":
        hand.bye()
    else:
        hand.bye()
        hand = hand.resume(0)
    desk.finish()
    assert len(desk.core.downlink) == 0
    session = desk.core.sessions[hand.session]
    assert session.arrays is not None or not session.anchored, "who keeps nothing is not anchored"
    hand.heard()
    hand.send(hand.pieces(1)[0])
    desk.finish()
    assert desk.core.version == (1, 0), "a push from nowhere"
    assert hand.heard((Grant, Fault))


def test_chunks_of_a_reply_are_sent_as_far_as_the_window_and_in_order() -> None:
    desk = Desk(LARGE)
    hand = desk.join()
    hand.heard()
    hand.send(Pull(hand.session, hand.connection, "evaluate", "", NOWHERE, 0))
    [offer] = hand.heard()
    for until, expected in ((1, [0]), (1, []), (3, [1, 2]), (9, []), (0, [])):
        hand.more(offer.reply.id, until)
        assert [chunk.index for chunk in hand.heard(Chunk)] == expected


def test_nobody_else_can_fetch_a_reply() -> None:
    desk = Desk(LARGE)
    hand, thief = desk.join("a"), desk.join("b")
    hand.heard()
    hand.send(Pull(hand.session, hand.connection, "evaluate", "", NOWHERE, 0))
    [offer] = hand.heard(Offer)
    thief.heard()
    thief.more(offer.reply.id)
    assert not thief.heard()
    assert len(desk.core.downlink) == 1


def test_push_without_a_center_to_start_from_is_refused() -> None:
    desk = Desk()
    desk.join("a")
    hand = Hand(desk, "b")
    hand.hello()
    before = desk.state()
    hand.send(hand.pieces(1)[0])
    [grant] = hand.heard(Grant)
    assert grant.decision == "refuse"
    assert desk.state() == before
    hand.anchor()
    assert hand.push(1).outcome == "applied"


def test_observer_looks_and_does_no_more() -> None:
    desk = Desk(rule="gem")
    desk.join("a").push(1, 0.5)
    observer = Hand(desk, "o")
    assert observer.hello(role="observer", elements=0, payload=b"", optimizer=None).init == "have"
    before = desk.state()
    assert observer.pull("anchor").reply.version == (1, 1)
    observer.send(observer.pieces(1)[0])
    assert [grant.decision for grant in observer.heard(Grant)] == ["refuse"]
    assert desk.state() == before
    assert len(desk.core.members) == 1
    assert desk.core.sessions[observer.session].arrays is None


# Time


def test_silence_ends_the_session_and_any_message_renews_it() -> None:
    desk = Desk(lease_s=10)
    silent, beating = desk.join("a"), desk.join("b")
    for _ in range(5):
        desk.wait(4.0)
        beating.beat()
    assert [session.worker for session in desk.core.members] == ["b"]
    assert beating.push(1).outcome == "applied"
    assert silent.resume(0).welcome.resumed == "record"


def test_standstill_of_the_server_is_forgiven_once() -> None:
    desk = Desk(lease_s=10)
    hand = desk.join()
    desk.now += 100.0
    desk.event(Tick())
    assert desk.core.members, "it was the server that stood still"
    desk.wait(9.9)
    assert desk.core.members
    desk.wait(0.2)
    assert not desk.core.members
    assert hand.session in desk.core.sessions


def test_record_is_forgotten_in_the_end() -> None:
    desk = Desk(lease_s=10, remember_session_h=1)
    hand = desk.join()
    desk.wait(3500)
    assert hand.resume(0).welcome.resumed == "record"
    desk.wait(3700)
    assert hand.session not in desk.core.sessions
    again = hand.redial()
    again.hello(resume=Resume(hand.session, 3, 3, 0))
    assert (again.welcome.resumed, again.session != hand.session) == ("new", True)


@pytest.mark.parametrize("when", ["fresh", "joined", "initialised", "pushing", "stopping", "finished"])
def test_a_tick_at_the_deadline_moves_the_deadline(when: str) -> None:
    desk = Desk(by_itself=False, lease_s=3, budget_s=5, init_timeout_s=1, **SAVING)
    hand = Hand(desk)
    steps: list[Callable[[], Any]] = [hand.hello, hand.initialise, lambda: hand.send(hand.pieces(1)[0])]
    for step in steps[: ["fresh", "joined", "initialised", "pushing", "stopping", "finished"].index(when)]:
        step()
        if when != "pushing":
            desk.finish()
    if when == "stopping":
        desk.event(Stop("test"))
    desk.wait(30.0)


# Ends


@BOTH
def test_budget_is_exact(layout: Layout) -> None:
    """Never one more, however many are on their way when it is used up; and everybody is told."""
    desk = Desk(layout, budget_updates=5)
    hands = [desk.join(name) for name in "abcd"]
    desk.by_itself = False
    for number in (1, 2, 3):
        for hand in hands:
            hand.heard()
            for message in hand.pieces(number):
                hand.send(message)
        desk.finish()
        for hand in hands:
            for ack in hand.heard(Ack):
                hand.more(ack.reply.id if ack.reply else 0)
        desk.finish()
    assert desk.core.version == (1, 5)
    assert center(desk) == {5.0}
    assert desk.core.finished
    for hand in hands:
        before = desk.state()
        hand.heard()
        for message in hand.pieces(4):
            hand.send(message)
        [ack] = hand.heard(Ack)
        assert (ack.outcome, ack.code, ack.finished) == ("rejected", "finished", True)
        assert desk.state() == before
    assert Hand(desk, "late").hello().settings["finished"] is True


def test_budget_of_time_ends_by_itself_and_says_so() -> None:
    desk = Desk(budget_s=60, lease_s=1000)
    hand = desk.join()
    desk.wait(59.0)
    assert not desk.core.finished
    hand.heard()
    desk.wait(2.0)
    assert desk.core.finished
    assert [bye.reason for bye in hand.heard(Bye)] == ["finished"]


def test_stop_applies_what_is_committed_saves_once_and_exits() -> None:
    desk = Desk(LARGE, **SAVING)
    hands = [desk.join(name) for name in "abc"]
    desk.by_itself = False
    for hand in hands:
        hand.heard()
    for hand in hands[:2]:
        for message in hand.pieces(1):
            hand.send(message)
    hands[2].send(hands[2].pieces(1)[0])
    desk.event(Stop("test"))
    assert all(any(bye.reason == "draining" for bye in hand.heard(Bye)) for hand in hands)
    assert not desk.exited
    assert Hand(desk, "late").hello().code == "draining"
    desk.finish()
    assert desk.core.version == (1, 2), "what is committed is applied"
    assert center(desk) == {2.0}
    assert not desk.exited
    [save] = desk.saves
    assert save.version == (1, 2)
    desk.saved()
    assert desk.exited
    assert len(desk.saves) == 1
    assert desk.core.state.durable == (1, 2)


def test_stop_with_nothing_to_do_exits_at_once() -> None:
    desk = Desk(**SAVING)
    desk.event(Stop("test"))
    assert desk.exited


def test_stop_during_a_save_that_fails_still_applies_what_is_committed() -> None:
    desk = Desk(**SAVING)
    hand = desk.join()
    hand.push(1)
    desk.wait(11.0)
    [_] = desk.saves
    desk.by_itself = False
    hand.push(2)
    desk.event(Stop("test"))
    desk.event(SaveFailed("The disk is full."))
    assert not desk.exited
    desk.finish()
    assert desk.core.version == (1, 2)


def test_failed_save_keeps_training_and_durable_where_they_are() -> None:
    desk = Desk(max_unsaved_age_s=100, lease_s=1000, **SAVING)
    hand = desk.join()
    durable = desk.core.state.durable
    assert hand.push(1).durable == durable == (1, 0)
    for number in range(2, 6):
        desk.wait(11.0)
        desk.event(SaveFailed("The disk is full."))
        ack = hand.push(number)
        assert (ack.outcome, ack.durable) == ("applied", durable)
    desk.wait(101.0)
    hand.heard()
    hand.send(hand.pieces(6)[0])
    assert [(grant.decision, grant.code) for grant in hand.heard(Grant)] == [("refuse", "degraded")]
    desk.saved()
    assert hand.push(6).outcome == "applied"
    assert desk.core.state.durable > durable


def test_initial_weights_are_saved_at_once_so_that_a_crash_leaves_a_server_that_knows_its_workers() -> None:
    desk = Desk(**SAVING)
    hand = Hand(desk, "a")
    hand.hello()
    hand.initialise(5.0)
    [save] = desk.saves
    recovered = desk.saved()
    assert save.version == desk.core.state.durable == (1, 0)
    hand.anchor()
    life = Desk(epoch=2, recovered=recovered, **SAVING)
    again = hand.resume(0, 0, life)
    assert again.welcome.init == "have"
    assert again.welcome.resumed == "record"
    assert center(life) == {5.0}


def test_counts_of_a_worker_survive_a_crash() -> None:
    desk = Desk(lease_s=1000, **SAVING)
    hand = desk.join("a")
    hand.push(1)
    assert hand.push(2, float("nan")).outcome == "rejected"
    desk.wait(11.0)
    life = Desk(epoch=2, recovered=desk.saved(), **SAVING)
    before, after = (core.core.sessions[hand.session].counters for core in (desk, life))
    names = ("updates", "rejected", "samples", "steps", "bytes_up", "bytes_down")
    assert [getattr(after, name) for name in names] == [getattr(before, name) for name in names]
    assert after.rejected == 1
    assert after.bytes_down > 0


def test_nothing_is_saved_where_there_is_no_directory() -> None:
    desk = Desk()
    desk.join().push(1)
    desk.wait(1000.0)
    desk.event(Stop("test"))
    assert not desk.saves
    assert desk.exited


def test_center_that_ceases_to_be_finite_stops_training_and_is_never_saved() -> None:
    desk = Desk(lease_s=1000, **SAVING)
    hand, other = desk.join("a"), desk.join("b")
    assert hand.push(1, 3e38).outcome == "applied"
    saves = len(desk.saves)
    hand.push(2, 3e38)
    desk.wait(30.0)
    assert len(desk.saves) == saves
    other.heard()
    other.send(other.pieces(1)[0])
    assert [grant.decision for grant in other.heard(Grant)] == ["refuse"]
    other.pull()
    desk.event(Stop("test"))
    assert desk.exited


# After a crash


@BOTH
def test_server_goes_on_from_its_checkpoint(layout: Layout) -> None:
    desk = Desk(layout, rule="gem", lease_s=1000, **SAVING)
    hand, other = desk.join("a"), desk.join("b")
    hand.push(1, 0.5)
    desk.wait(11.0)
    recovered = desk.saved()
    saved = desk.state()[0]
    assert hand.push(2, 0.5).outcome == "applied"
    assert hand.push(3, 0.5).outcome == "applied"

    life = Desk(layout, epoch=2, recovered=recovered, rule="gem", **SAVING)
    assert life.state()[0] == saved
    assert life.core.version == (2, 1) > desk.core.version
    again, late = Hand(life, "a"), Hand(life, "b")
    for new, old in ((again, hand), (late, other)):
        new.instance = old.instance
    again.hello(resume=Resume(hand.session, 3, 3, 0))
    assert (again.welcome.resumed, again.welcome.last_decided) == ("live", 1)
    assert again.welcome.lost == (2, 3)
    assert late.hello(resume=Resume(other.session, 0, 0, 0)).lost == ()
    assert again.push(4, 0.5, base=Version(1, 3)).outcome == "applied", "a lost base counts as the recovered one"
    assert life.core.version == (2, 2)
    assert late.push(1, 0.5, base=Version(1, 0)).outcome == "applied"


def test_repeat_of_an_update_that_survived_the_crash_is_not_applied_again() -> None:
    desk = Desk(lease_s=1000, **SAVING)
    hand = desk.join()
    hand.push(1)
    desk.wait(11.0)
    life = Desk(epoch=2, recovered=desk.saved(), **SAVING)
    again = Hand(life, "w")
    again.instance = hand.instance
    again.hello(resume=Resume(hand.session, 1, 0, 0))
    answer = again.push(1, base=Version(1, 0))
    assert (answer.number, answer.outcome) == (1, "applied")
    assert answer.reply is not None
    assert life.core.version == (2, 1)
    assert center(life) == {1.0}


def test_worker_that_joined_after_the_checkpoint_learns_that_its_updates_are_lost() -> None:
    desk = Desk(lease_s=1000, **SAVING)
    desk.join("a").push(1)
    desk.wait(11.0)
    recovered = desk.saved()
    young = desk.join("young")
    for number in (1, 2):
        assert young.push(number).outcome == "applied"
    life = Desk(epoch=2, recovered=recovered, **SAVING)
    again = Hand(life, "young")
    again.instance = young.instance
    again.hello(resume=Resume(young.session, 2, 2, 0))
    assert again.welcome.resumed == "new"
    assert again.welcome.lost == (1, 2)


# Odd ends


def test_unsendable_peer_frees_its_reply() -> None:
    desk = Desk(LARGE)
    hand = desk.join()
    for message in hand.pieces(1):
        hand.send(message)
    assert desk.state()[2] == 1
    desk.event(Unsendable(hand.peer, "the peer is gone"))
    assert desk.state()[2] == 0
    assert hand.resume(1).push(1).outcome == "applied"
    assert desk.core.version == (1, 1)


def test_status_is_answered_to_anyone() -> None:
    desk = Desk()
    desk.event(Received(b"anyone", wire.encode(Query())))
    peer, answer = desk.sent[-1]
    assert peer == b"anyone"
    assert isinstance(answer, Answer)
    assert answer.payload


def test_window_up_is_kept_open_by_a_half() -> None:
    layout = Layout((Tensor("w", (3000, 1000), "float32", "parameter"),))
    desk = Desk(layout, window_chunks=4)
    hand = desk.join()
    hand.heard()
    begin, *chunks, _ = hand.pieces(1)
    assert isinstance(begin, Begin)
    hand.send(begin)
    [grant] = hand.heard(Grant)
    until = grant.until
    assert until == 4
    for sent, chunk in enumerate(chunks):
        assert sent < until, "the sender is never without a grant"
        hand.send(chunk)
        for more in hand.heard(More):
            assert more.until - (sent + 1) <= 4
            until = more.until


def test_whether_anybody_asks_for_the_deadline_changes_nothing() -> None:
    """The log of a life has its events, and not who asked: lived again, everything happens with the same one. So does
    the end of a session that leaves, whose push is decided between two chunks of another's."""
    lives = []
    for asks in (True, False):
        desk = Desk(LARGE, budget_updates=1)
        hands = [desk.join(name) for name in ("first", "second", "third")]
        desk.by_itself = False
        seen: list[list[str | None]] = []

        def then(desk: Desk = desk, asks: bool = asks, seen: list[list[str | None]] = seen) -> None:
            if asks:
                desk.core.deadline()
            seen.append([None if s.ended is None else s.worker for s in desk.core.sessions.values()])

        begin, chunk, *_ = hands[2].pieces(1)
        for hand in hands[:2]:
            for message in hand.pieces(1):
                hand.send(message)
                then()
        hands[2].send(begin)
        then()
        hands[1].bye()
        then()
        while desk.jobs:
            desk.work()
            then()
        hands[2].send(chunk)
        then()
        lives.append(seen)
    assert lives[0] == lives[1]
    assert lives[0][-1] == [None, "second", None]
