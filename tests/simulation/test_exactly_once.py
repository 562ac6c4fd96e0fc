"""Whatever goes wrong between the cores, each update counts once: seeds x faults, on the counting model.

Laws
* Nothing is counted twice, nothing durable is lost, whoever lost something is told, versions only grow: the oracle is
  `tests.cluster.check_counting`, and each center that a worker is given is checked by the same rule.
* Everybody gets done: no fault leaves a worker waiting for ever.

A failing run says how to repeat it.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from common import wire
from common.errors import WireError
from common.messages import Beat
from common.simulator import Link
from tests.cluster import Cluster, Faults, check_counting

FAULTS = {
    "none": Faults(),
    "loss": Faults(loss=0.1),
    "duplication": Faults(duplicate=0.2),
    "reordering": Faults(reorder=0.2),
    "a-tenth-of-each": Faults(loss=0.1, duplicate=0.1, reorder=0.1),
    "cuts": Faults(cut_every_s=0.3),
    "worker-crashes": Faults(crash_worker_every_s=0.4),
    "server-crashes": Faults(crash_server_every_s=3.0),
    "crashes-and-failed-saves": Faults(crash_server_every_s=3.0, failed_saves=0.5),
    "cuts-and-duplication": Faults(cut_every_s=0.5, duplicate=0.1, delay_s=0.02),
    "everything": Faults(
        duplicate=0.05, cut_every_s=2.0, crash_worker_every_s=4.0, crash_server_every_s=5.0, failed_saves=0.2
    ),
}
REAL = [name for name, faults in FAULTS.items() if not faults.duplicate and not faults.reorder]
"""What a transport may do to a connection: never the same message twice, and never out of order. Cores that talk in
single messages bear with both; a chunk that comes twice is a broken transfer."""
SEEDS = 6
REPLAY = "COUNTING_SEED"
"""Environment variable that holds the one seed to run."""


def seeds(count: int) -> list[int]:
    """All of them, or the one that is to be repeated."""
    return [int(os.environ[REPLAY])] if REPLAY in os.environ else list(range(count))


def counted(seed: int, name: str, **changes: Any) -> Cluster:
    """One run, checked; a failure says how to repeat it."""
    cluster = Cluster(seed, faults=FAULTS[name], **changes)
    try:
        cluster.run()
        check_counting(cluster)
    except Exception as error:
        nodeid = os.environ.get("PYTEST_CURRENT_TEST", "tests/simulation").rpartition(" ")[0]
        error.add_note(f"at {cluster.now:.6f} s; again: {REPLAY}={seed} python -m pytest '{nodeid}'")
        raise
    return cluster


@pytest.mark.parametrize("name", FAULTS)
def test_small_pushes(name: str) -> None:
    """One message each way."""
    for seed in seeds(SEEDS):
        counted(seed, name, updates=60 if "crash" in name or name == "everything" else 15)


@pytest.mark.parametrize("name", REAL)
def test_pushes_of_several_chunks(name: str) -> None:
    """Begin, Grant, chunks, Commit; Ack, More, chunks. One chunk allowed at a time, and fewer slots than workers."""
    for seed in seeds(1):
        settings = {"window_chunks": 1, "pool_mib": 16}
        counted(100 + seed, name, workers=3, updates=6, guard=600_000, settings=settings)


def test_a_run_is_decided_by_its_seed() -> None:
    """To the last bit, so that a failure can be repeated."""

    def trace(seed: int) -> tuple[float, bytes, list[dict[int, Any]]]:
        cluster = counted(seed, "everything", updates=20)
        assert cluster.server is not None
        assert cluster.server.shard is not None
        return cluster.now, cluster.server.shard.center.tobytes(), [t.applied for t in cluster.trainers]

    assert trace(1) == trace(1)
    assert trace(1) != trace(2)


def test_server_crashes_really_lose_something() -> None:
    """Or else the oracle has nothing to see."""
    clusters = [counted(seed, "server-crashes", updates=60) for seed in seeds(SEEDS)]
    assert sum(cluster.crashes for cluster in clusters) >= len(clusters) // 2
    assert any(trainer.reported for cluster in clusters for trainer in cluster.trainers)


@pytest.mark.parametrize("messages", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_messages_of_which_a_tenth_each_is_lost_doubled_and_overtaken(messages: int) -> None:
    """Every core is validated after every event."""
    links: list[Link] = []
    for seed in seeds(messages // 2_500):
        cluster = counted(2000 + seed, "a-tenth-of-each", workers=12, updates=60, train_s=0.3)
        links += cluster.links.values()
    carried, lost, doubled = (sum(getattr(link, kind) for link in links) for kind in ("carried", "lost", "doubled"))
    assert carried >= messages or REPLAY in os.environ
    assert lost == pytest.approx(0.1 * carried, rel=0.15)
    assert doubled == pytest.approx(0.1 * carried, rel=0.15)


def test_the_cluster_sees_what_it_is_there_to_see() -> None:
    """A buffer that changes before it is released, and what the wire cannot read."""
    cluster = Cluster(1, workers=1)
    assert cluster.host is not None
    link = cluster.trainers[0].link
    frames = [bytearray(frame) for frame in wire.encode(Beat("session", 1, 0))]
    with pytest.raises(WireError):
        link.down(cluster.host, [b"?", *frames], 0)
    link.down(cluster.host, frames, 7)
    frames[0][0] ^= 1
    with pytest.raises(AssertionError, match="a buffer changed"):
        cluster.run_for(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_many_seeds(name: str) -> None:
    """10^5 messages and more."""
    for seed in seeds(150):
        counted(1000 + seed if REPLAY not in os.environ else seed, name, updates=100)
