"""Replies that are differences to what the worker holds, whatever goes wrong between the cores.

Laws
* The worker's copy and the server's replica have the same bits whenever nothing but what is owed lies between them: at
  every merge, and after every run.
* That holds whatever is lost, repeated or refused, where sessions are lost and where the server crashes; and the center
  gains what was trained, as with whole replies.

The counting model pushes whole numbers as they are, so that its oracle holds while replies lose most of the center;
real sessions push in `topk` with feedback, and center and memories make up all that was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.codecs.base import F32
from common.messages import NOWHERE
from paramserver.core import ServerCore
from tests.cluster import Cluster, Faults, Trainer, check_counting
from tests.simulation import test_feedback as feedback
from tests.simulation.test_exactly_once import FAULTS, REAL, seeds
from tests.simulation.test_feedback import expect_conserved, ran
from tests.simulation.test_rules_under_faults import Leaver, Rounder, check_rounds
from worker.core import WorkerCore

SEEDS = 6
CODECS = ["int8", "plain:int4", "plain:topk:0.05", "natural", "bf16"]
SLOTS = 1100
"""So many travel in the codec: small tensors go as fp16."""


def same_bits(server: ServerCore | None, core: WorkerCore) -> bool:
    """Compare copy and replica; False where the server says itself that it does not know what this worker holds."""
    session = server.sessions.get(core.membership.token) if server is not None else None
    if session is None or session.replica is None or not session.anchored:
        return False
    owed = session.owed
    if core.membership.merged not in (session.holds if owed is None else owed.replies):
        return False
    assert core._replica is not None
    assert core._replica.tobytes() == session.replica.tobytes(), f"{core} and {session} hold different bits"
    return True


class Adder(Trainer):
    """Compares bits at every merge; what it was given is no count, but near one."""

    def __init__(self, cluster: Cluster, row: int) -> None:
        super().__init__(cluster, row)
        self.compared = 0

    def merge(self, base: Any, center: F32 | None) -> None:
        assert base >= self.seen, f"{self} saw {self.seen} and was then given {base}"
        self.seen = base
        self.compared += same_bits(self.cluster.server, self.core)


class LeavingAdder(Adder, Leaver):
    """And says Bye once it is done."""


class RoundAdder(Adder, Rounder):
    """Under rounds: the center holds means."""


def added(seed: int, faults: Faults, reply_codec: str, *, check: Any = check_counting, **changes: Any) -> Cluster:
    """One run, checked; a failure says how to repeat it."""
    settings = {"replies": "difference", "reply_codec": reply_codec} | changes.pop("settings", {})
    rows = -(-SLOTS // changes["updates"])
    cluster = Cluster(seed, faults=faults, settings=settings, rows=rows, **({"trainer": Adder} | changes))
    assert cluster.model.layout.body == cluster.model.slots.stop, "the slots travel in the codec"
    try:
        cluster.run()
        cluster.run_for(3 * cluster.settings.lease_s)
        for trainer in cluster.trainers:
            assert isinstance(trainer, Adder)
            assert trainer.compared > 0 or trainer.dead, f"{trainer} was never compared"
            left = trainer.dead or trainer.core.phase == "ended"
            assert left or same_bits(cluster.server, trainer.core), f"{trainer}: its copy is unknown to the server"
            if trainer.core.phase == "ended":  # who has left cannot be told what a later crash undid
                trainer.host.die()
        check(cluster)
    except Exception as error:
        error.add_note(f"seed {seed}, {faults}, {reply_codec}, at {cluster.now:.6f} s: {cluster.trainers}")
        raise
    return cluster


@pytest.mark.parametrize("name", FAULTS)
def test_copy_and_replica_have_the_same_bits(name: str) -> None:
    crashes = "crash" in name or name == "everything"
    for seed in seeds(SEEDS):
        added(seed, FAULTS[name], CODECS[seed % len(CODECS)], updates=60 if crashes else 15)


@pytest.mark.parametrize("name", REAL)
def test_and_with_replies_of_several_chunks(name: str) -> None:
    """One chunk allowed at a time, and fewer slots than workers."""
    settings = {"window_chunks": 1, "pool_mib": 24}
    added(100, FAULTS[name], "int8", updates=6, guard=600_000, settings=settings)


@pytest.mark.parametrize("name", FAULTS)
def test_and_with_replies_that_come_late(name: str) -> None:
    """Of a round, to all but the last; and to whoever is too far ahead."""
    crashes = "crash" in name or name == "everything"
    for seed in seeds(SEEDS // 2):
        codec, updates = CODECS[seed % len(CODECS)], 25 if crashes else 10
        rounds = {"rule": "local_sgd"}
        added(seed, FAULTS[name], codec, check=check_rounds, updates=updates, settings=rounds, trainer=RoundAdder)
        gap = {"max_clock_gap": 1}
        added(seed, FAULTS[name], codec, updates=updates, settings=gap, trainer=LeavingAdder)


def test_a_late_reply_waits_for_a_slot() -> None:
    settings = {"rule": "local_sgd", "window_chunks": 2, "pool_mib": 13}
    for name in ("none", "cuts", "worker-crashes"):
        cluster = added(
            3,
            FAULTS[name],
            "int8",
            check=check_rounds,
            updates=4,
            guard=600_000,
            settings=settings,
            trainer=RoundAdder,
        )
        assert cluster.server is not None
        assert cluster.server.state.hosted.slots.limit < 3
        assert cluster.server.version > NOWHERE


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_many_seeds(name: str) -> None:
    for seed in seeds(40):
        added(1000 + seed, FAULTS[name], CODECS[seed % len(CODECS)], updates=100)


# Real sessions


class Differing(feedback.Trainer):
    """Compares bits once all is pushed."""

    compared = False

    def done(self) -> None:
        host = self._ether.server()
        assert host is not None
        assert isinstance(host.node, ServerCore)
        assert self.session is not None
        self.compared = same_bits(host.node, self.session._core)


DOWN = {"kind": Differing, "replies": "difference", "lease_s": 4}


@pytest.mark.parametrize("reply_codec", ["plain:int4", "plain:topk:0.05"])
@pytest.mark.parametrize("faults", feedback.FAULTS)
def test_nothing_is_lost_with_feedback_up_and_differences_down(faults: str, reply_codec: str, tmp_path: Path) -> None:
    for seed in range(3):
        more: dict[str, Any] = DOWN | {"codec": "topk:0.05", "reply_codec": reply_codec, "seed": seed}
        with ran(tmp_path / str(seed), feedback.FAULTS[faults], **more) as (center, trainers):
            assert [trainer.compared for trainer in trainers] == [True] * 2
            expect_conserved(center, trainers)


@pytest.mark.parametrize("faults", feedback.FAULTS)
def test_nor_with_overlap(faults: str, tmp_path: Path) -> None:
    more: dict[str, Any] = DOWN | {"codec": "topk:0.05", "reply_codec": "plain:int4", "overlap": True}
    with ran(tmp_path, feedback.FAULTS[faults], **more) as (center, trainers):
        assert [trainer.compared for trainer in trainers] == [True] * 2
        expect_conserved(center, trainers)


REFUSED = DOWN | {"codec": "topk:0.05", "reply_codec": "int8", "max_lag": 1, "rejected_per_minute": 1000}


def test_nor_where_updates_are_refused(tmp_path: Path) -> None:
    more: dict[str, Any] = REFUSED
    with ran(tmp_path, "", **more) as (center, trainers):
        assert sum(trainer.session.exchanges.rejected for trainer in trainers if trainer.session) >= 3
        assert [trainer.compared for trainer in trainers] == [True] * 2
        expect_conserved(center, trainers)


@pytest.mark.parametrize("faults", ["loss", "all", "cuts"])
def test_refused_and_lost_together_leave_both_sides_alike(faults: str, tmp_path: Path) -> None:
    more: dict[str, Any] = REFUSED
    with ran(tmp_path, feedback.FAULTS[faults], **more) as (_, trainers):
        assert sum(trainer.session.exchanges.rejected for trainer in trainers if trainer.session) >= 3
        assert [trainer.compared for trainer in trainers] == [True] * 2


def test_nor_in_rounds(tmp_path: Path) -> None:
    more: dict[str, Any] = DOWN | {"codec": "topk:0.05", "reply_codec": "int8", "rule": "local_sgd", "local_steps": 2}
    more |= {"seed": 4}  # in which both have joined before the first round closes: so each is half of every round
    with ran(tmp_path, feedback.FAULTS["all"], workers=feedback.WORKERS, **more) as (center, trainers):
        expect_conserved(center, trainers, share=1 / feedback.WORKERS)
