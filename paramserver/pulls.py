"""Whoever wants the center: to look at it, to go on from it, or because a reply was lost. Pure.

Laws
* Pulls of one version share one encoded snapshot; a pull never waits for the pushes that wait.
* Of one session, at most one pull to anchor and one to evaluate wait.
* Only a pull that anchors changes anything: it tells the rule what its worker goes on from (GEM: s <- c). Pulls to
  evaluate never do.
* A pull that its session or connection has outlived is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.errors import Code, PeerError
from common.messages import Message, Offer, Pull, Reply
from paramserver.applying import Applying
from paramserver.downlink import Downlink
from paramserver.order import Job, WorkOrder
from paramserver.session import Session
from paramserver.shard import Work
from paramserver.snapshots import Snapshot
from paramserver.state import Outbox, ServerState


@dataclass(slots=True, eq=False)
class _Request:
    """One who waits for the center."""

    session: Session
    connection: int
    anchor: bool
    announce: Callable[[Reply, memoryview | bytes], Message]
    scheduled: bool = False
    """Whether a job that will encode it is in the order of work."""

    @property
    def alive(self) -> bool:
        return self.session.live and self.session.connection == self.connection


class Pulls:
    """All pulls that are not served yet."""

    def __init__(
        self, state: ServerState, out: Outbox, order: WorkOrder, downlink: Downlink, applying: Applying
    ) -> None:
        self._state = state
        self._out = out
        self._order = order
        self._downlink = downlink
        self._applying = applying
        self._waiting: deque[_Request] = deque()

    def pull(self, session: Session, pull: Pull) -> None:
        """A worker or observer asks for the center; raises PeerError where there is none to give."""
        state = self._state
        session.merged = pull.merged
        if not state.initialised:
            raise PeerError(Code.UNEXPECTED, "The server has no weights yet.", fix="Wait for its next Welcome.")
        if state.diverged:
            raise PeerError(Code.DIVERGED, state.diverged, fix="Restart from a checkpoint with a lower learning rate.")

        def announce(reply: Reply, payload: memoryview | bytes) -> Offer:
            return Offer(session.token, session.connection, pull.purpose, reply, bool(state.finished), payload)

        anchor = pull.purpose == "anchor" and session.role == "worker"
        # asking twice is asking once
        for request in [r for r in self._waiting if r.session is session and r.anchor == anchor]:
            self._waiting.remove(request)
        self._waiting.append(_Request(session, session.connection, anchor, announce))

    def answer_again(self, session: Session) -> None:
        """The reply to an applied push was lost: the worker is given the center as it is now."""
        if session.decision.outcome != "applied" or self._state.diverged:
            self._applying.tell_decision(session)
            return
        session.answered_connection = session.connection
        answer = self._applying.answer

        def announce(reply: Reply, payload: memoryview | bytes) -> Message:
            return answer(session, reply, payload)

        self._waiting.append(_Request(session, session.connection, True, announce))

    def serve(self) -> None:
        """Serve what the current snapshot can serve; have the others encoded before the pushes that wait."""
        if self._state.model is None:
            return
        for _ in range(len(self._waiting)):
            request = self._waiting.popleft()
            if not request.alive or self._state.diverged:
                continue
            snapshot = None if request.anchor else self._state.model.snapshots.at(self._state.version)
            if snapshot is not None:
                self._send(request, snapshot)
                continue
            self._waiting.append(request)
            if not request.scheduled:
                request.scheduled = True
                self._schedule(request)

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
        """The work that encodes the center for `request`; None where it is served, gone, or must wait for a buffer."""
        shard, snapshots = self._state.hosted.shard, self._state.hosted.snapshots
        served_by_another = not request.anchor and snapshots.at(shard.version) is not None
        if request not in self._waiting or not request.alive or served_by_another:
            return None
        snapshot = snapshots.begin()
        if snapshot is None:
            return None
        session = request.session
        if request.anchor:
            session.anchored = False  # until it is told: who comes back in between must anchor anew
            if session.arrays is None:
                session.arrays = shard.session_arrays()
        self._waiting.remove(request)
        target.append(snapshot)
        return shard.anchor_work(session.arrays if request.anchor else None, snapshot.data)

    def _encoded(self, request: _Request, snapshot: Snapshot, results: Sequence[bool]) -> None:
        if not all(results):
            self._applying.diverge(request.session)
            return
        self._state.hosted.snapshots.publish(snapshot, self._state.version)
        if request.anchor and request.alive:
            request.session.anchored = True
        self._send(request, snapshot)

    def _send(self, request: _Request, snapshot: Snapshot) -> None:
        session, shard = request.session, self._state.hosted.shard
        if not request.alive:
            return
        snapshot.readers += 1
        session.counters.bytes_down += shard.down.bytes

        def done() -> None:
            snapshot.readers -= 1

        self._out.add(
            self._downlink.offer(
                request.announce,
                snapshot.data,
                shard.down,
                snapshot.version,
                (session.token, session.connection, session.peer),
                done,
                now=self._state.now,
            )
        )
