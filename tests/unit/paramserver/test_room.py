"""Big models are joined while the server goes on: memory is made by jobs, and only the Hello it is for waits.

Every model counts as big here. In real time, with 25 million parameters, see `docs/log.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.messages import Ack, Beat, Fault, Grant, Welcome
from paramserver import room
from paramserver.core import Stop
from tests.cluster import LARGE, Cluster, Desk, Faults, Hand, check_counting


@pytest.fixture(autouse=True)
def _everything_is_big(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "AT_ONCE_BYTES", 0)


def says_hello(hand: Hand, **changes: Any) -> list[Any]:
    """Hello; what is answered before any job is done."""
    try:
        return [hand.hello(**changes)]
    except IndexError:
        return []


def busy(**settings: Any) -> tuple[Desk, Hand]:
    """A server with one worker, whose jobs are now done when the test says so."""
    desk = Desk(**settings)
    hand = desk.join("a")
    hand.push(1)
    desk.by_itself = False
    hand.heard()
    return desk, hand


def test_hello_waits_for_its_room_and_nobody_else_does() -> None:
    """Beats are answered and no lease ends, however long it takes; nothing was said to be there before it was."""
    desk, first = busy()
    second = Hand(desk, "b")
    assert not says_hello(second)
    for _ in range(100):
        desk.wait(1.0)
        first.beat()
        assert first.heard(Beat)
        assert not first.heard(Fault)
        assert not second.heard()
    assert [member.worker for member in desk.core.members] == ["a"]
    desk.finish()
    assert [type(message) for message in second.heard()] == [Welcome]
    assert [member.worker for member in desk.core.members] == ["a", "b"]
    desk.by_itself = True
    assert first.push(2).outcome == "applied"


def test_two_who_join_a_fresh_server_at_once_are_both_taken_in() -> None:
    desk = Desk(by_itself=False)
    hands = [Hand(desk, name) for name in "ab"]
    assert not any(says_hello(hand) for hand in hands)
    assert len(desk.jobs) == 1, "one after the other"
    desk.finish()
    welcomes = [hand.heard(Welcome) for hand in hands]
    assert [welcome[-1].init for welcome in welcomes] == ["send", "wait"]
    assert len(desk.core.members) == 2
    assert len([said for said in desk.said if said.startswith("Model of")]) == 1


def test_only_the_last_connection_of_a_worker_is_welcomed() -> None:
    """It dialled again while its room was made; the connections before are closed."""
    desk, _ = busy()
    dials = [Hand(desk, "b")]
    for _ in range(3):
        dials.append(dials[-1].redial())
    for dial in dials:
        assert not says_hello(dial)
        desk.wait(1.0)
    desk.finish()
    assert [len(dial.heard(Welcome)) for dial in dials] == [0, 0, 0, 1]
    assert [member.worker for member in desk.core.members] == ["a", "b"]


@pytest.mark.parametrize("rule", ["downpour", "gem", "easgd"])
def test_once_it_is_welcomed_all_there_is_to_make_is_made(rule: str) -> None:
    """What the rule keeps for a worker, too; and who comes back in time needs no more."""
    desk, _ = busy(rule=rule)
    second = Hand(desk, "b")
    assert not says_hello(second)
    desk.finish()
    welcome = second.heard(Welcome)[-1]
    second.session, second.connection = welcome.session, welcome.connection
    model = desk.core.state.model
    assert model is not None
    assert model.slots.count == 2
    assert model.shard.spare_arrays == 1
    desk.by_itself = True
    second.anchor()
    assert model.shard.spare_arrays == 0
    assert isinstance(second.redial().hello(), Welcome)
    assert model.slots.count == 2


def test_refusals_do_not_wait_for_room() -> None:
    desk, _ = busy(max_sessions=2)
    assert says_hello(Hand(desk, "b"), layout=LARGE)[0].code == "layout_mismatch"
    assert says_hello(Hand(desk, "b"), codecs=("fp16",))[0].code == "unknown_codec"
    assert not desk.jobs


def test_those_who_wait_are_bounded_and_the_limit_holds_when_room_is_made() -> None:
    desk, _ = busy(max_sessions=2)
    hands = [Hand(desk, name) for name in "bcd"]
    answers = [says_hello(hand) for hand in hands]
    assert [len(answer) for answer in answers] == [0, 0, 1]
    assert answers[2][0].code == "full"
    desk.finish()
    assert [type(hand.heard()[-1]) for hand in hands[:2]] == [Welcome, Fault]
    assert len(desk.core.members) == 2


def test_room_of_a_model_that_was_forgotten_is_made_again() -> None:
    """The only worker leaves a fresh server while room for a second is made."""
    desk = Desk()
    first, second = Hand(desk, "a"), Hand(desk, "b")
    first.hello()
    desk.by_itself = False
    assert not says_hello(second)
    first.bye()
    assert desk.core.shard is None
    desk.finish()
    assert second.heard(Welcome)[-1].init == "send"
    assert desk.core.shard is not None


def test_server_that_stops_does_not_keep_anybody_waiting() -> None:
    desk, _ = busy()
    second = Hand(desk, "b")
    says_hello(second)
    desk.event(Stop("test"))
    desk.finish()
    assert second.heard(Fault)[-1].code == "draining"
    assert desk.exited


def test_server_that_stops_when_its_only_model_was_forgotten_ends() -> None:
    desk = Desk(rule="local_sgd", directory=Path("unused"), workers=1)
    hand = Hand(desk)
    hand.hello()
    hand.bye()
    desk.event(Stop("test"))
    assert desk.exited


def test_pushes_take_their_turn_while_room_is_made() -> None:
    desk, first = busy()
    says_hello(Hand(desk, "b"))
    for message in first.pieces(2):
        first.send(message)
    first.beat()
    assert first.heard(Grant)[-1].decision == "wait"
    desk.finish()
    assert first.heard(Ack)[-1].outcome == "applied"


def test_hello_that_was_late_does_not_leave_the_newer_connection_in_the_dark() -> None:
    """Read in the wrong order after a standstill: the newer connection is told at once, and says Hello again."""
    desk = Desk()
    hand = desk.join("a")
    late = hand.redial()
    hand.heard()
    late.hello()
    [stale] = hand.heard(Fault)
    assert stale.code == "stale"
    assert "Hello" in stale.fix
    again = late.redial()
    again.hello()
    assert late.heard(Fault)[-1].code == "stale", "and so on, until the last one speaks"
    again.beat()
    assert not again.heard(Fault)
    assert len(desk.core.members) == 1


def test_who_says_hello_twice_on_one_connection_is_not_told_to_say_it_again() -> None:
    desk = Desk()
    hand = desk.join("a")
    hand.hello()
    assert not hand.heard(Fault)


def test_whatever_goes_wrong_meanwhile_each_update_counts_once() -> None:
    """Every Hello of a newcomer waits here."""
    faults = Faults(loss=0.05, duplicate=0.1, reorder=0.1, cut_every_s=0.7, crash_worker_every_s=3.0)
    for seed in range(6):
        cluster = Cluster(seed, faults=faults, updates=10, job_s=0.1)
        cluster.run()
        check_counting(cluster)
