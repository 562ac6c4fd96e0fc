"""DynSGD: an update counts the less the more the center changed since it was begun."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common import rules
from common.replay import RuleServer
from common.rules.base import Apply, Facts, NoArrays, OptimizerFacts, Reply

DYNSGD, DOWNPOUR = rules.load("dynsgd"), rules.load("downpour")
CONFIG = rules.configure(DYNSGD, {})


def test_three_versions_behind_counts_a_quarter() -> None:
    """tau = 3, D = -.05: the center moves by -.0125."""
    server = RuleServer.start(DYNSGD, CONFIG, np.ones(1))
    server.join("w0")
    server.join("w1")
    for _ in range(3):
        server.push("w1", np.zeros(1))
    result = server.push("w0", np.array([-0.05]))
    np.testing.assert_allclose(server.center - 1.0, -0.0125, rtol=0, atol=1e-11)
    assert result.weight == 0.25


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_without_lag_it_is_downpour(dtype: Any) -> None:
    random = np.random.default_rng(1)
    start, pushes = random.normal(size=33).astype(dtype), random.normal(size=(9, 33)).astype(dtype)
    ends = []
    for rule in (DYNSGD, DOWNPOUR):
        server = RuleServer.start(rule, rules.configure(rule, {}), start)
        server.join("w0")
        for d in pushes:
            server.push("w0", d)
        ends.append(server.center.tobytes())
    assert ends[0] == ends[1]


@pytest.mark.parametrize("n", [2, 5])
def test_workers_in_turn_move_the_center_by_their_share(n: int) -> None:
    """From the second round on each is n - 1 behind."""
    random = np.random.default_rng(n)
    server = RuleServer.start(DYNSGD, CONFIG, np.zeros(6))
    for i in range(n):
        server.join(f"w{i}")
    for i in range(n):
        result = server.push(f"w{i}", np.ones(6))
        assert result.weight == 1 / (i + 1)
    after_first, pushes = server.center.copy(), random.normal(size=(4 * n, 6))
    for t, d in enumerate(pushes):
        server.push(f"w{t % n}", d)
    np.testing.assert_allclose(server.center - after_first, pushes.sum(0) / n, rtol=0, atol=1e-13)


def test_a_worker_that_joins_late_is_not_behind() -> None:
    server = RuleServer.start(DYNSGD, CONFIG, np.zeros(2))
    server.join("w0")
    for _ in range(5):
        server.push("w0", np.ones(2))
    server.join("w1")
    assert server.push("w1", np.ones(2)).weight == 1.0


def test_weight_scales_the_update() -> None:
    c, d = np.array([1.0, -2.0, 0.5]), np.array([4.0, 8.0, -16.0])
    assert DYNSGD.apply is not None
    DYNSGD.apply(CONFIG, c, NoArrays(), NoArrays(), d, 0.25, (), np.zeros(0))
    np.testing.assert_array_equal(c, [2.0, 0.0, -3.5])


def test_answers_with_the_center_after_whatever_the_lag() -> None:
    for lag in (0, 1, 999):
        match DYNSGD.admit(CONFIG, None, Facts("w0", 1, 1, lag, 0.5, 32, 0.1)):
            case (None, [Apply(weight, reason), Reply("w0", "after")]):
                assert weight == 1 / (lag + 1)
                assert str(lag) in reason
            case other:
                pytest.fail(str(other))


def test_keeps_no_state_and_takes_any_inner_optimizer() -> None:
    assert DYNSGD.state(CONFIG, True, 7, np.float32) == DYNSGD.session(CONFIG, True, 7, np.float32) == ()
    for optimizer in (OptimizerFacts("Adam", 1e-3, 0.0, 2), OptimizerFacts("SGD", 0.1, 0.9, 1)):
        assert DYNSGD.accept(CONFIG, optimizer) is None
