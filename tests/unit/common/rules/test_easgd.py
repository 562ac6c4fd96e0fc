"""EASGD: the published numbers, what is conserved, and that worker and server hold the same bits.

Laws
* The exchange on differences (replica, anchor) is the exchange on parameters of the paper.
* Replica and anchor are the same bits after every exchange, whatever update and reply become on the wire.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common import rules
from common.replay import RuleServer
from common.rules.base import Exchange, Facts, Floats, Member, OptimizerFacts, Reply, Terms
from tests.rule_driver import Cluster, Quadratic, simulate

EASGD = rules.load("easgd")


class Worker:
    """Keeps x, and the anchor that tracks what the server knows of it."""

    def __init__(self, server: RuleServer, name: str, x: Floats | None = None) -> None:
        self.server, self.name, self.anchor = server, name, server.join(name)
        self.x = self.anchor.copy() if x is None else x.copy()

    def exchange(self) -> Floats:
        d = np.empty_like(self.x)
        EASGD.update(self.server.config, self.x, self.anchor, d)
        reply = self.server.push(self.name, d).replies[self.name]
        EASGD.merge(self.server.config, self.x, reply)
        assert EASGD.track is not None
        EASGD.track(self.server.config, self.anchor, d, reply)
        return reply


def served(center: Floats, *, workers: int | None = None, **settings: Any) -> RuleServer:
    return RuleServer.start(EASGD, rules.configure(EASGD, settings), center, terms=Terms(workers=workers))


def test_one_exchange_as_published() -> None:
    """x 1, c .4, alpha .5: E .3, x .7, c .7."""
    server = served(np.array([0.4]), beta=0.5)
    worker = Worker(server, "w0", np.array([1.0]))
    np.testing.assert_allclose(worker.exchange(), 0.3, rtol=0, atol=1e-15)
    np.testing.assert_allclose(worker.x, 0.7, rtol=0, atol=1e-15)
    np.testing.assert_allclose(server.center, 0.7, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(server.sessions["w0"].replica, worker.anchor)


def test_many_exchanges_are_those_of_the_paper() -> None:
    """Against the two lines of the paper, in plain numpy, with steps in between."""
    random = np.random.default_rng(2)
    start = random.normal(size=7)
    server = served(start, workers=3)
    workers = [Worker(server, f"w{i}") for i in range(3)]
    c, xs, alpha = start.copy(), [start.copy() for _ in range(3)], 0.9 / 3
    for _ in range(300):
        i = int(random.integers(3))
        moved = 0.1 * random.normal(size=7)
        workers[i].x += moved
        xs[i] += moved
        workers[i].exchange()
        e = alpha * (xs[i] - c)
        c, xs[i] = c + e, xs[i] - e
    np.testing.assert_allclose(server.center, c, rtol=0, atol=1e-13)
    for worker, x in zip(workers, xs, strict=True):
        np.testing.assert_allclose(worker.x, x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_worker_and_server_hold_the_same_bits(dtype: Any) -> None:
    """Also where update and reply are decoded to something else than was sent."""
    random = np.random.default_rng(3)
    center, n = random.normal(size=65).astype(dtype), 65
    config = rules.configure(EASGD, {})
    c, session = center.copy(), EASGD.session(config, False, n, dtype)
    assert EASGD.anchor is not None
    assert EASGD.propose is not None
    assert EASGD.settle is not None
    assert EASGD.track is not None
    EASGD.anchor(config, c, session)
    x, anchor = center.copy(), center.copy()
    for _ in range(100):
        x += (0.1 * random.normal(size=n)).astype(dtype)
        d, out = np.empty_like(x), np.empty_like(x)
        EASGD.update(config, x, anchor, d)
        sent = d.astype(np.float16).astype(dtype)
        EASGD.propose(config, c, EASGD.state(config, False, n, dtype), session, sent, 1.0, (0.3,), out)
        reply = out.astype(np.float16).astype(dtype)
        known_sent, known_reply, before = sent.copy(), reply.copy(), c + x
        EASGD.settle(config, c, (), session, reply)
        EASGD.merge(config, x, reply)
        EASGD.track(config, anchor, sent, reply)
        assert anchor.tobytes() == session.replica.tobytes()
        assert (sent.tobytes(), reply.tobytes()) == (known_sent.tobytes(), known_reply.tobytes())
        np.testing.assert_allclose(c + x, before, rtol=1e-5 if dtype is np.float32 else 1e-13, atol=1e-6)
    assert np.linalg.norm(x - anchor) < 0.01 * np.linalg.norm(x), "what a lossy codec drops is sent the next time"


def test_center_and_workers_together_move_by_local_steps_only() -> None:
    server = served(np.zeros(4), workers=2)
    a, b = Worker(server, "a", np.full(4, 1.0)), Worker(server, "b", np.full(4, -5.0))
    total = server.center + a.x + b.x
    for i in range(50):
        (a, b)[i % 2].exchange()
    np.testing.assert_allclose(server.center + a.x + b.x, total, rtol=0, atol=1e-14)
    np.testing.assert_allclose(a.x, b.x, rtol=0, atol=1e-3)


def test_an_exchange_leaves_one_minus_two_alpha_of_the_distance() -> None:
    server = served(np.zeros(1), workers=3)
    worker = Worker(server, "w0", np.array([2.0]))
    for number in range(1, 6):
        worker.exchange()
        np.testing.assert_allclose(worker.x - server.center, 2.0 * (1 - 2 * 0.3) ** number, rtol=1e-13)


def test_a_worker_that_comes_back_keeps_its_parameters() -> None:
    server = served(np.zeros(2), workers=2)
    server.leave(Worker(server, "w0", np.ones(2)).name)
    back = Worker(server, "w0", np.full(2, 3.0))
    np.testing.assert_allclose(back.exchange(), 0.45 * 3.0)
    np.testing.assert_allclose(back.x, 0.55 * 3.0)


@pytest.mark.parametrize(
    ("expected", "recompute", "live", "p"), [(8, False, 3, 8), (8, True, 3, 3), (None, False, 3, 3), (None, True, 1, 1)]
)
def test_p_is_who_is_expected_or_who_is_there(expected: int | None, recompute: bool, live: int, p: int) -> None:
    config = rules.configure(EASGD, {"recompute": recompute})
    decisions = EASGD.start(config, Terms(workers=expected))
    for i in range(live + 1):
        decisions, effects = EASGD.join(config, decisions, Member(f"w{i}"), 0.0)
        assert effects == []
    decisions, effects = EASGD.leave(config, decisions, f"w{live}", 0.0)
    assert effects == []
    assert decisions == {"expected": expected, "members": [f"w{i}" for i in range(live)]}
    _, effects = EASGD.admit(config, decisions, Facts("w0", 1, 1, 0, 0.0, 1, 0.1))
    match effects:
        case [Exchange(1.0, reason, (alpha,)), Reply("w0", "made")]:
            assert alpha == pytest.approx(0.9 / p)
            assert f"/ {p}" in reason
        case _:
            pytest.fail(repr(effects))
    assert EASGD.figures(config, decisions) == {"p": p, "alpha": pytest.approx(0.9 / p)}


def test_joining_twice_is_one_member() -> None:
    config = rules.configure(EASGD, {})
    decisions = EASGD.start(config, Terms())
    for _ in range(2):
        decisions, _ = EASGD.join(config, decisions, Member("w0"), 0.0)
    assert decisions["members"] == ["w0"]


def test_weight_scales_alpha() -> None:
    config = rules.configure(EASGD, {})
    c, out = np.zeros(1), np.zeros(1)
    session = EASGD.session(config, False, 1, np.float64)
    assert EASGD.propose is not None
    EASGD.propose(config, c, (), session, np.ones(1), 0.5, (0.3,), out)
    np.testing.assert_allclose(out, 0.15)


@pytest.mark.parametrize("overlap", [False, True])
def test_overlap_pushes_every_step_once(overlap: bool) -> None:
    """What all steps moved is what the center and the workers moved, together."""
    run = simulate(EASGD, rules.configure(EASGD, {}), Quadratic(), Cluster(lr=0.1, overlap=overlap), seed=3, pushes=200)
    together = run.server.center + sum(session.replica for session in run.server.sessions.values())
    start = 6 * Quadratic().initial()
    np.testing.assert_allclose(together - start, run.trained, rtol=0, atol=1e-11)


def test_words() -> None:
    assert (EASGD.private, EASGD.lost_reply, EASGD.rounds) == (True, "resend", False)
    assert EASGD.accept(rules.configure(EASGD, {}), OptimizerFacts("Adam", 1e-3, 0.0, 2)) is None
