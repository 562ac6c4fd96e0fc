"""Whoever wants the center: to look at it, to go on from it, or because a reply was lost. Pure.

Laws
* Pulls of one version share one encoded snapshot; a pull never waits for the pushes that wait. A late reply to a push
  is encoded into the memory that its worker shares, where there is any. Where replies are differences, pulls are whole,
  and late replies are the business of `paramserver.late`.
* Of one session, at most one request of a kind waits. A pull that anchors and comes twice is answered once.
* Only a pull that anchors, and a reply that comes later than its push, tell the rule anything: what its worker goes on
  from (GEM: s <- c). Pulls to evaluate never do.
* A pull that its session or connection has outlived is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from common.codecs.base import U8
from common.errors import Code, PeerError
from common.messages import Message, Offer, Pull, Reply
from paramserver.applying import Applying
from paramserver.deciding import Deciding
from paramserver.downlink import Downlink
from paramserver.late import LateReplies
from paramserver.order import Job, WorkOrder
from paramserver.session import Session
from paramserver.shard import CENTER, Source, Work
from paramserver.snapshots import Moment, Snapshot
from paramserver.state import Outbox, ServerState

Kind: TypeAlias = Literal["anchor", "evaluate", "order", "reply"]


@dataclass(slots=True, eq=False)
class _Request:
    """One who waits to be given a source, or a fragment of it."""

    session: Session
    connection: int
    kind: Kind
    announce: Callable[[Reply, memoryview | bytes], Message]
    source: Source = CENTER
    fragment: int | None = None
    how: Literal["anchor", "given"] | None = None
    """Which kernel of the rule learns of it."""
    scheduled: bool = False
    """Whether a job that will encode it is in the order of work."""

    @property
    def alive(self) -> bool:
        return self.session.live and self.session.connection == self.connection


class Pulls:
    """All requests that are not served yet."""

    def __init__(
        self,
        state: ServerState,
        out: Outbox,
        order: WorkOrder,
        downlink: Downlink,
        applying: Applying,
        deciding: Deciding,
        late: LateReplies,
    ) -> None:
        self._state = state
        self._out = out
        self._order = order
        self._downlink = downlink
        self._applying = applying
        self._deciding = deciding
        self._late = late
        self.waiting: deque[_Request] = deque()

    def pull(self, session: Session, pull: Pull) -> None:
        """A worker or observer asks for the center or a source; raises PeerError where there is none to give."""
        state = self._state
        session.merged = pull.merged
        if not state.initialised:
            raise PeerError(Code.UNEXPECTED, "The server has no weights yet.", fix="Wait for its next Welcome.")
        if state.diverged:
            raise PeerError(Code.DIVERGED, state.diverged, fix="Restart from a checkpoint with a lower learning rate.")

        def announce(reply: Reply, payload: memoryview | bytes) -> Offer:
            finished = bool(state.finished)
            if kind == "anchor":
                session.holds = {reply.id}
            return Offer(session.token, session.connection, pull.purpose, pull.source, reply, finished, payload)

        kind: Kind = pull.purpose if session.role == "worker" else "evaluate"
        request = _Request(session, session.connection, kind, announce)
        if kind == "order":
            request.source = self._source(session, pull.source)
        if kind == "anchor":
            request.how = "anchor"
            if session.anchor_asked == (session.connection, pull.merged):
                return  # said twice: it goes on from the first answer, and the rule must not be told another
            session.anchor_asked = session.connection, pull.merged
        # asking twice is asking once
        for older in [r for r in self.waiting if r.session is session and r.kind == kind]:
            self.waiting.remove(older)
        self.waiting.append(request)

    def answer_again(self, session: Session) -> None:
        """The reply to an applied push was lost: the same once more, or the center as it is now."""
        state = self._state
        if session.decision.outcome != "applied" or session.decision.source is None or state.diverged:
            self._applying.tell_decision(session)
        elif state.keeps_replicas and session.merged not in session.holds:
            session.anchored = False
            raise PeerError(Code.STALE, "This worker does not hold what its reply is added to.", fix="Say Hello again.")
        elif session.owed is not None:
            if session.owed.made:
                self._applying.send_owed(session)
        elif state.rule.lost_reply == "resend":
            # the very bytes are gone, and the center is no substitute: it says Hello, and anchors anew
            session.anchored = False
            raise PeerError(Code.STALE, "The reply to this push is no longer kept.", fix="Say Hello again.")
        else:
            self._reply(session, "anchor")

    def answer_held(self, session: Session) -> None:
        """A push that was held is answered now. Its version is that of the center that holds it: where only the reply
        was late, it has one already."""
        version = session.decision.version if session.late else self._state.version
        session.decision = replace(session.decision, outcome="applied", version=version)
        session.late = False
        if session.decision.source is None or self._state.diverged:
            self._applying.tell_decision(session)
        elif session.peer:  # else it comes back, and asks
            self._reply(session, "given")

    def answer_late(self) -> None:
        """Those who are no longer too far ahead of the slowest."""
        for session in self._state.members:
            if session.late and not self._state.too_far_ahead(session):
                self.answer_held(session)

    def _reply(self, session: Session, how: Literal["anchor", "given"]) -> None:
        if self._state.keeps_replicas:
            self._late.add(session)
            return
        session.answered_connection = session.connection
        answer, decision = self._applying.answer, session.decision
        assert decision.source is not None
        fragment = decision.fragment if len(self._state.hosted.shard.ups) > 1 else None

        def announce(reply: Reply, payload: memoryview | bytes) -> Message:
            session.pace.since = self._state.now
            return answer(session, reply, payload)

        self.waiting.append(_Request(session, session.connection, "reply", announce, decision.source, fragment, how))

    def _source(self, session: Session, name: str) -> Source:
        state = self._state
        return state.rule.source(state.config, state.hosted.shard.decisions, session.worker, name)

    def serve(self) -> None:
        """Serve what a snapshot can serve; have the others encoded before the pushes that wait."""
        if self._state.model is None:
            return
        if self._late.waiting:
            self._late.serve()
        for _ in range(len(self.waiting)):
            request = self.waiting.popleft()
            if not request.alive:
                continue
            if self._state.diverged:
                self._give_up(request)
                continue
            snapshot = self._published(request)
            if snapshot is not None:
                self._send(request, snapshot)
                continue
            self.waiting.append(request)
            if not request.scheduled:
                request.scheduled = True
                self._schedule(request)

    def _published(self, request: _Request) -> Snapshot | None:
        """What it can be given without a kernel."""
        if self._tells_the_rule(request) or self._memory(request) is not None:
            return None
        return self._state.hosted.snapshots.of(self._moment(request))

    def _memory(self, request: _Request) -> U8 | None:
        """Shared with its worker, which waits for the reply to its push: only that may lie there."""
        return request.session.memory if request.kind == "reply" else None

    def _tells_the_rule(self, request: _Request) -> bool:
        """Whether a kernel of the rule runs when it is served; anchoring also changes the session."""
        return request.how == "anchor" or (request.how == "given" and self._state.rule.given is not None)

    def _moment(self, request: _Request) -> Moment:
        shard = self._state.hosted.shard
        at = shard.generation if request.source != CENTER else shard.version.version
        return Moment(request.source, request.fragment, at)

    def _schedule(self, request: _Request) -> None:
        target: list[Snapshot] = []

        def start() -> Work | None:
            request.scheduled = False
            return self._start(request, target)

        self._order.add(
            Job(f"pull of {request.session.worker}", start, lambda results: self._encoded(request, target[0], results)),
            pull=True,
        )

    def _start(self, request: _Request, target: list[Snapshot]) -> Work | None:
        """The work that encodes what `request` is given; None where it is served, gone, or must wait for a buffer."""
        shard = self._state.hosted.shard
        told = self._tells_the_rule(request)
        if request not in self.waiting or not request.alive or self._published(request) is not None:
            return None
        memory = self._memory(request)
        snapshot = self._state.hosted.snapshots.begin() if memory is None else Snapshot(memory)
        if snapshot is None:
            return None
        session = request.session
        if request.how == "anchor":
            session.anchored = False  # until it is told: who comes back in between must anchor anew
            if session.arrays is None:
                session.arrays, session.replica = shard.session_arrays()
        self.waiting.remove(request)
        target.append(snapshot)
        arrays, replica = (session.arrays, session.replica) if told else (None, None)
        return shard.read_work(snapshot.data, request.source, request.fragment, arrays, request.how or "given", replica)

    def _encoded(self, request: _Request, snapshot: Snapshot, results: Sequence[bool]) -> None:
        if not all(results):
            self._deciding.diverge(request.session.worker)
            self._give_up(request)
            return
        if snapshot in self._state.hosted.snapshots:
            self._state.hosted.snapshots.publish(snapshot, self._moment(request), self._state.version)
        else:
            snapshot.version = self._state.version
        if request.how == "anchor" and request.alive:
            request.session.anchored = True
            request.session.go_on()  # from here, not from the reply it was owed
            if request.session.decision.outcome == "held":  # nor from the one it waited for
                request.session.decision = replace(request.session.decision, outcome="applied")
                request.session.late = False
                self._deciding.dismiss(request.session)
            self._deciding.enrol(request.session)
        self._send(request, snapshot)

    def _give_up(self, request: _Request) -> None:
        """There is nothing to give any more; who waits for the answer to a push hears what became of it."""
        if request.kind == "reply" and request.alive:
            self._applying.tell_decision(request.session)

    def _send(self, request: _Request, snapshot: Snapshot) -> None:
        session, plan = request.session, self._state.hosted.shard.reply_plan(request.fragment)
        if not request.alive:
            return
        snapshot.readers += 1
        session.counters.bytes_down += plan.bytes
        if request.kind == "order":
            self._state.ordered_bytes += plan.bytes

        def done() -> None:
            snapshot.readers -= 1

        self._out.add(
            self._downlink.offer(
                request.announce,
                snapshot.data[: plan.bytes],
                plan,
                snapshot.version,
                (session.token, session.connection, session.peer),
                done,
                now=self._state.now,
                of_push=request.kind == "reply",
                whole=snapshot.data is session.memory,
            )
        )
