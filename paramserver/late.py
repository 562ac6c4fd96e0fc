"""Replies that come later than their push, where each is the difference to what its own worker holds. Pure.

    add -> room? -- yes -> a job encodes it and moves the replica -> sent, and owed
             | no
             waits

Where replies are whole, all members of a round are given one snapshot (`paramserver.pulls`); a difference is one
worker's own.

Laws
* A late reply lies where one that comes at once does: in a slot, or in memory that its worker shares. While all slots
  are taken it waits; who has one does not wait for it.
* It is made once. Who comes back before it is there is sent it once it is, wherever it then is connected.
* Who is given an anchor meanwhile gets none: what it would be the difference to is gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from paramserver.applying import Applying
from paramserver.deciding import Deciding
from paramserver.order import Job, WorkOrder
from paramserver.session import Decision, Owed, Session
from paramserver.shard import Work
from paramserver.state import ServerState


@dataclass(frozen=True, slots=True, eq=False)
class _Late:
    """One reply that is to be made, to the push that was decided so."""

    session: Session
    decision: Decision

    @property
    def wanted(self) -> bool:
        """Whether the worker still waits for it, and not for an anchor; and it has no room yet."""
        session = self.session
        return session.live and session.anchored and session.decision is self.decision and session.owed is None


class LateReplies:
    """All that are not made yet."""

    def __init__(self, state: ServerState, order: WorkOrder, applying: Applying, deciding: Deciding) -> None:
        self._state = state
        self._order = order
        self._applying = applying
        self._deciding = deciding
        self.waiting: deque[_Late] = deque()
        """Replies that have no room yet."""
        self.being_made = 0
        """Replies that have room and whose job is not over."""

    def add(self, session: Session) -> None:
        """The session's last push is applied, and can be answered now."""
        if not any(late.session is session and late.wanted for late in self.waiting):
            self.waiting.append(_Late(session, session.decision))

    def serve(self) -> None:
        """Room to those who wait, in order, and a job for each that has it."""
        while self.waiting:
            late = self.waiting[0]
            if late.wanted and self._state.diverged:
                self._applying.tell_decision(late.session)
            elif late.wanted:
                owed = self._room(late.session)
                if owed is None:
                    return
                late.session.owed = owed
                self.being_made += 1
                name = f"late reply to {late.session.worker}"
                self._order.add(
                    Job(name, partial(self._start, late, owed), partial(self._finish, late, owed)), pull=True
                )
            self.waiting.popleft()

    def _room(self, session: Session) -> Owed | None:
        slots, version = self._state.hosted.slots, self._state.version
        if session.memory is not None:
            return Owed(session.memory, None, version, slots.give, readers=1, made=False)
        slot = slots.take()
        return None if slot is None else Owed(slot.reply, slot, version, slots.give, readers=1, made=False)

    def _start(self, late: _Late, owed: Owed) -> Work | None:
        session, decision, state = late.session, late.decision, self._state
        if session.owed is not owed or state.diverged:
            self._give_up(late, owed)
            return None
        assert decision.source is not None
        key = state.key(session, decision.number)
        return state.hosted.shard.read_work(
            owed.reply, decision.source, decision.fragment, session.arrays, "given", session.replica, key
        )

    def _finish(self, late: _Late, owed: Owed, results: Sequence[bool]) -> None:
        session = late.session
        if not all(results):
            self._deciding.diverge(session.worker)
            self._give_up(late, owed)
            return
        owed.made, owed.version = True, self._state.version
        if session.owed is owed:
            session.counters.bytes_down += self._state.hosted.shard.downs[late.decision.fragment].bytes
            self._applying.send_owed(session)
        self._done(owed)

    def _give_up(self, late: _Late, owed: Owed) -> None:
        """It will not be made: its worker is gone, has an anchor, or there is no center any more that is finite."""
        if late.session.owed is owed:
            late.session.go_on()
            self._applying.tell_decision(late.session)
        self._done(owed)

    def _done(self, owed: Owed) -> None:
        self.being_made -= 1
        owed.read()
