"""FedBuff: the center is what a plain loop over the paper's equation makes of the same pushes, and nobody waits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from common import rules
from common.replay import RuleServer
from common.rules.base import Accumulate, Close, Facts, Floats, NoArrays, OptimizerFacts, Reply, Terms, perform
from tests.rule_driver import Cluster, Quadratic, simulate

FEDBUFF, DOWNPOUR = rules.load("fedbuff"), rules.load("downpour")
EXACT = 1e-11


def served(center: Floats, *, workers: int = 1, **configured: Any) -> RuleServer:
    """A server at `center` that workers w0, w1 ... have joined."""
    server = RuleServer.start(FEDBUFF, rules.configure(FEDBUFF, configured), center)
    for i in range(workers):
        server.join(f"w{i}")
    return server


@pytest.mark.parametrize(("k", "a", "server_lr"), [(1, 0.5, 1.0), (3, 0.5, 1.0), (4, 0.0, 0.3), (10, 1.0, 2.0)])
def test_against_a_plain_loop(k: int, a: float, server_lr: float) -> None:
    random = np.random.default_rng(k)
    start = random.normal(size=20)
    pushes = [(int(random.choice(5, p=(0.4, 0.3, 0.2, 0.08, 0.02))), random.normal(size=20)) for _ in range(80)]
    server = served(start, workers=5, K=k, a=a, server_lr=server_lr)

    center, step, buffer = start.copy(), 0, []
    began = [0] * 5
    lags = set()
    for worker, d in pushes:
        lags.add(step - began[worker])
        buffer.append((1 + step - began[worker]) ** -a * d)
        if len(buffer) == k:
            center, step, buffer = center + server_lr / k * sum(buffer), step + 1, []
        began[worker] = step
        result = server.push(f"w{worker}", d)
        assert result.outcome == "applied"
        np.testing.assert_allclose(result.replies[f"w{worker}"], center, rtol=0, atol=EXACT)
        assert server.version == step
    assert len(lags) > 2, "updates of different ages were in it"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_buffer_of_one_without_lag_is_downpour(dtype: Any) -> None:
    random = np.random.default_rng(1)
    start, pushes = random.normal(size=33).astype(dtype), random.normal(size=(9, 33)).astype(dtype)
    one = served(start, K=1, server_lr=1.0)
    plain = RuleServer.start(DOWNPOUR, rules.configure(DOWNPOUR, {}), start)
    plain.join("w0")
    for d in pushes:
        one.push("w0", d)
        plain.push("w0", d)
    assert one.center.tobytes() == plain.center.tobytes()


def test_without_exponent_a_buffer_is_a_mean_in_any_order() -> None:
    updates = np.array([[1.0, -4.0], [2.0, 8.0], [-6.0, 5.0]])
    for order in itertools.permutations(range(3)):
        server = served(np.zeros(2), workers=3, K=3, a=0.0, server_lr=0.5)
        for i in order:
            server.push(f"w{i}", updates[i])
        np.testing.assert_allclose(server.center, 0.5 * updates.mean(0), rtol=0, atol=1e-15)


def test_it_is_divided_by_k_and_not_by_the_weights() -> None:
    """w1 is three changes behind: its update counts half, and the buffer moves the center by that much less."""
    server = served(np.zeros(1), workers=2, K=1)
    for _ in range(3):
        server.push("w0", np.zeros(1))
    assert server.push("w1", np.ones(1)).weight == 0.5
    np.testing.assert_array_equal(server.center, 0.5)


def test_nobody_waits_and_who_leaves_leaves_its_update() -> None:
    server = served(np.zeros(2), workers=2, K=3)
    server.push("w0", np.full(2, 3.0))
    server.leave("w0")
    np.testing.assert_array_equal(server.push("w1", np.full(2, 6.0)).replies["w1"], 0.0)
    assert not server.held
    np.testing.assert_allclose(server.push("w1", np.zeros(2)).replies["w1"], 3.0, rtol=0, atol=1e-15)
    assert not server.state.sum.any(), "the buffer is empty again"


def test_weight_scales_the_update() -> None:
    config = rules.configure(FEDBUFF, {})
    c, d = np.ones(3), np.array([4.0, 8.0, -16.0])
    state = FEDBUFF.state(config, False, 3, np.float64)
    perform(FEDBUFF, config, [Accumulate(0.25, "of age")], c, state, NoArrays(), d, np.zeros(0))
    np.testing.assert_array_equal(state.sum, [1.0, 2.0, -4.0])
    np.testing.assert_array_equal(c, 1.0)


def test_decisions_count_to_k() -> None:
    config = rules.configure(FEDBUFF, {"K": 2})
    decisions = FEDBUFF.start(config, Terms())
    decisions, effects = FEDBUFF.admit(config, decisions, Facts("w0", 1, 1, 3, 0.5, 32, 0.1))
    assert decisions == {"buffered": 1}
    assert [type(effect) for effect in effects] == [Accumulate, Reply]
    decisions, effects = FEDBUFF.admit(config, decisions, Facts("w1", 1, 1, 0, 0.5, 32, 0.1))
    assert decisions == {"buffered": 0}
    assert [type(effect) for effect in effects] == [Accumulate, Close, Reply]
    assert FEDBUFF.leave(config, decisions, "w0", 0.0) == (decisions, [])


@pytest.mark.parametrize("overlap", [False, True])
def test_converges_whatever_the_buffer(overlap: bool) -> None:
    objective = Quadratic()
    for k in (1, 5):
        config = rules.configure(FEDBUFF, {"K": k})
        run = simulate(FEDBUFF, config, objective, Cluster(lr=0.1, overlap=overlap), seed=3, pushes=1, changes=1000)
        assert objective.loss(run.server.center) < 0.01 * objective.loss(objective.initial())


def test_takes_any_inner_optimizer_and_any_terms() -> None:
    config = rules.configure(FEDBUFF, {})
    assert FEDBUFF.accept(config, OptimizerFacts("AdamW", 1e-3, 0.0, 2)) is None
    assert FEDBUFF.fits(config, Terms(64, overlap=True, lossless=False)) is None
