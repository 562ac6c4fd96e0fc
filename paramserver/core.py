"""The server's core: messages in, decisions out. Pure; the daemon, the simulator and the tests drive it.

    frames -> wire -> session -> intake -> order of work -> shard -> downlink -> frames

Laws
* An update (worker, session, number) changes the center at most once, however often it is sent.
* A refusal changes nothing and says why: a code, a sentence, what to do.
* Slots are granted, and pushes applied, in order of arrival.
* Nobody overwrites an initialised center; exactly one worker at a time may supply a fresh server's weights.
* (epoch, version) only grows; `durable` follows only what the shell reports as saved.

Left to others: what one session is (`session`), what must hold of a push (`intake`), in what order the center changes
(`order`), how replies leave (`downlink`), how the center changes (`shard`), what is shown (`status`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from common import rules, wire
from common.codecs.base import F32, U8
from common.config import ServerSettings
from common.errors import Code, ConfigError, PeerError, WireError
from common.layout import Layout
from common.messages import (
    NOWHERE,
    Ack,
    Answer,
    Beat,
    Begin,
    Buffer,
    Bye,
    Chunk,
    Commit,
    Fault,
    Grant,
    Hello,
    Message,
    More,
    Offer,
    Pull,
    Push,
    Query,
    Reply,
    Scalars,
    Version,
    Welcome,
)
from common.node import JobDone, Received, Record, Released, Run, Say, Send, Tick, Unsendable
from common.rules.base import Apply, Facts, OptimizerFacts
from common.rules.base import Reply as ReplyWith
from paramserver import intake, memory, status
from paramserver.budget import Budget
from paramserver.downlink import Downlink
from paramserver.order import Job, WorkOrder
from paramserver.session import Decision, Session, Transfer
from paramserver.shard import Shard, Work
from paramserver.slots import Slot, Slots
from paramserver.snapshots import Snapshot, Snapshots

LIBRARY = "paramserver 0.1.0"
DETAILS_INTERVAL_S = 0.1
"""A rule's own figures are worked out at most this often."""
SAVE_SHARE = 0.05
"""Writing checkpoints may take at most this share of the time."""
UNINITIALISED_NUMBER = 0
"""Initial weights travel under this number; pushes count from 1."""


# Events and actions of this core alone


@dataclass(frozen=True, slots=True)
class Stop:
    """Event: finish what is committed, save, and exit."""

    reason: str


@dataclass(frozen=True, slots=True)
class Saved:
    """Event: everything up to `version` is durable."""

    version: Version
    seconds: float


@dataclass(frozen=True, slots=True)
class SaveFailed:
    """Event: nothing was saved; the previous checkpoint is as it was."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Save:
    """Action: write `arrays` and `record` as one checkpoint. The arrays do not change until Saved or SaveFailed."""

    version: Version
    arrays: dict[str, F32] = field(repr=False)
    record: dict[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Exit:
    """Action: all is done, the process may end."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a checkpoint held: arrays by name, and the record that `ServerCore._record` made."""

    arrays: dict[str, F32] = field(repr=False)
    record: dict[str, Any] = field(repr=False)


@dataclass(slots=True)
class _PullRequest:
    """A reply that must first be encoded: a pull, or the reply to a push that was lost."""

    session: Session
    connection: int
    anchor: bool
    announce: Callable[[Reply, memoryview | bytes], Message]
    scheduled: bool = False


class ServerCore:
    """One shard and its sessions. `token()` draws an unguessable session token."""

    def __init__(
        self, settings: ServerSettings, *, epoch: int, token: Callable[[], str], recovered: Recovered | None = None
    ) -> None:
        self.settings = settings
        self.rule = rules.load(settings.rule)
        self.config = rules.configure(self.rule, settings.rule_settings)
        self.epoch = epoch
        self.shard: Shard | None = None
        self.initialised = False
        self.durable = NOWHERE
        self.recovered_version = NOWHERE
        self.sessions: dict[str, Session] = {}
        self.downlink = Downlink()
        self.order = WorkOrder()
        self.slots: Slots | None = None
        self.snapshots: Snapshots | None = None
        self.budget = Budget(settings.budget_updates, settings.budget_samples, settings.budget_s)
        self.finished = ""
        self.diverged = ""
        self.stopping = ""
        self.refusals: dict[str, int] = {}
        self.drained = 0
        self.throughput = status.Throughput()
        self._token = token
        self._now = 0.0
        self._last_event: float | None = None
        self._out: list[Any] = []
        self._waiting_slot: deque[tuple[Session, Transfer]] = deque()
        self._pulls: deque[_PullRequest] = deque()
        self._init_order: deque[str] = deque()
        self._initialiser: str | None = None
        self._init_deadline = 0.0
        self._init_data: U8 | None = None
        self._whole: dict[str, Push] = {}
        self._saving: Version | None = None
        self._save_due: float | None = None
        self._unsaved_since: float | None = None
        self._shadow: dict[str, F32] = {}
        self._last_details = float("-inf")
        self._exited = False
        self._applying: tuple[Facts, float] | None = None
        self._recovered = recovered

    def __repr__(self) -> str:
        members = sum(session.member for session in self.sessions.values())
        return f"<ServerCore {self.settings.rule} at {self.version}, {members} workers, {self.order!r}>"

    # The door

    def start(self, now: float) -> list[Any]:
        """Take over what a checkpoint held. Call once, before the first event."""
        self._now = self._last_event = now
        if self._recovered is not None:
            self._restore(self._recovered, now)
            self._recovered = None
        return self._flush()

    def handle(self, event: Any, now: float) -> list[Any]:
        """Take in one event at `now` (monotonic seconds); return what shall be done."""
        self._now = now
        self._forgive_standstill(now)
        match event:
            case Received(peer, frames):
                self._received(peer, frames)
            case JobDone(job, results):
                self.order.finish(job, results)
            case Released(hold):
                self.downlink.released(hold)
            case Unsendable(peer, reason):
                self._unsendable(peer, reason)
            case Saved(version, seconds):
                self._saved(version, seconds)
            case SaveFailed(sentence):
                self._save_failed(sentence)
            case Stop(reason):
                self._stop(reason)
            case Tick():
                pass
        self._tick()
        self._proceed()
        return self._flush()

    def deadline(self) -> float | None:
        """When the next Tick is wanted: a lease, a budget, a checkpoint, or the regular round."""
        times = [self._now + self.settings.lease_s / 4]
        times += [session.lease_end for session in self.sessions.values() if session.live]
        if self._initialiser is not None:
            times.append(self._init_deadline)
        if self._save_due is not None and self._saving is None:
            times.append(self._save_due)
        if not self.finished and (end := self.budget.end()) is not None:
            times.append(end)
        return min(times)

    @property
    def version(self) -> Version:
        """The center now."""
        return self.shard.version if self.shard else Version(self.epoch, 0)

    @property
    def initialiser(self) -> Session | None:
        """Who was asked for the initial weights and has not sent them yet."""
        return self.sessions.get(self._initialiser) if self._initialiser else None

    @property
    def members(self) -> list[Session]:
        """Live workers."""
        return [session for session in self.sessions.values() if session.member]

    def _flush(self) -> list[Any]:
        out, self._out = self._out, []
        return out

    # Messages

    def _received(self, peer: bytes, frames: Sequence[Buffer]) -> None:
        try:
            message = wire.decode(frames)
        except WireError as error:
            self._malformed(peer, error)
            return
        match message:
            case Hello():
                self._guard(peer, lambda: self._hello(peer, message))
            case Query():
                payload = status.encode(status.describe(self, self._now))
                self._send(peer, Answer(payload=payload))
            case Push(begin, scalars, payload):
                if session := self._session(begin, peer):
                    self._push(session, begin, scalars, payload)
            case Begin():
                if session := self._session(message, peer):
                    self._begin(session, message)
            case Chunk():
                if session := self._session(message, peer):
                    self._chunk(session, message)
            case Commit():
                if session := self._session(message, peer):
                    self._commit(session, message)
            case More():
                if self._session(message, peer):
                    self._out += self.downlink.more(
                        message.transfer, message.session, message.connection, message.until
                    )
            case Pull():
                if session := self._session(message, peer):
                    self._pull(session, message)
            case Beat():
                if session := self._session(message, peer):
                    self._beat(session, message)
            case Bye():
                if session := self._session(message, peer):
                    self._bye(session, message.reason)
            case _:
                self._fault(peer, PeerError(Code.UNEXPECTED, f"A server takes no {type(message).__name__}."))

    def _session(self, message: Any, peer: bytes) -> Session | None:
        """The session a message belongs to, its lease renewed; None where it is stale, foreign or of an old connection."""
        session = self.sessions.get(message.session)
        if session is not None and session.live and session.peer == peer and session.connection == message.connection:
            session.lease_end = self._now + self.settings.lease_s
            session.last_seen = self._now
            session.malformed = 0
            return session
        self.drained += 1
        newer = session is not None and session.live and session.peer and session.connection > message.connection
        if not newer and not isinstance(message, Chunk):
            self._fault(
                peer,
                PeerError(Code.STALE, "This session is unknown, expired, or of another connection.", fix="Say Hello again."),
            )
        return None

    def _malformed(self, peer: bytes, error: WireError) -> None:
        self._fault(peer, error)
        session = next((s for s in self.sessions.values() if s.live and s.peer == peer), None)
        if session is None:
            return
        session.malformed += 1
        if session.malformed >= self.settings.malformed_in_a_row:
            self._say("warning", f"{session.worker}: {session.malformed} malformed messages in a row; session ended.")
            self._end(session, "malformed messages")

    def _guard(self, peer: bytes, act: Callable[[], None]) -> None:
        try:
            act()
        except PeerError as error:
            self._fault(peer, error)

    # Joining

    def _hello(self, peer: bytes, hello: Hello) -> None:
        if self.stopping:
            raise PeerError(Code.DRAINING, "The server is stopping.", fix="Try again when it is back.")
        session = self._resumed(hello)
        resumed: Literal["new", "live", "record"] = "new"
        if session is None:
            session = self._admit(peer, hello)
        else:
            resumed = "live" if session.live and session.anchored else "record"
            self._check_fit(hello)
            self._reconnect(session, peer)
        lost = self._lost(hello, session)
        session.waits_for_init = not self.initialised
        if session.waits_for_init and session.role == "worker" and session.token not in self._init_order:
            self._init_order.append(session.token)
        self._welcome(session, resumed, lost)
        self._record("join", worker=session.worker, role=session.role, resumed=resumed, lost=list(lost))
        if session.role == "worker":
            again = {"new": "joined", "live": "is back", "record": "is back after its lease had ended"}[resumed]
            self._say("info", f"{session.worker} {again}; {len(self.members)} workers.")

    def _resumed(self, hello: Hello) -> Session | None:
        """The session a worker comes back to; None where it is gone or there never was one."""
        if hello.resume is None:
            return None
        if not self.initialised and not self.settings.adopt:
            raise PeerError(
                Code.EMPTY_SERVER,
                "This server has no weights, but the worker has trained before: the server lost its state.",
                fix="Restore its directory, or start it with --adopt to let this worker's weights refill it.",
            )
        session = self.sessions.get(hello.resume.session)
        return session if session is not None and session.worker.split("#")[0] == hello.worker.split("#")[0] else None

    def _admit(self, peer: bytes, hello: Hello) -> Session:
        """A new session; raises PeerError where this worker cannot join."""
        live = [session for session in self.sessions.values() if session.live]
        if len(live) >= self.settings.max_sessions:
            raise PeerError(
                Code.FULL,
                f"The server has {len(live)} sessions, which is its limit.",
                fix="Raise `max_sessions` on the server, or wait until a worker leaves.",
            )
        self._check_fit(hello)
        assert self.shard is not None or hello.role == "observer"
        session = Session(
            token=self._token(),
            worker=self._free_name(hello.worker or "worker"),
            role=hello.role,
            peer=peer,
            connection=1,
            lease_end=self._now + self.settings.lease_s,
            joined=self._now,
            last_seen=self._now,
            last_progress=self._now,
        )
        self.sessions[session.token] = session
        return session

    def _check_fit(self, hello: Hello) -> None:
        """Codecs, optimizer and layout of a worker; an observer only names its layout where it has one."""
        if hello.role == "observer" and not hello.elements:
            return
        for codec in (self.settings.codec, self.settings.reply_codec):
            if codec not in hello.codecs:
                raise PeerError(
                    Code.UNKNOWN_CODEC,
                    f"The server uses codec '{codec}', which this worker does not know.",
                    fix="Install the same version of paramserver on both sides.",
                )
        if hello.optimizer is not None and (refusal := self.rule.accept(self.config, OptimizerFacts(*_tuple(hello.optimizer)))):
            raise PeerError(Code.OPTIMIZER, refusal)
        layout = Layout.parse(hello.payload, elements_limit=self.settings.max_elements)
        if self.shard is None:
            if hello.role == "worker":
                self._prepare(layout)
        elif layout != self.shard.layout:
            raise PeerError(
                Code.LAYOUT_MISMATCH,
                f"This worker's model is not the one on the server. {self.shard.layout.difference(layout)}",
                fix="Build the same model in every worker, or start a server of its own for this one.",
            )
        if hello.role == "worker":
            self._check_memory(layout)

    def _prepare(self, layout: Layout) -> None:
        """Make the shard and the pool for a model; raises PeerError where they do not fit."""
        s = self.settings
        try:
            plan = memory.plan(s, layout)
        except ConfigError as error:
            raise PeerError(Code.FULL, error.sentence, fix=error.fix) from None
        self._check_memory(layout)
        self.shard = Shard(
            layout,
            self.rule,
            self.config,
            overlap=s.overlap,
            codec=s.codec,
            reply_codec=s.reply_codec,
            epoch=self.epoch,
        )
        self.slots = Slots(plan.slots, self.shard.up.bytes, self.shard.down.bytes)
        self.snapshots = Snapshots(self.shard.down.bytes)
        self._say("info", f"Model of {layout.parameters:,} parameters. {plan.sentence(len(self.members))}")

    def _check_memory(self, layout: Layout) -> None:
        limit = self.settings.memory_limit_mib
        needed = memory.plan(self.settings, layout).total(len(self.members) + 1)
        if limit is not None and needed > limit << 20:
            raise PeerError(
                Code.FULL,
                f"With one more worker the server would need {needed / 2**20:,.0f} MiB, its limit is {limit:,} MiB.",
                fix="Raise `memory_limit_mib`, lower `pool_mib`, or use fewer workers.",
            )

    def _free_name(self, wanted: str) -> str:
        taken = {session.worker for session in self.sessions.values() if session.live}
        name, count = wanted, 1
        while name in taken:
            count += 1
            name = f"{wanted}#{count}"
        return name

    def _reconnect(self, session: Session, peer: bytes) -> None:
        """A new connection of a known session: what the old one had under way is freed."""
        self.downlink.cancel(session.token)
        if session.transfer is not None and not session.transfer.committed:
            self._drop_transfer(session)
        session.peer = peer
        session.connection += 1
        session.ended = None
        session.lease_end = self._now + self.settings.lease_s
        session.last_seen = self._now

    def _lost(self, hello: Hello, session: Session) -> tuple[int, ...]:
        """Numbers that this worker was told are applied and that a crash undid."""
        if hello.resume is None or hello.resume.session != session.token:
            return ()
        first, last = session.decision.number + 1, hello.resume.last_applied
        if last < first:
            return ()
        self._say("warning", f"{session.worker}: updates {first} to {last} were applied but lost in the crash.")
        return (first, last)

    def _welcome(self, session: Session, resumed: Literal["new", "live", "record"], lost: tuple[int, ...]) -> None:
        s = self.settings
        pending = session.transfer.begin.number if session.transfer and session.transfer.committed else 0
        decided = max(pending if resumed == "record" else 0, session.decision.number)
        init: Literal["send", "wait", "have"] = "wait"
        if self.initialised:
            init = "have"
        elif session.token == self._initialiser:
            init = "send"
        self._tell(
            session,
            Welcome(
                session.token,
                session.connection,
                session.worker,
                self.version,
                {
                    "rule": s.rule,
                    "codec": s.codec,
                    "reply_codec": s.reply_codec,
                    "local_steps": s.local_steps,
                    "overlap": s.overlap,
                    "buffers": s.buffers,
                    "lease_s": s.lease_s,
                    "window_chunks": s.window_chunks,
                    "finished": bool(self.finished),
                },
                dict(s.rule_settings),
                init,
                resumed,
                decided,
                session.decision.outcome if decided == session.decision.number else "applied",
                lost,
            ),
        )

    # Initial weights

    def _choose_initialiser(self) -> None:
        """Let the next in order supply the weights of a fresh server."""
        if self.initialised or self.stopping:
            return
        if self._initialiser is not None:
            if self._now < self._init_deadline:
                return
            late = self.sessions[self._initialiser]
            self._say("warning", f"{late.worker} did not send its weights in time; the next in order is asked.")
            self._forget_initialiser(back_in_line=late.live)
        while self._init_order:
            token = self._init_order.popleft()
            if (session := self.sessions.get(token)) and session.live:
                self._initialiser = token
                self._init_deadline = self._now + self.settings.init_timeout_s
                self._welcome(session, "new", ())
                return

    def _forget_initialiser(self, *, back_in_line: bool) -> None:
        token, self._initialiser, self._init_data = self._initialiser, None, None
        if token is not None:
            self.sessions[token].transfer = None
            if back_in_line:
                self._init_order.append(token)

    def _begin_init(self, session: Session, begin: Begin) -> Transfer | None:
        shard = self._ready_shard()
        if self.initialised or session.token != self._initialiser:
            self._fault(
                session.peer,
                PeerError(Code.UNEXPECTED, "These initial weights were not asked for."),
                session=session,
                number=begin.number,
            )
            return None
        try:
            intake.check_begin(begin, shard.exact, Version(self.epoch, 0))
        except PeerError as error:
            self._fault(session.peer, error, session=session, number=begin.number)
            return None
        if self._init_data is None:
            self._init_data = np.zeros(shard.exact.bytes, np.uint8)
        transfer = Transfer(begin, session.connection, self._now, received=bytearray(len(shard.exact.chunks)))
        session.transfer = transfer
        return transfer

    def _load_initial(self, session: Session) -> None:
        """The weights are complete: make them the center."""
        shard, data = self._ready_shard(), self._init_data
        assert data is not None

        def start() -> Work:
            return shard.load_work(data)

        def finish(results: Sequence[bool]) -> None:
            self.initialised = True
            self._initialiser = self._init_data = session.transfer = None
            self._init_order.clear()
            self.budget.started = self._now
            self._save_due = self._now + self.settings.checkpoint_interval_s if self.settings.directory else None
            self._say("info", f"{session.worker} supplied the initial weights.")
            self._record("initialised", worker=session.worker, parameters=shard.layout.parameters)
            self._tell(
                session,
                Ack(
                    session.token,
                    session.connection,
                    UNINITIALISED_NUMBER,
                    "applied",
                    "",
                    "initial weights taken",
                    shard.version,
                    self.durable,
                    1.0,
                    False,
                ),
            )
            for other in self.sessions.values():
                if other.live and other.waits_for_init:
                    other.waits_for_init = False
                    if other is not session:
                        self._welcome(other, "new", ())

        self.order.add(Job(f"initial weights of {session.worker}", start, finish))

    # Pushes

    def _push(self, session: Session, begin: Begin, scalars: Scalars, payload: Buffer) -> None:
        """A whole transfer in one message. It is kept (at most one per session) until a slot is free."""
        transfer = self._start_transfer(session, begin, announce=False)
        if transfer is None:
            return
        if begin.kind == "push" and transfer.slot is None:
            self._whole[session.token] = Push(begin, scalars, payload)
            return
        self._take_whole(session, transfer, scalars, payload)

    def _take_whole(self, session: Session, transfer: Transfer, scalars: Scalars, payload: Buffer) -> None:
        if self._take_chunk(session, transfer, 0, payload):
            self._complete(session, transfer, scalars)

    def _begin(self, session: Session, begin: Begin) -> None:
        transfer = self._start_transfer(session, begin, announce=True)
        if transfer is not None and begin.kind == "push" and transfer.slot is None:
            self._grant(session, transfer, "wait", 0, Code.BUSY, f"{self.slots!r}; slots are given in order of arrival.")

    def _start_transfer(self, session: Session, begin: Begin, *, announce: bool) -> Transfer | None:
        """The transfer that `begin` asks for, with a slot if one is free; None where it is answered already."""
        if begin.kind == "init":
            transfer = self._begin_init(session, begin)
            if transfer is not None and announce:
                self._open_window(session, transfer)
            return transfer
        if begin.number <= session.decision.number:
            if begin.number == session.decision.number and session.answered_connection != session.connection:
                self._answer_again(session)
            return None
        if session.transfer is not None:
            return None  # the same again: it is under way, and will be answered when decided
        if refusal := self._refusal(session):
            self._refuse(session, begin, refusal)
            return None
        try:
            intake.check_begin(begin, self._ready_shard().up, self.version)
        except PeerError as error:
            self._reject(session, begin.number, error)
            return None
        session.merged = begin.merged
        transfer = Transfer(begin, session.connection, self._now, received=bytearray(len(self._ready_shard().up.chunks)))
        session.transfer = transfer
        self._waiting_slot.append((session, transfer))
        self._give_slots(announce=announce)
        return transfer

    def _refusal(self, session: Session) -> PeerError | None:
        """Why no push of this session is taken at present."""
        if not session.anchored:
            return PeerError(Code.UNEXPECTED, "This worker has not pulled the center it would start from.")
        if self.finished:
            return PeerError(Code.FINISHED, f"Training is over: {self.finished}.")
        if self.diverged:
            return PeerError(Code.DEGRADED, self.diverged, fix="Lower the learning rate and restart from a checkpoint.")
        if self.stopping:
            return PeerError(Code.DRAINING, "The server is stopping.")
        if self._now < session.quarantined_until:
            left = session.quarantined_until - self._now
            return PeerError(Code.QUARANTINED, f"Too many rejected updates; quarantined for {left:.0f} s more.")
        if self._unsaved_since is not None and self._now - self._unsaved_since > self.settings.max_unsaved_age_s:
            return PeerError(Code.DEGRADED, "Nothing could be saved for too long; updates are refused until it can.")
        return None

    def _refuse(self, session: Session, begin: Begin, refusal: PeerError) -> None:
        """No at Begin: the number stays undecided, except where training is over for good."""
        if refusal.code == Code.FINISHED:
            self._decide(session, Decision(begin.number, "rejected", refusal.code, refusal.sentence, self.version))
            return
        self._count(refusal.code)
        transfer = Transfer(begin, session.connection, self._now)
        self._grant(session, transfer, "refuse", 0, refusal.code, str(refusal))

    def _give_slots(self, *, announce: bool = True) -> None:
        """Slots to those who wait, in order of arrival."""
        while self._waiting_slot and self.slots is not None:
            session, transfer = self._waiting_slot[0]
            if session.transfer is not transfer:
                self._waiting_slot.popleft()
                continue
            slot = self.slots.take()
            if slot is None:
                return
            self._waiting_slot.popleft()
            transfer.slot = slot
            if whole := self._whole.pop(session.token, None):
                self._take_whole(session, transfer, whole.scalars, whole.payload)
            elif announce:
                self._open_window(session, transfer)

    def _open_window(self, session: Session, transfer: Transfer) -> None:
        transfer.until = self.settings.window_chunks
        self._grant(session, transfer, "go", transfer.until, "", "")

    def _chunk(self, session: Session, chunk: Chunk) -> None:
        transfer = session.transfer
        if transfer is None or transfer.begin.number != chunk.transfer or transfer.committed:
            self.drained += 1
            return
        if chunk.index >= transfer.until:
            self._fail_transfer(session, transfer, PeerError(Code.LIMIT, "More chunks were sent than were granted."))
            return
        if not self._take_chunk(session, transfer, chunk.index, chunk.payload):
            return
        arrived = sum(transfer.received)
        if transfer.until < len(transfer.received) and transfer.until - arrived <= self.settings.window_chunks // 2:
            transfer.until = arrived + self.settings.window_chunks
            self._tell(session, More(session.token, session.connection, chunk.transfer, transfer.until))

    def _take_chunk(self, session: Session, transfer: Transfer, index: int, payload: Buffer) -> bool:
        shard = self._ready_shard()
        initial = transfer.begin.kind == "init"
        if initial:
            self._init_deadline = self._now + self.settings.init_timeout_s
        target = self._init_data if initial else transfer.slot.update if transfer.slot else None
        assert target is not None
        try:
            intake.take_chunk(transfer, target, shard.exact if initial else shard.up, index, payload)
        except PeerError as error:
            self._fail_transfer(session, transfer, error)
            return False
        session.counters.bytes_up += len(payload)
        return True

    def _commit(self, session: Session, commit: Commit) -> None:
        transfer = session.transfer
        if transfer is None or transfer.begin.number != commit.number or transfer.committed:
            self.drained += 1
            return
        self._complete(session, transfer, commit.scalars)

    def _complete(self, session: Session, transfer: Transfer, scalars: Scalars) -> None:
        """The last byte is there: put the update in the order of work."""
        try:
            intake.check_complete(transfer)
        except PeerError as error:
            self._fail_transfer(session, transfer, error)
            return
        transfer.scalars = scalars
        if transfer.begin.kind == "init":
            self._load_initial(session)
        else:
            job = Job(f"push {transfer.begin.number} of {session.worker}", lambda: self._start_push(session, transfer), _nothing)
            job.finish = partial(self._finish_push, session, transfer)
            self.order.add(job)

    def _start_push(self, session: Session, transfer: Transfer) -> Work | None:
        shard, slot, scalars = self._ready_shard(), transfer.slot, transfer.scalars
        assert slot is not None and scalars is not None
        if refusal := self._refusal(session):
            self._drop_transfer(session)
            self._decide(
                session, Decision(transfer.begin.number, "rejected", refusal.code, str(refusal), shard.version)
            )
            return None
        facts = Facts(
            session.worker,
            transfer.begin.number,
            scalars.steps,
            self._lag(transfer.begin.base),
            scalars.loss,
            scalars.samples,
            scalars.lr,
        )
        shard.decisions, effects = self.rule.admit(self.config, shard.decisions, facts)
        weight, what = 1.0, "after"
        for effect in effects:
            match effect:
                case Apply(weight=given):
                    weight = given
                case ReplyWith(what=given_what):
                    what = given_what
        self._applying = (facts, weight)
        return shard.apply_work(
            slot.update,
            session.arrays,
            weight,
            slot.reply,
            "before" if what == "before" else "after",
            self._buffers(session),
        )

    def _buffers(self, session: Session) -> list[F32]:
        """The members' last float buffers, this session's first; none where buffers stay local."""
        shard = self._ready_shard()
        if self.settings.buffers == "local" or not shard.layout.buffers:
            return []
        if session.buffers is None:
            session.buffers = np.zeros(shard.layout.buffers, np.float32)
        others = [s.buffers for s in self.members if s is not session and s.buffers is not None]
        return [session.buffers, *others]

    def _lag(self, base: Version) -> int:
        """Versions between what the worker started from and now; a base that a crash undid counts as recovered."""
        start = base.version if base.epoch == self.epoch else min(base.version, self.recovered_version.version)
        return max(self.version.version - start, 0)

    def _finish_push(self, session: Session, transfer: Transfer, results: Sequence[bool]) -> None:
        shard, slot, scalars = self._ready_shard(), transfer.slot, transfer.scalars
        assert slot is not None and scalars is not None
        assert self._applying is not None
        facts, weight = self._applying
        shard.advance()
        session.transfer = None
        session.decision = Decision(facts.number, "applied", "", "", shard.version, weight)
        session.answered_connection = session.connection
        counters = session.counters
        counters.updates += 1
        counters.samples += facts.samples
        counters.steps += facts.steps
        counters.loss = facts.loss
        counters.lag_versions = facts.lag_versions
        self._progress(session)
        self.budget.updates += 1
        self.budget.samples += facts.samples
        self.throughput.add(self._now, facts.samples)
        if not all(results):
            self._diverge(session)
        self._log_apply(session, facts, weight)
        self._finish_if_used_up()
        if self.diverged:
            self._give(slot)
            self._tell(session, self._ack(session))
            return
        counters.bytes_down += shard.down.bytes
        self._out.append(
            self.downlink.offer(
                partial(self._ack, session),
                slot.reply,
                shard.down,
                shard.version,
                (session.token, session.connection, session.peer),
                lambda: self._give(slot),
            )
        )

    def _log_apply(self, session: Session, facts: Facts, weight: float) -> None:
        shard = self._ready_shard()
        values: dict[str, Any] = {
            "worker": session.worker,
            "number": facts.number,
            "version": shard.version.version,
            "lag": facts.lag_versions,
            "weight": weight,
            "loss": facts.loss,
            "samples": facts.samples,
            "steps": facts.steps,
            "bytes_up": shard.up.bytes,
            "bytes_down": shard.down.bytes,
        }
        if self._now - self._last_details >= DETAILS_INTERVAL_S:
            self._last_details = self._now
            values |= self.rule.details(self.config, shard.stats)
        self._record("apply", **values)

    def _ack(self, session: Session, reply: Reply | None = None, payload: memoryview | bytes = b"") -> Ack:
        d = session.decision
        return Ack(
            session.token,
            session.connection,
            d.number,
            d.outcome,
            d.code,
            d.sentence,
            d.version,
            self.durable,
            d.weight,
            bool(self.finished),
            reply,
            payload,
        )

    def _answer_again(self, session: Session) -> None:
        """A decided push is repeated on a new connection: the same outcome; a lost reply re-anchors the worker."""
        session.answered_connection = session.connection
        if session.decision.outcome == "applied" and not self.diverged:
            self._pulls.append(_PullRequest(session, session.connection, True, partial(self._ack, session)))
        else:
            self._tell(session, self._ack(session))

    def _decide(self, session: Session, decision: Decision) -> None:
        """Decide a push without applying it, and say so."""
        session.decision = decision
        session.answered_connection = session.connection
        if decision.code:
            self._count(decision.code)
        self._tell(session, self._ack(session))

    def _fail_transfer(self, session: Session, transfer: Transfer, error: PeerError) -> None:
        """A transfer broke a rule on its way: nothing of it remains."""
        if transfer.begin.kind == "init":
            self._fault(session.peer, error, session=session, number=transfer.begin.number)
            self._forget_initialiser(back_in_line=False)
            return
        self._drop_transfer(session)
        self._reject(session, transfer.begin.number, error)

    def _reject(self, session: Session, number: int, error: PeerError) -> None:
        """Decide a push as rejected; three new ones within a minute put the worker in quarantine, doubling."""
        session.counters.rejected += 1
        self._say("warning", f"{session.worker}: update {number} rejected ({error.code}): {error}")
        self._record("reject", worker=session.worker, number=number, code=str(error.code), sentence=str(error))
        session.rejections.append(self._now)
        recent = sum(self._now - at < 60 for at in session.rejections)
        if recent >= self.settings.rejected_per_minute:
            session.quarantines += 1
            session.rejections.clear()
            session.quarantined_until = self._now + 60.0 * 2 ** min(session.quarantines - 1, 10)
        self._decide(session, Decision(number, "rejected", error.code, str(error), self.version))

    def _drop_transfer(self, session: Session) -> None:
        transfer, session.transfer = session.transfer, None
        self._whole.pop(session.token, None)
        if transfer is not None and transfer.slot is not None:
            self._give(transfer.slot)

    def _give(self, slot: Slot) -> None:
        assert self.slots is not None
        self.slots.give(slot)

    # Pulls

    def _pull(self, session: Session, pull: Pull) -> None:
        session.merged = pull.merged
        if not self.initialised:
            self._fault(session.peer, PeerError(Code.UNEXPECTED, "The server has no weights yet."), session=session)
            return
        if self.diverged:
            self._fault(session.peer, PeerError(Code.DEGRADED, self.diverged), session=session)
            return
        anchor = pull.purpose == "anchor" and session.role == "worker"

        def announce(reply: Reply, payload: memoryview | bytes) -> Offer:
            return Offer(session.token, session.connection, pull.purpose, reply, bool(self.finished), payload)

        self._pulls.append(_PullRequest(session, session.connection, anchor, announce))

    def _serve_pulls(self) -> None:
        """Serve what the current snapshot can serve; have the others encoded, before waiting pushes."""
        assert self.snapshots is not None
        for _ in range(len(self._pulls)):
            request = self._pulls.popleft()
            session = request.session
            if not session.live or session.connection != request.connection or self.diverged:
                continue
            snapshot = None if request.anchor else self.snapshots.at(self.version)
            if snapshot is not None:
                self._serve(request, snapshot)
                continue
            self._pulls.append(request)
            if not request.scheduled:
                request.scheduled = True
                self._schedule(request)

    def _schedule(self, request: _PullRequest) -> None:
        shard, snapshots, session = self._ready_shard(), self.snapshots, request.session
        assert snapshots is not None
        target: list[Snapshot] = []

        def start() -> Work | None:
            request.scheduled = False
            snapshot = snapshots.begin() if request in self._pulls else None
            if snapshot is None or not session.live or (not request.anchor and snapshots.at(shard.version)):
                return None
            if request.anchor and session.arrays is None:
                session.arrays = shard.session_arrays()
            self._pulls.remove(request)
            target.append(snapshot)
            return shard.anchor_work(session.arrays if request.anchor else None, snapshot.data)

        def finish(results: Sequence[bool]) -> None:
            if not all(results):
                self._diverge(session)
                return
            snapshots.publish(target[0], shard.version)
            if request.anchor:
                session.anchored = True
            self._serve(request, target[0])

        self.order.add(Job(f"pull of {session.worker}", start, finish), first=True)

    def _serve(self, request: _PullRequest, snapshot: Snapshot) -> None:
        session, shard = request.session, self._ready_shard()
        snapshot.readers += 1
        session.counters.bytes_down += shard.down.bytes

        def done() -> None:
            snapshot.readers -= 1

        self._out.append(
            self.downlink.offer(
                request.announce,
                snapshot.data,
                shard.down,
                snapshot.version,
                (session.token, session.connection, session.peer),
                done,
            )
        )

    # Liveness

    def _beat(self, session: Session, beat: Beat) -> None:
        if beat.steps > session.progress_steps:
            session.progress_steps = beat.steps
            self._progress(session)
        self._tell(session, Beat(session.token, session.connection, session.progress_steps))

    def _progress(self, session: Session) -> None:
        session.last_progress = self._now

    def _bye(self, session: Session, reason: str) -> None:
        self._tell(session, Bye(session.token, session.connection, "as you wish"))
        self._end(session, reason or "said goodbye")

    def _unsendable(self, peer: bytes, reason: str) -> None:
        """Whoever cannot be written to must dial again; the lease goes on."""
        for session in self.sessions.values():
            if session.live and session.peer == peer:
                self.downlink.cancel(session.token)
                self._record("unsendable", worker=session.worker, reason=reason)

    def _end(self, session: Session, reason: str) -> None:
        """The session becomes a record. A committed push is decided first: then the lease ends it later."""
        if session.transfer is not None and session.transfer.committed:
            return
        self._drop_transfer(session)
        self.downlink.cancel(session.token)
        session.end(self._now)
        if session.token == self._initialiser:
            self._forget_initialiser(back_in_line=False)
        if session.role == "worker":
            shard_decisions = self.shard.decisions if self.shard else None
            decisions, _ = self.rule.leave(self.config, shard_decisions, session.worker)
            if self.shard is not None:
                self.shard.decisions = decisions
            self._say("info", f"{session.worker} left ({reason}); {len(self.members)} workers.")
        self._record("leave", worker=session.worker, role=session.role, reason=reason, updates=session.counters.updates)
        if not self.initialised and not self.members:
            self.shard = self.slots = self.snapshots = None  # nobody stands for this model any more

    def _forgive_standstill(self, now: float) -> None:
        """If this process stood still for over half a lease, workers could not renew theirs: extend all once."""
        stood = now - (self._last_event if self._last_event is not None else now)
        self._last_event = now
        if stood > self.settings.lease_s / 2:
            self._say("warning", f"The server stood still for {stood:.1f} s; all leases are extended.")
            for session in self.sessions.values():
                if session.live:
                    session.lease_end = max(session.lease_end, now + self.settings.lease_s)

    def _tick(self) -> None:
        now = self._now
        for session in list(self.sessions.values()):
            if session.live and session.lease_end <= now:
                self._end(session, f"silent for {self.settings.lease_s:g} s")
            elif not session.live and now - (session.ended or now) > self.settings.remember_session_h * 3600:
                del self.sessions[session.token]
        self._choose_initialiser()
        self._finish_if_used_up()
        if self._save_due is not None and now >= self._save_due and not self.stopping:
            self._save()

    def _proceed(self) -> None:
        """Start what can be started: grants, pulls, the next job; and leave when all is done."""
        if self.shard is not None and self.slots is not None:
            self._give_slots()
            self._serve_pulls()
            if run := self.order.next(len(self.shard.up.blocks), self.shard.layout.elements):
                self._out.append(run)
        if self.stopping and not self._exited and len(self.order) == 0 and self._saving is None:
            if self._must_save():
                self._save()
                self._proceed()
            else:
                self._exited = True
                self._out.append(Exit())

    # Ends

    def _finish_if_used_up(self) -> None:
        reason = self.budget.used_up(self._now) if self.initialised and not self.finished else ""
        if not reason:
            return
        self.finished = reason
        self._say("info", f"Training is over: {reason}.")
        self._record("finished", reason=reason, version=self.version.version, elapsed_s=self.budget.elapsed_s(self._now))
        self._goodbye("finished")
        if self._save_due is not None:
            self._save_due = self._now

    def _diverge(self, session: Session) -> None:
        if self.diverged:
            return
        self.diverged = f"The center is no longer finite since version {self.version}, after an update of {session.worker}."
        self._say("error", f"{self.diverged} Updates are refused; the last checkpoint ({self.durable}) is kept.")
        self._record("diverged", worker=session.worker, version=self.version.version)
        self._save_due = None

    def _stop(self, reason: str) -> None:
        if self.stopping:
            return
        self.stopping = reason
        self._say("info", f"Stopping ({reason}): {self.order!r}.")
        for session in self.sessions.values():
            if session.live and session.transfer is not None and not session.transfer.committed:
                self._drop_transfer(session)
        self._goodbye("draining")

    def _goodbye(self, reason: str) -> None:
        for session in self.sessions.values():
            if session.live and session.peer:
                self._tell(session, Bye(session.token, session.connection, reason))

    # Checkpoints

    def _must_save(self) -> bool:
        return bool(self.settings.directory and self.initialised and not self.diverged and self.durable < self.version)

    def _save(self) -> None:
        """Copy everything into the shadow, in the order of work, so that a checkpoint is one version."""
        self._save_due = self._now + self.settings.checkpoint_interval_s
        if not self._must_save() or self._saving is not None:
            return
        self._saving = self.version
        sources: dict[str, F32] = {}

        def start() -> Work:
            sources.update(self._arrays())
            self._shadow = {
                name: shadow if (shadow := self._shadow.get(name)) is not None and shadow.size == source.size else np.empty_like(source)
                for name, source in sources.items()
            }
            return self._ready_shard().copy_work(list(sources.values()), list(self._shadow.values()))

        def finish(results: Sequence[bool]) -> None:
            self._saving = self.version
            arrays = dict(self._shadow)
            for session in self.members:
                if session.buffers is not None:
                    arrays[f"buffers.{session.token}"] = session.buffers.copy()
            self._out.append(Save(self.version, arrays, self._record_of_state()))

        self.order.add(Job("checkpoint", start, finish))

    def _arrays(self) -> dict[str, F32]:
        """Every array of the state, by its name in a checkpoint."""
        shard = self._ready_shard()
        arrays: dict[str, F32] = {"center": shard.center}
        arrays |= {f"state.{name}": array for name, array in shard.state._asdict().items()}
        for session in self.members:
            if session.arrays is not None and session.anchored:
                arrays |= {f"session.{session.token}.{name}": a for name, a in session.arrays._asdict().items()}
        return arrays

    def _record_of_state(self) -> dict[str, Any]:
        """The part of the state that is no array, as plain values; `_restore` is the inverse."""
        shard = self._ready_shard()
        return {
            "library": LIBRARY,
            "version": list(shard.version),
            "layout": shard.layout.describe().decode(),
            "rule": self.settings.rule,
            "rule_settings": dict(self.settings.rule_settings),
            "decisions": shard.decisions,
            "settings": self.settings.model_dump(mode="json"),
            "updates": self.budget.updates,
            "samples": self.budget.samples,
            "elapsed_s": self.budget.elapsed_s(self._now),
            "sessions": [s.remember() for s in self.sessions.values() if s.role == "worker"],
        }

    def _saved(self, version: Version, seconds: float) -> None:
        self._saving = None
        self._unsaved_since = None
        self.durable = version
        self._record("checkpoint", version=version.version, seconds=seconds)
        if self._save_due is not None:
            self._save_due = max(self._save_due, self._now + seconds / SAVE_SHARE - seconds)

    def _save_failed(self, sentence: str) -> None:
        self._saving = None
        self._unsaved_since = self._now if self._unsaved_since is None else self._unsaved_since
        self._say("error", f"Checkpoint failed: {sentence} Training goes on; the previous checkpoint is as it was.")
        self._record("checkpoint_failed", sentence=sentence)
        if self.stopping:
            self._exited = True
            self._out.append(Exit())

    def _restore(self, recovered: Recovered, now: float) -> None:
        """The state of a checkpoint becomes the state of this life."""
        record, arrays = recovered.record, recovered.arrays
        if record["rule"] != self.settings.rule:
            raise ConfigError(
                f"The checkpoint was made under rule '{record['rule']}', this server is set to '{self.settings.rule}'.",
                fix=f"Serve with --rule {record['rule']}, or in another directory.",
            )
        layout = Layout.parse(record["layout"].encode(), elements_limit=self.settings.max_elements)
        self._prepare(layout)
        shard = self._ready_shard()
        shard.center[:] = arrays["center"]
        for name, array in shard.state._asdict().items():
            array[:] = arrays[f"state.{name}"]
        shard.decisions = record["decisions"]
        self.recovered_version = Version(*record["version"])
        self.durable = self.recovered_version
        shard.version = Version(self.epoch, self.recovered_version.version)
        for remembered in record["sessions"]:
            session = Session.recall(remembered, now, self.settings.lease_s)
            self.sessions[session.token] = session
            if session.live and session.anchored:
                session.arrays = shard.session_arrays()
                for name, array in session.arrays._asdict().items():
                    stored = arrays.get(f"session.{session.token}.{name}")
                    if stored is None:
                        session.anchored = False  # other settings keep other arrays: the worker re-anchors
                    else:
                        array[:] = stored
            session.buffers = arrays.get(f"buffers.{session.token}")
        self.initialised = True
        self.budget.updates, self.budget.samples = record["updates"], record["samples"]
        self.budget.seconds, self.budget.started = record["elapsed_s"], now
        self._save_due = now + self.settings.checkpoint_interval_s if self.settings.directory else None
        self._say("info", f"Recovered version {self.recovered_version} with {len(self.sessions)} sessions.")

    # Saying things

    def _ready_shard(self) -> Shard:
        assert self.shard is not None
        return self.shard

    def _send(self, peer: bytes, message: Message) -> None:
        self._out.append(Send(peer, wire.encode(message)))

    def _tell(self, session: Session, message: Message) -> None:
        if session.peer:
            self._send(session.peer, message)

    def _grant(
        self,
        session: Session,
        transfer: Transfer,
        decision: Literal["go", "wait", "refuse"],
        until: int,
        code: str,
        sentence: str,
    ) -> None:
        number = transfer.begin.number
        self._tell(session, Grant(session.token, session.connection, number, decision, until, code, sentence))

    def _fault(self, peer: bytes, error: PeerError, *, session: Session | None = None, number: int = 0) -> None:
        self._count(error.code)
        token, connection = (session.token, session.connection) if session else ("", 0)
        self._send(peer, Fault(token, connection, str(error.code), error.sentence, error.fix, number))
        self._record("fault", code=str(error.code), sentence=error.sentence, worker=session.worker if session else "")

    def _count(self, code: str) -> None:
        self.refusals[str(code)] = self.refusals.get(str(code), 0) + 1

    def _record(self, kind: str, **values: Any) -> None:
        self._out.append(Record(kind, values))

    def _say(self, level: str, sentence: str) -> None:
        self._out.append(Say(level, sentence))

    def validate(self) -> None:
        """Check the invariants across sessions, slots and replies."""
        self.downlink.validate()
        if self.slots is None:
            return
        self.slots.validate()
        held = [s.transfer.slot.index for s in self.sessions.values() if s.transfer and s.transfer.slot]
        assert len(held) == len(set(held)), "a slot has two owners"
        assert len(held) <= self.slots.taken <= len(held) + len(self.downlink) + (self.order.current is not None), (
            f"a slot lost its owner: {held}, {self.slots!r}, {len(self.downlink)} replies"
        )
        for session in self.sessions.values():
            assert session.live or (session.transfer is None and session.arrays is None), session
            assert session.decision.version <= self.version, session


def _nothing(results: Sequence[bool]) -> None:
    """Finish of a job that has nothing to do."""


def _tuple(optimizer: Any) -> tuple[Any, ...]:
    return (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.groups)


__all__ = ["Exit", "Recovered", "Run", "Save", "SaveFailed", "Saved", "ServerCore", "Stop"]
