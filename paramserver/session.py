"""One worker's session: who it is, what was decided of its pushes, what is under way. Pure.

    live      the lease runs; pushes are taken
    record    the lease ended: only numbers and outcome are kept (under 1 KB), for a day, so that a worker that comes
              back learns what became of its last push

Laws
* A number is decided once. What was decided, and of which number, is in the same checkpoint as the weights.
* One transfer at a time. It belongs to a connection and dies with it, unless it was committed: then it is decided.
* A session with a committed transfer does not end before that is decided.
* Where replies are differences, the replica is what the worker holds, or will hold once it has the reply that is owed.
  A push is taken only where it names the reply, or the anchor, that made the replica what it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Set
from dataclasses import field, replace
from typing import Any, Literal

from common.chunks import Plan
from common.codecs.base import F32, U8
from common.messages import NOWHERE, Begin, Order, Outcome, Scalars, Version
from common.rules.base import Arrays, Facts
from common.values import dataclass
from paramserver.diversity import UNKNOWN, Load
from paramserver.slots import Slot


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of a push. `number` 0: nothing was decided yet."""

    number: int = 0
    outcome: Outcome = "none"
    code: str = ""
    sentence: str = ""
    version: Version = NOWHERE
    weight: float = 0.0
    fragment: int = 0
    source: tuple[str, int] | None = ("", 0)
    """What the reply was, or will be, read from: an array of the rule's state and its row; "" is the center. None: the
    worker is told that its push was taken, and nothing else."""


@dataclass(slots=True)
class Transfer:
    """An update (or the initial weights) on its way up."""

    begin: Begin
    plan: Plan
    connection: int
    since: float
    slot: Slot | None = None
    """None while it waits for one."""
    received: bytearray = field(default_factory=bytearray)
    """One flag per chunk."""
    until: int = 0
    """Chunks below this index may be sent."""
    scalars: Scalars | None = None
    """Set by Commit."""
    lying: U8 | None = None
    """All of it, in memory that its worker writes; None once it was taken from there, or came in messages."""

    @property
    def committed(self) -> bool:
        return self.scalars is not None


@dataclass(slots=True)
class Owed:
    """A reply that may have to be sent again: its bytes stay where they are until the worker goes on from it.

    `readers`: announcements of it that the transport may still read, and the job that makes it; `give` frees the slot.
    """

    reply: U8
    slot: Slot | None
    """Where the reply lies; None: in memory shared on the connection that it was made for."""
    version: Version
    give: Callable[[Slot], None]
    readers: int = 0
    made: bool = True
    """Whether the bytes are there: a late reply waits for its turn."""
    settled: bool = False
    replies: set[int] = field(default_factory=set)
    """Ids it was announced under."""

    def read(self) -> None:
        """One announcement is read, or given up; or the kernel is done."""
        self.readers -= 1
        self._let_go()

    def settle(self) -> None:
        """The worker went on: nobody will ask for it again."""
        self.settled = True
        self._let_go()

    def _let_go(self) -> None:
        if self.settled and self.readers == 0 and self.slot is not None:
            self.give(self.slot)


@dataclass(slots=True)
class Pace:
    """How fast a worker trains: optimizer steps a second, a moving average over its pushes."""

    steps_per_s: float = 0.0
    since: float | None = None
    """When its last reply left (monotonic seconds)."""

    def pushed(self, steps: int, now: float) -> None:
        """A push of so many steps begins."""
        if self.since is not None and now > self.since:
            speed = steps / (now - self.since)
            self.steps_per_s = speed if self.steps_per_s == 0.0 else (self.steps_per_s + speed) / 2
        self.since = None


REMEMBERED = ("updates", "rejected", "samples", "steps", "bytes_up", "bytes_down")
"""Counters that a checkpoint keeps; what came after it is undone in them as it is in the center."""


@dataclass(slots=True)
class Counters:
    """What a worker has done so far, for `status` and the report."""

    updates: int = 0
    rejected: int = 0
    samples: int = 0
    steps: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    loss: float = float("nan")
    lag_versions: int = 0
    load: Load = UNKNOWN
    """What it trains on at a time."""

    def reported(self, steps: int, samples: int, loss: float) -> tuple[int, int]:
        """Under a rule that schedules: so much is done in all; the steps and samples that were not known."""
        new = max(steps - self.steps, 0), max(samples - self.samples, 0)
        self.steps, self.samples, self.loss = self.steps + new[0], self.samples + new[1], loss
        self.load = Load(new[1] / new[0], 1.0) if new[0] else self.load
        return new

    def applied(self, facts: Facts, bytes_down: int, *, counted: bool) -> None:
        """One more update was applied, and answered with so many bytes. `counted`: its steps were reported before."""
        self.updates += 1
        if not counted:
            self.samples += facts.samples
            self.steps += facts.steps
            self.load = Load(facts.samples / max(facts.steps, 1), facts.steps)
        self.loss = facts.loss
        self.lag_versions = facts.lag_versions
        self.bytes_down += bytes_down


@dataclass(slots=True)
class Session:
    """One worker (or observer) as the server knows it."""

    token: str
    instance: str
    """Drawn by the worker when it starts: tells a repeated Hello from a second worker."""
    worker: str
    role: Literal["worker", "observer"]
    peer: bytes
    connection: int
    lease_end: float
    """Monotonic seconds."""
    joined: float
    host: str = ""
    group: int | None = None
    """The group it asked for."""
    enrolled: bool = False
    """Whether the rule knows it as a member."""
    arrays: Arrays | None = None
    """What the rule keeps: a named tuple of (parameters,) float32; None for observers and records."""
    replica: F32 | None = None
    """(parameters,) float32: what the worker holds of the center, or will once it has what is owed; None where replies
    are whole."""
    holds: Set[int] = frozenset()
    """Ids of the reply that left the worker with the replica as it was before what is owed."""
    buffers: F32 | None = None
    """(buffers,) float32: last float buffers pushed, where they are averaged."""
    anchored: bool = False
    """Whether it was given a center to go on from; before that it has nothing to push."""
    anchor_asked: tuple[int, int] = (0, -1)
    """(connection, last reply merged) of the last pull that asked for it."""
    decision: Decision = field(default_factory=Decision)
    answered_connection: int = 0
    """The connection on which the last decision was told."""
    transfer: Transfer | None = None
    owed: Owed | None = None
    """The last reply, where the very same bytes are wanted again if it is lost."""
    memory: U8 | None = None
    """Where this connection's replies to pushes lie, and its worker reads them; None: they are sent."""
    offered: int = 0
    """The connection on which it offered memory of its own."""
    lent: bool = False
    """Whether memory is shared with it, or is about to be."""
    order: Order | None = None
    """The latest order, under a rule that schedules."""
    last_order: int = 0
    """Its id; kept when the session ends, because its worker remembers it."""
    clock: int = 0
    """Accepted pushes; who joins starts at the slowest."""
    late: bool = False
    """Whether its reply waits until it is no longer too far ahead of the slowest."""
    pace: Pace = field(default_factory=Pace)
    waits_for_init: bool = False
    ended: float | None = None
    """When the lease ended (monotonic seconds); None while live."""
    merged: int = 0
    last_seen: float = 0.0
    progress_steps: int = 0
    last_progress: float = 0.0
    counters: Counters = field(default_factory=Counters)
    malformed: int = 0
    rejections: deque[float] = field(default_factory=lambda: deque(maxlen=16))
    quarantines: int = 0
    quarantined_until: float = 0.0

    def __repr__(self) -> str:
        return (
            f"<Session {self.worker} {self.state}, {self.counters.updates} updates, last number {self.decision.number}>"
        )

    @property
    def live(self) -> bool:
        return self.ended is None

    @property
    def member(self) -> bool:
        """A live worker; observers are none."""
        return self.live and self.role == "worker"

    @property
    def state(self) -> str:
        """One word for `status`."""
        if not self.live:
            return "gone"
        if self.role == "observer":
            return "observing"
        if self.waits_for_init:
            return "waiting for initial weights"
        if not self.anchored:
            return "joining"
        if self.transfer is None and self.decision.outcome == "held":
            return "held"
        if self.transfer is None:
            return "training"
        if self.transfer.slot is None:
            return "waiting for a slot"
        return "queued" if self.transfer.committed else "pushing"

    def end(self, now: float) -> None:
        """Keep only the record."""
        self.ended = now
        self.arrays = self.replica = None
        self.holds = frozenset()
        self.buffers = None
        self.anchored = False
        self.waits_for_init = False
        self.late = False
        self.order = None
        if self.decision.outcome == "held":  # what was folded in counts; nobody waits for its answer any more
            self.decision = replace(self.decision, outcome="applied")
        self.go_on()

    def named(self, reply_id: int) -> None:
        """The worker says which reply it merged last: what is owed is what it holds, if that is the one."""
        if self.owed is not None and reply_id in self.owed.replies:
            self.holds = self.owed.replies
            self.go_on()

    def go_on(self) -> None:
        """The worker has its last reply, or needs it no more."""
        if self.owed is not None:
            self.owed.settle()
            self.owed = None

    def remember(self) -> dict[str, Any]:
        """The part of the record that a checkpoint keeps, as plain values; `recall` is the inverse."""
        d, order = self.decision, self.order
        return {
            "token": self.token,
            "instance": self.instance,
            "worker": self.worker,
            "number": d.number,
            "outcome": d.outcome,
            "code": d.code,
            "sentence": d.sentence,
            "version": list(d.version),
            "weight": d.weight,
            "fragment": d.fragment,
            "source": None if d.source is None else list(d.source),
            "host": self.host,
            "group": self.group,
            "enrolled": self.enrolled,
            "clock": self.clock,
            "late": self.late,
            "order": None if order is None else [order.upload, list(order.pull), order.until, order.sentence],
            "live": self.live,
            "anchored": self.anchored,
            **{name: getattr(self.counters, name) for name in REMEMBERED},
        }

    @classmethod
    def recall(cls, record: dict[str, Any], now: float, lease_s: float) -> Session:
        """The session of a checkpoint; its lease starts anew, because it was the server that was away."""
        session = cls(
            token=record["token"],
            instance=record["instance"],
            worker=record["worker"],
            role="worker",
            peer=b"",
            connection=0,
            lease_end=now + lease_s,
            joined=now,
            host=record["host"],
            group=record["group"],
            enrolled=record["enrolled"],
            anchored=record["anchored"],
            clock=record["clock"],
            late=record["late"],
            last_seen=now,
            last_progress=now,
        )
        session.decision = Decision(
            record["number"],
            record["outcome"],
            record["code"],
            record["sentence"],
            Version(*record["version"]),
            record["weight"],
            record["fragment"],
            None if record["source"] is None else (record["source"][0], record["source"][1]),
        )
        for name in REMEMBERED:
            setattr(session.counters, name, record.get(name, 0))
        if record["order"] is not None:
            upload, pull, until, sentence = record["order"]
            session.order = Order(session.token, 0, 0, upload, tuple(pull), until, sentence)
        if not record["live"]:
            session.ended = now
        return session
