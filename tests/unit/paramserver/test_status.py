"""Status says what is true, in plain values, whatever state the server is in; and its answer always fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.messages import Answer, Query, Scalars
from common.node import Received
from common.wire import encode
from paramserver import status
from paramserver.core import Stop
from paramserver.status import LIMIT_BYTES, Throughput
from tests.cluster import LARGE, Desk, Hand


def asked(desk: Desk) -> dict[str, Any]:
    desk.event(Received(b"anyone", encode(Query())))
    _, answer = desk.sent[-1]
    assert isinstance(answer, Answer)
    values: dict[str, Any] = json.loads(bytes(answer.payload), parse_constant=pytest.fail)
    return values


def test_phases_in_the_order_they_happen() -> None:
    desk = Desk(budget_updates=3, directory=Path("unused"))
    phases = [asked(desk)["phase"]]
    hand = Hand(desk)
    hand.hello()
    phases.append(asked(desk)["phase"])
    assert asked(desk)["waiting_for"] == ["w to send the initial weights"]
    hand.initialise()
    hand.anchor()
    phases.append(asked(desk)["phase"])
    hand.bye()
    phases.append(asked(desk)["phase"])
    again = desk.join("x")
    for number in (1, 2, 3):
        again.push(number)
    phases.append(asked(desk)["phase"])
    desk.event(Stop("test"))
    phases.append(asked(desk)["phase"])
    assert phases == [
        "waiting for the first worker",
        "waiting for initial weights",
        "training",
        "waiting for workers",
        "finished",
        "stopping",
    ]


def test_figures_are_those_of_the_core() -> None:
    desk = Desk(budget_updates=4)
    a, b = desk.join("a"), desk.join("b")
    a.push(1)
    b.push(1)
    b.push(2, np.nan)
    observer = Hand(desk, "o")
    observer.hello(role="observer", elements=0, payload=b"")
    values = asked(desk)
    assert (values["epoch"], values["version"], values["updates"], values["samples"]) == (1, 2, 2, 16)
    assert values["budget_used"] == 0.5
    assert values["refusals"] == {"non_finite": 1}
    assert values["observers"] == 1
    assert values["parameters"] == 6
    assert [(w["name"], w["updates"], w["rejected"], w["loss"]) for w in values["workers"]] == [
        ("a", 1, 0, 0.5),
        ("b", 1, 1, 0.5),
    ]


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf, 3e38, 0.0])
def test_any_loss_is_shown_as_plain_json(loss: float) -> None:
    desk = Desk()
    hand = desk.join()
    [push] = hand.pieces(1)
    hand.send(type(push)(push.begin, Scalars(float(loss), 2**53 - 1, 2**53 - 1, float(loss)), push.payload))  # type: ignore[union-attr, call-arg]
    assert desk.core.version == (1, 1)
    [worker] = asked(desk)["workers"]
    assert worker["loss"] is None or np.isfinite(worker["loss"])


def test_whoever_is_silent_or_waits_is_named() -> None:
    desk = Desk(LARGE, pool_mib=12, lease_s=30)
    hands = [desk.join(name) for name in "abc"]
    for hand in hands[:2]:
        hand.send(hand.pieces(1)[0])
    desk.wait(11.0)
    hands[0].beat()
    sentences = asked(desk)["waiting_for"]
    assert any("a free slot for b" in s and "11.0 s" in s for s in sentences)
    assert any("a sign of c" in s and "19 s" in s for s in sentences)
    assert not any(s.endswith(" a") for s in sentences)


def test_answer_fits_whatever_the_workers_are_called() -> None:
    """Names are a stranger's; a control character takes six bytes of JSON."""
    desk = Desk(lease_s=30)
    for index in range(250):
        Hand(desk).hello(worker=f"{index:04d}" + "\x01" * 1000)
    desk.wait(11.0)
    assert len(status.describe(desk.core, desk.now)["workers"]) > 200
    values = status.describe(desk.core, desk.now)
    rounds = iter(range(1000))

    class Watched(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            assert next(rounds) < 100, "leaves out without end"
            super().__setitem__(key, value)

    assert len(status.encode(Watched(values))) <= LIMIT_BYTES


def test_rates_are_of_the_last_seconds() -> None:
    rates = Throughput()
    assert rates.rates(0.0) == (0.0, 0.0)
    for step in range(1000):
        rates.add(step * 0.1, 32)
    updates, samples = rates.rates(100.0)
    assert updates == pytest.approx(10.0, rel=0.05)
    assert samples == pytest.approx(320.0, rel=0.05)
    assert rates.rates(1000.0) == (0.0, 0.0)
