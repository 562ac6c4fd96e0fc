"""DOWNPOUR: the center is the sum of all updates, and one worker alone is what it would be without a server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from common import rules
from common.replay import RuleServer
from common.rules.base import Apply, Facts, Floats, NoArrays, OptimizerFacts, Reply
from tests.rule_driver import Cluster, Quadratic, simulate, trained_alone, trained_with_server

DOWNPOUR = rules.load("downpour")
CONFIG = rules.configure(DOWNPOUR, {})

whole_numbers = arrays_of.arrays(np.float64, 5, elements=st.integers(-1000, 1000).map(float))

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["f32", "f64"])
@pytest.mark.parametrize("local_steps", [1, 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_worker_is_plain_torch(optimizer: str, local_steps: int, dtype: torch.dtype, tolerance: float) -> None:
    """Whatever the inner optimizer: its state is the worker's own, and no merge touches it."""
    make = OPTIMIZERS[optimizer]
    center = trained_with_server(DOWNPOUR, CONFIG, make, dtype=dtype, local_steps=local_steps)
    expected = trained_alone(make, dtype=dtype)
    assert np.linalg.norm(center - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("local_steps", [1, 4])
def test_one_worker_with_overlap_pushes_every_step_once(local_steps: int) -> None:
    """A message takes longer than a step, so that progress is always in flight."""
    quadratic = Quadratic()
    cluster = Cluster(step_s=(1.0,), delay_s=2.0, local_steps=local_steps, lr=0.1, overlap=True)
    run = simulate(DOWNPOUR, CONFIG, quadratic, cluster, seed=6, pushes=60)
    steps = sum(exchange.steps for exchange in run.exchanges)
    assert steps > 60 * local_steps

    x = quadratic.initial()
    for _ in range(steps):
        x -= 0.1 * quadratic.gradient(x, np.random.default_rng(0))
    np.testing.assert_allclose(run.server.center, x, rtol=1e-12)


@pytest.mark.parametrize("overlap", [False, True])
def test_nothing_is_lost_between_many_workers(overlap: bool) -> None:
    """What all steps moved is what the center moved."""
    run = simulate(DOWNPOUR, CONFIG, Quadratic(), Cluster(lr=0.1, overlap=overlap), seed=7, pushes=500)
    np.testing.assert_allclose(run.server.center - Quadratic().initial(), run.trained, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(run.pushed, run.trained, rtol=1e-12, atol=1e-13)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(whole_numbers, st.lists(st.tuples(st.integers(0, 2), whole_numbers), max_size=8))
def test_center_is_the_sum_in_any_order(start: Floats, pushes: list[tuple[int, Floats]]) -> None:
    """On whole numbers there is no rounding, and the order cannot be seen."""
    ends = []
    for order in (pushes, pushes[::-1]):
        server = RuleServer.start(DOWNPOUR, CONFIG, start)
        for i in range(3):
            server.join(f"w{i}")
        for worker, d in order:
            result = server.push(f"w{worker}", d)
            assert result.outcome == "applied"
            np.testing.assert_array_equal(result.replies[f"w{worker}"], server.center)
        ends.append(server.center)
        assert server.version == len(pushes)
    np.testing.assert_array_equal(ends[0], start + sum((d for _, d in pushes), np.zeros(5)))
    np.testing.assert_array_equal(ends[0], ends[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weight_scales_the_update(dtype: Any) -> None:
    c, d = np.array([1.0, -2.0, 0.5], dtype), np.array([4.0, 8.0, -16.0], dtype)
    assert DOWNPOUR.apply is not None
    DOWNPOUR.apply(CONFIG, c, NoArrays(), NoArrays(), d, 0.25, (), np.zeros(0))
    np.testing.assert_array_equal(c, [2.0, 0.0, -3.5])


def test_keeps_no_state_and_has_nothing_of_its_own_to_set_or_say() -> None:
    assert DOWNPOUR.state(CONFIG, True, 7, np.float32) == ()
    assert DOWNPOUR.session(CONFIG, True, 7, np.float32) == ()
    assert CONFIG.model_dump() == {}
    assert DOWNPOUR.details(CONFIG, np.zeros((3, 0))) == {}


def test_admits_at_once_and_answers_with_the_center_after() -> None:
    for lag in (0, 1, 1000):
        decisions, effects = DOWNPOUR.admit(CONFIG, None, Facts("w0", 1, 1, lag, 0.5, 32, 0.1))
        match effects:
            case [Apply(1.0), Reply("w0", "after")]:
                pass
            case _:
                pytest.fail(f"lag {lag}: {effects}")
        assert DOWNPOUR.leave(CONFIG, decisions, "w0", 0.0) == (decisions, [])


def test_takes_any_inner_optimizer() -> None:
    for optimizer in (OptimizerFacts("Adam", 1e-3, 0.0, 2), OptimizerFacts("SGD", 0.1, 0.9, 1)):
        assert DOWNPOUR.accept(CONFIG, optimizer) is None
