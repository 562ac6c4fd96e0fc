"""Accumulated gradient normalisation: an update counts as the mean of the local steps in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common import rules
from common.replay import RuleServer
from common.rules.base import Apply, Facts, NoArrays, OptimizerFacts, Reply
from tests.rule_driver import Cluster, Quadratic, simulate

ADAG, DOWNPOUR = rules.load("adag"), rules.load("downpour")
CONFIG = rules.configure(ADAG, {})


def test_four_local_steps_count_as_one() -> None:
    server = RuleServer.start(ADAG, CONFIG, np.array([1.0, -2.0]))
    server.join("w0")
    result = server.push("w0", np.array([0.5, -1.0]), steps=4)
    np.testing.assert_allclose(result.replies["w0"], [1.125, -2.25], rtol=0, atol=1e-11)
    assert result.weight == 0.25


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_local_step_is_downpour(dtype: Any) -> None:
    random = np.random.default_rng(1)
    start, pushes = random.normal(size=33).astype(dtype), random.normal(size=(9, 33)).astype(dtype)
    ends = []
    for rule in (ADAG, DOWNPOUR):
        server = RuleServer.start(rule, rules.configure(rule, {}), start)
        server.join("w0")
        for d in pushes:
            server.push("w0", d, steps=1)
        ends.append(server.center.tobytes())
    assert ends[0] == ends[1]


def test_no_update_moves_the_center_further_than_its_longest_step() -> None:
    random = np.random.default_rng(2)
    for steps in (2, 5, 32):
        moves = random.normal(size=(steps, 10))
        server = RuleServer.start(ADAG, CONFIG, np.zeros(10))
        server.join("w0")
        server.push("w0", moves.sum(0), steps=steps)
        np.testing.assert_allclose(server.center, moves.mean(0), rtol=0, atol=1e-14)
        assert np.linalg.norm(server.center) <= np.linalg.norm(moves, axis=1).max()


def test_steps_are_counted_not_set() -> None:
    """With overlap an update has more steps than H, and each by a count of its own: the center takes their means."""
    quadratic = Quadratic()
    cluster = Cluster(step_s=(1.0,), delay_s=2.0, local_steps=4, lr=0.1, overlap=True)
    run = simulate(ADAG, CONFIG, quadratic, cluster, seed=3, pushes=400)
    assert len({exchange.steps for exchange in run.exchanges}) > 1
    assert quadratic.loss(run.server.center) < 0.01 * quadratic.loss(quadratic.initial())


def test_weight_scales_the_update() -> None:
    c, d = np.array([1.0, -2.0, 0.5]), np.array([4.0, 8.0, -16.0])
    assert ADAG.apply is not None
    ADAG.apply(CONFIG, c, NoArrays(), NoArrays(), d, 0.25, (), np.zeros(0))
    np.testing.assert_array_equal(c, [2.0, 0.0, -3.5])


@pytest.mark.parametrize(("steps", "weight"), [(0, 1.0), (1, 1.0), (4, 0.25), (8, 0.125)])
def test_admits_at_once_whatever_the_lag(steps: int, weight: float) -> None:
    """An update of no steps at all is zero; it is applied as any other."""
    for lag in (0, 1000):
        match ADAG.admit(CONFIG, None, Facts("w0", 1, steps, lag, 0.5, 32, 0.1)):
            case (None, [Apply(applied), Reply("w0", "after")]):
                assert applied == weight
            case other:
                pytest.fail(str(other))


def test_keeps_no_state_and_takes_any_inner_optimizer() -> None:
    assert ADAG.state(CONFIG, True, 7, np.float32) == ADAG.session(CONFIG, True, 7, np.float32) == ()
    for optimizer in (OptimizerFacts("Adam", 1e-3, 0.0, 2), OptimizerFacts("SGD", 0.1, 0.9, 1)):
        assert ADAG.accept(CONFIG, optimizer) is None
