"""Orders and reports, under a rule that schedules: no order is lost for good, no leader is waited for that is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.messages import NOWHERE, Ack, Fault, Offer, Order, Pull
from tests.cluster import SMALL, Desk, Hand

SAVING = {"directory": Path("unused"), "checkpoint_interval_s": 10.0}
TAU = 2


def led(*names: str, life: dict[str, Any] | None = None, **settings: Any) -> tuple[Desk, list[Hand]]:
    """A server under Leader SGD, and workers that said where they stand; tau 2, one group."""
    rule_settings = {"tau": TAU, "tau_global": TAU} | settings.pop("rule_settings", {})
    desk = Desk(**{"rule": "lsgd", "rule_settings": rule_settings, "lease_s": 1000} | settings | (life or {}))
    hands = [desk.join(name) for name in names]
    for hand in hands:
        hand.heard()
        hand.report(0)
    return desk, hands


def orders(hand: Hand) -> list[Order]:
    """The orders that were heard."""
    found: list[Order] = hand.heard(Order)
    return found


def train(hands: list[Hand], losses: dict[str, float], done: dict[str, int] | None = None) -> dict[str, list[Order]]:
    """Let everybody do what is granted until somebody is to upload; the last orders of each."""
    steps = done if done is not None else {}
    told: dict[str, list[Order]] = {hand.name: [] for hand in hands}
    for _ in range(50):
        for hand in hands:
            told[hand.name] += orders(hand)
            until = told[hand.name][-1].until if told[hand.name] else 0
            if any(order.upload for order in told[hand.name][-1:]):
                return told
            if steps.get(hand.name, 0) < until:
                steps[hand.name] = steps.get(hand.name, 0) + 1
                hand.report(steps[hand.name], losses[hand.name])
    raise AssertionError(f"nobody is asked to upload: {told}")


def test_the_best_uploads_and_the_others_pull_it() -> None:
    desk, (a, b) = led("a", "b")
    told = train([a, b], {"a": 0.9, "b": 0.1})
    assert told["b"][-1].upload
    assert not any(order.upload for order in told["a"])
    ack = b.push(1, 7.0)
    assert (ack.outcome, ack.reply) == ("applied", None), "a leader keeps its parameters"
    [order] = orders(a)
    assert order.pull == ("global",)
    offer = a.pull("order", "global")
    assert np.frombuffer(offer.payload, np.float32)[0] == 7.0
    assert desk.state()[2] == 0


def test_an_upload_whose_ack_was_lost_is_answered_with_nothing_again() -> None:
    """The center is no reply: it would overwrite the leader's parameters."""
    desk, (a, b) = led("a", "b")
    train([a, b], {"a": 0.9, "b": 0.1})
    b.push(1, 7.0)
    again = b.resume(1)
    ack = again.push(1, 7.0)
    assert (ack.number, ack.outcome, ack.reply) == (1, "applied", None)
    assert desk.core.version == (1, 1)


@pytest.mark.parametrize("how", ["new connection", "same connection"])
def test_a_lost_order_is_said_again(how: str) -> None:
    _, (a, b) = led("a", "b")
    told = train([a, b], {"a": 0.9, "b": 0.1})
    lost = told["b"][-1]
    hand = b.resume(0) if how == "new connection" else b
    hand.heard()
    hand.report(len(told["b"]), orders=lost.id - 1)
    if how == "same connection":
        hand.heard()
        hand.report(len(told["b"]), orders=lost.id - 1)
    said = orders(hand)
    assert said
    assert {(order.id, order.upload, order.connection) for order in said} == {(lost.id, True, hand.connection)}
    hand.report(len(told["b"]), orders=lost.id)
    assert not orders(hand), "it was carried out"


@pytest.mark.parametrize("how", ["bye", "lease"])
def test_a_leader_that_is_gone_before_its_upload_is_replaced(how: str) -> None:
    desk, (a, b, c) = led("a", "b", "c", lease_s=10)
    train([a, b, c], {"a": 0.5, "b": 0.1, "c": 0.9})
    for hand in (a, c):
        hand.heard()
    if how == "bye":
        b.bye()
    else:
        for _ in range(5):
            desk.wait(3.0)
            a.beat()
            c.beat()
    assert [order.upload for order in orders(a)] == [True]
    assert a.push(1, 3.0).outcome == "applied"
    assert orders(c)[-1].pull == ("global",)


def test_an_upload_that_nobody_asked_for_is_rejected_and_changes_nothing() -> None:
    desk, (a, b) = led("a", "b")
    before, decisions = desk.state(), desk.core.shard
    assert decisions is not None
    known = decisions.decisions
    answer = a.push(1, 5.0)
    assert (answer.outcome, answer.code) == ("rejected", "rule")
    assert desk.state() == before
    assert decisions.decisions == known
    session = desk.core.sessions[a.session]
    assert (session.counters.rejected, len(session.rejections), session.malformed) == (1, 0, 0)
    for number in range(2, 8):
        assert a.push(number, 5.0).code == "rule", "no quarantine"
    a.heard()
    a.report(0)  # says nothing new: its order is said again
    train([a, b], {"a": 0.1, "b": 0.9})
    assert a.push(8, 5.0).outcome == "applied"


def test_reports_of_nobody_and_under_other_rules_are_refused() -> None:
    desk, (a,) = led("a")
    stranger = Hand(desk, "stranger")
    stranger.session, stranger.connection = "nobody", 5
    stranger.report(3)
    assert [fault.code for fault in stranger.heard(Fault)] == ["stale"]
    observer = Hand(desk, "observer")
    observer.hello(role="observer", elements=0, payload=b"", optimizer=None)
    updates = desk.core.state.budget.updates
    observer.report(10_000)
    assert [fault.code for fault in observer.heard(Fault)] == ["unexpected"]
    assert desk.core.state.budget.updates == updates
    a.bye()
    a.heard()
    a.report(5)
    assert [fault.code for fault in a.heard(Fault)] == ["stale"]
    plain = Desk()
    hand = plain.join()
    hand.heard()
    hand.report(1)
    [fault] = hand.heard(Fault)
    assert fault.code == "unexpected"
    assert "downpour" in fault.sentence


def test_repeated_reports_count_once_and_grant_once() -> None:
    desk, (a, b) = led("a", "b")
    for hand in (a, b):
        hand.heard()
    for _ in range(5):
        a.report(1, 0.5)
    assert desk.core.state.budget.updates == 1
    assert len({order.id for order in orders(a)}) == 1


def test_who_comes_back_after_its_lease_takes_the_new_orders() -> None:
    """It remembers the id of its last order; what is older than that it does not hear."""
    desk, (a, b) = led("a", "b", lease_s=10)
    done: dict[str, int] = {}
    told = train([a, b], {"a": 0.9, "b": 0.1}, done)
    last = max(order.id for order in told["a"])
    b.push(1)
    for _ in range(5):
        desk.wait(3.0)
        b.beat()
    again = a.resume(0)
    again.anchor()
    again.heard()
    again.report(done["a"], orders=last)
    assert orders(again) or not b.heard()
    assert all(order.id > last for order in orders(again))
    session = desk.core.sessions[again.session]
    assert session.last_order > last or session.order is None


@pytest.mark.parametrize("lost", ["upload", "step"])
def test_orders_survive_a_crash(lost: str) -> None:
    """The rule waits for what it ordered; nobody else would say it again."""
    desk, (a, b) = led("a", "b", **SAVING)
    done: dict[str, int] = {}
    train([a, b], {"a": 0.9, "b": 0.1}, done)
    if lost == "step":
        b.push(1, 7.0)
        assert orders(a)[-1].until > done["a"]
    else:
        desk.core.state.durable = NOWHERE  # as if the first save had failed: the center is what it was then
    desk.wait(11.0)
    life, _ = led(life={"epoch": 2, "recovered": desk.saved()}, **SAVING)
    hands = [hand.resume(1 if lost == "step" and hand is b else 0, 0, life) for hand in (a, b)]
    told = []
    for hand in hands:
        assert hand.welcome.resumed == "record"
        hand.anchor()
        hand.report(done[hand.name], orders=(1 << 32) + 1000)
        told.append(orders(hand))
    assert all(order.id > 2 << 32 for said in told for order in said)
    if lost == "upload":
        assert any(order.upload for order in told[1])
        assert hands[1].push(2, 7.0).outcome == "applied"
        assert orders(hands[0])[-1].pull == ("global",)
    else:
        assert all(said and said[-1].until > 0 for said in told)


def test_leaders_of_groups_are_pulled_by_their_groups() -> None:
    settings = {"groups": 2, "tau": 1, "tau_global": 2}
    desk, hands = led("a", "b", "c", "d", rule_settings=settings)
    losses = {"a": 0.1, "b": 0.2, "c": 0.8, "d": 0.9}  # groups a c, b d
    done: dict[str, int] = {}
    train(hands, losses, done)
    a, b, c, d = hands
    assert a.push(1, 1.0).outcome == "applied"
    assert b.push(1, 2.0).outcome == "applied"
    assert desk.core.version == (1, 0), "leaders of groups are no center"
    for hand, fill in ((c, 1.0), (d, 2.0)):
        assert orders(hand)[-1].pull == ("local",)
        hand.heard()
        hand.send(Pull(hand.session, hand.connection, "order", "local", NOWHERE, 0))
        [offer] = hand.heard(Offer)
        assert np.frombuffer(offer.payload, np.float32)[: SMALL.parameters].tolist() == [fill] * 6


def test_status_names_who_is_to_upload() -> None:
    desk, (a, b) = led("a", "b")
    train([a, b], {"a": 0.9, "b": 0.1})
    assert list(desk.core.state.waited_for) == ["b"]
    before = len(desk.said)
    desk.wait(31.0)
    assert any("b" in line.split() for line in desk.said[before:])
    assert not a.heard(Ack)
