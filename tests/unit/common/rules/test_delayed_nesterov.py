"""Delayed Nesterov through its production kernels: published numbers, a transcription, and the limits it has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from common import rules
from common.errors import ConfigError
from common.replay import RuleServer
from common.rules.base import Apply, Facts, Floats, NoArrays, OptimizerFacts, Reply, Terms

DELAYED, DOWNPOUR = rules.load("delayed_nesterov"), rules.load("downpour")
EXACT = 1e-11


def served(center: Floats, *, workers: int = 1, **configured: Any) -> RuleServer:
    """A server at `center` that workers w0, w1 ... have joined."""
    server = RuleServer.start(DELAYED, rules.configure(DELAYED, configured), center)
    for i in range(workers):
        server.join(f"w{i}")
    return server


def test_four_pushes_by_two() -> None:
    """lr .5, mu .9, N 2, c_coef 0, from 0, g = 1, 2, 3, 4: (push, center, m)."""
    rows = [(0, -0.25, 0.0), (1, -1.425, 1.5), (2, -2.175, 1.5), (3, -5.3575, 4.85)]
    server = served(np.zeros(1), N=2, lr=0.5, mu=0.9)
    for push, center, m in rows:
        server.push("w0", np.array([-(push + 1.0)]))
        np.testing.assert_allclose(server.center, center, rtol=0, atol=EXACT)
        np.testing.assert_allclose(server.state.m, m, rtol=0, atol=EXACT)


def transcribed(center: Floats, gradients: Floats, *, n: int, lr: float, mu: float, c: float) -> tuple[Floats, Floats]:
    """Center and momentum after all gradients: the paper's algorithm with its counter t from 0."""
    m, gathered = np.zeros_like(center), np.zeros_like(center)
    for t, g in enumerate(gradients):
        gathered = gathered + g
        if (t + 1) % n == 0:
            m = mu * m + gathered / n
            center = center - lr * ((1 - c * n + c) * mu * m + g / n)
            gathered = np.zeros_like(center)
        else:
            center = center - lr * (c * mu * m + g / n)
    return center, m


@pytest.mark.parametrize(("n", "c"), [(1, 0.0), (1, 1.0), (2, 0.5), (4, 0.0), (4, 0.1), (4, 0.25), (5, 0.2)])
def test_against_a_transcription(n: int, c: float) -> None:
    """Whoever pushes: all count to N together."""
    random = np.random.default_rng(n)
    start, gradients = random.normal(size=20), random.normal(size=(23, 20))
    server = served(start, workers=3, N=n, lr=0.3, mu=0.8, c_coef=c)
    for done, g in enumerate(gradients, start=1):
        server.push(f"w{random.integers(3)}", -g)
        center, m = transcribed(start, gradients[:done], n=n, lr=0.3, mu=0.8, c=c)
        np.testing.assert_allclose(server.center, center, rtol=0, atol=EXACT)
        np.testing.assert_allclose(server.state.m, m, rtol=0, atol=EXACT)


@pytest.mark.parametrize("c_coef", [0.0, 0.5, 1.0])
def test_every_push_the_last_is_nesterov_as_torch_has_it(c_coef: float) -> None:
    random = np.random.default_rng(3)
    start, gradients = random.normal(size=9), random.normal(size=(12, 9))
    server = served(start, N=1, lr=0.7, mu=0.9, c_coef=c_coef)
    x = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.7, momentum=0.9, nesterov=True)
    for g in gradients:
        server.push("w0", -g)
        x.grad = torch.tensor(g)
        optimizer.step()
    np.testing.assert_allclose(server.center, x.detach().numpy(), rtol=0, atol=EXACT)


def test_without_momentum_it_is_scaled_downpour() -> None:
    random = np.random.default_rng(4)
    start, pushes = random.normal(size=9), random.normal(size=(10, 9))
    server = served(start, N=4, lr=0.5, mu=0.0, c_coef=0.25)
    plain = RuleServer.start(DOWNPOUR, rules.configure(DOWNPOUR, {}), start)
    plain.join("w0")
    for d in pushes:
        server.push("w0", d)
        plain.push("w0", 0.5 / 4 * d)
    np.testing.assert_allclose(server.center, plain.center, rtol=0, atol=EXACT)


@pytest.mark.parametrize("c_coef", [0.0, 0.1, 0.25])
def test_shares_of_the_momentum_add_up_to_one(c_coef: float) -> None:
    """Zero updates show the momentum alone; m decays at the N-th push, before its share is taken."""
    server = served(np.zeros(1), N=4, lr=1.0, mu=0.5, c_coef=c_coef)
    server.state.m[:] = 1.0
    for _ in range(4):
        server.push("w0", np.zeros(1))
    at_the_last = 1 - 3 * c_coef
    np.testing.assert_allclose(server.center, -0.5 * (3 * c_coef + at_the_last * 0.5), rtol=0, atol=EXACT)


@pytest.mark.parametrize("last", [0.0, 1.0])
def test_weight_scales_the_update_and_never_the_momentum(last: float) -> None:
    """The same as an update that is smaller by that much."""
    random = np.random.default_rng(5)
    c, m, gathered, d = (random.normal(size=7) for _ in range(4))
    config = rules.configure(DELAYED, {"c_coef": 0.1})
    assert DELAYED.apply is not None
    ends = []
    for weight, update in ((0.25, d), (1.0, 0.25 * d)):
        center, state = c.copy(), DELAYED.state(config, False, 7, np.float64)
        state.m[:], state.sum[:] = m, gathered
        DELAYED.apply(config, center, state, NoArrays(), update, weight, (last,), np.zeros(0))
        ends.append([center, *state])
    np.testing.assert_array_equal(ends[0], ends[1])


# Decisions and words.


def test_counts_to_n_over_all_workers_and_leaves() -> None:
    config = rules.configure(DELAYED, {"N": 3})
    decisions = DELAYED.start(config, Terms())
    seen = []
    for number, worker in enumerate(["w0", "w1", "w0", "w2", "w1", "w1", "w0"]):
        decisions, effects = DELAYED.admit(config, decisions, Facts(worker, number, 8, number, 0.5, 32, 0.1))
        match effects:
            case [Apply(1.0, reason, (last,)), Reply(answered, "after")]:
                assert answered == worker
                assert "of 3" in reason
                seen.append((decisions["pushes"], last))
            case _:
                pytest.fail(str(effects))
        assert DELAYED.leave(config, decisions, worker, 0.0) == (decisions, [])
    assert seen == [(1, 0.0), (2, 0.0), (0, 1.0), (1, 0.0), (2, 0.0), (0, 1.0), (1, 0.0)]


@pytest.mark.parametrize(("n", "c_coef"), [(4, 0.26), (2, 0.6), (65_536, 0.01)])
def test_share_beyond_one_over_n_is_refused(n: int, c_coef: float) -> None:
    with pytest.raises(ConfigError) as caught:
        rules.configure(DELAYED, {"N": n, "c_coef": c_coef})
    for words in (f"'c_coef' of rule 'delayed_nesterov' cannot be {c_coef}", f"{n} pushes", f"{1 / n:.12g} at most"):
        assert words in str(caught.value)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 49, 1000])
def test_share_of_one_over_n_is_taken_whatever_the_order_of_the_settings(n: int) -> None:
    for settings in ({"N": n, "c_coef": 1 / n}, {"c_coef": 1 / n, "N": n}):
        assert rules.configure(DELAYED, settings).model_dump()["c_coef"] == 1 / n


def test_takes_any_inner_optimizer_and_any_terms() -> None:
    config = rules.configure(DELAYED, {})
    assert DELAYED.accept(config, OptimizerFacts("AdamW", 1e-3, 0.0, 2)) is None
    assert DELAYED.fits(config, Terms(64, overlap=True, lossless=False)) is None
