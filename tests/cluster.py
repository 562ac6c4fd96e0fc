"""A cluster in memory, on the engine of `paramserver simulate`: the real cores, and faults drawn from one seed.

    cluster = Cluster(seed=7, faults=Faults(loss=0.1))
    cluster.run()
    check_counting(cluster)

The model is the counting model: update s of worker w adds 1 to slot (w, s) and 1 to every element of a guard tensor.

Laws
* One seed, one run: everything random is drawn from it, and nothing reads a clock.
* Cores meet only as encoded frames, copied when sent. Whatever a core sends, the wire can read.
* A buffer under a hold, and the arrays of a Save, must not change until they are given back: that is checked here.
* A job's blocks run in scrambled ranges, some when the job starts and some when it ends.
* `validate` of a core runs after each of its events; a core that asks for Ticks without end is caught.

A trainer keeps to the contract of `worker.core`, as `worker.trainer` does, and remembers all it was told; the oracle
compares that with the center. `Desk` and `Hand` are for tests that want one message at a time: a server whose outside
is the test, and a worker that says what it is told to. Left out: sockets, threads, files, and all that needs torch.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common import chunks, codecs, distributions, rules, wire
from common.codecs.base import BLOCK_ELEMENTS, F32, U8
from common.config import ServerSettings
from common.distributions import expovariate
from common.layout import Layout, Tensor
from common.messages import (
    NOWHERE,
    Ack,
    Beat,
    Begin,
    Buffer,
    Bye,
    Chunk,
    Commit,
    Hello,
    Message,
    More,
    Optimizer,
    Place,
    Pull,
    Push,
    Report,
    Resume,
    Scalars,
    Share,
    Version,
    Welcome,
)
from common.node import JobDone, Node, Received, Released, Run, Send, Tick
from common.simulator import EVENTS_AT_ONCE, LATE_S, Conditions, Host, Link, Pipe, World, unsent
from paramserver.core import Attach, Attached, Detach, Exit, Recovered, Save, Saved, SaveFailed, ServerCore, Stop
from worker import core as worker
from worker import events
from worker.core import WorkerCore


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong. Shares are of messages, times are means in seconds; None: never."""

    delay_s: float = 0.005
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    """Share of messages that others of the same connection may overtake, which no real transport lets happen."""
    cut_every_s: float | None = None
    crash_worker_every_s: float | None = None
    crash_server_every_s: float | None = None
    failed_saves: float = 0.0


class Counting:
    """The counting model as a layout, and where its parts lie in the vector."""

    def __init__(self, rows: int, updates: int, guard: int) -> None:
        tensors = [
            Tensor("slots", (rows, updates), "float32", "parameter"),
            Tensor("guard", (guard,), "float32", "parameter"),
            Tensor("mean", (3,), "float32", "buffer"),
            Tensor("batches", (), "int64", "local"),
        ]
        self.layout = Layout(tuple(tensors))
        self.shape = (rows, updates)
        self.slots = slice(0, rows * updates)
        self.guard = slice(rows * updates, rows * updates + guard)

    def update(self, row: int, s: int) -> F32:
        """(elements,) what update s of worker `row` adds; its buffers hold the row."""
        d = np.zeros(self.layout.elements, np.float32)
        d[row * self.shape[1] + s] = 1.0
        d[self.guard] = 1.0
        d[self.layout.parameters :] = row
        return d

    def set_slots(self, center: F32) -> F32:
        """(rows, updates) the slots, after checking that they and the guard agree."""
        slots = center[self.slots].reshape(self.shape)
        assert np.isin(slots, (0.0, 1.0)).all(), "a slot was counted twice"
        assert (center[self.guard] == slots.sum()).all(), "the guard is torn, or does not count the slots"
        return slots


class CheckedLink(Link):
    """A link on which every message is a copy that the wire can read, and no buffer changes before it is released.

    The transport may have read a buffer long before its message arrives, or long after.
    """

    def __init__(self, cluster: Cluster, worker: Host, peer: bytes) -> None:
        unlimited = Pipe(0.0), Pipe(0.0)
        super().__init__(
            cluster.world, cluster.conditions, cluster.random, worker, lambda: cluster.host, peer, unlimited
        )
        self._cluster = cluster
        self._reading: defaultdict[int, deque[tuple[Sequence[Buffer], list[bytes]]]] = defaultdict(deque)
        """Hold -> of each message under it the buffers, and what they held when they were sent."""

    def up(self, frames: Sequence[Buffer]) -> None:
        super().up(_copied(frames))

    def down(self, server: Host, frames: Sequence[Buffer], hold: int) -> None:
        copies = _copied(frames)
        if hold and self.open:
            self._reading[hold].append((frames, copies))
        super().down(server, copies, hold)

    def read_at(self, arrivals_s: Sequence[float]) -> float:
        return self._cluster.now + expovariate(self._cluster.random, self._cluster.faults.delay_s)

    def read(self, server: Host, hold: int) -> None:
        for frames, copies in self._reading[hold]:
            assert copies == [bytes(frame) for frame in frames], "a buffer changed while the transport read it"
        self._reading[hold].popleft()  # whichever it was: a core cannot tell
        super().read(server, hold)


def _copied(frames: Sequence[Buffer]) -> list[bytes]:
    copies = [bytes(frame) for frame in frames]
    wire.decode(copies[:2])  # a third is a pointer, which no core sees
    return copies


class Trainer:
    """One worker's training loop as a script, its core, and what it was told.

    As a node it is its core, but that it notes what the wire tells.
    """

    def __init__(self, cluster: Cluster, row: int) -> None:
        self.cluster, self.row = cluster, row
        self.core = WorkerCore(
            name=f"w{row}", instance=f"instance-{row}", library="test", layout=cluster.model.layout, optimizer=None
        )
        self.host = Host(cluster.world, self, self.do, check=True)
        self.link = cluster.dialled(self)
        self.away, self.reanchoring, self.finished = False, True, False
        self.in_flight: int | None = None
        self.again: deque[int] = deque()
        self.next = 0
        self.numbers: dict[tuple[str, int], int] = {}
        """(session, number) -> s."""
        self.applied: dict[int, Version] = {}
        self.versions: dict[tuple[str, int], Version] = {}
        """(session, number) -> version of the update, as acked."""
        self.rejected: dict[int, str] = {}
        self.unknown: set[int] = set()
        self.reported: set[int] = set()
        """Lost in a crash, and told so."""
        self.seen = NOWHERE
        self.durable: dict[int, Version] = {}
        """What each epoch of the server last told to be durable."""
        self.failed: Any = None

    def __repr__(self) -> str:
        state = "away" if self.away else "reanchoring" if self.reanchoring else f"pushing {self.in_flight}"
        return f"<w{self.row} {state}, {len(self.applied)} applied, {len(self.rejected)} rejected, {self.core!r}>"

    @property
    def dead(self) -> bool:
        """Whether it was killed."""
        return self.host.dead

    @property
    def done(self) -> bool:
        """Whether every update was settled, or this trainer ended."""
        left = self.again or self.in_flight is not None or self.next < self.cluster.model.shape[1]
        return self.dead or self.finished or not left

    def handle(self, event: Any, now: float) -> list[Any]:
        """The core's, after noting what the wire tells."""
        if isinstance(event, Received):
            self.hears(event.frames)
        return self.core.handle(event, now)

    def deadline(self) -> float | None:
        """The core's."""
        return self.core.deadline()

    def validate(self) -> None:
        """The core's."""
        self.core.validate()

    def do(self, action: Any) -> None:
        """What the core wants done."""
        match action:
            case Send(_, frames):
                self.link.up(frames)
            case events.Redial():
                self.link.close()
                self.link = self.cluster.dialled(self)
                self.host.soon(events.Dialled())
            case events.Deliver(news):
                self.take(news)

    def train(self) -> None:
        """A few local steps, then push where that makes sense."""
        if self.dead or self.failed or self.finished:
            return
        self.cluster.after(expovariate(self.cluster.random, self.cluster.train_s), self.train)
        if self.away or self.reanchoring or self.in_flight is not None or self.done:
            return
        s = self.again.popleft() if self.again else self.next
        self.next = max(self.next, s + 1)
        self.in_flight = s
        plan = self.core.plan(self.cluster.settings.codec)
        data = self.staging(plan.bytes)
        plan.encode(self.update(s), data)
        chunks = len(plan.chunks)
        ready = chunks if chunks == 1 else self.cluster.random.randrange(chunks)
        self.cluster.work(self, events.PushWanted(data, plan.codec, Scalars(0.5, 8, 1, 0.1), self.seen, ready))
        self.numbers[self.core.membership.token, self.core.membership.last_number] = s
        if ready < chunks:
            self.cluster.after(0.001, partial(self.cluster.work, self, events.Encoded(chunks)))

    def staging(self, size: int) -> U8:
        """(size,) where the next push is encoded."""
        return np.zeros(size, np.uint8)

    def update(self, s: int) -> F32:
        """(elements,) what update `s` pushes."""
        return self.cluster.model.update(self.row, s)

    def hears(self, frames: Sequence[Buffer]) -> None:
        """Note what the wire tells and the core keeps to itself."""
        match wire.decode(frames, payload_bytes=LONGEST_BYTES):
            case Ack(outcome="applied", number=number) as ack if number:
                self.versions[ack.session, number] = ack.version
                self.durable[ack.durable.epoch] = max(ack.durable, self.durable.get(ack.durable.epoch, NOWHERE))
            case Welcome() as welcome:
                here = self.core.membership.token, self.core.membership.connection
                if (welcome.session, welcome.connection) != here:
                    self.welcomed(welcome)

    def welcomed(self, welcome: Welcome) -> None:
        """What a crash undid is what the server says it undid; where the session is gone too, all of it."""
        undone = {s for s, version in self.applied.items() if not self.cluster.survives(version)} - self.reported
        if welcome.lost:
            numbers = range(welcome.lost[0], welcome.lost[1] + 1)
            session = self.core.membership.token  # also where there is a new one: numbers are of the old
            told = {self.numbers[session, n] for n in numbers if (session, n) in self.numbers}
            assert told & self.applied.keys() - self.reported == undone, f"{self} lost {undone}, was told {told}"
        else:
            assert not undone or welcome.resumed == "new", f"{self} lost {undone} and was not told"
        self.reported |= undone

    def take(self, news: Any) -> None:
        """React to the core's news."""
        match news:
            case events.NeedWeights():
                plan = self.core.plan(worker.LOSSLESS)
                zeros = np.zeros(plan.bytes, np.uint8)
                self.cluster.after(0.0, partial(self.cluster.work, self, events.InitialWeights(zeros)))
            case events.Settled(number=number, outcome=outcome, code=code, base=base, values=values):
                s = self.numbers[self.core.membership.token, number]
                assert s == self.in_flight, f"{self} was told of update {s}"
                self.in_flight = None
                if outcome == "applied":
                    self.applied[s] = self.versions[self.core.membership.token, number]
                    self.merge(base, values)
                else:
                    self.rejected[s] = code
                    self.reanchoring = True
                    self.cluster.after(0.0, partial(self.cluster.work, self, events.PullWanted("anchor")))
            case events.Orphaned(pushed=pushed):
                assert self.in_flight is not None
                self.unknown.add(self.in_flight) if pushed else self.again.append(self.in_flight)
                self.in_flight, self.reanchoring = None, True
            case events.Fetched(base=base, values=values):
                self.reanchoring = False
                self.merge(base, values)
            case events.Away():
                self.away = True
            case events.Back():
                self.away = False
            case events.Finished():
                self.finished = True
            case events.Failed(error):
                self.failed = error

    def merge(self, base: Version, center: F32 | None) -> None:
        """Whatever is pulled is one version, and it never goes back."""
        assert base >= self.seen, f"{self} saw {self.seen} and was then given {base}"
        self.seen = base
        if center is not None:
            assert self.cluster.model.set_slots(center).sum() == base.version, f"not the center of {base}"


class Cluster:
    """One server, some workers, a disk, and time."""

    machine = ""
    """The server's, where memory is shared."""
    link: type[CheckedLink] = CheckedLink

    def __init__(
        self,
        seed: int,
        *,
        workers: int = 3,
        updates: int = 12,
        guard: int = 40,
        faults: Faults = Faults(),
        job_s: float = 0.002,
        train_s: float = 0.05,
        settings: dict[str, Any] | None = None,
        trainer: type[Trainer] = Trainer,
        rows: int = 0,
    ) -> None:
        """rows: of the model, where it shall have more than one for each worker that there may ever be."""
        self.most_workers = 4 * workers
        self.seed, self.faults, self.job_s, self.train_s, self.trainer = seed, faults, job_s, train_s, trainer
        self.random = random.Random(seed)
        self.world = World()
        self.model = Counting(max(rows, self.most_workers), updates, guard)
        defaults = {"directory": Path("unused"), "checkpoint_interval_s": 1.0, "lease_s": 6.0, "init_timeout_s": 2.0}
        self.settings = ServerSettings.model_validate(defaults | (settings or {}))
        self.disk: Save | None = None
        self.recoveries: dict[int, Version] = {}
        """Epoch -> the version it was recovered from."""
        latency = distributions.parse(f"exponential:{faults.delay_s}", "delay_s")
        self.conditions = Conditions(latency, 0.0, faults.loss, faults.duplicate, faults.reorder, cuts=True)
        self.links: dict[bytes, CheckedLink] = {}
        """All that there ever were."""
        self.exited = False
        self.crashes = 0
        self._count = itertools.count(1)
        self.server: ServerCore | None = None
        self.host: Host | None = None
        self.start_server(epoch=1)
        self.trainers: list[Trainer] = []
        for _ in range(workers):
            self.add_worker()
        for every_s, fault in (
            (faults.cut_every_s, self.cut_one),
            (faults.crash_worker_every_s, self.crash_worker),
            (faults.crash_server_every_s, self.crash_server),
        ):
            if every_s is not None:
                self._again_and_again(every_s, fault)

    # Time

    @property
    def now(self) -> float:
        """Virtual seconds."""
        return self.world.now

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        """Do `act` in so many seconds."""
        self.world.after(delay_s, act)

    def run_for(self, seconds: float) -> None:
        """Let so much time pass."""
        self.world.run_for(seconds)

    def run(self, limit_s: float = 300.0) -> None:
        """Run until every trainer is done; raises AssertionError that says who is not, after `limit_s`."""
        end = self.now + limit_s
        while not self.all_done and self.now < end and self.world.step():
            pass
        assert self.all_done, f"not done after {limit_s:g} s: {self.trainers}, {self.server!r}"
        self.run_for(2 * self.settings.lease_s)  # no fault happens any more, and everybody is back

    @property
    def all_done(self) -> bool:
        """Nobody has anything to push, and the server is up."""
        for trainer in self.trainers:
            assert trainer.failed is None, f"{trainer} was refused: {trainer.failed}"
        return self.server is not None and all(trainer.done for trainer in self.trainers)

    def _again_and_again(self, every_s: float, fault: Callable[[], None]) -> None:
        def happen() -> None:
            if not self.all_done:
                fault()
                self.after(expovariate(self.random, every_s), happen)

        self.after(expovariate(self.random, every_s), happen)

    # Workers

    def add_worker(self) -> None:
        """One more worker, with a row of its own, while there are rows."""
        if len(self.trainers) < self.most_workers:
            trainer = self.trainer(self, len(self.trainers))
            self.trainers.append(trainer)
            self.work(trainer, events.Dialled())
            self.after(self.train_s, trainer.train)

    def work(self, trainer: Trainer, event: Any) -> None:
        """One event through a worker's core, and what it wants done."""
        trainer.host.handle(event)

    def dialled(self, trainer: Trainer) -> CheckedLink:
        """A fresh connection, under a name that was never used."""
        link = self.link(self, trainer.host, b"peer-%d" % next(self._count))
        self.links[link.peer] = link
        return link

    # The server

    def start_server(self, epoch: int) -> None:
        """A life of the server, from what the disk holds."""
        recovered = None
        if self.disk is not None:
            recovered = recovered_from(self.disk)
            self.recoveries[epoch] = self.disk.version
        core = ServerCore(
            self.settings,
            epoch=epoch,
            token=lambda: f"t{epoch}-{next(self._count)}",
            recovered=recovered,
            machine=self.machine,
        )
        self.live(core, core, core.start(self.now))

    def live(self, core: ServerCore, node: Node, actions: Sequence[Any]) -> None:
        """Have `core` be the server, through `node`; `actions`: what its start wants done."""
        self.server = core
        self.host = host = Host(self.world, node, lambda action: self._do(host, action), check=True)
        host.carry_out(actions)

    def serve(self, event: Any) -> None:
        """One event through the server's core, and what it wants done; while there is none, nothing."""
        if self.host is not None:
            self.host.handle(event)

    def _do(self, host: Host, action: Any) -> None:
        match action:
            case Send(peer, frames, hold):
                if link := self.links.get(peer):
                    link.down(host, frames, hold)
                else:
                    unsent(host, peer, hold)
            case Run():
                self._run(host, action)
            case Save():
                self._save(host, action)
            case Exit():
                self.exited = True
                host.die()

    def _run(self, host: Host, job: Run) -> None:
        edges = sorted({0, job.parts, *(self.random.randrange(job.parts) for _ in range(3))})
        ranges = list(itertools.pairwise(edges))
        results: dict[tuple[int, int], Any] = {}

        def work(some: list[tuple[int, int]]) -> None:
            for first, last in self.random.sample(some, len(some)):
                results[first, last] = job.work(first, last, np.full(BLOCK_ELEMENTS, np.nan, np.float32))

        def end() -> None:
            if not host.dead:
                work(ranges[half:])
                host.handle(JobDone(job.job, [results[part] for part in ranges]))

        half = self.random.randrange(len(ranges) + 1)
        work(ranges[:half])
        self.after(expovariate(self.random, self.job_s), end)

    def _save(self, host: Host, save: Save) -> None:
        before = {name: array.tobytes() for name, array in save.arrays.items()}
        seconds = self.random.uniform(0.0, 0.1)

        def written() -> None:
            if host.dead:
                return
            assert before == {name: array.tobytes() for name, array in save.arrays.items()}, "a saved array changed"
            if self.random.random() < self.faults.failed_saves:
                host.handle(SaveFailed("The disk is full."))
                return
            self.disk = Save(save.version, {name: array.copy() for name, array in save.arrays.items()}, save.record)
            host.handle(Saved(save.version, seconds))

        self.after(seconds, written)

    def stop(self, reason: str = "told to") -> None:
        """Tell the server to stop."""
        self.serve(Stop(reason))

    def survives(self, version: Version) -> bool:
        """Whether a version the server once had is part of the history of the server as it is now."""
        return all(version <= kept for epoch, kept in self.recoveries.items() if epoch > version.epoch)

    # Faults

    def cut(self, link: Link) -> None:
        """Break a connection; its worker hears of it at once, or only by silence."""
        link.cut(events.LinkLost())

    def cut_one(self) -> None:
        """Break the connection of any worker."""
        self.cut(self.random.choice([trainer.link for trainer in self.trainers]))

    def crash_worker(self, trainer: Trainer | None = None) -> None:
        """kill -9 of a worker; another takes its place."""
        alive = [t for t in self.trainers if not t.done]
        if trainer is None and len(self.trainers) == self.most_workers:
            return
        if victim := trainer or (self.random.choice(alive) if alive else None):
            victim.host.die()
            victim.link.close()
            if victim.in_flight is not None:
                victim.unknown.add(victim.in_flight)
            self.crashes += 1
            self.add_worker()

    def crash_server(self, away_s: float | None = None) -> None:
        """kill -9 of the server once something is saved; it comes back from the disk, in the next epoch."""
        if self.server is None or self.host is None or self.disk is None:
            return
        self.host.die()
        epoch, self.server, self.host = self.server.version.epoch, None, None
        self.crashes += 1
        for link in self.links.values():
            self.cut(link)
        self.after(self.random.uniform(0.1, 2.0) if away_s is None else away_s, partial(self.start_server, epoch + 1))


def check_counting(cluster: Cluster) -> None:
    """The oracle: what the center counted is what the workers were told."""
    server = cluster.server
    assert server is not None
    assert server.shard is not None
    slots = cluster.model.set_slots(server.shard.center)
    assert slots.sum() == server.version.version, "downpour: every applied update is one version"
    for trainer in cluster.trainers:
        row = slots[trainer.row]
        for s, version in trainer.applied.items():
            survives = cluster.survives(version)
            assert row[s] == survives, f"{trainer}: update {s} of version {version} is {row[s]}, expected {survives}"
            durable = max((d for epoch, d in trainer.durable.items() if epoch <= version.epoch), default=NOWHERE)
            assert survives or version > durable, f"{trainer}: update {s} was durable and is lost"
            assert survives or trainer.dead or s in trainer.reported, f"{trainer}: update {s} was lost, nobody said so"
        for s in trainer.rejected:
            assert not row[s], f"{trainer}: update {s} was rejected and is applied"
        told = trainer.applied.keys() | trainer.rejected.keys() | trainer.unknown
        told |= {s for s in (trainer.in_flight, *trainer.again) if s is not None}
        assert told >= set(np.flatnonzero(row)), f"{trainer}: an update was applied that was never pushed"


SMALL = Layout((Tensor("w", (2, 3), "float32", "parameter"), Tensor("mean", (2,), "float32", "buffer")))
"""Eight elements: one chunk, so that a push is one message."""
LARGE = Layout((Tensor("w", (600, 1000), "float32", "parameter"), Tensor("b", (7,), "float32", "parameter")))
"""Three chunks in fp32."""
POISON = 0xA5
"""Bytes of memory that nobody has written to."""
LONGEST_BYTES = 1 << 24
"""In shared memory a payload may be longer than a message."""


class Desk:
    """A server whose outside is the test. Jobs and releases happen when told to, or `by_itself`; saves when told to."""

    def __init__(
        self,
        layout: Layout = SMALL,
        *,
        epoch: int = 1,
        recovered: Recovered | None = None,
        by_itself: bool = True,
        machine: str = "",
        **settings: Any,
    ) -> None:
        self.layout = layout
        self.settings = ServerSettings.model_validate(settings)
        count = itertools.count(1)
        self.core = ServerCore(
            self.settings, epoch=epoch, token=lambda: f"t{epoch}-{next(count)}", recovered=recovered, machine=machine
        )
        self.now = 100.0
        self.by_itself = by_itself
        """Whether jobs run and buffers are released as soon as they can be."""
        self.jobs: deque[Run] = deque()
        self.holds: deque[int] = deque()
        self.saves: deque[Save] = deque()
        self.attaching: deque[Attach] = deque()
        """Memory that workers offered; `attach` and `cannot_attach` tell of it."""
        self.detached: list[bytes] = []
        self.sent: list[tuple[bytes, Message]] = []
        """As it was sent: copies."""
        self.lying: list[U8 | None] = []
        """Of each message sent, the payload where it lies."""
        self.said: list[str] = []
        self.exited = False
        self._do(self.core.start(self.now))

    def event(self, event: Any) -> None:
        """One event, and where things happen by themselves, all that follows from it."""
        self._do(self.core.handle(event, self.now))
        while self.by_itself and (self.jobs or self.holds):
            self.work() if self.jobs else self.release()

    def work(self) -> None:
        """Run the job that was started."""
        job = self.jobs.popleft()
        scratch = np.full(BLOCK_ELEMENTS, np.nan, np.float32)
        self.event(JobDone(job.job, [job.work(part, part + 1, scratch) for part in range(job.parts)]))

    def release(self) -> None:
        """The transport has read one more message."""
        self.event(Released((self.holds.popleft(),)))

    def attach(self) -> U8:
        """The memory that was offered first is mapped; what was made for the replies."""
        wanted = self.attaching.popleft()
        memory = np.full(wanted.reply_bytes, POISON, np.uint8)
        place = Place(1, 2, wanted.reply_bytes, f"{len(self.sent):032x}")
        self.event(Attached(wanted.peer, wanted.session, wanted.connection, memory, place))
        return memory

    def cannot_attach(self) -> None:
        """The memory that was offered first is not to be had."""
        wanted = self.attaching.popleft()
        self.event(Attached(wanted.peer, wanted.session, wanted.connection, None, None, "It is elsewhere."))

    def finish(self) -> None:
        """Do and release everything there is."""
        while self.jobs or self.holds:
            self.work() if self.jobs else self.release()

    def wait(self, seconds: float) -> None:
        """Let time pass, with a Tick at each deadline."""
        end = self.now + seconds
        for _ in range(EVENTS_AT_ONCE):
            deadline = self.core.deadline()
            if deadline is None or deadline > end:
                break
            self.now = max(self.now, deadline) + LATE_S
            self.event(Tick())
        else:
            raise AssertionError(f"{self.core!r} wants Ticks without end")
        self.now = end
        self.event(Tick())

    def saved(self) -> Recovered:
        """The last checkpoint that was written, as another life of the server finds it."""
        save = self.saves[-1]
        self.event(Saved(save.version, 0.01))
        return recovered_from(save)

    def state(self) -> tuple[bytes, Version, int]:
        """What a refusal must not change: center, version, slots taken."""
        shard, model = self.core.shard, self.core.state.model
        assert shard is not None
        assert model is not None
        return shard.center.tobytes(), self.core.version, model.slots.taken

    def join(self, name: str = "w", **changes: Any) -> Hand:
        """A worker that was welcomed and holds the center; the first one supplies it, all zero."""
        hand = Hand(self, name)
        welcome = hand.hello(**changes)
        if self.core.state.initialised:
            hand.anchor()
        elif welcome.init == "send":
            hand.initialise()
            hand.anchor()
            self.forget_first_save()
        return hand

    def forget_first_save(self) -> None:
        """The initial weights are saved as soon as they are there; `saves` begins after that."""
        if self.saves:
            self.saved()
            self.saves.clear()

    def _do(self, actions: list[Any]) -> None:
        self.core.validate()
        for action in actions:
            match action:
                case Send(peer, frames, hold):
                    copies = [bytes(frame) for frame in frames]
                    self.sent.append((peer, wire.decode(copies, payload_bytes=LONGEST_BYTES)))
                    self.lying.append(np.frombuffer(frames[1], np.uint8) if len(frames) > 1 else None)
                    if hold:
                        self.holds.append(hold)
                case Attach():
                    self.attaching.append(action)
                case Detach(peer):
                    self.detached.append(peer)
                case Run():
                    self.jobs.append(action)
                case Save():
                    self.saves.append(action)
                case Exit():
                    self.exited = True
                case _ if hasattr(action, "sentence"):
                    self.said.append(action.sentence)


class Hand:
    """A worker that says what it is told to, on connections of its own."""

    _peers = itertools.count(1)

    def __init__(self, desk: Desk, name: str = "w") -> None:
        self.desk, self.name = desk, name
        self.peer = b"hand-%d" % next(self._peers)
        self.instance = f"{name}-{self.peer!r}"
        self.session, self.connection = "", 0
        self.merged = 0
        """Last reply merged: the last center that it was given."""
        self.welcome: Any = None
        self._read = 0

    def send(self, message: Message) -> None:
        """Say this."""
        self.raw([bytes(frame) for frame in wire.encode(message)])

    def raw(self, frames: Sequence[Buffer]) -> None:
        """Say these bytes."""
        self.desk.event(Received(self.peer, frames))

    def heard(self, kind: Any = object) -> list[Any]:
        """What was said to this connection since the last call, of that kind."""
        new, self._read = self.desk.sent[self._read :], len(self.desk.sent)
        return [message for peer, message in new if peer == self.peer and isinstance(message, kind)]

    def redial(self, desk: Desk | None = None) -> Hand:
        """The same worker on a fresh connection (to another life of the server); it has not said Hello yet."""
        other = Hand(desk or self.desk, self.name)
        other.instance, other.session, other._read = self.instance, self.session, len(other.desk.sent)
        return other

    def hello(self, *, resume: Resume | None = None, **changes: Any) -> Any:
        """Say Hello; the last answer: a Welcome, or a Fault."""
        layout = changes.pop("layout", self.desk.layout)
        values: dict[str, Any] = {
            "library": "test",
            "instance": self.instance,
            "role": "worker",
            "worker": self.name,
            "fingerprint": layout.fingerprint,
            "elements": layout.elements,
            "codecs": codecs.known(),
            "host": "here",
            "optimizer": Optimizer("SGD", 0.1, 0.0, 1, False, 0.0),
            "resume": resume,
            "payload": layout.describe(),
        }
        self.heard()
        self.send(Hello(**(values | changes)))
        answers = self.heard()
        for answer in answers:
            if isinstance(answer, Welcome):
                self.session, self.connection, self.welcome = answer.session, answer.connection, answer
        return answers[-1]

    def resume(self, last_sent: int, last_applied: int = 0, desk: Desk | None = None) -> Hand:
        """Come back on a fresh connection, with what is remembered."""
        other = self.redial(desk)
        other.hello(resume=Resume(self.session, last_sent, last_applied, 0))
        return other

    def initialise(self, fill: float = 0.0) -> None:
        """Supply the initial weights."""
        self.push(0, fill, kind="init", codec="fp32")

    def anchor(self) -> Any:
        """Pull the center to go on from it, all of it."""
        return self.pull("anchor")

    def report(self, steps: int, loss: float = 0.5, orders: int = 0) -> None:
        """So many steps are done, so many samples each, and the last order that was carried out."""
        self.send(Report(self.session, self.connection, steps, 8 * steps, loss, orders))

    def pull(self, purpose: Any = "evaluate", source: str = "") -> Any:
        """Pull the center (or a source) and take every chunk of it; the answer."""
        self.heard()
        self.send(Pull(self.session, self.connection, purpose, source, NOWHERE, self.merged))
        answers = self.heard()
        if answers and getattr(answers[-1], "reply", None) is not None:
            self.merged = answers[-1].reply.id
        if answers and getattr(answers[-1], "reply", None) is not None and not answers[-1].payload:
            self.more(answers[-1].reply.id)
        return answers[-1] if answers else None

    def more(self, reply: int, until: int = 1000) -> None:
        """Take chunks of a reply."""
        self.send(More(self.session, self.connection, reply, until))

    def begun(self, number: int, **changes: Any) -> Begin:
        """The Begin of a push (or, with `kind`, of the initial weights)."""
        codec = changes.get("codec", self.desk.settings.codec)
        size = self._plan(codec, int(changes.get("fragment", 0)), whole=changes.get("kind") == "init").bytes
        values = {
            "kind": "push",
            "fragment": 0,
            "codec": codec,
            "bytes": size,
            "base": self.desk.core.version,
            "merged": 0,
        }
        return Begin(self.session, self.connection, number=number, **(values | changes))  # type: ignore[arg-type]

    def _plan(self, codec: str, fragment: int, *, whole: bool = False) -> chunks.Plan:
        """The plan of what is pushed; of the whole vector where there is no such codec or fragment."""
        settings = self.desk.settings
        fragments = 1 if whole else rules.load(settings.rule).fragments(settings.rule_config())
        cut = (fragment, fragments) if fragment < fragments else (0, 1)
        rows = codecs.at_rows(settings.codec, settings.reply_codec)
        return chunks.plan(self.desk.layout, codec if codec in codecs.names() else "fp32", *cut, rows=rows)

    def pieces(self, number: int, fill: float | F32 = 1.0, **changes: Any) -> list[Message]:
        """The messages of a push, in order: one where it is short or memory is shared, or Begin, Chunks and Commit."""
        begin = self.begun(number, **changes)
        plan = self._plan(begin.codec, begin.fragment, whole=begin.kind == "init")
        data = np.zeros(plan.bytes, np.uint8)
        if plan.codec == "fp32" and plan.bytes == self._plan("fp32", 0, whole=True).bytes:
            data.view(np.float32)[: self.desk.layout.elements] = fill  # as it is, NaN too
        else:
            plan.encode(np.full(self.desk.layout.elements, fill, np.float32), data)
        scalars = Scalars(0.5, 8, 1, 0.1)
        session = self.desk.core.sessions.get(self.session)
        if len(plan.chunks) == 1 or (begin.kind == "push" and session is not None and session.memory is not None):
            data.flags.writeable = False
            return [Push(begin, scalars, data.data)]
        cut = [data[c.offset : c.offset + c.size].tobytes() for c in plan.chunks]
        here = (self.session, self.connection, number)
        return [begin, *(Chunk(*here, i, piece) for i, piece in enumerate(cut)), Commit(*here, scalars)]

    def push(self, number: int, fill: float | F32 = 1.0, **changes: Any) -> Any:
        """Push all of it; the last answer."""
        self.heard()
        for message in self.pieces(number, fill, **changes):
            self.send(message)
        answers = self.heard((Ack,))
        if answers and answers[-1].reply is not None and not answers[-1].payload:
            self.more(answers[-1].reply.id)
        return answers[-1] if answers else None

    def beat(self, steps: int = 0) -> None:
        """Be heard of."""
        self.send(Beat(self.session, self.connection, steps))

    def share(self, **changes: Any) -> None:
        """Offer memory for updates."""
        settings = self.desk.settings
        fragments = rules.load(settings.rule).fragments(settings.rule_config())
        size = max(self._plan(settings.codec, part).bytes for part in range(fragments))
        self.send(
            Share(
                self.session,
                self.connection,
                Place(**{"process": 1, "descriptor": 2, "bytes": size, "mark": "00"} | changes),
            )
        )

    def bye(self) -> None:
        """Leave."""
        self.send(Bye(self.session, self.connection, "done"))


def recovered_from(save: Save) -> Recovered:
    """A checkpoint as it comes back from a disk."""
    return Recovered({name: a.copy() for name, a in save.arrays.items()}, json.loads(json.dumps(save.record)))
