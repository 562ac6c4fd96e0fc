"""Pushes that are held until a round closes: who is answered when and with what, whoever goes or comes back."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.layout import Layout, Tensor
from common.messages import Ack, Bye, Grant, Resume, Version
from common.node import Tick
from paramserver import memory, status
from paramserver.core import Stop
from tests.cluster import LARGE, SMALL, Desk, Hand
from tests.unit.paramserver.test_core import BOTH, center

SAVING = {"directory": Path("unused"), "checkpoint_interval_s": 10.0}


def round_of(*names: str, **settings: Any) -> tuple[Desk, list[Hand]]:
    """A server under local SGD, and members."""
    desk = Desk(**{"rule": "local_sgd", **settings})
    return desk, [desk.join(name) for name in names]


def answers(hand: Hand) -> list[tuple[int, str]]:
    """Number and outcome of each Ack that was heard."""
    acks = hand.heard(Ack)
    for ack in acks:
        if ack.reply is not None and not ack.payload:
            hand.more(ack.reply.id)
    return [(ack.number, ack.outcome) for ack in acks]


def life_after(desk: Desk, **settings: Any) -> Desk:
    """Another life of the server, from the last checkpoint."""
    return Desk(desk.layout, epoch=2, recovered=desk.saved(), **{"rule": "local_sgd", **SAVING, **settings})


# A round


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_all_of_a_round_are_given_the_same_version_and_the_same_bytes(codec: str) -> None:
    desk, hands = round_of("a", "b", "c", reply_codec=codec)
    assert [hand.push(1, fill).outcome for hand, fill in zip(hands[:2], (3.0, 6.0), strict=True)] == ["held", "held"]
    assert desk.core.version == (1, 0), "what is held does not change the center"
    last = hands[2].push(1, 9.0)
    others = [hand.heard(Ack) for hand in hands[:2]]
    assert [len(acks) for acks in others] == [1, 1], "answered once"
    acks = [last, *(ack for [ack] in others)]
    assert {(ack.number, ack.outcome, ack.version, ack.reply.version) for ack in acks} == {
        (1, "applied", Version(1, 1), Version(1, 1))
    }
    assert len({bytes(ack.payload) for ack in acks}) == 1
    assert center(desk) == {6.0}
    assert desk.state()[2] == 0, "held pushes hold no slot"


def test_several_rounds_of_a_large_model_leave_nothing_behind() -> None:
    desk, hands = round_of("a", "b", layout=LARGE, pool_mib=16)
    for number in (1, 2, 3):
        assert hands[0].push(number).outcome == "held"
        assert hands[1].push(number).outcome == "applied"
        assert answers(hands[0]) == [(number, "applied")]
    assert center(desk) == {3.0}
    assert len(desk.core.downlink) == desk.state()[2] == 0


@pytest.mark.parametrize("pushed", [False, True])
@pytest.mark.parametrize("how", ["bye", "lease"])
def test_a_member_that_goes_hangs_nobody_and_what_it_pushed_counts(how: str, pushed: bool) -> None:
    desk, hands = round_of("a", "b", "gone", lease_s=10)
    if pushed:
        assert hands[2].push(1, 9.0).outcome == "held"
    for hand in hands[:2]:
        assert hand.push(1, 3.0).outcome == ("applied" if pushed and hand is hands[1] else "held")
    if not pushed:
        assert center(desk) == {0.0}
    if how == "bye":
        hands[2].bye()
    else:
        for _ in range(4):
            desk.wait(3.0)
            for hand in hands[:2]:
                hand.beat()
    assert center(desk) == {5.0 if pushed else 3.0}
    assert answers(hands[0])[-1] == (1, "applied")
    assert len(desk.core.members) == 2
    assert hands[0].push(2).outcome == "held"
    assert hands[1].push(2).outcome == "applied", "the next round does not wait for it"


def test_gone_after_its_push_while_others_have_not_pushed_counts_when_they_have() -> None:
    desk, (a, b) = round_of("a", "b")
    assert a.push(1, 2.0).outcome == "held"
    a.bye()
    assert center(desk) == {0.0}
    assert b.push(1, 4.0).outcome == "applied"
    assert center(desk) == {3.0}


def test_the_last_one_that_goes_closes_the_round_it_was_held_in() -> None:
    desk, (a, b) = round_of("a", "b")
    a.push(1, 2.0)
    a.bye()
    b.bye()
    assert center(desk) == {2.0}
    assert desk.core.version == (1, 1)


def test_a_bye_with_its_push_still_in_the_order_of_work_is_held_and_counts() -> None:
    desk, (a, b) = round_of("a", "b")
    desk.by_itself = False
    a.send(a.pieces(1, 2.0)[0])
    a.bye()
    desk.finish()
    assert [session.worker for session in desk.core.members] == ["b"]
    desk.by_itself = True
    assert b.push(1, 4.0).outcome == "applied"
    assert center(desk) == {3.0}


def test_who_joins_in_the_middle_is_not_waited_for_and_counts_if_it_pushes() -> None:
    for pushes in (False, True):
        desk, (a, b) = round_of("a", "b")
        a.push(1, 3.0)
        late = desk.join("late")
        if pushes:
            assert late.push(1, 9.0).outcome == "held"
        assert b.push(1, 6.0).outcome == "applied"
        assert center(desk) == {6.0 if pushes else 4.5}
        assert answers(a) == [(1, "applied")]
        assert a.push(2).outcome == "held"
        assert b.push(2).outcome == "held", "in the next round it is waited for"


# Coming back


def test_repeats_of_a_held_number_change_nothing() -> None:
    desk, (a, b) = round_of("a", "b")
    a.push(1, 2.0)
    a.heard()
    for _ in range(3):
        a.send(a.pieces(1, 7.0)[0])
    assert not a.heard(Ack)
    again = a.resume(1)
    assert again.welcome.resumed == "live"
    assert again.push(1, 7.0).outcome == "held"
    again.send(again.pieces(1, 7.0)[0])
    assert not again.heard(Ack), "told once on each connection"
    b.push(1, 4.0)
    assert answers(again) == [(1, "applied")]
    assert not a.heard(Ack)
    assert center(desk) == {3.0}


@BOTH
def test_who_comes_back_after_the_round_has_closed_is_given_its_center(layout: Any) -> None:
    desk, (a, b) = round_of("a", "b", layout=layout)
    a.push(1, 2.0)
    assert b.push(1, 4.0).outcome == "applied"
    again = a.resume(1)
    answer = again.push(1, 7.0)
    assert (answer.outcome, answer.version, answer.reply.version) == ("applied", (1, 1), (1, 1))
    again.send(again.pieces(1, 7.0)[0])
    assert not again.heard(Ack)
    assert center(desk) == {3.0}
    assert b.push(2).outcome == "held"
    assert again.push(2).outcome == "applied", "it is a member all the time"


def test_who_comes_back_while_its_answer_is_encoded_is_answered_once_on_the_new_connection() -> None:
    desk, (a, b) = round_of("a", "b")
    a.push(1, 2.0)
    desk.by_itself = False
    b.send(b.pieces(1, 4.0)[0])
    desk.work()  # the round is closed; the answer of a is being encoded
    assert len(desk.jobs) == 1
    again = a.resume(1)
    again.send(again.pieces(1, 7.0)[0])
    desk.finish()
    assert [(ack.number, ack.outcome, ack.reply.version) for ack in again.heard(Ack)] == [(1, "applied", (1, 1))]
    assert center(desk) == {3.0}


@pytest.mark.parametrize("closed", [False, True])
def test_who_comes_back_after_its_lease_knows_that_its_update_counts(closed: bool) -> None:
    desk, (a, b) = round_of("a", "b", lease_s=10)
    a.push(1, 2.0)
    for _ in range(5):
        desk.wait(3.0)
        b.beat()
    assert [session.worker for session in desk.core.members] == ["b"]
    if closed:
        assert b.push(1, 4.0).outcome == "applied"
    again = a.resume(1)
    assert (again.welcome.resumed, again.welcome.last_decided, again.welcome.outcome) == ("record", 1, "applied")
    again.anchor()
    assert desk.core.sessions[again.session].state == "training", "it is held no longer"
    again.beat()
    assert not again.heard(Grant)
    if not closed:
        assert b.push(1, 4.0).outcome == "applied", "who is new in the middle is not waited for"
    assert center(desk) == {3.0}
    assert b.push(2, 1.0).outcome == "held"
    assert again.push(2, 1.0).outcome == "applied"
    assert center(desk) == {4.0}


def test_who_comes_back_under_another_name_leaves_no_ghost_in_the_round() -> None:
    """Its leaving is still in the order of work when it is back, and its name is taken."""
    desk, (a, b) = round_of("a", "b")
    desk.by_itself = False
    b.send(b.pieces(1, 1.0)[0])
    a.bye()
    Hand(desk, "a").hello()
    again = a.resume(0)
    assert again.welcome.worker == "a#2"
    desk.finish()
    assert [outcome for _, outcome in answers(b)][-1] == "applied", "nobody waits for the old name"


# Crashes


def test_crash_in_the_middle_of_a_round_with_a_held_push_in_the_checkpoint_and_one_after_it() -> None:
    desk, (a, b, gone) = round_of("a", "b", "gone", lease_s=100, **SAVING)
    first = [hand.push(1) for hand in (a, b, gone)]
    assert first[-1].outcome == "applied"
    a.push(2, 3.0)
    desk.wait(11.0)
    [_] = desk.saves
    life = life_after(desk, lease_s=100)
    b.push(2, 6.0)  # after the checkpoint, and lost
    assert life.core.version == (2, 1)
    again, other = a.resume(2, 1, life), b.resume(2, 1, life)
    assert (again.welcome.resumed, again.welcome.last_decided, again.welcome.outcome) == ("live", 2, "held")
    assert again.push(2, 3.0).outcome == "held", "in the checkpoint: not folded in again"
    assert other.welcome.last_decided == 1
    assert other.push(2, 6.0, base=Version(1, 1)).outcome == "held"
    for _ in range(12):
        life.wait(10.0)
        again.beat()
        other.beat()
    assert sorted(session.worker for session in life.core.members) == ["a", "b"], "gone never came back"
    assert answers(again) == answers(other) == [(2, "applied")]
    assert center(life) == {1.0 + 4.5}


def test_round_whose_held_worker_never_comes_back_still_counts_it() -> None:
    desk, (a, b) = round_of("a", "b", lease_s=100, **SAVING)
    for hand in (a, b):
        hand.push(1)
    a.push(2, 3.0)
    desk.wait(11.0)
    life = life_after(desk, lease_s=100)
    other = b.resume(1, 1, life)
    assert other.push(2, 6.0, base=Version(1, 1)).outcome == "applied"
    assert center(life) == {1.0 + 4.5}
    for _ in range(12):
        life.wait(10.0)
        other.beat()
    assert other.push(3, 1.0).outcome == "applied", "it is alone now"


def test_close_that_a_crash_undid_hangs_nobody() -> None:
    """a was held in the checkpoint, was answered after it, and goes on with its next number."""
    desk, (a, b) = round_of("a", "b", lease_s=100, **SAVING)
    for hand in (a, b):
        hand.push(1)
    a.push(2, 3.0)
    desk.wait(11.0)
    recovered = desk.saves[-1]
    assert b.push(2, 6.0).outcome == "applied"
    assert answers(a)[-1] == (2, "applied")
    assert desk.saves[-1] is recovered
    life = life_after(desk, lease_s=100)
    again, other = a.resume(2, 2, life), b.resume(2, 2, life)
    assert (again.welcome.lost, other.welcome.lost) == ((), (2, 2)), "what was held is in the checkpoint"
    assert again.push(3, 1.0, base=Version(1, 2)).outcome == "held"
    assert other.push(3, 2.0, base=Version(1, 2)).outcome == "applied"
    assert answers(again) == [(3, "applied")]
    assert center(life) == {1.0 + 2.0}


def test_checkpoint_between_what_happens_and_what_the_rule_decides_of_it() -> None:
    """It is a job in the order of work, and so is the decision behind it: neither may be lost."""
    desk, (a, b, c) = round_of("a", "b", "c", lease_s=20, checkpoint_interval_s=5.0, directory=Path("unused"))
    for hand in (a, b, c):
        hand.push(1)
    desk.by_itself = False
    desk.wait(6.0)  # the checkpoint is due, and its job runs
    assert desk.jobs
    c.bye()
    desk.finish()
    life = life_after(desk, lease_s=1000)
    again, other = a.resume(1, 1, life), b.resume(1, 1, life)
    assert again.push(2, base=Version(1, 1)).outcome == "held"
    assert other.push(2, base=Version(1, 1)).outcome == "applied", "c left before the crash"


def test_member_whose_joining_the_checkpoint_missed_is_a_member_after_the_crash() -> None:
    """Hierarchical rounds know no member that never joined."""
    settings = {"rule_settings": {"groups": 2, "h_block": 2}, "lease_s": 1000}
    desk, (a, b) = round_of("a", "b", **settings, **SAVING)
    for hand in (a, b):
        hand.push(1)
        hand.push(2)
    assert desk.core.version == (1, 1)
    late = Hand(desk, "late")
    late.hello()
    desk.by_itself = False
    late.anchor()
    desk.now += 11.0
    desk.event(Tick())  # a checkpoint enters the order behind the job that anchors, before the decision to join
    desk.finish()
    life = life_after(desk, **settings)
    again = late.resume(0, 0, life)
    if again.welcome.resumed != "live":
        again.anchor()
    assert again.push(1, base=Version(1, 1)).outcome in ("held", "applied")
    assert "late" in str(life.core.shard.decisions["places"])


# Ends


@pytest.mark.parametrize("budget", [{"budget_updates": 3}, {"budget_samples": 24}])
def test_budget_used_up_in_the_middle_of_a_round_ends_everybody_after_it(budget: dict[str, int]) -> None:
    desk, (a, b) = round_of("a", "b", **budget)
    a.push(1)
    b.push(1)
    assert a.push(2, 2.0).outcome == "held"
    desk.wait(5.0)
    assert not desk.core.finished, "a round that is under way is brought to its end"
    b.heard()
    last = b.push(2, 4.0)
    assert (last.outcome, last.finished) == ("applied", True)
    [ack, *_] = a.heard(Ack)
    assert (ack.outcome, ack.finished) == ("applied", True)
    assert desk.core.finished
    assert center(desk) == {4.0}
    assert a.push(3).code == "finished"


def test_budget_used_up_in_the_middle_of_a_round_ends_also_when_the_others_go() -> None:
    desk, (a, b) = round_of("a", "b", budget_updates=3)
    a.push(1)
    b.push(1)
    a.push(2, 2.0)
    b.bye()
    assert desk.core.finished
    assert [(ack.outcome, ack.finished) for ack in a.heard(Ack)][-1] == ("applied", True)


def test_budget_of_time_does_not_wait_for_a_round() -> None:
    desk, (a, b) = round_of("a", "b", budget_s=60, lease_s=1000)
    a.push(1)
    desk.wait(61.0)
    assert desk.core.finished
    for hand in (a, b):
        assert [bye.reason for bye in hand.heard(Bye)] == ["finished"]


def test_stop_with_held_pushes_exits_and_they_can_be_pushed_again() -> None:
    desk, (a, b) = round_of("a", "b", **SAVING)
    a.push(1)
    b.push(1)
    a.push(2, 3.0)
    desk.event(Stop("test"))
    assert not desk.exited
    [save] = desk.saves
    desk.saved()
    assert desk.exited
    assert save.version == (1, 1)
    assert [bye.reason for bye in a.heard(Bye)] == ["draining"]


def test_center_that_a_round_made_infinite_is_never_saved_and_the_held_are_told() -> None:
    desk, (a, b, c) = round_of("a", "b", "c", lease_s=1000, **SAVING)
    huge = np.zeros(SMALL.elements, np.float32)
    huge[: SMALL.parameters] = 3e38
    a.push(1, huge)
    b.push(1, huge)
    desk.by_itself = False
    desk.now += 11.0
    c.bye()  # the round closes, and a checkpoint is due behind that
    desk.finish()
    desk.by_itself = True
    desk.wait(20.0)
    assert not desk.saves
    assert desk.core.state.diverged
    assert answers(a)[-1] == (1, "applied"), "nobody waits for a center that there is not"


# Waiting


def test_who_is_held_hears_whom_it_waits_for_often_enough_not_to_doubt() -> None:
    desk, (a, b, slow) = round_of("a", "b", "slow", lease_s=12)
    a.push(1)
    b.push(1)
    for _ in range(10):
        desk.wait(2.0)  # a beat is due after a sixth of the lease
        for hand in (a, b, slow):
            hand.heard()
            hand.beat()
        for hand in (a, b):
            [grant] = hand.heard(Grant)
            assert (grant.decision, grant.number) == ("wait", 1)
            assert "slow" in grant.sentence
            assert "a" not in grant.sentence.split(":")[1].split(", ")
    assert not slow.heard(Grant)
    waiting_for = status.describe(desk.core, desk.now)["waiting_for"]
    assert waiting_for == ["slow to push, by 2 that are held"]


def test_no_wait_is_longer_than_30_s_without_a_line_that_says_for_whom() -> None:
    desk, hands = round_of("a", "b", "c", "slow", lease_s=1000)
    lines: list[float] = []
    started = desk.now
    for index, hand in enumerate(hands[:3]):  # who is waited for changes all the time, but for one
        desk.wait(14.0 if index else 0.0)
        hand.push(1)
    assert not any("wait" in line for line in desk.said)
    for _ in range(40):
        before = len(desk.said)
        desk.wait(2.0)
        said = [line for line in desk.said[before:] if "wait" in line]
        assert all("slow" in line and "a" not in line.split() for line in said)
        lines += [desk.now] * len(said)
    assert lines[0] - started <= 32.0
    assert all(later - earlier <= 32.0 for earlier, later in itertools.pairwise(lines))
    assert len(lines) == 3
    hands[3].push(1)
    desk.wait(60.0)
    assert sum("wait" in line for line in desk.said) == 3, "nobody waits any more"


# Places


def test_a_worker_for_whom_the_rule_has_no_place_any_more_is_refused_and_the_server_goes_on() -> None:
    """Both were told that there is room when they said Hello."""
    settings = {"rule_settings": {"groups": 2, "h_block": 2, "group_by": "host"}}
    desk = Desk(rule="local_sgd", **settings)
    first = Hand(desk, "a")
    first.hello(host="one")
    first.initialise()
    first.anchor()
    second, third = Hand(desk, "b"), Hand(desk, "c")
    assert second.hello(host="two").init == third.hello(host="three").init == "have"
    second.anchor()
    third.anchor()
    assert len(desk.core.members) == 2
    assert third.redial().hello(host="three").code == "rule", "and the next time it learns it at the door"
    assert first.push(1).outcome == "applied"


def test_blocks_are_answered_with_their_own_centers_also_when_the_answer_is_lost() -> None:
    desk, hands = round_of("a", "b", "c", "d", rule_settings={"groups": 2, "h_block": 2})
    a, b, c, d = hands  # blocks: a c, b d
    assert a.push(1, 2.0).outcome == b.push(1, 6.0).outcome == "held"
    assert c.push(1, 4.0).outcome == d.push(1, 8.0).outcome == "applied"
    again = a.resume(1)
    answer = again.push(1, 2.0)
    assert np.frombuffer(answer.payload, np.float32)[:6].tolist() == [3.0] * 6
    assert desk.core.version == (1, 0)
    for hand, fill in ((again, 1.0), (c, 1.0), (b, 2.0)):
        assert hand.push(2, fill).outcome == "held"
    assert d.push(2, 2.0).outcome == "applied"
    assert answers(again) == [(2, "applied")]
    assert center(desk) == {6.5}


# Fragments


def test_fragments_are_pushed_and_answered_by_themselves() -> None:
    desk = Desk(rule="diloco", rule_settings={"fragments": 2, "lr": 1.0, "mu": 0.0}, local_steps=4)
    a, b = desk.join("a"), desk.join("b")
    assert a.push(1, 2.0, fragment=0).outcome == "held"
    last = b.push(1, 4.0, fragment=0)
    [ack] = a.heard(Ack)
    shard = desk.core.shard
    assert shard is not None
    assert last.reply.bytes == ack.reply.bytes == shard.downs[0].bytes < shard.down.bytes
    assert bytes(last.payload) == bytes(ack.payload)
    assert np.frombuffer(last.payload, np.float32)[:3].tolist() == [3.0] * 3
    assert shard.center[:6].tolist() == [3.0] * 3 + [0.0] * 3
    assert a.push(2, 6.0, fragment=1).outcome == "held"
    again = a.resume(2)
    assert again.push(2, 6.0, fragment=1).outcome == "held"
    assert b.push(2, 8.0, fragment=1).outcome == "applied"
    assert answers(again) == [(2, "applied")]
    assert shard.center[:6].tolist() == [3.0] * 3 + [7.0] * 3


def test_a_model_of_fewer_parameters_than_fragments_is_served() -> None:
    desk = Desk(
        Layout((Tensor("w", (3,), "float32", "parameter"),)),
        rule="diloco",
        rule_settings={"fragments": 4, "lr": 1.0, "mu": 0.0},
        local_steps=4,
    )
    hand = desk.join()
    sizes = []
    for number in range(1, 9):
        ack = hand.push(number, 2.0 * number, fragment=(number - 1) % 4)
        assert ack.outcome == "applied"
        sizes.append(ack.reply.bytes)
    assert sizes == [0, 8, 8, 8] * 2, "the first has no element"


def test_a_fragment_that_does_not_exist_is_refused() -> None:
    desk = Desk(rule="diloco", rule_settings={"fragments": 2}, local_steps=4)
    hand = desk.join("a")
    before = desk.state()
    answer = hand.push(1, fragment=2)
    assert (answer.outcome, answer.code) == ("rejected", "bad_chunk")
    assert desk.state() == before
    assert hand.push(2, fragment=1).outcome == "applied"


def test_memory_counts_arrays_with_rows() -> None:
    flat, blocks = (
        memory.plan(Desk(rule="local_sgd", rule_settings=settings).settings, SMALL)
        for settings in ({}, {"groups": 3, "h_block": 2})
    )
    assert flat.rule_state == 4 * 6
    assert blocks.rule_state == 2 * 3 * 4 * 6


def test_stranger_with_a_token_of_the_round_is_not_listened_to() -> None:
    desk, (a, b) = round_of("a", "b")
    a.push(1, 2.0)
    thief = Hand(desk, "thief")
    answer = thief.hello(resume=Resume("guessed", 1, 0, 0))
    assert answer.resumed == "new"
    thief.session, thief.connection = a.session, a.connection
    thief.send(thief.pieces(1, 50.0)[0])
    b.push(1, 4.0)
    assert center(desk) == {3.0}
