"""GEM through its production kernels: the vectors, the laws of its header, and momentum SGD as its own special case.

Laws
* Every vector in `tests/golden/gem.json` holds in float64 to 1e-11 absolute (they carry an epsilon of 1e-12 that the
  division-free kernel does not have); digits printed in text hold as printed.
* What no vector covers is compared with a transcription in plain numpy that stands here and shares nothing with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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

GEM = rules.load("gem")
VECTORS = json.loads((Path(__file__).parents[3] / "golden" / "gem.json").read_text())
EXACT = 1e-11
PRINTED = 5.1e-11
"""Half a unit of the tenth decimal, the last that is printed."""

property_test = settings(max_examples=100, deadline=None, derandomize=True)


def served(center: Floats, *, workers: int = 1, overlap: bool = False, **configured: Any) -> RuleServer:
    """A server at `center` that workers w0, w1 ... have joined."""
    server = RuleServer.start(GEM, rules.configure(GEM, configured), center, overlap=overlap)
    for i in range(workers):
        server.join(f"w{i}")
    return server


class Commit(NamedTuple):
    """One update and what became of it; all (n,)."""

    worker: int
    delta: Floats
    m: Floats
    shift: Floats
    u: Floats
    theta: Floats


def round_robin(server: RuleServer, gradient: Callable[[Floats], Floats], *, lr: float, commits: int) -> list[Commit]:
    """Workers push in turn, each one gradient step from the reply to its last push."""
    n = len(server.sessions)
    held = [server.center.copy() for _ in range(n)]
    made = []
    for t in range(commits):
        worker, session = t % n, server.sessions[f"w{t % n}"]
        delta, before, s = -lr * gradient(held[worker]), server.center.copy(), session.s.copy()
        held[worker] = server.push(f"w{worker}", delta, lr=lr).replies[f"w{worker}"]
        theta = server.center.copy()
        made.append(Commit(worker, delta, session.m.copy(), before - s, theta - before, theta))
    return made


def close(mine: Any, expected: Any, atol: float = EXACT) -> None:
    np.testing.assert_allclose(mine, expected, rtol=0, atol=atol)


# Vectors.


@pytest.mark.parametrize("kappa", [1, 2])
def test_tv1_one_step(kappa: int) -> None:
    vector = {name: np.array(column) for name, column in VECTORS[f"TV1_kappa{kappa}"].items()}
    server = served(vector["theta"], kappa=kappa)
    session = server.sessions["w0"]
    session.m[:], session.s[:] = vector["m_prev"], vector["s"]
    close(-0.05 * vector["g"], vector["delta"])
    close(server.center - session.s, vector["shift"])

    server.push("w0", vector["delta"])

    close(session.m, vector["m"])
    close(server.center - vector["theta"], vector["update_code"])
    close(server.center, vector["theta_after"])
    np.testing.assert_array_equal(session.s, vector["theta"])


CURVATURE = np.array([1.0, 10.0])
FROM = np.array([1.0, -1.0])


def test_tv2_two_workers_on_a_quadratic() -> None:
    commits = round_robin(served(FROM, workers=2), lambda x: CURVATURE * x, lr=0.05, commits=6)
    for commit, row in zip(commits, VECTORS["TV2_code"], strict=True):
        assert commit.worker == row["worker"]
        close(commit.delta, row["delta"])
        close(commit.m, row["m"])
        close(commit.shift, row["shift"])
        close(commit.u, row["u"])
        close(commit.u / commit.delta, row["pi"], atol=1e-10)  # epsilon / |D| is above 1e-11 here
        close(commit.theta, row["theta"])
        close(CURVATURE @ commit.theta**2 / 2, row["loss"], atol=2e-11)  # its slope is 5 at the first


def algorithm_1(theta: Floats, *, lr: float, mu: float, workers: int, commits: int) -> list[Commit]:
    """Algorithm 1 of the paper, line by line, on the quadratic with `CURVATURE`."""
    s = [theta for _ in range(workers)]
    m = [np.zeros_like(theta) for _ in range(workers)]
    made = []
    for t in range(commits):
        w = t % workers
        delta = -lr * (CURVATURE * s[w])
        pulled = theta
        m[w] = mu * m[w] + delta
        pi = (np.abs(m[w]) - np.abs(pulled - s[w])) / (np.abs(delta) + 1e-16)
        theta = pulled + pi * delta
        made.append(Commit(w, delta, m[w], pulled - s[w], pi * delta, theta))
        s[w] = pulled
    return made


def test_tv2_paper_variant_to_the_printed_digits() -> None:
    server = served(FROM, workers=2, variant="paper")
    commits = round_robin(server, lambda x: CURVATURE * x, lr=0.05, commits=6)
    for commit, row in zip(commits, VECTORS["TV2_paper"], strict=True):
        assert commit.worker == row["worker"]
        for name in ("m", "shift", "theta"):
            close(getattr(commit, name), row[name], atol=PRINTED)
        close(commit.u / commit.delta, row["pi"], atol=PRINTED)


def test_paper_variant_is_algorithm_1() -> None:
    server = served(FROM, workers=2, variant="paper")
    commits = round_robin(server, lambda x: CURVATURE * x, lr=0.05, commits=40)
    for mine, theirs in zip(commits, algorithm_1(FROM, lr=0.05, mu=0.9, workers=2, commits=40), strict=True):
        for one, other in zip(mine, theirs, strict=True):
            close(one, other)


@pytest.mark.parametrize("n", [1, 2, 10])
def test_tv3_constant_gradient(n: int) -> None:
    rows = VECTORS[f"TV3_n{n}"]
    commits = round_robin(served(np.zeros(1), workers=n), np.ones_like, lr=0.05, commits=400 * n)
    last = commits[-n:]
    # The vectors' epsilon of 1e-12 beside |D| is up to 5e-12 in u, and the recursion of u forgets none of 400 rounds.
    summed = 400 * 5e-12
    close(last[-1].m[0], rows["m"])
    close([commit.u[0] for commit in last], -0.05 * np.array(rows["pi"]), atol=summed)
    close(sum(commit.u[0] for commit in last), rows["movement_last_round"], atol=summed)
    close(last[-1].theta[0], rows["theta"], atol=summed)


@pytest.mark.parametrize("kappa", [1.0, 2.0])
@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_tv3_a_round_moves_n_of_n_plus_one_of_the_proxy(n: int, kappa: float) -> None:
    """Mean over n + 1 rounds, one period; a clamp far away, so that it is never active."""
    server = served(np.zeros(1), workers=n, kappa=kappa, clamp=1e6)
    commits = round_robin(server, np.ones_like, lr=0.05, commits=400 * n)
    m_inf = -0.05 / (1 - 0.9)
    moved = sum(commit.u[0] for commit in commits[-n * (n + 1) :]) / (n + 1)
    close(moved, n / (n + 1) * kappa * m_inf)
    if kappa == 1.0:
        close(moved, VECTORS[f"TV3_avg_n{n}"]["mean_movement_per_round"])


def test_tv4_cold_start() -> None:
    commits = round_robin(served(np.zeros(1), workers=3), np.ones_like, lr=0.1, commits=9)
    for commit, (_, worker, m, shift, pi, u, theta) in zip(commits, VECTORS["TV4"], strict=True):
        assert commit.worker == worker
        close(commit.m[0], m)
        close(commit.shift[0], shift)
        close((commit.u / commit.delta)[0], pi, atol=2e-11)  # epsilon / |D| is 1e-11 here
        close(commit.u[0], u)
        close(commit.theta[0], theta)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_paper_variant_does_not_divide_by_zero(dtype: Any) -> None:
    server = served(np.zeros(3, dtype), variant="paper")
    server.sessions["w0"].m[:] = 1.0
    server.push("w0", np.array([0.0, -0.0, 0.5], dtype))
    np.testing.assert_allclose(server.center, [0.0, 0.0, 1.4], rtol=1e-6)


# Laws.


@st.composite
def situations(draw: st.DrawFn, size: int = 6) -> tuple[RuleServer, Floats, Floats]:
    """A server about to take update D, after any past. s is zero, so that the center is the shift, exactly."""
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    elements = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
    m, shift, d = (draw(arrays_of.arrays(dtype, size, elements=elements)) for _ in range(3))
    shift *= draw(st.sampled_from([1.0, 1e-3]))
    kappa, clamp = draw(st.sampled_from([1.0, 0.5, 2.0, 3.3])), draw(st.sampled_from([5.0, 0.1, 1e6]))
    server = served(np.zeros(size, dtype), kappa=kappa, clamp=clamp)
    server.center[:], server.sessions["w0"].m[:] = shift, m
    return server, shift, d


@property_test
@given(situations())
def test_center_has_no_more_energy_than_the_proxy(situation: tuple[RuleServer, Floats, Floats]) -> None:
    server, shift, d = situation
    server.push("w0", d)
    proxy = np.float64(server.config.model_dump()["kappa"]) * np.abs(server.sessions["w0"].m)
    room = np.abs(shift) <= proxy
    rounding = 4 * np.finfo(d.dtype).eps * proxy + np.finfo(d.dtype).tiny
    assert (np.abs(server.center) <= proxy + rounding)[room].all()
    np.testing.assert_array_equal(server.center[~room], shift[~room], "no room, no move")


@property_test
@given(situations())
def test_no_element_moves_against_its_update_or_beyond_the_clamp(situation: tuple[RuleServer, Floats, Floats]) -> None:
    server, shift, d = situation
    server.push("w0", d)
    moved = server.center - shift
    assert (np.sign(moved) * np.sign(d) >= 0).all()
    assert not moved[d == 0].any()
    clamp = server.config.model_dump()["clamp"]
    rounding = 4 * np.finfo(d.dtype).eps * (np.abs(shift) + clamp * np.abs(d)) + np.finfo(d.dtype).tiny
    assert (np.abs(moved) <= clamp * np.abs(d) + rounding).all()


@property_test
@given(situations(), st.floats(0, 1))
def test_energy_ratio_is_at_most_one_where_the_shift_is_small(
    situation: tuple[RuleServer, Floats, Floats], fraction: float
) -> None:
    server, _, d = situation
    proxy = server.config.model_dump()["kappa"] * np.abs(0.9 * server.sessions["w0"].m + d)
    server.center[:] = np.copysign(fraction * (1 - 1e-5) * proxy, server.center)
    server.push("w0", d)
    assert server.details()["energy_ratio"] <= 1 + 1e-5


@property_test
@given(st.integers(2, 6), st.sampled_from([1.0, 2.0, 5.0]), st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8))
def test_cold_start_lets_only_the_first_of_identical_updates_pass(n: int, kappa: float, d: list[float]) -> None:
    update = np.array(d)
    server = served(np.zeros(update.size), workers=n, kappa=kappa)
    for i in range(n):
        server.push(f"w{i}", update)
        np.testing.assert_allclose(server.center, kappa * update, rtol=1e-15)


def test_paper_variant_diverges_under_random_arrival_and_the_default_does_not() -> None:
    objective = Quadratic()
    ends = {
        variant: simulate(
            GEM, rules.configure(GEM, {"variant": variant}), objective, Cluster(lr=0.1), seed=1, pushes=200
        )
        for variant in ("reference", "paper")
    }
    first = objective.loss(objective.initial())
    assert objective.loss(ends["reference"].server.center) < 0.01 * first
    assert objective.loss(ends["paper"].server.center) > 1e6 * first


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("variant", ["reference", "paper", "self_excluded"])
def test_weight_scales_what_the_center_moves_by_and_no_momentum(variant: str, overlap: bool) -> None:
    """u is linear in the weight, in the figures too; m and the s of the published variants do not know it."""
    random = np.random.default_rng(13)
    center, m, d = (random.normal(size=9) for _ in range(3))
    ends = []
    for weight in (1.0, 0.25):
        server = served(center * 0, overlap=overlap, variant=variant)
        server.center[:], server.sessions["w0"].m[:] = center, m
        server.stats = np.zeros((1, GEM.stats_width))
        assert GEM.apply is not None
        GEM.apply(server.config, server.center, NoArrays(), server.sessions["w0"], d, weight, (), server.stats[0])
        ends.append(server)
    whole, quarter = ends
    close(quarter.center - center, 0.25 * (whole.center - center))
    close(quarter.sessions["w0"].m, 0.9 * m + d)
    close(quarter.sessions["w0"].s, quarter.center if variant == "self_excluded" else center)
    close(quarter.details()["pi_mean"], 0.25 * whole.details()["pi_mean"])
    close(quarter.details()["energy_ratio"], (quarter.center**2).sum() / (quarter.sessions["w0"].m ** 2).sum())


# One worker alone with `self_excluded` is momentum SGD.


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2.5e-7), (torch.float64, 1e-13)], ids=["f32", "f64"])
@pytest.mark.parametrize("mu", [0.9, 0.5])
def test_self_excluded_alone_is_torch_sgd_with_momentum(dtype: torch.dtype, rounding: float, mu: float) -> None:
    """x - anchor carries the rounding of x into the momentum, which keeps it for 1 / (1 - mu) updates."""
    config = rules.configure(GEM, {"variant": "self_excluded", "mu": mu})
    center = trained_with_server(GEM, config, lambda parameters: torch.optim.SGD(parameters, lr=0.05), dtype=dtype)
    expected = trained_alone(lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=mu), dtype=dtype)
    error = np.linalg.norm(center - expected) / np.linalg.norm(expected)
    assert error < rounding / (1 - mu)  # mu .9: 2.5e-6 and 1e-12


# With overlap, s is two deep.


def overlapped(
    center: Floats, pushes: list[tuple[int, Floats]], *, variant: str, workers: int, mu: float, kappa: float
) -> Floats:
    """The center after `pushes`, transcribed: the shift is measured from two exchanges of this worker ago."""
    kept = [[center, center] for _ in range(workers)]
    m = [np.zeros_like(center) for _ in range(workers)]
    for worker, d in pushes:
        m[worker] = mu * m[worker] + d
        room = kappa * np.abs(m[worker]) - np.abs(center - kept[worker][-2])
        before = center
        if variant == "reference":
            center = before + np.sign(d) * np.minimum(np.maximum(room, 0), 5 * np.abs(d))
        elif variant == "paper":
            center = before + d * room / (np.abs(d) + 1e-16)
        else:
            center = before + np.sign(m[worker]) * np.maximum(room, 0)
        kept[worker].append(center if variant == "self_excluded" else before)
    return center


@pytest.mark.parametrize("variant", ["reference", "paper", "self_excluded"])
@pytest.mark.parametrize("workers", [1, 3])
def test_overlap_keeps_s_two_deep(variant: str, workers: int) -> None:
    random = np.random.default_rng(11)
    drift = random.normal(size=20)  # updates that mostly agree, so that all three bounds of u are met
    pushes = [(int(random.integers(workers)), drift + random.normal(scale=0.7, size=20)) for _ in range(15)]
    start = random.normal(size=20)
    server = served(start, workers=workers, overlap=True, variant=variant, mu=0.8, kappa=1.5)
    for done, (worker, d) in enumerate(pushes, start=1):
        server.push(f"w{worker}", d)
        expected = overlapped(start, pushes[:done], variant=variant, workers=workers, mu=0.8, kappa=1.5)
        np.testing.assert_allclose(server.center, expected, rtol=1e-11, atol=1e-11)


def test_overlap_by_hand() -> None:
    """One worker, one element, every update 1, mu .5: the shift is the last two moves, from the join on."""
    server = served(np.zeros(1), overlap=True, mu=0.5)
    session = server.sessions["w0"]
    seen = []
    for _ in range(4):
        server.push("w0", np.ones(1))
        seen.append((session.m[0], session.oldest[0], session.s[0], server.center[0]))
    assert seen == [
        # m     oldest  s     center
        (1.0, 0.0, 0.0, 1.0),  # shift 0 from the join, room 1
        (1.5, 0.0, 1.0, 1.5),  # shift 1 from the join still, room .5
        (1.75, 1.0, 1.5, 1.75),  # shift 1.5, the oldest gradient is from the first reply: room .25
        (1.875, 1.5, 1.75, 2.875),  # shift .75 from the center before the second push, room 1.125
    ]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_rejoining_worker_is_measured_from_what_it_is_given(overlap: bool) -> None:
    server = served(np.zeros(3), workers=2, overlap=overlap)
    for _ in range(3):
        server.push("w0", np.ones(3))
        server.push("w1", np.ones(3))
    given = server.join("w0")
    session = server.sessions["w0"]
    assert all((kept == given).all() for name, kept in session._asdict().items() if name != "m")
    assert not session.m.any()
    server.push("w0", np.full(3, 0.25))
    np.testing.assert_array_equal(server.center, given + 0.25)


# A proxy fed by all workers together.


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("variant", ["reference", "paper", "self_excluded"])
def test_global_proxy_of_one_worker_is_its_own(variant: str, overlap: bool) -> None:
    random = np.random.default_rng(17)
    start, pushes = random.normal(size=31), random.normal(size=(12, 31))
    ends = []
    for proxy in ("worker", "global"):
        server = served(start, overlap=overlap, variant=variant, proxy=proxy)
        for d in pushes:
            server.push("w0", d)
        ends.append((server.center.tobytes(), server.stats.tobytes()))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("overlap", [False, True])
def test_global_proxy_is_one_momentum_of_all_updates(overlap: bool) -> None:
    """Against a transcription: m is of all, s of each worker."""
    random = np.random.default_rng(18)
    drift = random.normal(size=20)
    pushes = [(int(random.integers(3)), drift + random.normal(scale=0.7, size=20)) for _ in range(25)]
    center = random.normal(size=20)
    server = served(center, workers=3, overlap=overlap, proxy="global", mu=0.8, kappa=1.5)
    m, kept = np.zeros(20), [[center, center] for _ in range(3)]
    for worker, d in pushes:
        server.push(f"w{worker}", d)
        m = 0.8 * m + d
        shift = center - kept[worker][-2 if overlap else -1]
        kept[worker].append(center)
        center = center + np.sign(d) * np.clip(1.5 * np.abs(m) - np.abs(shift), 0, 5 * np.abs(d))
        close(server.center, center)
        close(server.state.m, m)
    assert all("m" not in session._fields for session in server.sessions.values())


@pytest.mark.parametrize("n", [1, 2, 5])
def test_global_proxy_moves_as_far_in_a_round_of_a_constant_gradient(n: int) -> None:
    """m_inf is that of one worker's updates: n workers no more multiply it than with a proxy each."""
    server = served(np.zeros(1), workers=n, proxy="global", clamp=1e6)
    before = server.center.copy()
    for t in range(400 * n):
        if t == (400 - (n + 1)) * n:
            before = server.center.copy()
        server.push(f"w{t % n}", np.array([-0.05]))
    close((server.center - before) / (n + 1), n / (n + 1) * -0.05 / (1 - 0.9))


def test_global_proxy_converges_and_outlives_its_workers() -> None:
    objective = Quadratic()
    config = rules.configure(GEM, {"proxy": "global"})
    run = simulate(GEM, config, objective, Cluster(lr=0.1, leave_s=((0, 20.0),)), seed=1, pushes=600)
    assert objective.loss(run.server.center) < 0.01 * objective.loss(objective.initial())
    m = run.server.state.m.copy()
    run.server.leave("w1")
    run.server.join("w1")
    np.testing.assert_array_equal(run.server.state.m, m)


# Decisions and words.


def test_reply_is_the_center_after_except_for_the_paper_variant() -> None:
    for variant, what in (("reference", "after"), ("self_excluded", "after"), ("paper", "before")):
        server = served(np.zeros(2), variant=variant)
        reply = server.push("w0", np.ones(2)).replies["w0"]
        np.testing.assert_array_equal(reply, np.ones(2) if what == "after" else np.zeros(2))
        np.testing.assert_array_equal(server.center, np.ones(2))


def test_admits_every_update_in_full_whatever_its_lag() -> None:
    config = rules.configure(GEM, {})
    for lag in (0, 1, 1000):
        _, effects = GEM.admit(config, None, Facts("w0", 1, 1, lag, 0.5, 32, 0.05))
        match effects:
            case [Apply(1.0), Reply("w0", "after")]:
                pass
            case _:
                pytest.fail(f"lag {lag}: {effects}")


@pytest.mark.parametrize(
    ("optimizer", "named"),
    [
        (OptimizerFacts("Adam", 1e-3, 0.0, 1), "Adam"),
        (OptimizerFacts("SGD", 0.05, 0.9, 1), "SGD with momentum 0.9"),
        (OptimizerFacts("RMSprop", 0.05, 0.5, 1), "RMSprop with momentum 0.5"),
    ],
)
def test_optimizer_with_a_memory_is_refused_unless_told(optimizer: OptimizerFacts, named: str) -> None:
    sentence = GEM.accept(rules.configure(GEM, {}), optimizer)
    assert sentence is not None
    for words in ("'gem'", named, "plain SGD without momentum", "torch.optim.SGD(lr=...)", "any_optimizer=true"):
        assert words in sentence
    assert GEM.accept(rules.configure(GEM, {"any_optimizer": True}), optimizer) is None


def test_plain_sgd_is_taken() -> None:
    for groups in (1, 3):
        assert GEM.accept(rules.configure(GEM, {}), OptimizerFacts("SGD", 0.05, 0.0, groups)) is None


# Figures.


def figures(center: Floats, m: Floats, d: Floats, sampled: Any) -> dict[str, float]:
    """What the run log should say, from the elements `sampled`, for s = 0 and the default settings."""
    center, m, d = center[sampled], (0.9 * m + d)[sampled], d[sampled]
    u = np.sign(d) * np.clip(np.abs(m) - np.abs(center), 0, 5 * np.abs(d))
    pi = u[d != 0] / d[d != 0]
    return {
        "pi_median": float(np.median(pi)),
        "pi_mean": float(np.mean(pi)),
        "energy_ratio": float(((center + u) ** 2).sum() / (m**2).sum()),
    }


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("n", [60, 512, 513, 1536, 1537, 4000])
def test_figures_of_an_update(n: int, blocks: int) -> None:
    """Every element counts in blocks of up to 512; in longer ones every k-th from the first, k least."""
    length = -(-n // blocks)
    random = np.random.default_rng(n)
    center, m, d = random.normal(scale=0.5, size=n), random.normal(size=n), random.normal(size=n)
    d[::14] = 0.0
    server = RuleServer.start(GEM, rules.configure(GEM, {}), np.zeros(n), block_elements=length)
    server.join("w0")
    server.center[:], server.sessions["w0"].m[:] = center, m
    server.push("w0", d)

    bounds = [(low, min(low + length, n)) for low in range(0, n, length)]
    sampled = np.concatenate([np.arange(low, high, -(-(high - low) // 512)) for low, high in bounds])
    assert server.stats.shape == (len(bounds), GEM.stats_width)
    assert server.details() == pytest.approx(figures(center, m, d, sampled), rel=1e-12)


def test_figures_where_nothing_happens() -> None:
    server = served(np.ones(4))
    server.push("w0", np.zeros(4))
    assert server.details() == {"pi_median": 0.0, "pi_mean": 0.0, "energy_ratio": 0.0}


def test_figures_of_a_cold_start() -> None:
    server = served(np.zeros(4), workers=2)
    server.push("w0", np.full(4, 0.5))
    assert server.details() == {"pi_median": 1.0, "pi_mean": 1.0, "energy_ratio": 1.0}
    server.push("w1", np.full(4, 0.5))
    assert server.details() == {"pi_median": 0.0, "pi_mean": 0.0, "energy_ratio": 1.0}
