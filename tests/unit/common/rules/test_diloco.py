"""DiLoCo: torch's Nesterov SGD as the outer optimizer, AdamW inside, and fragments that leave nobody hanging.

Laws
* One fragment through the server is a plain serial simulation of the paper.
* Several fragments are, element by element, as many rules of one fragment each.
* Whoever joins or leaves when: each that is held waits for somebody who is free, or for the tick that is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import rules
from common.replay import RuleServer, part
from common.rules.base import Accumulate, Close, Effect, Facts, Floats, Member, Reply, Terms, perform
from common.rules.diloco import Diloco, fragment, offset

DILOCO = rules.load("diloco")


def configured(**settings: Any) -> Diloco:
    config = rules.configure(DILOCO, settings)
    assert isinstance(config, Diloco)
    return config


class Streamed:
    """A server of one rule that cuts the vector evenly: a push computes on its fragment, a tick or a leave on all."""

    def __init__(self, center: Floats, **settings: Any) -> None:
        self.config, self.center = configured(**settings), center.copy()
        self.state = DILOCO.state(self.config, False, center.size, center.dtype)
        self.decisions = DILOCO.start(self.config, Terms())
        cuts = [center.size * f // self.config.fragments for f in range(self.config.fragments + 1)]
        self.spans = list(pairwise(cuts))
        self.numbers: dict[str, int] = {}
        self.held: dict[str, int] = {}
        self.replies: dict[str, Floats] = {}

    def join(self, worker: str) -> None:
        self.numbers[worker] = 0
        self.decisions, effects = DILOCO.join(self.config, self.decisions, Member(worker), 0.0)
        assert effects == []

    def leave(self, worker: str) -> None:
        del self.numbers[worker]
        self.held.pop(worker, None)
        self.decisions, effects = DILOCO.leave(self.config, self.decisions, worker, 0.0)
        self._perform(effects, 0, self.center.size)
        self._tick()

    def push(self, worker: str, d: Floats) -> list[Effect]:
        """d: (n,), of which the fragment whose turn it is is pushed; returns the effects of the push alone."""
        assert worker not in self.held
        self.numbers[worker] += 1
        f = fragment(self.config, self.numbers[worker])
        self.held[worker] = f
        facts = Facts(worker, self.numbers[worker], 1, 0, 0.0, 1, 0.1, at_s=4.0, fragment=f)
        self.decisions, effects = DILOCO.admit(self.config, self.decisions, facts)
        low, high = self.spans[f]
        self._perform(effects, low, high, d)
        self._tick()
        return effects

    def _tick(self) -> None:
        at_s = DILOCO.deadline(self.config, self.decisions)
        if at_s is not None:
            self.decisions, effects = DILOCO.tick(self.config, self.decisions, at_s)
            assert any(isinstance(effect, Close) for effect in effects), "it was asked for"
            assert DILOCO.deadline(self.config, self.decisions) is None
            self._perform(effects, 0, self.center.size)

    def _perform(self, effects: list[Effect], low: int, high: int, d: Floats | None = None) -> None:
        pushed = np.zeros(0) if d is None else d[low:high]
        assert d is not None or not any(isinstance(effect, Accumulate) for effect in effects)
        state = part(self.state, low, high)
        perform(DILOCO, self.config, effects, self.center[low:high], state, (), pushed, np.zeros(0))
        for effect in effects:
            if isinstance(effect, Reply):
                low, high = self.spans[self.held.pop(effect.worker)]
                self.replies[effect.worker] = self.center[low:high].copy()


# One fragment.


def serial(start: Floats, pushed: list[list[Floats]], lr: float, mu: float) -> Floats:
    """The paper, with torch as the outer optimizer."""
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    outer = torch.optim.SGD([parameter], lr=lr, momentum=mu, nesterov=mu > 0)
    for updates in pushed:
        parameter.grad = torch.from_numpy(-np.mean(updates, axis=0))
        outer.step()
    return parameter.detach().numpy()


def script(workers: int, rounds: int, n: int) -> list[list[Floats]]:
    random = np.random.default_rng(8)
    return [[random.normal(size=n) for _ in range(workers)] for _ in range(rounds)]


@pytest.mark.parametrize("block_elements", [None, 1, 5])
@pytest.mark.parametrize(("lr", "mu"), [(0.7, 0.9), (0.4, 0.5), (1.0, 0.0)])
def test_outer_step_is_torch_nesterov(lr: float, mu: float, block_elements: int | None) -> None:
    start, pushed = np.linspace(-1, 1, 11), script(3, 30, 11)
    server = RuleServer.start(DILOCO, configured(lr=lr, mu=mu), start, block_elements=block_elements)
    for i in range(3):
        server.join(f"w{i}")
    for updates in pushed:
        made: dict[str, Floats] = {}
        for i, d in enumerate(updates):
            made |= server.push(f"w{i}", d).replies
        assert {reply.tobytes() for reply in made.values()} == {server.center.tobytes()}
        assert len(made) == 3
    np.testing.assert_allclose(server.center, serial(start, pushed, lr, mu), rtol=0, atol=1e-12)


class Net:
    """A small classifier under AdamW, which keeps its state over rounds."""

    def __init__(self, worker: int) -> None:
        torch.manual_seed(5)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.random = torch.Generator().manual_seed(worker)

    def steps(self, h: int) -> None:
        for _ in range(h):
            inputs = torch.randn(16, 8, generator=self.random)
            labels = (inputs[:, :3] + inputs[:, 3:6]).argmax(1)
            self.optimizer.zero_grad()
            torch.nn.functional.cross_entropy(self.model(inputs), labels).backward()
            self.optimizer.step()

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return self.model.parameters()

    def get(self) -> torch.Tensor:
        return torch.nn.utils.parameters_to_vector(self.parameters()).detach().clone()

    def set(self, x: torch.Tensor) -> None:
        torch.nn.utils.vector_to_parameters(x.clone(), self.parameters())


def test_adamw_inside_is_a_plain_serial_simulation() -> None:
    workers, h, turns = 3, 6, 12
    alone = [Net(i) for i in range(workers)]
    center = torch.nn.Parameter(alone[0].get())
    outer = torch.optim.SGD([center], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(turns):
        for net in alone:
            net.set(center.detach())
            net.steps(h)
        center.grad = center.detach() - torch.stack([net.get() for net in alone]).mean(0)
        outer.step()

    fleet = [Net(i) for i in range(workers)]
    config = configured()
    server = RuleServer.start(DILOCO, config, fleet[0].get().numpy(), terms=Terms(h, workers=workers))
    anchors = [server.join(f"w{i}") for i in range(workers)]
    for _ in range(turns):
        replies: dict[str, Floats] = {}
        for i, net in enumerate(fleet):
            net.steps(h)
            x, d = net.get().numpy(), np.empty_like(anchors[i])
            DILOCO.update(config, x, anchors[i], d)
            replies |= server.push(f"w{i}", d, steps=h).replies
        for i, net in enumerate(fleet):
            x = net.get().numpy()
            DILOCO.merge(config, x, replies[f"w{i}"])
            anchors[i] = replies[f"w{i}"]
            net.set(torch.from_numpy(x))
    expected = center.detach().numpy()
    assert np.linalg.norm(server.center - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("after_its_push", [False, True])
def test_who_leaves_hangs_nobody(after_its_push: bool) -> None:
    server = RuleServer.start(DILOCO, configured(lr=1.0, mu=0.0), np.zeros(1))
    for i in range(3):
        server.join(f"w{i}")
    server.push("w0", np.ones(1))
    if after_its_push:
        server.push("w2", np.full(1, 7.0))
        server.leave("w2")
        result, mean = server.push("w1", np.full(1, 4.0)), 4.0
    else:
        server.push("w1", np.full(1, 4.0))
        assert DILOCO.waits(server.config, server.decisions) == ["w2"]
        result, mean = server.leave("w2"), 2.5
    assert set(result.replies) == {"w0", "w1"}
    np.testing.assert_allclose(server.center, mean)


def test_alpha_mixes() -> None:
    x = np.array([1.0, 2.0])
    DILOCO.merge(configured(alpha=0.25), x, np.array([5.0, -2.0]))
    np.testing.assert_allclose(x, [4.0, -1.0])
    DILOCO.merge(configured(), x, np.array([5.0, -2.0]))
    np.testing.assert_array_equal(x, [5.0, -2.0])


# Fragments.


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 64), st.integers(1, 500))
def test_fragments_take_turns_at_their_offsets(fragments: int, h: int) -> None:
    """Each once in H steps, evenly: two pushes are H / F steps apart, rounded up or down."""
    config = configured(fragments=min(fragments, h))
    done, pushes = 0, []
    for number in range(1, 3 * config.fragments + 1):
        steps = DILOCO.local_steps(config, h, done)
        assert h // config.fragments <= steps <= -(-h // config.fragments)
        done += steps
        f = fragment(config, number)
        assert done % h == offset(config, h, f)
        pushes.append(f)
    assert done == 3 * h
    assert pushes == [*range(config.fragments)] * 3


def test_one_fragment_is_pushed_every_h_steps() -> None:
    assert [DILOCO.local_steps(configured(), 7, done) for done in (0, 1, 6, 7)] == [7, 6, 1, 7]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fragments_are_rules_of_one_fragment_each(dtype: Any) -> None:
    n, fragments = 23, 4
    start = np.linspace(-1, 1, n).astype(dtype)
    server = Streamed(start, fragments=fragments)
    alone = [RuleServer.start(DILOCO, configured(), start[low:high]) for low, high in server.spans]
    for worker in ("a", "b"):
        server.join(worker)
        for one in alone:
            one.join(worker)
    for turn, updates in enumerate(script(2, 20, n)):
        low, high = server.spans[turn % fragments]
        for worker, d in zip(("a", "b"), updates, strict=True):
            server.push(worker, d.astype(dtype))
            alone[turn % fragments].push(worker, d[low:high].astype(dtype))
        assert server.replies["a"].tobytes() == server.replies["b"].tobytes() == server.center[low:high].tobytes()
        for (low, high), one in zip(server.spans, alone, strict=True):
            assert server.center[low:high].tobytes() == one.center.tobytes()


def test_a_joiner_and_the_others_do_not_wait_for_each_other() -> None:
    """The others are at fragment 2, the joiner at 0: they go on until it is their turn to push that."""
    server = Streamed(np.zeros(8), fragments=4, lr=1.0, mu=0.0)
    server.join("a")
    server.join("b")
    for _ in range(2):
        for worker in ("a", "b"):
            server.push(worker, np.ones(8))
    server.join("late")
    server.push("late", np.full(8, 4.0))
    assert server.held == {"late": 0}
    assert DILOCO.waits(server.config, server.decisions) == ["a", "b"]
    for f in (2, 3):
        server.push("a", np.ones(8))
        assert server.held == {"late": 0, "a": f}
        server.push("b", np.ones(8))
        assert server.held == {"late": 0}
    server.push("a", np.ones(8))
    server.push("b", np.ones(8))
    assert server.held == {}
    np.testing.assert_allclose(server.center, [3, 3, 1, 1, 1, 1, 1, 1])
    for worker in ("a", "late", "b"):
        server.push(worker, np.ones(8))
    assert server.held == {}, "from now on they push the same fragment"


def test_a_push_closes_its_own_fragment_only_and_a_tick_the_others() -> None:
    """The joiner's push leaves nobody who is free: the round of most closes, and that is not the joiner's."""
    server = Streamed(np.zeros(4), fragments=2, lr=1.0, mu=0.0)
    for worker in ("a", "b"):
        server.join(worker)
    for worker in ("a", "b"):
        server.push(worker, np.ones(4))
    server.join("late")
    for worker in ("a", "b"):
        server.push(worker, np.full(4, 3.0))
    assert DILOCO.waits(server.config, server.decisions) == ["late"]
    effects = server.push("late", np.full(4, 5.0))
    assert [type(effect) for effect in effects] == [Accumulate]
    assert server.held == {"late": 0}
    np.testing.assert_allclose(server.center, [1, 1, 3, 3])
    for worker in ("a", "b"):
        server.push(worker, np.full(4, 2.0))
    assert server.held == {}
    np.testing.assert_allclose(server.center, [4, 4, 3, 3])


moves = st.lists(st.tuples(st.sampled_from(["join", "push", "push", "push", "leave"]), st.sampled_from("abcd")))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 4), moves)
def test_nobody_hangs_whatever_happens(fragments: int, happened: list[tuple[str, str]]) -> None:
    server = Streamed(np.zeros(8), fragments=fragments, lr=1.0, mu=0.5)
    for what, worker in happened:
        if what == "join" and worker not in server.numbers:
            server.join(worker)
        elif what == "push" and worker in server.numbers and worker not in server.held:
            closes = [effect for effect in server.push(worker, np.ones(8)) if isinstance(effect, Close)]
            f = fragment(server.config, server.numbers[worker])
            assert all(effect.args[0] == f for effect in closes), "a push computes on its own fragment"
        elif what == "leave" and worker in server.numbers:
            server.leave(worker)
        else:
            continue
        assert json.loads(json.dumps(server.decisions)) == server.decisions
        free = set(server.numbers) - set(server.held)
        waits = set(DILOCO.waits(server.config, server.decisions))
        assert waits <= free
        assert free or not server.numbers, "somebody can always go on"
        assert bool(waits) == bool(server.held)


@pytest.mark.parametrize(
    ("settings", "terms", "said"),
    [
        ({"fragments": 8}, Terms(4), "8 fragments but 4 local steps"),
        ({"delay": 2}, Terms(10), "needs overlap"),
        ({"fragments": 2, "delay": 5}, Terms(10, overlap=True), "must be below 5"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, int], terms: Terms, said: str) -> None:
    sentence = DILOCO.fits(configured(**settings), terms)
    assert sentence is not None
    assert said in sentence
    assert sentence.endswith(".")


def test_what_fits_is_taken() -> None:
    assert DILOCO.fits(configured(), Terms(1)) is None
    assert DILOCO.fits(configured(fragments=2, delay=4, alpha=0.5), Terms(10, overlap=True)) is None
    assert DILOCO.fragments(configured(fragments=3)) == 3
