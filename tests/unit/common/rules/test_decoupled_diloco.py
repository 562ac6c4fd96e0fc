"""Decoupled DiLoCo: when a round closes, how updates are weighted, and that who is late loses nothing.

Nothing here is a number of the paper: the rule is known from summaries only.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import rules
from common.replay import RuleServer
from common.rules.base import Accumulate, Close, Terms
from common.rules.decoupled_diloco import DecoupledDiloco, weight_of
from tests.rule_driver import Cluster, Quadratic, simulate

DECOUPLED = rules.load("decoupled_diloco")


def configured(**settings: Any) -> DecoupledDiloco:
    config = rules.configure(DECOUPLED, settings)
    assert isinstance(config, DecoupledDiloco)
    return config


def served(workers: int, *, lr: float = 1.0, mu: float = 0.0, **settings: Any) -> RuleServer:
    server = RuleServer.start(DECOUPLED, configured(lr=lr, mu=mu, **settings), np.zeros(1))
    for i in range(workers):
        server.join(f"w{i}")
    return server


def push(server: RuleServer, worker: int, d: float = 1.0, **facts: Any) -> set[str]:
    return set(server.push(f"w{worker}", np.full(1, d), **facts).replies)


def deadline(server: RuleServer) -> float | None:
    return DECOUPLED.deadline(server.config, server.decisions)


def test_a_round_of_all_closes_at_once_and_is_diloco() -> None:
    diloco = rules.load("diloco")
    other = RuleServer.start(diloco, rules.configure(diloco, {}), np.ones(5))
    mine = RuleServer.start(DECOUPLED, configured(), np.ones(5))
    random = np.random.default_rng(9)
    for server in (mine, other):
        for i in range(3):
            server.join(f"w{i}")
    for _ in range(20):
        for i in range(3):
            d = random.normal(size=5)
            for server in (mine, other):
                replies = server.push(f"w{i}", d, samples=32, steps=4).replies
        assert len(replies) == 3
        np.testing.assert_allclose(mine.center, other.center, rtol=0, atol=1e-12)


def test_it_closes_when_the_window_after_the_quorum_is_over() -> None:
    server = served(4, quorum=2, max_grace_s=10.0)
    assert push(server, 0) == set()
    assert deadline(server) is None, "no quorum yet"
    server.tick(3.0)
    assert push(server, 1, 2.0) == set()
    assert deadline(server) == 3.0 + 2 * 3.0, "twice the only gap there was"
    assert not server.tick(5.9).replies
    assert DECOUPLED.waits(server.config, server.decisions) == ["w2", "w3"]
    result = server.tick(0.1)
    assert set(result.replies) == {"w0", "w1"}
    assert "grace window is over" in result.effects[0].reason
    np.testing.assert_allclose(server.center, 1.5)
    assert deadline(server) is None


def test_the_window_starts_anew_with_each_arrival_but_is_bounded() -> None:
    server = served(5, quorum=1, grace=2.0, gap_rate=1.0, max_grace_s=5.0)
    push(server, 0)
    assert deadline(server) == 5.0, "no gap is known: the longest window"
    server.tick(1.0)
    push(server, 1)
    assert deadline(server) == 1.0 + 2.0
    server.tick(1.5)
    push(server, 2)
    assert deadline(server) == 5.0, "2.5 + 2 * 1.5, but no more than 5 after the quorum"
    assert set(server.tick(2.5).replies) == {"w0", "w1", "w2"}


def test_gaps_are_a_moving_average() -> None:
    server = served(4, quorum=4, gap_rate=0.25)
    for i, seconds in enumerate((0.0, 2.0, 4.0)):
        server.tick(seconds)
        push(server, i)
    assert server.decisions["gap_s"] == pytest.approx(2.0 + 0.25 * (4.0 - 2.0))


def test_who_is_late_is_in_the_next_round_and_its_gap_is_learned() -> None:
    server = served(3, quorum=2, grace=1.0, gap_rate=1.0)
    push(server, 0)
    server.tick(1.0)
    push(server, 1)
    assert set(server.tick(1.0).replies) == {"w0", "w1"}
    server.tick(4.0)
    assert push(server, 2, 8.0) == set()
    assert server.decisions["gap_s"] == pytest.approx(5.0), "since the last arrival that started where it did"
    push(server, 0)
    assert push(server, 1) == {"w0", "w1", "w2"}
    np.testing.assert_allclose(server.center, 1.0 + 10.0 / 3)


def test_an_idle_time_between_rounds_is_no_gap() -> None:
    server = served(2)
    for _ in range(3):
        push(server, 0)
        server.tick(1.0)
        push(server, 1)
        server.tick(100.0)
    assert server.decisions["gap_s"] == pytest.approx(1.0)


def test_updates_are_weighted_by_samples_times_samples_per_step() -> None:
    assert weight_of(64, 4) == 1024.0
    assert weight_of(0, 0) == 1.0
    server = served(2)
    push(server, 0, 1.0, samples=64, steps=4)
    assert push(server, 1, 5.0, samples=32, steps=4) == {"w0", "w1"}
    np.testing.assert_allclose(server.center, (1024 * 1.0 + 256 * 5.0) / 1280)


@pytest.mark.parametrize(("live", "configuration", "expected"), [(4, None, 3), (5, None, 3), (4, 9, 4), (4, 1, 1)])
def test_quorum(live: int, configuration: int | None, expected: int) -> None:
    server = served(live, quorum=configuration)
    for i in range(expected - 1):
        push(server, i)
        assert deadline(server) is None
    answered = push(server, expected - 1)
    assert (deadline(server) is not None) != (len(answered) == live), "the window opens, or all are there"


def test_a_leave_may_complete_the_quorum_or_the_round() -> None:
    server = served(4, quorum=3)
    push(server, 0)
    push(server, 1)
    assert not server.leave("w3").replies
    assert deadline(server) is None
    assert set(server.leave("w2").replies) == {"w0", "w1"}
    server = served(5)
    push(server, 0)
    push(server, 1)
    assert deadline(server) is None
    server.leave("w4")
    server.leave("w3")
    assert deadline(server) is not None, "two of three are more than half"


def test_a_joiner_neither_moves_nor_closes_the_window() -> None:
    server = served(3, quorum=2)
    push(server, 0)
    push(server, 1)
    at_s = deadline(server)
    assert at_s is not None
    server.join("late")
    assert deadline(server) == at_s
    assert push(server, 2) == {"w0", "w1", "w2"}


def test_a_quorum_that_cannot_be_reached_is_refused() -> None:
    sentence = DECOUPLED.fits(configured(quorum=5), Terms(workers=4))
    assert sentence is not None
    assert "quorum of 5, but 4 workers are expected" in sentence
    for config, terms in ((configured(quorum=4), Terms(workers=4)), (configured(quorum=9), Terms())):
        assert DECOUPLED.fits(config, terms) is None
    assert DECOUPLED.fits(configured(), Terms(workers=1)) is None


@pytest.mark.parametrize("local_steps", [1, 8])
@pytest.mark.parametrize("quorum", [None, 1])
def test_a_straggler_does_not_shrink_the_window_until_nobody_meets(quorum: int | None, local_steps: int) -> None:
    """If only gaps of those in time counted, each worker would be a round of its own, and momentum would diverge."""
    cluster = Cluster(lr=0.1, local_steps=local_steps)
    run = simulate(DECOUPLED, configured(quorum=quorum), Quadratic(), cluster, seed=0, pushes=400, changes=400)
    assert Quadratic().loss(run.server.center) < 1e-15
    assert len(run.exchanges) > 3 * run.server.version, "most rounds are of most workers"


moves = st.lists(st.tuples(st.sampled_from(["join", "push", "push", "tick", "leave"]), st.integers(0, 3)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from([None, 1, 2, 4]), moves)
def test_nobody_hangs_whatever_happens(quorum: int | None, happened: list[tuple[str, int]]) -> None:
    server = served(0, quorum=quorum)
    pushed = closed = 0.0
    for what, i in happened:
        worker = f"w{i}"
        if what == "join" and worker not in server.sessions:
            server.join(worker)
            continue
        if what == "push" and worker in server.sessions and worker not in server.held:
            result = server.push(worker, np.ones(1))
        elif what == "leave" and worker in server.sessions:
            result = server.leave(worker)
        elif what == "tick":
            result = server.tick(float(i))
        else:
            continue
        assert json.loads(json.dumps(server.decisions)) == server.decisions
        pushed += sum(effect.weight for effect in result.effects if isinstance(effect, Accumulate))
        closed += sum(effect.args[0] for effect in result.effects if isinstance(effect, Close))
        assert closed + server.decisions["round"]["weight"] == pushed
        assert set(server.decisions["round"]["held"]) == server.held
        if server.held:
            waits = set(DECOUPLED.waits(server.config, server.decisions))
            assert waits
            assert waits <= set(server.sessions) - server.held
    for worker in sorted(set(server.sessions) - server.held):
        server.push(worker, np.ones(1))
    at_s = deadline(server)
    if at_s is not None:
        server.tick(max(0.0, at_s - server.now_s))
    assert not server.held
