"""Local SGD: the vectors, its special cases against plain torch, and blocks that leave nobody hanging.

Laws
* Every vector holds in float64 to 1e-11 absolute, through the production decisions and kernels.
* H 1 is plain data parallel SGD; before the switch post-local is synchronous; h_block 1 is flat, bit for bit.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import rules
from common.errors import ConfigError
from common.replay import RuleServer
from common.rules.base import Close, Floats, Member, Reply, Terms
from common.rules.local_sgd import LocalSgd, local_steps, warmed_up
from tests.rule_driver import trained_alone, trained_with_server

LOCAL_SGD = rules.load("local_sgd")
EXACT = 1e-11


def configured(**settings: Any) -> LocalSgd:
    config = rules.configure(LOCAL_SGD, settings)
    assert isinstance(config, LocalSgd)
    return config


def served(center: Floats, workers: int, **settings: Any) -> RuleServer:
    """A server that workers w0, w1 ... have joined."""
    server = RuleServer.start(LOCAL_SGD, configured(**settings), center, terms=Terms(workers=workers))
    for i in range(workers):
        server.join(f"w{i}", group=i * server.config.groups // workers)  # type: ignore[attr-defined]
    return server


Train = Callable[[int, Floats], Floats]
"""What worker i makes of x in the steps of one round."""


def turns(server: RuleServer, train: Train, xs: list[Floats]) -> None:
    """Each worker trains for one round from its x and pushes; xs become what they are answered."""
    starts, replies = [x.copy() for x in xs], dict[str, Floats]()
    for i, x in enumerate(starts):
        replies |= server.push(f"w{i}", train(i, x.copy()) - x).replies
    for i in range(len(xs)):
        xs[i] = replies[f"w{i}"]


def descent(h: Sequence[float], c: Sequence[float], lr: float, steps: int) -> Train:
    """Gradient descent of worker i on h_i (w - c_i)^2 / 2."""

    def train(i: int, x: Floats) -> Floats:
        for _ in range(steps):
            x = x - lr * h[i] * (x - c[i])
        return x

    return train


def centers(server: RuleServer, train: Train, turns_of_each: int) -> list[float]:
    """The center after each turn in which it changed."""
    xs = [server.center.copy() for _ in server.sessions]
    made = []
    for _ in range(turns_of_each):
        version = server.version
        turns(server, train, xs)
        if server.version > version:
            made.append(float(server.center[0]))
    return made


# Vectors.


def test_b1_equal_curvatures() -> None:
    """Local SGD is mini-batch SGD at the sync points."""
    train = descent((1, 1), (1, 3), 0.5, 2)
    np.testing.assert_allclose(centers(served(np.zeros(1), 2), train, 2), [1.5, 1.875], rtol=0, atol=EXACT)
    train = descent((1, 1), (1, 3), 0.5, 1)
    np.testing.assert_allclose(centers(served(np.zeros(1), 2), train, 4), [1, 1.5, 1.75, 1.875], rtol=0, atol=EXACT)


def test_b2_unequal_curvatures() -> None:
    train = descent((1, 2), (1, 3), 0.25, 2)
    expected = [1.34375, 1.8896484375, 2.111419677734375]
    np.testing.assert_allclose(centers(served(np.zeros(1), 2), train, 3), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize(("steps", "fixed"), [(1, 7 / 3), (2, 2.2631578947368), (4, None), (8, None)])
def test_b2_fixed_point_depends_on_h(steps: int, fixed: float | None) -> None:
    left = [(1 - 0.25 * h) ** steps for h in (1, 2)]
    closed_form = sum((1 - a) * c for a, c in zip(left, (1, 3), strict=True)) / sum(1 - a for a in left)
    if fixed is not None:
        assert closed_form == pytest.approx(fixed, abs=1e-12)
    made = centers(served(np.zeros(1), 2), descent((1, 2), (1, 3), 0.25, steps), 200)
    assert made[-1] == pytest.approx(closed_form, abs=EXACT)


def test_b3_inner_nesterov_with_buffers_kept() -> None:
    """Momentum buffers are the workers' own: torch keeps them over rounds."""
    parameters = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
    optimizers = [torch.optim.SGD([p], lr=0.1, momentum=0.9, nesterov=True) for p in parameters]

    def train(i: int, x: Floats) -> Floats:
        parameters[i].data = torch.from_numpy(x)
        for _ in range(2):
            parameters[i].grad = parameters[i].data - (1.0, 3.0)[i]
            optimizers[i].step()
        return parameters[i].data.numpy().copy()

    server = served(np.zeros(1), 2)
    xs = [np.zeros(1), np.zeros(1)]
    turns(server, train, xs)
    np.testing.assert_allclose(server.center, 0.8498, rtol=0, atol=EXACT)
    buffers = [float(optimizers[i].state[parameters[i]]["momentum_buffer"]) for i in range(2)]
    np.testing.assert_allclose(buffers, [-1.71, -5.13], rtol=0, atol=EXACT)
    turns(server, train, xs)
    np.testing.assert_allclose(server.center, 1.81222418, rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    ("nesterov", "expected"), [(False, [0.38, 0.8018, 1.156]), (True, [0.494, 0.900182, 1.20784965])]
)
def test_b5_global_momentum(nesterov: bool, expected: list[float]) -> None:
    server = served(np.zeros(1), 2, global_momentum=0.3, nesterov=nesterov)
    made = centers(server, descent((1, 1), (1, 3), 0.1, 2), 3)
    np.testing.assert_allclose(made[:2], expected[:2], rtol=0, atol=EXACT)
    digits = 8 if nesterov else 3  # as printed
    assert round(made[2], digits) == expected[2]


@pytest.mark.parametrize("block_elements", [None, 1])
def test_b6_hierarchical(block_elements: int | None) -> None:
    config = configured(groups=2, h_block=2)
    server = RuleServer.start(LOCAL_SGD, config, np.zeros(3), terms=Terms(workers=4), block_elements=block_elements)
    for i in range(4):
        server.join(f"w{i}", group=i // 2)
    train = descent((1, 2, 1, 2), (1, 3, 5, 7), 0.25, 2)
    xs = [np.zeros(3) for _ in range(4)]
    state: Any = server.state
    for blocks, center in (
        ((1.8896484375, 5.2294921875), 3.5595703125),
        ((2.477116584777832, 5.816960334777832), 4.147038459777832),
    ):
        turns(server, train, xs)
        assert server.version == (0 if center < 4 else 1), "a block round leaves the center"
        np.testing.assert_array_equal(xs[0], state.block[0])
        np.testing.assert_array_equal(xs[2], state.block[1])
        # the blocks just before the average: one more round of each, as the workers compute it
        before = [np.mean([train(i, xs[i]) for i in pair], axis=0) for pair in ((0, 1), (2, 3))]
        for mine, expected in zip(before, blocks, strict=True):
            np.testing.assert_allclose(mine, expected, rtol=0, atol=EXACT)
        turns(server, train, xs)
        np.testing.assert_allclose(server.center, center, rtol=0, atol=EXACT)
        for array in (*xs, *state.block):
            assert array.tobytes() == server.center.tobytes()


# The schedule of H.


@pytest.mark.parametrize(
    ("warmup", "h", "period", "expected"),
    [
        ("exponential", 16, 16, [1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 16, 16]),
        ("exponential", 16, 8, [1, 1, 2, 2, 2, 4, 4, 8, 16, 16]),
        ("exponential", 4, 16, [1, 1, 1, 2, 2, 2, 2, 4, 4, 4]),
        ("linear", 16, 16, [*range(1, 17), 16]),
        ("linear", 4, 8, [1, 1, 1, 2, 2, 3, 3, 4, 4]),
        ("constant", 5, 3, [1, 1, 1, 5, 5]),
        ("none", 5, 3, [5, 5]),
    ],
)
def test_h_is_warmed_up(warmup: Any, h: int, period: int, expected: list[int]) -> None:
    assert [warmed_up(warmup, h, period, i) for i in range(1, len(expected) + 1)] == expected


def sync_steps(config: LocalSgd, h: int, last: int) -> list[int]:
    """Steps after which a worker pushes."""
    made, done = [], 0
    while done < last:
        done += LOCAL_SGD.local_steps(config, h, done)
        made.append(done)
    return made


def test_sync_phase() -> None:
    assert sync_steps(configured(), 4, 12) == [4, 8, 12]
    assert sync_steps(configured(sync_phase="first"), 4, 13) == [1, 5, 9, 13]
    assert sync_steps(configured(sync_phase="first", start_local_at=3), 4, 9) == [1, 2, 3, 4, 8, 12]
    assert sync_steps(configured(start_local_at=3), 4, 11) == [1, 2, 3, 7, 11]
    assert sync_steps(configured(), 1, 3) == sync_steps(configured(sync_phase="first"), 1, 3) == [1, 2, 3]


def test_warmup_of_rounds_in_steps() -> None:
    config = configured(h_warmup="linear", warmup_period=4, start_local_at=2)
    assert sync_steps(config, 4, 16) == [1, 2, 3, 5, 8, 12, 16]
    config = configured(h_warmup="linear", warmup_period=4, sync_phase="first")
    assert sync_steps(config, 4, 15) == [1, 2, 4, 7, 11, 15]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(["none", "constant", "linear", "exponential"]), st.integers(1, 40), st.integers(1, 60), st.data()
)
def test_h_stays_in_bounds_wherever_a_worker_stands(warmup: str, h: int, period: int, data: Any) -> None:
    """With overlap a round may start at any step."""
    phase = data.draw(st.sampled_from(["after", "first"]))
    config = configured(h_warmup=warmup, warmup_period=period, sync_phase=phase, start_local_at=7)
    steps = [local_steps(config, h, done) for done in range(7 + h * (period + 2))]
    assert all(1 <= each <= h for each in steps)
    assert steps[:7] == [1] * 7
    assert steps[-1] == h


# Canaries.

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["f32", "f64"])
@pytest.mark.parametrize("h", [1, 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_worker_is_plain_torch(optimizer: str, h: int, dtype: torch.dtype, tolerance: float) -> None:
    make = OPTIMIZERS[optimizer]
    center = trained_with_server(LOCAL_SGD, configured(), make, dtype=dtype, local_steps=h)
    expected = trained_alone(make, dtype=dtype)
    assert np.linalg.norm(center - expected) < tolerance * np.linalg.norm(expected)


class Net:
    """A small classifier under SGD with momentum, on batches drawn by step."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).to(dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.dtype = dtype

    def step(self, step: int, rows: slice) -> None:
        random = torch.Generator().manual_seed(step)
        inputs = torch.randn(24, 8, generator=random, dtype=torch.float64)[rows]
        labels = (inputs[:, :3] + inputs[:, 3:6]).argmax(1)
        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(self.model(inputs.to(self.dtype)), labels).backward()
        self.optimizer.step()

    @property
    def x(self) -> Floats:
        flat: Floats = torch.nn.utils.parameters_to_vector(self.model.parameters()).detach().numpy().copy()
        return flat

    @x.setter
    def x(self, x: Floats) -> None:
        torch.nn.utils.vector_to_parameters(torch.from_numpy(x.copy()), self.model.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["f32", "f64"])
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize(
    "settings", [{}, {"start_local_at": 40}, {"groups": 2}, {"h_block": 3}], ids=["flat", "post-local", "groups", "one"]
)
def test_equal_batches_are_one_joined_batch(
    settings: dict[str, int], workers: int, dtype: torch.dtype, tolerance: float
) -> None:
    """H 1, or post-local before the switch; each worker keeps a momentum buffer of its own."""
    h = 8 if "start_local_at" in settings else 1
    alone, fleet = Net(dtype), [Net(dtype) for _ in range(workers)]
    server = served(alone.x, workers, **settings)
    share = 24 // workers
    for step in range(40):
        alone.step(step, slice(None))
        assert LOCAL_SGD.local_steps(server.config, h, step) == 1
        replies: dict[str, Floats] = {}
        for i, net in enumerate(fleet):
            before = net.x
            net.step(step, slice(i * share, (i + 1) * share))
            replies |= server.push(f"w{i}", net.x - before).replies
        for i, net in enumerate(fleet):
            net.x = replies[f"w{i}"]
    assert np.linalg.norm(server.center - alone.x) < tolerance * np.linalg.norm(alone.x)
    assert LOCAL_SGD.local_steps(server.config, h, 40) == h


def script(workers: int, rounds: int, n: int = 5) -> list[list[Floats]]:
    random = np.random.default_rng(6)
    return [[random.normal(size=n) for _ in range(workers)] for _ in range(rounds)]


def run(server: RuleServer, pushed: list[list[Floats]]) -> list[bytes]:
    made = []
    for turn in pushed:
        for i, d in enumerate(turn):
            server.push(f"w{i}", d.astype(server.center.dtype))
        made.append(server.center.tobytes())
    return made


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_one_block_round_is_flat_bit_for_bit(momentum: float) -> None:
    start = np.ones(5, np.float32)
    flat = served(start, 4, global_momentum=momentum)
    expected = run(flat, script(4, 6))
    for groups, h_block in ((2, 1), (1, 7)):
        server = served(start, 4, global_momentum=momentum, groups=groups, h_block=h_block)
        assert run(server, script(4, 6)) == expected
        assert type(server.state) is type(flat.state)
    assert sum(array.size for array in flat.state) == (10 if momentum else 5), "and no more state"


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("nesterov", [False, True])
def test_blocks_of_a_common_round_are_flat(momentum: float, nesterov: bool) -> None:
    """Where all blocks get the same updates, two block rounds and an average are a flat round of both updates."""
    settings = {"global_momentum": momentum, "nesterov": nesterov}
    pushed = [[turn[0]] * 4 for turn in script(4, 8)]
    blocks = served(np.ones(5), 4, groups=2, h_block=2, **settings)
    flat = served(np.ones(5), 4, **settings)
    run(blocks, pushed)
    run(flat, [[a[0] + b[0]] * 4 for a, b in zip(pushed[::2], pushed[1::2], strict=True)])
    np.testing.assert_allclose(blocks.center, flat.center, rtol=0, atol=1e-12)


# Rounds.


def test_all_replies_of_a_round_are_the_same_bits() -> None:
    server, made = served(np.ones(9, np.float32), 5), dict[str, Floats]()
    for i, d in enumerate(script(5, 1, 9)[0]):
        result = server.push(f"w{i}", d.astype(np.float32))
        assert result.outcome == ("held" if i < 4 else "applied")
        made |= result.replies
    assert len(made) == 5
    assert {reply.tobytes() for reply in made.values()} == {server.center.tobytes()}
    assert server.version == 1


@pytest.mark.parametrize("after_its_push", [False, True])
def test_who_leaves_hangs_nobody(after_its_push: bool) -> None:
    server = served(np.zeros(1), 3)
    server.push("w0", np.ones(1))
    if after_its_push:
        server.push("w2", np.full(1, 7.0))
        assert not server.leave("w2").replies
        result, mean = server.push("w1", np.full(1, 4.0)), 4.0
    else:
        server.push("w1", np.full(1, 4.0))
        assert LOCAL_SGD.waits(server.config, server.decisions) == ["w2"]
        result, mean = server.leave("w2"), 2.5
    assert set(result.replies) == {"w0", "w1"}
    np.testing.assert_allclose(server.center, mean)


def test_a_joiner_is_not_waited_for_in_the_round_under_way() -> None:
    server = served(np.zeros(1), 2)
    server.push("w0", np.ones(1))
    server.join("late")
    assert set(server.push("w1", np.ones(1)).replies) == {"w0", "w1"}
    server.push("w0", np.ones(1))
    assert not server.push("w1", np.ones(1)).replies
    assert set(server.push("late", np.ones(1)).replies) == {"w0", "w1", "late"}


# Blocks.


def placed(config: LocalSgd, members: list[Member]) -> list[int]:
    decisions = LOCAL_SGD.start(config, Terms())
    for member in members:
        decisions, _ = LOCAL_SGD.join(config, decisions, member, 0.0)
    return [decisions["places"][member.worker] for member in members]


@pytest.mark.parametrize("h_block", [1, 2])
def test_a_joiner_gets_a_block(h_block: int) -> None:
    by_order = configured(groups=3, h_block=h_block)
    assert placed(by_order, [Member(f"w{i}") for i in range(7)]) == [0, 1, 2, 0, 1, 2, 0]
    assert placed(by_order, [Member("a", group=2), Member("b"), Member("c"), Member("d")]) == [2, 0, 1, 0]
    by_host = configured(groups=2, h_block=h_block, group_by="host")
    assert placed(by_host, [Member("a", "x"), Member("b", "y"), Member("c", "x"), Member("d", "y")]) == [0, 1, 0, 1]
    assert placed(by_host, [Member("a", "x"), Member("b", "y", group=0)]) == [0, 0]


def test_a_block_that_is_not_there_is_refused() -> None:
    config = configured(groups=2)
    with pytest.raises(ConfigError, match="asks for group 2; rule 'local_sgd' has 2, numbered from 0"):
        placed(config, [Member("a", group=2)])
    by_host = configured(groups=2, group_by="host")
    with pytest.raises(ConfigError, match="already belongs to a host: x, y") as caught:
        placed(by_host, [Member("a", "x"), Member("b", "y"), Member("c", "z")])
    assert "group_by=order" in caught.value.fix


def test_the_block_of_a_host_that_is_gone_is_free() -> None:
    config = configured(groups=2, group_by="host")
    decisions = LOCAL_SGD.start(config, Terms())
    for member in (Member("a", "x"), Member("b", "y")):
        decisions, _ = LOCAL_SGD.join(config, decisions, member, 0.0)
    decisions, _ = LOCAL_SGD.leave(config, decisions, "a", 0.0)
    decisions, _ = LOCAL_SGD.join(config, decisions, Member("c", "z"), 0.0)
    assert decisions["places"] == {"b": 1, "c": 0}
    assert decisions["hosts"] == {"y": 1, "z": 0}


def test_more_groups_than_workers_are_refused() -> None:
    sentence = LOCAL_SGD.fits(configured(groups=4), Terms(workers=3))
    assert sentence is not None
    assert "4 groups for 3 workers" in sentence
    assert LOCAL_SGD.fits(configured(groups=4), Terms(workers=4)) is None
    assert LOCAL_SGD.fits(configured(groups=4), Terms()) is None


@pytest.mark.parametrize(("block_weight", "expected"), [("members", 5.0), ("equal", 4.5)])
def test_blocks_are_weighted_by_members_or_equally(block_weight: str, expected: float) -> None:
    server = RuleServer.start(LOCAL_SGD, configured(groups=2, h_block=2, block_weight=block_weight), np.zeros(1))
    for i, g in enumerate((0, 1, 1)):
        server.join(f"w{i}", group=g)
    for _ in range(2):
        for i, d in enumerate((1.5, 2.0, 4.0)):
            server.push(f"w{i}", np.full(1, d))
    np.testing.assert_allclose(server.center, expected)


def test_a_block_waits_for_the_others_and_not_for_an_empty_one() -> None:
    server = RuleServer.start(LOCAL_SGD, configured(groups=3, h_block=2), np.zeros(1))
    for i, g in enumerate((0, 0, 1)):
        server.join(f"w{i}", group=g)
    server.push("w0", np.ones(1))
    assert LOCAL_SGD.waits(server.config, server.decisions) == ["w1"]
    result = server.push("w1", np.full(1, 3.0))
    assert [effect.center for effect in result.effects if isinstance(effect, Close)] == [False]
    assert {name: float(reply[0]) for name, reply in result.replies.items()} == {"w0": 2.0, "w1": 2.0}
    server.push("w0", np.ones(1))
    assert not server.push("w1", np.ones(1)).replies, "block 0 has done its rounds"
    assert LOCAL_SGD.waits(server.config, server.decisions) == ["w2"]
    result = server.push("w2", np.full(1, 5.0))
    assert float(result.replies["w2"][0]) == 5.0
    assert server.version == 0
    result = server.push("w2", np.full(1, 1.0))
    assert set(result.replies) == {"w0", "w1", "w2"}
    np.testing.assert_allclose(server.center, (2 * 3.0 + 6.0) / 3)


def test_what_an_emptied_block_has_done_still_counts() -> None:
    server = RuleServer.start(LOCAL_SGD, configured(groups=2, h_block=2, block_weight="equal"), np.zeros(1))
    server.join("a", group=0)
    server.join("b", group=1)
    server.push("b", np.full(1, 8.0))
    server.leave("b")
    server.push("a", np.ones(1))
    assert set(server.push("a", np.ones(1)).replies) == {"a"}
    np.testing.assert_allclose(server.center, (2.0 + 8.0) / 2)
    server.push("a", np.full(1, 3.0))
    server.leave("a")
    np.testing.assert_allclose(server.center, 8.0)


event = st.tuples(st.sampled_from(["join", "push", "push", "push", "leave"]), st.integers(0, 4), st.integers(-1, 2))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 3), st.lists(event, max_size=80))
def test_nobody_hangs_whatever_happens(groups: int, h_block: int, happened: list[tuple[str, int, int]]) -> None:
    """Whoever is held waits for somebody who is free; and when all that are free push on, everybody is answered."""
    server = RuleServer.start(LOCAL_SGD, configured(groups=groups, h_block=h_block), np.zeros(2))
    d = np.ones(2)
    for what, i, group in happened:
        worker = f"w{i}"
        given_to_it = server.decisions
        known = copy.deepcopy(given_to_it)
        if what == "join" and worker not in server.sessions:
            server.join(worker, group=min(group, groups - 1))
        elif what == "push" and worker in server.sessions and worker not in server.held:
            server.push(worker, d)
        elif what == "leave" and worker in server.sessions:
            server.leave(worker)
        else:
            continue
        assert json.loads(json.dumps(server.decisions)) == server.decisions
        assert given_to_it == known, "the state it was given is untouched"
        waits = set(LOCAL_SGD.waits(server.config, server.decisions))
        assert bool(waits) == bool(server.held)
        assert waits <= set(server.sessions) - server.held
    answered: set[str] = set()
    for _ in range(4 * h_block):
        for worker in sorted(set(server.sessions) - server.held):
            answered |= set(server.push(worker, d).replies)
    assert answered == set(server.sessions)


def test_everything_that_was_pushed_is_in_the_center_once_all_have_left() -> None:
    """One block at a time works, so that sums and not means are seen."""
    server = RuleServer.start(LOCAL_SGD, configured(groups=2, h_block=3), np.zeros(1))
    server.join("a", group=0)
    for _ in range(5):
        server.push("a", np.ones(1))
    server.leave("a")
    np.testing.assert_allclose(server.center, 5.0)


def test_replies_of_a_block_name_its_row() -> None:
    server = RuleServer.start(LOCAL_SGD, configured(groups=2, h_block=2), np.zeros(1))
    server.join("a", group=1)
    result = server.push("a", np.ones(1))
    assert [(effect.what, effect.row) for effect in result.effects if isinstance(effect, Reply)] == [("block", 1)]
