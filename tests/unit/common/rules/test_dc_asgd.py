"""DC-ASGD through its production kernels: numbers worked out by hand, the limits in which it is `downpour`, and a
transcription in plain numpy that shares nothing with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common import rules
from common.replay import RuleServer
from common.rules.base import Apply, Facts, Floats, NoArrays, OptimizerFacts, Reply, Terms
from tests.rule_driver import Cluster, Quadratic, simulate

DC_ASGD, DOWNPOUR = rules.load("dc_asgd"), rules.load("downpour")
EXACT = 1e-11
VARIANTS = ("constant", "adaptive")


def served(center: Floats, *, workers: int = 2, **configured: Any) -> RuleServer:
    """A server at `center` that workers w0, w1 ... have joined."""
    server = RuleServer.start(DC_ASGD, rules.configure(DC_ASGD, configured), center)
    for i in range(workers):
        server.join(f"w{i}")
    return server


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"variant": "constant", "lambda_constant": 2.0}, 1.14),
        ({"variant": "adaptive", "lambda_0": 2.0, "m": 0.95}, 1.060557638668738),
    ],
    ids=VARIANTS,
)
def test_one_compensated_gradient(settings: dict[str, Any], expected: float) -> None:
    """g = .5 taken at 1.0, lr .1; meanwhile w1 moved the center to 1.2."""
    server = served(np.ones(1), **settings)
    server.push("w1", np.array([0.2]), lr=0.1)
    np.testing.assert_allclose(server.center, 1.2, rtol=0, atol=1e-15)
    server.push("w0", np.array([-0.05]), lr=0.1)
    np.testing.assert_allclose(server.center, expected, rtol=0, atol=EXACT)


def transcribed(
    center: Floats, pushes: list[tuple[int, Floats, float]], *, workers: int, variant: str, scale: float, m: float
) -> Floats:
    """The center after pushes of (worker, gradient, lr)."""
    b, ms = [center] * workers, [np.zeros_like(center)] * workers
    for worker, g, lr in pushes:
        ms[worker] = m * ms[worker] + (1 - m) * g**2
        lambda_t = scale if variant == "constant" else scale / np.sqrt(ms[worker] + 1e-7)
        center = center - lr * (g + lambda_t * g * g * (center - b[worker]))
        b[worker] = center
    return center


@pytest.mark.parametrize("variant", VARIANTS)
def test_many_workers_and_rates(variant: str) -> None:
    """Backup and mean square are each worker's own; the rate is that of the push."""
    random = np.random.default_rng(9)
    start = random.normal(size=20)
    pushes = [(int(random.integers(3)), random.normal(size=20), float(random.uniform(0.01, 0.1))) for _ in range(30)]
    server = served(start, workers=3, variant=variant, lambda_constant=0.7, lambda_0=0.7, m=0.8)
    for done, (worker, g, lr) in enumerate(pushes, start=1):
        server.push(f"w{worker}", -lr * g, lr=lr)
        expected = transcribed(start, pushes[:done], workers=3, variant=variant, scale=0.7, m=0.8)
        np.testing.assert_allclose(server.center, expected, rtol=0, atol=EXACT)


# Where it is `downpour`.


def as_downpour(order: list[str], dtype: Any, **configured: Any) -> bool:
    """Whether the same pushes in this order end in the same bits."""
    random = np.random.default_rng(4)
    start, pushes = random.normal(size=33).astype(dtype), random.normal(size=(len(order), 33)).astype(dtype)
    server = served(start, **configured)
    plain = RuleServer.start(DOWNPOUR, rules.configure(DOWNPOUR, {}), start)
    for worker in ("w0", "w1"):
        plain.join(worker)
    for worker, d in zip(order, pushes, strict=True):
        server.push(worker, d, lr=0.1)
        plain.push(worker, d, lr=0.1)
    return server.center.tobytes() == plain.center.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_compensation_or_delay_it_is_downpour(variant: str, dtype: Any) -> None:
    taking_turns = ["w0", "w1", "w1", "w0", "w1", "w0"]
    assert as_downpour(taking_turns, dtype, variant=variant, lambda_constant=0.0, lambda_0=0.0)
    assert as_downpour(["w0"] * 6, dtype, variant=variant)
    assert not as_downpour(taking_turns, dtype, variant=variant), "the compensation counts"


# Laws.


def test_compensation_is_linear_in_the_delay_and_even_in_the_gradient() -> None:
    def compensation(moved: float, g: float) -> float:
        server = served(np.zeros(1), lambda_constant=0.5)
        server.push("w1", np.array([moved]), lr=0.1)
        server.push("w0", np.array([-0.1 * g]), lr=0.1)
        return float(server.center[0] - moved + 0.1 * g)

    one = compensation(0.3, 2.0)
    np.testing.assert_allclose(one, -0.1 * 0.5 * 2.0**2 * 0.3, rtol=1e-12)
    np.testing.assert_allclose(compensation(0.9, 2.0), 3 * one, rtol=1e-12)
    np.testing.assert_allclose(compensation(0.3, -2.0), one, rtol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rate_of_zero_changes_nothing(variant: str) -> None:
    """There is no gradient in the update; the reply is the center, and the next delay counts from it."""
    server = served(np.ones(3), variant=variant)
    server.push("w0", np.full(3, -0.1), lr=0.1)
    server.push("w1", np.full(3, 0.5), lr=0.1)
    center, ms = server.center.copy(), [array.copy() for array in server.sessions["w0"][1:]]
    result = server.push("w0", np.zeros(3), lr=0.0)
    np.testing.assert_array_equal(server.center, center)
    np.testing.assert_array_equal(result.replies["w0"], center)
    np.testing.assert_array_equal(server.sessions["w0"].b, center)
    np.testing.assert_array_equal(server.sessions["w0"][1:], ms)
    assert result.weight == 0.0


def test_who_is_given_the_center_is_measured_from_it() -> None:
    """At join, with the reply to a push, and where a reply comes later than its push."""
    server = served(np.zeros(2), variant="adaptive")
    server.push("w1", np.ones(2), lr=0.1)
    np.testing.assert_array_equal(server.sessions["w0"].b, 0.0)
    np.testing.assert_array_equal(server.sessions["w1"].b, server.center)
    session = server.sessions["w0"]
    assert DC_ASGD.given is not None
    DC_ASGD.given(server.config, server.center, session)
    np.testing.assert_array_equal(session.b, server.center)
    server.push("w0", np.ones(2), lr=0.1)
    given = server.join("w0")
    np.testing.assert_array_equal(server.sessions["w0"].b, given)
    assert not server.sessions["w0"].ms.any(), "a new session knows no gradients"


@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_scales_what_the_center_moves_by_and_no_mean_square(variant: str) -> None:
    random = np.random.default_rng(6)
    c, b, d = (random.normal(size=7) for _ in range(3))
    config = rules.configure(DC_ASGD, {"variant": variant})
    assert DC_ASGD.apply is not None
    moved, kept = [], []
    for weight in (1.0, 0.25):
        center, session = c.copy(), DC_ASGD.session(config, False, 7, np.float64)
        session.b[:] = b
        DC_ASGD.apply(config, center, NoArrays(), session, d, weight, (0.1,), np.zeros(0))
        moved.append(center - c)
        kept.append(session[1:])
    np.testing.assert_allclose(moved[1], 0.25 * moved[0], rtol=0, atol=1e-13)
    np.testing.assert_array_equal(kept[0], kept[1])


def test_compensation_helps_where_the_curvature_is_as_it_assumes() -> None:
    """On f = -log(x) the Hessian is g g: at lambda 1 a stale gradient is corrected to second order in the delay."""
    at, now, lr = 1.0, 1.05, 0.01
    errors = []
    for lambda_constant in (0.0, 1.0):
        server = served(np.array([at]), lambda_constant=lambda_constant)
        server.push("w1", np.array([now - at]), lr=lr)
        server.push("w0", np.array([lr / at]), lr=lr)
        errors.append(abs(server.center[0] - (now + lr / now)))
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_variants_converge(variant: str) -> None:
    """At twice this rate `adaptive` diverges here, five workers wide, where `constant` does not."""
    config = rules.configure(DC_ASGD, {"variant": variant})
    objective = Quadratic()
    run = simulate(DC_ASGD, config, objective, Cluster(lr=0.1), seed=2, pushes=2000)
    assert objective.loss(run.server.center) < 0.01 * objective.loss(objective.initial())


# Decisions and words.


def test_the_kernel_is_told_the_rate() -> None:
    config = rules.configure(DC_ASGD, {})
    for lag in (0, 7):
        match DC_ASGD.admit(config, None, Facts("w0", 1, 1, lag, 0.5, 32, 0.05)):
            case (None, [Apply(1.0, reason, (0.05,)), Reply("w0", "after")]):
                assert f"{lag} versions" in reason
            case other:
                pytest.fail(str(other))


@pytest.mark.parametrize(
    ("optimizer", "named"),
    [
        (OptimizerFacts("Adam", 1e-3, 0.0, 1), "Adam"),
        (OptimizerFacts("SGD", 0.05, 0.9, 1), "SGD with momentum 0.9"),
        (OptimizerFacts("SGD", 0.05, 0.0, 3), "SGD with 3 parameter groups"),
    ],
)
def test_other_optimizers_are_refused(optimizer: OptimizerFacts, named: str) -> None:
    sentence = DC_ASGD.accept(rules.configure(DC_ASGD, {}), optimizer)
    assert sentence is not None
    for words in ("'dc_asgd'", named, "plain SGD", "one learning rate", "torch.optim.SGD(lr=...)"):
        assert words in sentence
    assert DC_ASGD.accept(rules.configure(DC_ASGD, {}), OptimizerFacts("SGD", 0.05, 0.0, 1)) is None


@pytest.mark.parametrize(("terms", "named"), [(Terms(4), "local_steps = 4"), (Terms(overlap=True), "overlap")])
def test_more_steps_and_overlap_are_refused(terms: Terms, named: str) -> None:
    sentence = DC_ASGD.fits(rules.configure(DC_ASGD, {}), terms)
    assert sentence is not None
    for words in ("'dc_asgd'", f"cannot run with {named}", "Set local_steps = 1 and overlap = false"):
        assert words in sentence
    assert DC_ASGD.fits(rules.configure(DC_ASGD, {}), Terms(workers=8, lossless=False)) is None
