"""Each update counts once over shared memory too: seeds x faults, on the counting model, with memory that is shared.

Laws
* Messages carry pointers, and what they point at is looked up when they arrive: who overwrites too early is read wrong.
* What is overwritten is overwritten with poison first, so that half of a new update is no old one.
* On a connection that holds, what a pointer points at is what it pointed at when it was sent.
* Attaching takes time, and may fail on either side; memory ends with its connection, and the server keeps none.

The oracle is that of `test_exactly_once`. A failing run says how to repeat it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest

from common import wire
from common.codecs.base import U8
from common.messages import Buffer, Place
from common.node import Received
from common.simulator import ARRIVES_ANYWAY, Host
from common.transports.base import SERVER
from paramserver.core import Attach, Attached, Detach
from tests.cluster import CheckedLink, Cluster, Faults, Trainer, check_counting
from tests.simulation.test_differences import Adder, LeavingAdder, RoundAdder
from tests.simulation.test_exactly_once import FAULTS, REAL, REPLAY, seeds
from tests.simulation.test_rules_under_faults import (
    NO_CRASH,
    Elastic,
    Leaver,
    Rounder,
    check_elastic,
    check_rounds,
    ran,
)
from worker import events

POISON = 0x7F
"""As float32 it is finite, and so large that nobody overlooks it."""
ATTACH_S = 0.01
FAILS = 0.1
"""Share of the attempts to attach that fail, on either side."""
SEEDS = 6


class SharedLink(CheckedLink):
    """A link both of whose ends may have memory that the other reads, as `common.transports.zeromq` has it."""

    _cluster: SharingCluster
    mine: U8 | None = None
    """What the worker writes and the server reads, once the worker has attached the server's."""
    theirs: tuple[str, U8] | None = None
    """What the worker reads."""
    pointed = checked = 0

    def up(self, frames: Sequence[Buffer]) -> None:
        """As a pointer, where the payload lies in memory that is shared."""
        super().up(self._pointed(frames, self.mine, self._cluster.trainer_of(self).mark))

    def down(self, server: Host, frames: Sequence[Buffer], hold: int) -> None:
        """As a pointer, where the payload lies in memory that is shared; there is nothing then to wait for."""
        shared = self._cluster.shared.get(self.peer)
        pointer = self._pointed(frames, shared.memory if shared else None, shared.mark if shared else "")
        if pointer is frames and len(frames) > 1 and len(frames[1]) > wire.PAYLOAD_BYTES:
            raise AssertionError("too long for a message, and not shared")
        super().down(server, pointer, hold)

    def _pointed(self, frames: Sequence[Buffer], memory: U8 | None, mark: str) -> Sequence[Buffer]:
        if memory is None or len(frames) < 2:
            return frames
        payload = np.frombuffer(frames[1], np.uint8)
        if not np.shares_memory(payload, memory):
            return frames
        type(self).pointed += 1
        at = payload.ctypes.data - memory.ctypes.data
        return [frames[0], b"", f"{mark} {at} {payload.size} {hash(payload.tobytes())}".encode()]

    def _found(self, frames: Sequence[Buffer], theirs: tuple[str, U8] | None) -> Sequence[Buffer]:
        """What a pointer points at now."""
        if len(frames) < 3:
            return frames
        mark, at, size, told = bytes(frames[2]).decode().split()
        if theirs is None or theirs[0] != mark:
            return [frames[0], b""]
        view = theirs[1][int(at) : int(at) + int(size)]
        view.flags.writeable = False
        if self.open and not self._cluster.faults.duplicate:
            assert hash(view.tobytes()) == int(told), "it was overwritten before its reader was done"
            type(self).checked += 1
        return [frames[0], view.data]

    def _reach_server(self, server: Host, frames: Sequence[Buffer]) -> None:
        if self.open or self._cluster.random.random() < ARRIVES_ANYWAY:
            shared = self._cluster.shared.get(self.peer)
            server.handle(Received(self.peer, self._found(frames, shared.theirs if shared else None)))

    def _reach_worker(self, frames: Sequence[Buffer]) -> None:
        if self.open:
            self.worker.handle(Received(SERVER, self._found(frames, self.theirs)))


class Shares(Trainer):
    """Encodes every push in the same memory, and attaches the server's."""

    cluster: SharingCluster
    link: SharedLink

    def __init__(self, cluster: SharingCluster, row: int) -> None:
        self.mark, self.memory = "", np.zeros(0, np.uint8)
        super().__init__(cluster, row)

    def take(self, news: Any) -> None:
        if isinstance(news, events.Joined):
            plan = self.core.plan(str(news.welcome.settings["codec"]))
            self.mark, self.memory = self.cluster.made(plan.bytes)
            place = Place(self.row + 1, 3, plan.bytes, self.mark)
            self.cluster.after(0.0, partial(self.cluster.work, self, events.Staged(place)))
        super().take(news)

    def staging(self, size: int) -> U8:
        self.memory[:] = POISON
        return self.memory[:size]

    def do(self, action: Any) -> None:
        if not isinstance(action, events.Attach):
            super().do(action)
        elif action.place.mark not in self.cluster.memories or self.cluster.random.random() < FAILS:
            self.cluster.work(self, events.CannotAttach("It is elsewhere."))
        else:
            self.link.theirs = action.place.mark, self.cluster.memories[action.place.mark]
            self.link.mine = self.memory


class SharingRounder(Shares, Rounder):
    """Under rounds: replies that come late."""


class SharingElastic(Shares, Elastic):
    """Under elastic averaging: replies that are owed."""


class SharingAdder(Shares, LeavingAdder):
    """Where replies are differences: what is owed stays where it lies."""


class SharingRoundAdder(Shares, RoundAdder):
    """And comes late."""


class SharingLeaver(Shares, Leaver):
    """Says Bye once it is done."""


class Given(NamedTuple):
    """What the server shares with a peer: it writes `memory`, and reads `theirs`."""

    mark: str
    memory: U8
    theirs: tuple[str, U8]


class SharingCluster(Cluster):
    """One server and some workers on one machine."""

    machine = "here"
    link = SharedLink

    def __init__(self, seed: int, *, trainer: type[Shares] = Shares, **changes: Any) -> None:
        self.memories: dict[str, U8] = {}
        """By mark, all that there is."""
        self.shared: dict[bytes, Given] = {}
        self.given = self.ended = 0
        super().__init__(seed, trainer=trainer, **changes)

    def made(self, size: int) -> tuple[str, U8]:
        """Fresh memory, poisoned, and its mark."""
        mark = f"{self.random.getrandbits(128):032x}"
        self.memories[mark] = np.full(size, POISON, np.uint8)
        return mark, self.memories[mark]

    def trainer_of(self, link: SharedLink) -> Shares:
        """Whose link it is."""
        return next(trainer for trainer in self.trainers if trainer.host is link.worker)  # type: ignore[return-value]

    def crash_server(self, away_s: float | None = None) -> None:
        """What it shared, its workers may still read; nobody may attach it."""
        super().crash_server(away_s)
        if self.host is None:
            for given in self.shared.values():
                self.memories.pop(given.mark, None)
            self.shared.clear()

    def _do(self, host: Host, action: Any) -> None:
        match action:
            case Attach():
                self.after(self.random.uniform(0.0, 2 * ATTACH_S), partial(self._attach, host, action))
            case Detach(peer):
                if given := self.shared.pop(peer, None):
                    self.ended += 1
                    del self.memories[given.mark]
            case _:
                super()._do(host, action)

    def _attach(self, host: Host, wanted: Attach) -> None:
        """As the daemon does: what it reads and writes is in place before the core hears of it."""
        if host.dead:
            return
        theirs, place = self.memories.get(wanted.place.mark), wanted.place
        if theirs is None or theirs.size != wanted.update_bytes or self.random.random() < FAILS:
            host.handle(Attached(wanted.peer, wanted.session, wanted.connection, None, None, "It is elsewhere."))
            return
        mark, memory = self.made(wanted.reply_bytes)
        assert wanted.peer not in self.shared, "the shell forgot to end it"
        self.shared[wanted.peer] = Given(mark, memory, (place.mark, theirs))
        self.given += 1
        here = Place(99, 4, wanted.reply_bytes, mark)
        host.handle(Attached(wanted.peer, wanted.session, wanted.connection, memory, here))

    def check_shared(self) -> None:
        """The server shares with those who share with it, and with nobody else."""
        assert self.server is not None
        sharing = {session.peer for session in self.server.sessions.values() if session.memory is not None}
        assert sharing == self.shared.keys()


def counted(seed: int, name: str, **changes: Any) -> SharingCluster:
    """One run, checked; a failure says how to repeat it."""
    cluster = SharingCluster(seed, faults=FAULTS[name], **changes)
    try:
        cluster.run()
        check_counting(cluster)
        cluster.check_shared()
    except Exception as error:
        error.add_note(f"at {cluster.now:.6f} s; again: {REPLAY}={seed} with {name}")
        raise
    return cluster


@pytest.mark.parametrize("name", FAULTS)
def test_small_pushes(name: str) -> None:
    """One message each way."""
    SharedLink.pointed = SharedLink.checked = 0
    clusters = [
        counted(seed, name, updates=60 if "crash" in name or name == "everything" else 15) for seed in seeds(SEEDS)
    ]
    assert sum(cluster.given for cluster in clusters) >= len(clusters)
    assert SharedLink.pointed > 100 * len(clusters) / SEEDS
    assert SharedLink.checked > 50 or FAULTS[name].duplicate


@pytest.mark.parametrize("name", REAL)
def test_pushes_of_several_chunks(name: str) -> None:
    """Chunks up, each of which is a pointer; and one message down, which is another."""
    SharedLink.pointed = 0
    for seed in seeds(1):
        settings = {"window_chunks": 1, "pool_mib": 16}
        counted(100 + seed, name, workers=3, updates=6, guard=600_000, settings=settings)
    assert SharedLink.pointed


@pytest.mark.parametrize("name", FAULTS)
def test_rounds(name: str) -> None:
    """Who is held reads its reply where that was written long after its push."""
    SharedLink.pointed = 0
    for seed in seeds(2):
        settings = {"rule": "local_sgd"}
        updates = 25 if "crash" in name or name == "everything" else 10
        ran(
            seed,
            FAULTS[name],
            check_rounds,
            kind=SharingCluster,
            updates=updates,
            settings=settings,
            trainer=SharingRounder,
        )
    assert SharedLink.pointed


@pytest.mark.parametrize("name", NO_CRASH)
def test_elastic_averaging(name: str) -> None:
    """What is owed is sent again byte for byte, though the memory it lies in was another connection's."""
    SharedLink.pointed = 0
    for seed in seeds(2):
        settings = {"rule": "easgd", "rule_settings": {"beta": 0.5}, "workers": 2}
        ran(
            seed, FAULTS[name], check_elastic, kind=SharingCluster, updates=8, settings=settings, trainer=SharingElastic
        )
    assert SharedLink.pointed


@pytest.mark.parametrize("name", FAULTS)
def test_clocks_with_a_gap(name: str) -> None:
    for seed in seeds(2):
        settings = {"max_clock_gap": 1}
        ran(seed, FAULTS[name], check_counting, kind=SharingCluster, settings=settings, trainer=SharingLeaver)


@pytest.mark.parametrize("name", FAULTS)
def test_differences(name: str) -> None:
    """Copy and replica have the same bits: compared at every merge."""
    SharedLink.pointed = 0
    crashes = "crash" in name or name == "everything"
    settings = {"replies": "difference", "reply_codec": "int8"}
    for seed in seeds(2):
        one = ran(
            seed,
            FAULTS[name],
            check_counting,
            kind=SharingCluster,
            settings=settings,
            trainer=SharingAdder,
            rows=3_000,
        )
        two = ran(
            seed,
            FAULTS[name],
            check_rounds,
            kind=SharingCluster,
            updates=25 if crashes else 10,
            settings=settings | {"rule": "local_sgd"},
            trainer=SharingRoundAdder,
            rows=3_000,
        )
        trainers = [trainer for trainer in (*one.trainers, *two.trainers) if isinstance(trainer, Adder)]
        assert all(trainer.compared for trainer in trainers if not trainer.dead)
    assert SharedLink.pointed


def test_under_cuts_it_ends_as_often_as_it_begins() -> None:
    clusters = [counted(seed, "cuts", updates=40) for seed in seeds(SEEDS)]
    assert all(cluster.ended > 3 for cluster in clusters)
    assert all(cluster.given == cluster.ended + len(cluster.shared) for cluster in clusters)


def test_the_cluster_sees_what_it_is_there_to_see() -> None:
    """A trainer that writes its next push too early, and a server that answers the next before the last was read."""
    cluster = SharingCluster(1, workers=1, faults=Faults(delay_s=0.05))
    trainer = cluster.trainers[0]
    assert isinstance(trainer, Shares)

    def overwrite() -> None:
        trainer.memory[:] = POISON
        cluster.after(0.01, overwrite)

    while not trainer.applied:
        cluster.run_for(0.01)
    overwrite()
    with pytest.raises(AssertionError, match="overwritten before its reader was done"):
        cluster.run()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_many_seeds(name: str) -> None:
    """Some 10^5 messages."""
    for seed in seeds(40):
        counted(1000 + seed if REPLAY not in os.environ else seed, name, updates=100)
