"""Leader SGD: the paper's update rule on worked numbers, and its laws, by workers that follow the server's orders."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from common import rules
from common.errors import ConfigError, PeerError
from common.replay import RuleServer
from common.rules.base import Floats, Member, Order, Terms
from common.rules.lsgd import Lsgd

RULE = rules.load("lsgd")
Loss = Callable[[Floats], float]


def configured(**settings: Any) -> Lsgd:
    config = rules.configure(RULE, settings)
    assert isinstance(config, Lsgd)
    return config


class Workers:
    """Workers with parameters of their own, that train and obey: one order after the other."""

    def __init__(
        self, config: Lsgd, starts: dict[str, Floats], f: Loss, slope: Callable[[Floats], Floats], lr: float
    ) -> None:
        self.config, self.f, self.slope, self.lr = config, f, slope, lr
        self.x = {name: x.copy() for name, x in starts.items()}
        first = next(iter(starts.values()))
        self.server = RuleServer.start(RULE, config, np.zeros_like(first), terms=Terms(workers=len(starts)))
        self.steps = dict.fromkeys(starts, 0)
        self.pulls: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        self.pulled: dict[str, Floats] = {}
        self.orders: deque[Order] = deque()
        self.dead: set[str] = set()
        for name in starts:
            self.join(name)
        for name in starts:  # each says where it stands
            self.orders += self.server.report(name, 0, 0.0).orders

    def join(self, name: str) -> None:
        group = int(name[1:]) * self.config.groups // len(self.x) if self.config.groups > 1 else -1
        self.server.join(name, group=group)

    def run(self, done: Callable[[], bool], limit: int = 100_000) -> None:
        for _ in range(limit):
            if done() or not self.orders:
                return
            self.obey(self.orders.popleft())
        raise AssertionError("this does not end")

    def obey(self, order: Order) -> None:
        name = order.worker
        if name in self.dead:
            return
        if order.upload:
            self.uploads.append(name)
            out = np.empty_like(self.x[name])
            RULE.update(self.config, self.x[name], out, out)
            result = self.server.push(name, out)
            assert result.replies == {}, "a leader is sent nothing"
            self.orders += result.orders
        for source in order.pull:
            self.pulls.append((name, source))
            assert RULE.pull is not None
            RULE.pull(self.config, self.x[name], source, self.server.pull(name, source))
            self.pulled[name] = self.x[name].copy()
        while self.steps[name] < order.until:
            self.step(name)

    def step(self, name: str) -> None:
        self.x[name] -= self.lr * self.slope(self.x[name])
        self.steps[name] += 1
        self.orders += self.server.report(name, self.steps[name], self.f(self.x[name])).orders

    def leave(self, name: str) -> None:
        self.dead.add(name)
        self.orders += self.server.leave(name).orders

    @property
    def rounds(self) -> int:
        return int(self.server.decisions["round"])


def quadratic(x: Floats) -> float:
    return float(x @ x) / 2


def workers(config: Lsgd, starts: list[float], lr: float = 0.1) -> Workers:
    """On f(x) = x^2 / 2."""
    made = {f"w{i}": np.array([x]) for i, x in enumerate(starts)}
    return Workers(config, made, quadratic, lambda x: x, lr)


# Worked numbers


def test_vector_a1_two_levels_both_pulls_fall() -> None:
    """Algorithm 1: local pull, then global pull on the point already pulled; from one exact loss each."""
    config = configured(groups=2, tau=1, tau_global=2, lambda_local=0.1, lambda_global=0.2, window=1)
    run = workers(config, [4.0, 2.0, -1.0, 3.0])
    x: dict[str, Floats] = {}
    # one step each, then the two pulls of a global round, in the order in which orders would bring them
    for name in run.x:
        run.x[name] = run.x[name] - 0.1 * run.x[name]
        x[name] = run.x[name].copy()
    assert [float(x[f"w{i}"][0]) for i in range(4)] == pytest.approx([3.6, 1.8, -0.9, 2.7], abs=1e-15)
    leaders = {"w0": x["w1"], "w1": None, "w2": None, "w3": x["w2"]}
    assert RULE.pull is not None
    for name, leader in leaders.items():
        if leader is not None:
            RULE.pull(config, x[name], "local", leader)
    assert [float(x[f"w{i}"][0]) for i in range(4)] == pytest.approx([3.42, 1.8, -0.9, 2.34], abs=1e-15)
    for name in ("w0", "w1", "w3"):
        RULE.pull(config, x[name], "global", x["w2"])
    assert [float(x[f"w{i}"][0]) for i in range(4)] == pytest.approx([2.556, 1.26, -0.9, 1.692], abs=1e-14)


def test_vector_a1_by_the_server() -> None:
    """The same numbers, with the server electing, asking and ordering: the second of two rounds is global."""
    config = configured(groups=2, tau=1, tau_global=2, lambda_local=0.1, lambda_global=0.2, window=1)
    run = workers(config, [4.0, 2.0, -1.0, 3.0], lr=0.0)
    run.server.decisions = {**run.server.decisions, "round": 1}  # of rounds 1, 2, ... the even ones are global
    run.lr = 0.1
    run.run(lambda: len(run.pulls) == 5 and run.rounds == 2 and len(run.uploads) == 2)
    assert run.uploads == ["w1", "w2"]
    pulled = {name: [source for who, source in run.pulls if who == name] for name in run.x}
    assert pulled == {"w0": ["local", "global"], "w1": ["global"], "w2": [], "w3": ["local", "global"]}
    expected = {"w0": 2.556, "w1": 1.26, "w2": -0.9, "w3": 1.692}
    for name, x in run.x.items():
        before_the_next_step = x / 0.9 ** (run.steps[name] - 1)
        assert float(before_the_next_step[0]) == pytest.approx(expected[name], abs=1e-14)
    assert run.server.center[0] == pytest.approx(-0.9, abs=1e-15), "the center is the leader of all"


@pytest.mark.parametrize("strength", [0.19, 0.5])
def test_vector_a2_a_leader_breaks_the_symmetry(strength: float) -> None:
    """f = (x^2 - 1)^2 / 4 from -.5 and .6: the leader goes to the minimum at 1, nobody to the maximum at 0.

    The vector's steps are those of the theorems: lambda is the rule's over lr, and the pull is from the point before
    the step. Algorithm 1 pulls after it, so the other worker's fixed point -(1 + sqrt(1 - 4 l)) / 2 (-.744949 in the
    vector) has l = lambda / (1 - lr lambda) in place of lambda; where l > 1/4 there is none, and it follows the leader.
    """
    lr = 0.1
    config = configured(tau=1, tau_global=1, lambda_global=strength * lr, window=1)
    run = Workers(
        config,
        {"w0": np.array([-0.5]), "w1": np.array([0.6])},
        lambda x: float((x[0] ** 2 - 1) ** 2) / 4,
        lambda x: x * (x**2 - 1),
        lr,
    )
    run.run(lambda: run.rounds == 4000)
    effective = strength / (1 - lr * strength)
    other_ends = -(1 + np.sqrt(1 - 4 * effective)) / 2 if effective <= 0.25 else 1.0
    assert float(run.x["w1"][0]) == pytest.approx(1.0, abs=1e-9)
    assert float(run.pulled["w0"][0]) == pytest.approx(other_ends, abs=1e-9)


# Laws


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.73, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_pull_contracts_the_distance_by_one_minus_lambda(strength: float, dtype: Any) -> None:
    random = np.random.default_rng(1)
    x, leader = (random.normal(size=999).astype(dtype) for _ in range(2))
    known, before = leader.copy(), x - leader
    assert RULE.pull is not None
    RULE.pull(configured(lambda_global=strength), x, "global", leader)
    np.testing.assert_allclose(x - leader, (1 - strength) * before, atol=20 * np.finfo(dtype).eps)
    assert leader.tobytes() == known.tobytes()
    if strength == 1.0:
        assert x.tobytes() == leader.tobytes(), "all the way, exactly"


def test_with_lambda_0_runs_are_independent_bit_for_bit() -> None:
    random = np.random.default_rng(2)
    starts = {f"w{i}": random.normal(size=5).astype(np.float32) for i in range(3)}
    starts["w0"][0] = -0.0
    run = Workers(configured(lambda_global=0.0, tau=2, tau_global=2), starts, quadratic, lambda x: x, 0.1)
    run.run(lambda: run.rounds == 6)
    assert run.pulls
    for name, x in starts.items():
        alone = x.copy()
        for _ in range(run.steps[name]):
            alone -= 0.1 * alone
        assert run.x[name].tobytes() == alone.tobytes()


@pytest.mark.parametrize("settings", [{}, {"groups": 2, "tau_global": 8}], ids=["one leader", "two groups"])
def test_the_least_loss_never_rises_by_a_pull_and_leaders_stay_as_they_are(settings: dict[str, Any]) -> None:
    config = configured(window=1, **settings)
    random = np.random.default_rng(3)
    starts = {f"w{i}": random.normal(size=4) for i in range(4)}
    run = Workers(config, starts, quadratic, lambda x: x, 0.05)
    while run.rounds < 8:
        order = run.orders.popleft()
        known = {name: x.copy() for name, x in run.x.items()}
        if order.pull:  # the pull alone
            run.obey(order._replace(until=0, upload=False))
            assert min(map(quadratic, run.x.values())) <= min(map(quadratic, known.values()))
            assert quadratic(run.x[order.worker]) <= quadratic(known[order.worker])
            order = order._replace(pull=())
        elif order.upload:
            run.obey(order)
            assert run.x[order.worker].tobytes() == known[order.worker].tobytes()
            continue
        run.obey(order)
    assert run.pulls


@pytest.mark.parametrize("tau", [1, 4, 5])
def test_exactly_n_tau_steps_between_two_pulls_whoever_makes_them(tau: int) -> None:
    """Worker w0 answers three times for each time of the others: it makes more of the steps."""
    config = configured(tau=tau, tau_global=tau)
    run = workers(config, [4.0, 2.0, -1.0])
    made: list[int] = []
    for _ in range(3000):
        if run.rounds > len(made):
            made.append(sum(run.steps.values()))
        ready = sorted(run.orders, key=lambda order: order.worker != "w0")
        if not ready:
            break
        run.orders.remove(ready[0])
        run.obey(ready[0])
        if len(made) == 12:
            break
    assert len(made) == 12
    # a round's first steps are made as its orders are obeyed, so a round is counted from one election to the next
    assert {b - a for a, b in pairwise(made)} == {3 * tau}
    if tau > 1:
        assert run.steps["w0"] > run.steps["w2"]


def test_one_leader_uploads_once_and_each_other_pulls_once_in_a_round() -> None:
    run = workers(configured(tau=4, tau_global=4), [4.0, 2.0, -1.0, 3.0])
    run.run(lambda: run.rounds == 10)
    assert len(run.uploads) == 10
    assert len(run.pulls) in range(9 * 3, 10 * 3 + 1)


def test_one_group_or_equal_periods_is_the_global_pull_alone() -> None:
    runs = [
        workers(configured(groups=groups, tau=2, tau_global=tau_global, lambda_local=0.9), [4.0, 2.0, -1.0, 3.0])
        for groups, tau_global in ((1, 2), (2, 2))
    ]
    for run in runs:
        run.run(lambda run=run: run.rounds == 5)  # type: ignore[misc]
        assert {source for _, source in run.pulls} == {"global"}
    assert {name: x.tobytes() for name, x in runs[0].x.items()} == {n: x.tobytes() for n, x in runs[1].x.items()}


def test_ties_go_to_the_lowest_name_and_nobody_is_favoured_by_an_empty_window() -> None:
    d: Any = {"workers": {}, "granted": 0, "round": 0, "uploads": {}, "leader": "", "history": [], "hosts": []}
    config = configured(tau=1, tau_global=1, window=4)
    server = RuleServer.start(RULE, config, np.zeros(1))
    for name in ("b", "a", "c"):
        server.join(name)
        server.report(name, 0, 0.0)
    server.report("b", 1, 0.5)
    server.report("a", 1, 0.5)
    [order] = server.report("c", 1, 0.75).orders
    assert (order.worker, order.upload) == ("a", True)
    assert set(d) <= set(server.decisions)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_never_leads_and_if_all_are_nobody_is_pulled(bad: float) -> None:
    server = RuleServer.start(RULE, configured(tau=1, tau_global=1), np.zeros(1))
    for name in ("a", "b"):
        server.join(name)
        server.report(name, 0, 0.0)
    server.report("a", 1, bad)
    [order] = server.report("b", 1, 9.0).orders
    assert (order.worker, order.upload) == ("b", True)
    orders = server.push("b", np.ones(1)).orders
    assert {(order.worker, order.pull) for order in orders} == {("a", ("global",)), ("b", ())}
    server.report("a", 2, bad)
    orders = server.report("b", 2, bad).orders
    assert sorted((o.worker, o.upload, o.pull, o.until) for o in orders) == [("a", False, (), 3), ("b", False, (), 3)]
    json.dumps(server.decisions, allow_nan=False)


def test_of_a_dead_leader_the_next_best_of_the_living_is_asked() -> None:
    server = RuleServer.start(RULE, configured(tau=1, tau_global=1), np.zeros(1))
    for name in ("a", "b", "c"):
        server.join(name)
        server.report(name, 0, 0.0)
    server.report("a", 1, 0.1)
    server.report("b", 1, 0.3)
    assert [o.worker for o in server.report("c", 1, 0.2).orders if o.upload] == ["a"]
    assert RULE.waits(configured(), server.decisions) == ("a",)
    assert [o.worker for o in server.leave("a").orders if o.upload] == ["c"]
    orders = server.push("c", np.full(1, 7.0)).orders
    assert {(o.worker, o.pull) for o in orders} == {("b", ("global",)), ("c", ())}
    assert server.center[0] == 7.0


@pytest.mark.parametrize("clock", ["published", "latest"])
@pytest.mark.parametrize("groups", [1, 2])
def test_who_leaves_at_any_moment_leaves_nobody_hanging(clock: str, groups: int) -> None:
    for moment in range(0, 60, 3):
        config = configured(clock=clock, groups=groups, tau=3, tau_global=6)
        run = workers(config, [4.0, 2.0, -1.0, 3.0])
        for _ in range(moment):
            run.obey(run.orders.popleft())
        for gone in ("w1", "w2"):
            run.leave(gone)
        before = run.steps["w0"] + run.steps["w3"]
        run.run(lambda run=run, before=before: run.steps["w0"] + run.steps["w3"] > before + 60)  # type: ignore[misc]
        assert run.steps["w0"] + run.steps["w3"] > before + 60, f"stuck after {moment}: {run.server.decisions}"


def test_a_joiner_gets_its_share_and_one_who_comes_back_is_not_counted_twice() -> None:
    run = workers(configured(tau=2, tau_global=2), [4.0, 2.0])
    run.run(lambda: run.rounds == 3)
    run.x["w2"], run.steps["w2"] = np.array([9.0]), 17  # has trained before
    run.join("w2")
    run.orders += run.server.report("w2", 17, 1.0).orders
    before = run.rounds
    run.run(lambda: run.rounds == before + 5)
    assert run.steps["w2"] in range(17 + 6, 17 + 16)
    assert any(name == "w2" for name, _ in run.pulls)


# The latest clock


def test_latest_leader_without_a_barrier() -> None:
    """Each worker exchanges after tau steps of its own, however slow the others are."""
    config = configured(clock="latest", tau=4, tau_global=4, lambda_global=0.5)
    run = workers(config, [4.0, 2.0, -1.0])
    for _ in range(400):  # w2 never does anything
        order = next((order for order in run.orders if order.worker != "w2"), None)
        assert order is not None, "nobody waits for w2"
        run.orders.remove(order)
        run.obey(order)
        if run.steps["w0"] >= 60 and run.steps["w1"] >= 60:
            break
    assert run.steps["w2"] == 0
    assert set(run.uploads[2:]) == {"w1"}, "the lower loss, once both have reported"
    assert {name for name, _ in run.pulls} == {"w0"}
    assert len(run.uploads) == pytest.approx(run.steps["w1"] / 4, abs=2)


# Refusals


def test_an_upload_that_nobody_asked_for_is_refused() -> None:
    run = workers(configured(), [4.0, 2.0])
    known = json.dumps(run.server.decisions)
    with pytest.raises(PeerError, match="not the leader"):
        run.server.push("w0", np.ones(1))
    assert json.dumps(run.server.decisions) == known


def test_periods_and_groups_that_do_not_match_are_refused() -> None:
    with pytest.raises(ConfigError, match="tau_global 6 is no multiple of tau 4"):
        configured(tau=4, tau_global=6)
    config = configured(groups=2, group_by="host")
    d = RULE.start(config, Terms())
    for worker, host in (("a", "x"), ("b", "y"), ("c", "x")):
        d, _ = RULE.join(config, d, Member(worker, host), 0.0)
    assert [worker["group"] for worker in d["workers"].values()] == [0, 1, 0]
    with pytest.raises(ConfigError, match="2 hosts have a group each"):
        RULE.join(config, d, Member("d", "z"), 0.0)
    with pytest.raises(ConfigError, match="asks for group 2, but there are 2"):
        RULE.join(config, d, Member("d", "x", 2), 0.0)
    assert "every group needs a member" in str(RULE.fits(config, Terms(workers=1)))
    assert "overlap" in str(RULE.fits(config, Terms(overlap=True)))
