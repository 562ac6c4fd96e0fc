"""The server's core: messages in, decisions out. Pure; the daemon, the simulator and the tests drive it.

    frames -> wire -> session -> uplink -> order of work -> applying (rule, shard) -> downlink -> frames

Laws
* An update (worker, session, number) changes the center at most once, however often it is sent.
* A refusal changes nothing and says why: a code, a sentence, what to do.
* Whoever is not the session, on the connection, from the peer that the server knows is never listened to.
* (epoch, version) only grows.

This file is the door: it finds the session a message belongs to, hands it to the part whose business it is, and lets
time pass. The parts: `joining`, `room`, `initial`, `uplink`, `applying`, `deciding`, `pulls`, `late`, `downlink`,
`sharing`, `durability`; what they share is `state`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from common import wire
from common.config import ServerSettings
from common.errors import Code, PeerError, WireError
from common.messages import (
    Answer,
    Beat,
    Begin,
    Buffer,
    Bye,
    Chunk,
    Commit,
    Hello,
    Message,
    More,
    Pull,
    Push,
    Query,
    Report,
    Share,
    Version,
)
from common.node import JobDone, Received, Released, Tick, Unsendable
from common.rules.base import has_own
from common.values import dataclass
from paramserver import durability, status
from paramserver.applying import Applying
from paramserver.deciding import Deciding
from paramserver.downlink import Downlink
from paramserver.durability import Durability, Recovered, Save, Saved, SaveFailed
from paramserver.initial import InitialWeights
from paramserver.joining import Joining
from paramserver.late import LateReplies
from paramserver.order import WorkOrder
from paramserver.pulls import Pulls
from paramserver.session import Session
from paramserver.shard import Shard
from paramserver.sharing import Attach, Attached, Detach, Sharing
from paramserver.state import Outbox, ServerState
from paramserver.uplink import Uplink

__all__ = [
    "Attach",
    "Attached",
    "Detach",
    "Exit",
    "Recovered",
    "Save",
    "SaveFailed",
    "Saved",
    "ServerCore",
    "Stop",
]


WAITS_S = 30.0
RECORDS_LIMIT = 4096
"""Sessions that are over and still remembered, at most."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Event: finish what is committed, save, and exit."""

    reason: str


@dataclass(frozen=True, slots=True)
class Exit:
    """Action: all is done, the process may end."""


class ServerCore:
    """One shard and its sessions. `token()` draws an unguessable session token; `machine`: the one it runs on, where
    memory may be shared."""

    def __init__(
        self,
        settings: ServerSettings,
        *,
        epoch: int,
        token: Callable[[], str],
        recovered: Recovered | None = None,
        machine: str = "",
    ) -> None:
        self.state = ServerState.of(settings, epoch, machine)
        self.out = Outbox()
        self.order = WorkOrder()
        self.downlink = Downlink()
        self.rates = status.Throughput()
        self.deciding = Deciding(
            self.state,
            self.out,
            self.order,
            answer=lambda session: self.pulls.answer_held(session),
            turn_away=self._end,
        )
        self.applying = Applying(
            self.state,
            self.out,
            self.order,
            self.downlink,
            self.rates,
            self.deciding,
            give_late=lambda: self.pulls.answer_late(),
        )
        self.late = LateReplies(self.state, self.order, self.applying, self.deciding)
        self.pulls = Pulls(self.state, self.out, self.order, self.downlink, self.applying, self.deciding, self.late)
        self.initial = InitialWeights(self.state, self.out, self.order, lambda session: self.joining.welcome(session))
        self.uplink = Uplink(
            self.state,
            self.out,
            self.initial,
            self.downlink,
            complete=lambda session, transfer: self.applying.add(session, transfer, self.uplink),
            decided=self.applying.tell_decision,
            again=self.pulls.answer_again,
        )
        self.sharing = Sharing(self.state, self.out)
        self.joining = Joining(
            self.state, self.out, token, self.order, self.initial, self.uplink, self.downlink, self.sharing
        )
        self.durability = Durability(self.state, self.out, self.order)
        self.drained = 0
        """Messages of old connections, dropped."""
        self._recovered = recovered
        self._half_lease_s = settings.lease_s / 2
        self._may_wait = has_own(self.state.rule, "waits") or settings.max_clock_gap is not None
        """Whether workers are ever made to wait for others."""
        self._calm = not (self._may_wait or has_own(self.state.rule, "deadline"))
        """Whether a push that is applied makes nothing due for anybody else, but a checkpoint or the end."""
        self._last_event = math.inf
        self._deadline = -math.inf
        self._save_foreseen = False
        """Whether the deadline allows for the next checkpoint."""
        self._sweep_due = 0.0
        self._leaving: dict[str, tuple[str, int]] = {}
        """Sessions that end as soon as their push is decided: why, and their connection."""
        self._goodbye_said = False
        self._exited = False
        self._waited_for: dict[str, float] = {}
        """Who is waited for, and when to say so (monotonic seconds)."""

    def __repr__(self) -> str:
        return f"<ServerCore {self.settings.rule} at {self.version}, {len(self.members)} workers, {self.order!r}>"

    @property
    def settings(self) -> ServerSettings:
        return self.state.settings

    @property
    def sessions(self) -> dict[str, Session]:
        return self.state.sessions

    @property
    def members(self) -> list[Session]:
        """Live workers."""
        return self.state.members

    @property
    def version(self) -> Version:
        """The center now."""
        return self.state.version

    @property
    def shard(self) -> Shard | None:
        """None until the model is known."""
        return self.state.model.shard if self.state.model else None

    @property
    def finished(self) -> str:
        """Why training is over, once it is."""
        return self.state.finished

    # The door

    def start(self, now: float) -> list[Any]:
        """Take over what a checkpoint held. Call once, before the first event."""
        self.state.now = self._last_event = now
        if self._recovered is not None:
            self.joining.host(durability.layout_of(self.state, self._recovered))
            durability.restore(self.state, self._recovered)
            for session in self.sessions.values():
                # a checkpoint may be older than what was decided to follow from it: do that now
                if session.enrolled and not session.live:
                    self.deciding.dismiss(session)
                elif session.live and session.anchored:
                    self.deciding.enrol(session)
            self.pulls.answer_late()  # where the gap that they were held for is no longer set, nobody else will
            self.out.say("info", f"Recovered version {self.state.recovered} with {len(self.sessions)} sessions.")
            self._recovered = None
        self._deadline = self._next_deadline()
        return self.out.take()

    def handle(self, event: Any, now: float) -> list[Any]:
        """Take in one event at `now` (monotonic seconds); return what shall be done."""
        self.state.now = now
        if now - self._last_event > self._half_lease_s:
            self._forgive_standstill(now - self._last_event)
        self._last_event = now
        taken_in = False
        match event:
            case Received(peer, frames):
                taken_in = self._received(peer, frames)
            case JobDone(job, results):
                taken_in = self._finish_job(job, results)
            case Released(holds):
                for hold in holds:
                    self.downlink.released(hold)
                taken_in = True
            case Unsendable(peer, reason):
                self._unsendable(peer, reason)
            case Saved(version, seconds):
                self.durability.saved(version, seconds)
            case SaveFailed(sentence):
                self.durability.failed(sentence)
            case Attached():
                self.sharing.attached(event)
            case Stop(reason):
                self._stop(reason)
            case Tick():
                pass
        time_passes = not taken_in or self._leaving or now >= self._deadline
        if time_passes:
            self._let_time_pass()
        self._proceed()
        if time_passes:
            self._deadline = self._next_deadline()
        return self.out.take()

    def deadline(self) -> float:
        """When the next Tick is wanted: a lease, a budget, a checkpoint, or the regular round."""
        return self._deadline

    def _next_deadline(self) -> float:
        state = self.state
        # often enough to tell a quiet time from a standstill of this process
        first = min(self._sweep_due, state.now + self._half_lease_s / 2, *self._waited_for.values())
        save, end = self.durability.deadline, None if state.finished else state.budget.end()
        self._save_foreseen = save is not None
        for due in (self.initial.deadline, save, self.deciding.deadline, end):
            if due is not None and due < first:
                first = due
        return first

    def _finish_job(self, job: int, results: Sequence[Any]) -> bool:
        """Whether it was a push that was applied, or goes on, and makes nothing due for anybody else."""
        of_push = self.order.runs_push
        if run := self.order.finish(job, results):
            self.out.add(run)
        if not of_push or not self._calm or self.state.finished or self.state.budget.used_up(self.state.now):
            return False
        return self._save_foreseen or not self.durability.needed

    # Messages

    def _received(self, peer: bytes, frames: Sequence[Buffer]) -> bool:
        """Whether it was taken in, and that is all: what a push leads to, its job does, where nothing is said of it."""
        try:
            model = self.state.model  # in shared memory an update comes whole
            longest = wire.PAYLOAD_BYTES if model is None else model.longest_payload
            message = wire.decode(frames, payload_bytes=longest)
        except WireError as error:
            self._malformed(peer, error)
            return False
        try:
            self._dispatch(peer, message)
        except PeerError as error:
            self.out.fault(peer, error)
        return isinstance(message, More) or (isinstance(message, Chunk | Push) and not len(self.out))

    def _dispatch(self, peer: bytes, message: Message) -> None:
        """To the part whose business it is; raises PeerError for what is answered by a Fault."""
        match message:
            case Hello():
                self.joining.hello(peer, message)
            case Query():
                payload = status.encode(status.describe(self, self.state.now))
                self.out.send(peer, Answer(payload=payload))
            case Share():
                if session := self._session(message, peer):
                    self.sharing.share(session, message)
            case Push(begin=begin):
                if session := self._session(begin, peer):
                    self.uplink.push(session, message)
            case Begin():
                if session := self._session(message, peer):
                    self.uplink.begin(session, message)
            case Chunk():
                if session := self._session(message, peer):
                    self.uplink.chunk(session, message)
            case Commit():
                if session := self._session(message, peer):
                    self.uplink.commit(session, message)
            case More(session=token, connection=connection, transfer=reply, until=until):
                if session := self._session(message, peer):
                    if until == 0:
                        self.applying.confirmed(session, reply)
                    for send in self.downlink.more(reply, token, connection, until, self.state.now):
                        self.out.add(send)
            case Pull():
                if session := self._session(message, peer):
                    self.pulls.pull(session, message)
            case Beat():
                if session := self._session(message, peer):
                    self._beat(session, message)
            case Report():
                if session := self._session(message, peer):
                    self._report(session, message)
            case Bye():
                if session := self._session(message, peer):
                    self.out.tell(session, Bye(session.token, session.connection, "as you wish"))
                    self._end(session, message.reason or "said goodbye")
            case _:
                raise PeerError(Code.UNEXPECTED, f"A server takes no {type(message).__name__}.")

    def _session(self, message: Any, peer: bytes) -> Session | None:
        """The session a message belongs to, its lease renewed; None where it is stale, foreign, or of another time."""
        state = self.state
        session = state.sessions.get(message.session)
        if session is not None and session.live and session.peer == peer and session.connection == message.connection:
            session.lease_end = state.now + state.settings.lease_s
            session.last_seen = state.now
            session.malformed = 0
            return session
        self.drained += 1
        if not isinstance(message, Chunk):
            sentence = "This session is unknown, expired, or of another connection."
            self.out.fault(peer, PeerError(Code.STALE, sentence, fix="Say Hello again."))
        return None

    def _malformed(self, peer: bytes, error: WireError) -> None:
        self.out.fault(peer, error)
        session = next((s for s in self.sessions.values() if s.live and s.peer == peer), None)
        if session is None:
            return
        session.malformed += 1
        if session.malformed >= self.settings.malformed_in_a_row:
            self.out.say(
                "warning", f"{session.worker}: {session.malformed} malformed messages in a row; session ended."
            )
            self._end(session, "malformed messages")

    def _beat(self, session: Session, beat: Beat) -> None:
        if beat.steps > session.progress_steps:
            session.progress_steps = beat.steps
            session.last_progress = self.state.now
        self.out.tell(session, Beat(session.token, session.connection, session.progress_steps))
        self.uplink.reassure(session)
        if session.waits_for_init:
            self.joining.welcome(session)

    def _report(self, session: Session, report: Report) -> None:
        """Progress under a rule that schedules. An order that was perhaps not heard (the connection is a new one, or
        this report says nothing new) is said again."""
        if not self.state.rule.schedules:
            raise PeerError(Code.UNEXPECTED, f"Rule '{self.settings.rule}' takes no reports.")
        if session.role != "worker" or not session.anchored:
            raise PeerError(Code.UNEXPECTED, "Only a worker that was given the center has progress to report.")
        if report.steps > session.progress_steps:
            session.last_progress = self.state.now
        steps, samples = session.counters.reported(report.steps, report.samples, report.loss)
        session.progress_steps = session.counters.steps
        self.state.budget.updates += steps
        self.state.budget.samples += samples
        self.rates.add_samples(self.state.now, samples)
        self.deciding.measured(report.diversity if steps else None, steps)
        order = session.order
        if order is not None and report.orders < order.id and (order.connection != session.connection or not steps):
            session.order = replace(order, connection=session.connection)
            self.out.tell(session, session.order)
        if not self.state.finished:
            self.deciding.report(session, report.steps, report.loss)

    def _unsendable(self, peer: bytes, reason: str) -> None:
        """Whoever cannot be written to must dial again; the lease goes on."""
        for session in self.sessions.values():
            if session.live and session.peer == peer:
                self.downlink.cancel(session.token)
                self.out.record("unsendable", worker=session.worker, reason=reason)

    # Time

    def _forgive_standstill(self, stood_s: float) -> None:
        """This process stood still for over half a lease, so workers could not renew theirs: extend all once."""
        self.out.say("warning", f"The server stood still for {stood_s:.1f} s; all leases are extended.")
        for session in self.sessions.values():
            if session.live:
                session.lease_end = max(session.lease_end, self.state.now + self.settings.lease_s)

    def _let_time_pass(self) -> None:
        state = self.state
        if state.now >= self._sweep_due:
            self._sweep()
        for token, (reason, connection) in list(self._leaving.items()):
            session = self.sessions[token]
            if session.transfer is None or not session.transfer.committed:
                del self._leaving[token]
                if session.connection == connection:  # else it has come back meanwhile
                    self._end(session, reason)
        self.initial.ask_next()
        self.deciding.tick()
        if self.settings.max_clock_gap is not None:
            self.pulls.answer_late()
        if self._may_wait:
            self._say_who_is_waited_for()
        if not state.finished and state.budget.used_up(state.now):
            state.end_if_used_up(counted=not state.mid_round)
        if state.finished and not self._goodbye_said:
            self._finish()
        if not state.stopping:
            self.durability.tick()

    def _say_who_is_waited_for(self) -> None:
        """No wait is longer than `WAITS_S` without a line that says for whom."""
        now = self.state.now
        names = () if self.state.finished else self.state.waited_for
        self._waited_for = {name: self._waited_for.get(name, now + WAITS_S) for name in names}
        if late := [name for name, due in self._waited_for.items() if due <= now]:
            self._waited_for |= dict.fromkeys(late, now + WAITS_S)
            self.out.say("warning", f"The others wait for {', '.join(late)} since {WAITS_S:g} s or more.")

    def _sweep(self) -> None:
        """End what is silent, forget what is old. Leases only get longer, so the next sweep is due with the first."""
        now, lease_s = self.state.now, self.settings.lease_s
        self.downlink.expire(now - lease_s)
        for session in list(self.sessions.values()):
            if session.live and session.lease_end <= now:
                self._end(session, f"silent for {lease_s:g} s")
            elif session.ended is not None and now - session.ended > self.settings.remember_session_h * 3600:
                del self.sessions[session.token]
        # a session that outlives its lease (its push is being decided) is looked at again soon
        ends = (max(s.lease_end, now + lease_s / 100) for s in self.sessions.values() if s.live)
        self._sweep_due = min(ends, default=now + lease_s / 4)

    def _proceed(self) -> None:
        """Start what can be started: grants, pulls, the next job; and leave when all is done."""
        if self.uplink.waiting:
            self.uplink.give_slots()
        if self.pulls.waiting or self.late.waiting:
            self.pulls.serve()
        for _ in range(2):  # a decision without kernels may ask for pulls, whose jobs start at once
            if not self.order.ready:
                break
            if run := self.order.next():
                self.out.add(run)
            self.pulls.serve()
        if self.state.stopping and not self._exited and len(self.order) == 0 and not self.durability.saving:
            if self.durability.needed and not self.durability.gave_up:
                self.durability.save()
                self._proceed()
            else:
                self._exited = True
                self.out.add(Exit())

    # Ends

    def _end(self, session: Session, reason: str) -> None:
        """The session becomes a record: at once, or where a committed push must be decided first, after that."""
        if session.transfer is not None and session.transfer.committed:
            self._leaving[session.token] = (reason, session.connection)
            return
        self.initial.give_up(session, back_in_line=False)
        self.sharing.stop(session)
        self.uplink.drop(session)
        self.downlink.cancel(session.token)
        session.end(self.state.now)
        self._forget_beyond_limit(session)
        if session.role == "worker":
            self.deciding.dismiss(session)
            self.out.say("info", f"{session.worker} left ({reason}); {len(self.members)} workers.")
        self.out.record(
            "leave", worker=session.worker, role=session.role, reason=reason, updates=session.counters.updates
        )
        if not self.state.initialised and not self.members:
            self.state.model = None  # nobody stands for this model any more

    def _forget_beyond_limit(self, ended: Session) -> None:
        """Observers leave no record; of workers, the records of the latest are kept."""
        if ended.role == "observer":
            del self.sessions[ended.token]
        records = [s for s in self.sessions.values() if s.ended is not None]
        if len(records) > RECORDS_LIMIT:
            oldest = min(records, key=lambda s: s.ended or 0.0)
            del self.sessions[oldest.token]

    def _finish(self) -> None:
        state = self.state
        self._goodbye_said = True
        self.out.say("info", f"Training is over: {state.finished}.")
        elapsed_s = state.budget.elapsed_s(state.now)
        self.out.record("finished", reason=state.finished, version=state.version.version, elapsed_s=elapsed_s)
        self._goodbye("finished")
        self.durability.soon()

    def _stop(self, reason: str) -> None:
        if self.state.stopping:
            return
        self.state.stopping = reason
        under_way = f"{len(self.order)} jobs are finished first" if len(self.order) else "nothing is under way"
        self.out.say("info", f"Stopping ({reason}); {under_way}.")
        for session in self.sessions.values():
            if session.live and session.transfer is not None and not session.transfer.committed:
                self.initial.give_up(session, back_in_line=False)
                self.uplink.drop(session)
        self._goodbye("draining")

    def _goodbye(self, reason: str) -> None:
        for session in self.sessions.values():
            if session.live:
                self.out.tell(session, Bye(session.token, session.connection, reason))

    def validate(self) -> None:
        """Check the invariants across sessions, slots and replies."""
        self.downlink.validate()
        for session in self.sessions.values():
            assert session.live or (session.transfer is None and session.arrays is session.replica is None), session
            assert session.decision.version <= self.version, session
        if self.state.model is None:
            return
        slots = self.state.model.slots
        slots.validate()
        self.state.model.snapshots.validate()
        owed = [s.owed.slot.index for s in self.sessions.values() if s.owed and s.owed.slot]
        held = [s.transfer.slot.index for s in self.sessions.values() if s.transfer and s.transfer.slot] + owed
        assert len(held) == len(set(held)), "a slot has two owners"
        replies = len(self.downlink) + self.late.being_made
        assert len(held) <= slots.taken <= len(held) + replies, (
            f"a slot lost its owner: {held}, {slots!r}, {replies} replies"
        )
