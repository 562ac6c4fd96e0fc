"""Rules that wait, owe and hold, whatever goes wrong between the cores: their conservation laws, seeds x faults.

Laws
* Rounds: what the center gained is the sum of the means of its rounds. Each update moves the slot of its own by 1 / K
  of one round, or not at all; all of a round share 1; each round moves the guard by 1. Whoever lost one is told.
* Elastic: what the center gained is what the workers gave: the sum of the differences that they merged. The replica on
  the server is the worker's anchor, bit for bit, whenever nothing is under way.
* Clocks: the counting law of `test_exactly_once`, and nobody is answered further ahead of the slowest than the gap.
* Everybody gets done, `validate` holds after each event, and in the end no slot is taken.

Workers leave when they are done, or the others would wait for them. A failing run says how to repeat it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from common import wire
from common.codecs.base import F32
from common.messages import NOWHERE, Ack, Buffer, Welcome
from common.rules import elastic
from common.rules.easgd import RULE as EASGD
from tests.cluster import Cluster, Faults, Trainer, check_counting
from tests.simulation.test_exactly_once import FAULTS, seeds
from worker import events

CONFIG = EASGD.Config()
SEEDS = 3
NO_CRASH = ["none", "loss", "duplication", "reordering", "cuts", "cuts-and-duplication"]
ROUGH = Faults(loss=0.05, duplicate=0.1, reorder=0.1, cut_every_s=0.7)
"""All that a network does, at once."""


class Leaver(Trainer):
    """Says Bye once it is done."""

    def train(self) -> None:
        super().train()
        if self.done and not self.dead and not self.away and self.core.phase == "joined":
            self.cluster.work(self, events.Leave("done"))


class Rounder(Leaver):
    """Under rounds: the center holds means, and a crash may keep what was held before it."""

    def __init__(self, cluster: Cluster, row: int) -> None:
        super().__init__(cluster, row)
        self.lost: set[int] = set()
        self.doubtful: set[int] = set()

    def welcomed(self, welcome: Welcome) -> None:
        """What a crash undid is what the server says it undid."""
        session = self.core.membership.token
        if welcome.lost:
            numbers = range(welcome.lost[0], welcome.lost[1] + 1)
            self.lost |= {self.numbers[session, n] for n in numbers if (session, n) in self.numbers}
        elif welcome.resumed == "new" and session:
            self.doubtful |= self.applied.keys()

    def merge(self, base: Any, center: F32 | None) -> None:
        """Each round, so each version, moved the guard by 1."""
        assert base >= self.seen, f"{self} saw {self.seen} and was then given {base}"
        self.seen = base
        if center is not None:
            np.testing.assert_allclose(center[self.cluster.model.guard], base.version, rtol=1e-5)


class Elastic(Leaver):
    """A worker of `easgd`: parameters of its own, and the rule's own merge and track."""

    def __init__(self, cluster: Cluster, row: int) -> None:
        super().__init__(cluster, row)
        self.wants_center = True
        n = cluster.model.layout.elements
        self.x, self.anchor, self.sent = (np.zeros(n, np.float32) for _ in range(3))
        self.total = np.zeros(n)
        """Sum of the differences that were merged."""

    def update(self, s: int) -> F32:
        """D = x - anchor after a local step; `sent` as the server decodes it."""
        n = self.cluster.model.layout.parameters
        self.x += self.cluster.model.update(self.row, s) / np.float32(3.0)
        d = np.zeros_like(self.x)
        EASGD.update(CONFIG, self.x[:n], self.anchor[:n], d[:n])
        plan = self.core.plan(self.cluster.settings.codec)
        data = np.zeros(plan.bytes, np.uint8)
        plan.encode(d, data)
        plan.decode(data, self.sent)
        return d

    def take(self, news: Any) -> None:
        """Nothing is ever lost for good here, so no session is."""
        assert not isinstance(news, events.Orphaned), f"{self} lost its session"
        if isinstance(news, events.Fetched):
            self.anchor[:] = news.values  # x is its own, but for the first time
            self.x[:] = news.values if self.wants_center else self.x
            self.wants_center = self.reanchoring = False
            self.seen = news.base
            return
        super().take(news)

    def merge(self, base: Any, center: F32 | None) -> None:
        """What was exchanged; both ends know the same of each other afterwards."""
        self.seen = base
        assert center is not None, f"{self} was told that it was applied, and not what it is to give"
        n = self.cluster.model.layout.parameters
        elastic.merge(CONFIG, self.x[:n], center[:n])
        elastic.track(CONFIG, self.anchor[:n], self.sent[:n], center[:n])
        self.total += center
        server = self.cluster.server
        assert server is not None
        arrays = server.sessions[self.core.membership.token].arrays
        assert arrays is not None
        assert arrays.replica.tobytes() == self.anchor[:n].tobytes(), f"{self}: replica and anchor differ"


def ran(seed: int, faults: Faults, check: Any, *, kind: type[Cluster] = Cluster, **changes: Any) -> Cluster:
    """One run, checked; a failure says how to repeat it."""
    cluster = kind(seed, faults=faults, **changes)
    try:
        cluster.run()
        cluster.run_for(3 * cluster.settings.lease_s)  # also those whose Bye was lost are gone
        for trainer in cluster.trainers:  # who has left cannot be told what a later crash undid
            if trainer.core.phase == "ended":
                trainer.host.die()
        check(cluster)
        assert cluster.server is not None
        assert cluster.server.state.hosted.slots.taken == 0
        assert not cluster.server.members, "everybody left"
    except Exception as error:
        error.add_note(f"seed {seed}, {faults}, at {cluster.now:.6f} s: {cluster.server!r}, {cluster.trainers}")
        raise
    return cluster


def check_rounds(cluster: Cluster) -> None:
    """center == the sum of the means, and each update is in it at most once."""
    server = cluster.server
    assert server is not None
    assert server.shard is not None
    center, rounds = server.shard.center, server.version.version
    slots = center[cluster.model.slots].reshape(cluster.model.shape)
    np.testing.assert_allclose(center[cluster.model.guard], rounds, rtol=1e-5)
    np.testing.assert_allclose(slots.sum(dtype=np.float64), rounds, rtol=1e-5)
    folded = sum(s.counters.updates for s in server.sessions.values() if s.role == "worker")
    assert np.count_nonzero(slots) == folded, "an update was folded in twice, or was counted and is not there"
    assert not any(array.any() for array in (server.shard.state.total,)), "nothing is left of a round"
    shares = slots[slots > 0]
    assert (np.abs(1 / shares - np.rint(1 / shares)) < 1e-3).all(), "a share is 1 / K of one round"
    for trainer in cluster.trainers:
        assert isinstance(trainer, Rounder)
        row = slots[trainer.row]
        for s in trainer.applied.keys() - trainer.doubtful:
            told = trainer.dead or (row[s] > 0) == (s not in trainer.lost)
            assert told, f"{trainer}: update {s} is {row[s]}, lost {trainer.lost}"
        for s in trainer.rejected:
            assert row[s] == 0, f"{trainer}: update {s} was rejected and is there"


def check_elastic(cluster: Cluster) -> None:
    """What the center gained, the workers gave."""
    server = cluster.server
    assert server is not None
    assert server.shard is not None
    n = cluster.model.layout.parameters
    given = sum((trainer.total for trainer in cluster.trainers if isinstance(trainer, Elastic)), np.zeros(1))
    np.testing.assert_allclose(server.shard.center[:n], given[:n], atol=2e-4)
    pushed = sum(len(trainer.applied) for trainer in cluster.trainers)
    assert server.version.version == pushed == sum(s.counters.updates for s in server.sessions.values())


@pytest.mark.parametrize("name", FAULTS)
def test_rounds_gain_the_sum_of_their_means(name: str) -> None:
    crashes = "crash" in name or name == "everything"
    for seed in seeds(SEEDS):
        settings = {"rule": "local_sgd"}
        ran(seed, FAULTS[name], check_rounds, updates=25 if crashes else 10, settings=settings, trainer=Rounder)


def test_rounds_under_all_that_a_network_does() -> None:
    for seed in seeds(SEEDS):
        ran(50 + seed, ROUGH, check_rounds, settings={"rule": "local_sgd"}, trainer=Rounder)


def test_rounds_of_pushes_of_several_chunks() -> None:
    settings = {"rule": "local_sgd", "window_chunks": 1, "pool_mib": 16}
    for name in ("cuts", "worker-crashes"):
        ran(7, FAULTS[name], check_rounds, updates=4, guard=600_000, settings=settings, trainer=Rounder)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("name", NO_CRASH)
def test_elastic_averaging_gives_and_takes_the_same(name: str, codec: str) -> None:
    settings = {"rule": "easgd", "rule_settings": {"beta": 0.5}, "workers": 2, "codec": codec, "reply_codec": codec}
    for seed in seeds(SEEDS):
        ran(seed, FAULTS[name], check_elastic, updates=8, settings=settings, trainer=Elastic)


def test_elastic_averaging_with_fewer_slots_than_workers() -> None:
    settings = {"rule": "easgd", "workers": 3, "pool_mib": 10, "window_chunks": 2}
    for name in ("none", "cuts"):
        cluster = ran(3, FAULTS[name], check_elastic, updates=4, guard=600_000, settings=settings, trainer=Elastic)
        assert cluster.server is not None
        assert cluster.server.state.hosted.slots.limit == 1


@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_clocks_with_a_gap_count_once(name: str, gap: int) -> None:
    crashes = "crash" in name or name == "everything"
    for seed in seeds(SEEDS - 1):
        ran(
            seed,
            FAULTS[name],
            check_counting,
            updates=25 if crashes else 10,
            settings={"max_clock_gap": gap},
            trainer=Leaver,
        )


@pytest.mark.parametrize("gap", [0, 2])
def test_nobody_is_answered_further_ahead_than_the_gap(gap: int) -> None:
    """Of workers that joined together, without faults: at every answer, the slowest has pushed enough."""
    pushed: dict[int, int] = {}
    furthest = 0

    class Watching(Leaver):
        def hears(self, frames: Sequence[Buffer]) -> None:
            nonlocal furthest
            super().hears(frames)
            message = wire.decode(frames)
            if isinstance(message, Ack) and message.outcome == "applied" and message.number:
                server = self.cluster.server
                assert server is not None
                clocks = {s.worker: s.clock for s in server.members if s.enrolled}
                furthest = max(furthest, message.number - min(clocks.values(), default=message.number))
                pushed[self.row] = message.number

    for seed in seeds(SEEDS):
        cluster = ran(seed, Faults(), check_counting, settings={"max_clock_gap": gap}, trainer=Watching)
        assert [pushed[row] for row in range(len(cluster.trainers))] == [12] * 3
        assert cluster.server is not None
        assert cluster.server.version > NOWHERE
    assert furthest <= gap
    assert furthest == gap or gap == 0
