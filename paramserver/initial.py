"""The first weights of a fresh server: who supplies them, and that nobody else does. Pure.

Laws
* One worker at a time is asked, in order of arrival; if it is silent for `init_timeout_s` after its last chunk, the
  next one is. The others wait, and are told when the weights are there.
* Weights that were not asked for are refused; an initialised center is never overwritten.
* They travel lossless, whatever the codec, so that everybody starts from the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from common.codecs.base import U8
from common.messages import Ack, Begin, Version
from paramserver import intake
from paramserver.order import Job, WorkOrder
from paramserver.session import Session, Transfer
from paramserver.state import Outbox, ServerState

NUMBER = 0
"""Initial weights travel under this number; pushes count from 1."""


class InitialWeights:
    """Until the server has weights. `welcome(session)` tells a session that its part has changed."""

    def __init__(self, state: ServerState, out: Outbox, order: WorkOrder, welcome: Callable[[Session], None]) -> None:
        self._state = state
        self._out = out
        self._order = order
        self._welcome = welcome
        self._queue: deque[str] = deque()
        self._asked: str | None = None
        self._deadline = 0.0
        self._data: U8 | None = None

    @property
    def asked(self) -> Session | None:
        """Who was asked for the weights and has not sent them yet."""
        return self._state.sessions.get(self._asked) if self._asked else None

    @property
    def deadline(self) -> float | None:
        """When the one who was asked is given up."""
        return self._deadline if self._asked else None

    def part_of(self, session: Session) -> Literal["send", "wait", "have"]:
        """What a session shall do about the weights."""
        if self._state.initialised:
            return "have"
        return "send" if session.token == self._asked else "wait"

    def enqueue(self, session: Session) -> None:
        """A session that waits for the weights; a worker may be asked for its own."""
        session.waits_for_init = True
        if session.role == "worker" and session.token not in (self._asked, *self._queue):
            self._queue.append(session.token)

    def ask_next(self) -> None:
        """Ask the next in order, if nobody is asked, or who was is late."""
        state = self._state
        if state.initialised or state.stopping:
            return
        if (late := self.asked) is not None:
            if state.now < self._deadline:
                return
            self._out.say("warning", f"{late.worker} did not send its weights in time; the next in order is asked.")
            self.give_up(late, back_in_line=late.live)
            self._welcome(late)
        while self._queue and self._asked is None:
            session = state.sessions.get(self._queue.popleft())
            if session is not None and session.live:
                self._asked = session.token
                self._deadline = state.now + state.settings.init_timeout_s
                self._welcome(session)

    def give_up(self, session: Session, *, back_in_line: bool) -> None:
        """This session does not supply the weights (now)."""
        if session.token == self._asked:
            self._asked = self._data = session.transfer = None
            if back_in_line:
                self._queue.append(session.token)

    def begin(self, session: Session, begin: Begin) -> Transfer | None:
        """The weights are on their way; None where they are already, or no longer asked for. Raises PeerError."""
        if session.token != self._asked:
            self._welcome(session)
            return None
        if session.transfer is not None:
            return None
        shard = self._state.hosted.shard
        plan = intake.check_begin(begin, ({shard.exact.codec: shard.exact},), Version(self._state.epoch, 0))
        self._data = np.zeros(shard.exact.bytes, np.uint8)  # its pages come as chunks fill them, not all at once
        session.transfer = Transfer(
            begin, plan, session.connection, self._state.now, received=bytearray(len(plan.chunks))
        )
        return session.transfer

    def buffer(self) -> U8:
        """Where the chunks go: (exact.bytes,). Each one renews the sender's time."""
        assert self._data is not None
        self._deadline = self._state.now + self._state.settings.init_timeout_s
        return self._data

    def load(self, session: Session) -> None:
        """All is there: it becomes the center."""
        shard, data = self._state.hosted.shard, self._data
        assert data is not None

        def finish(results: Sequence[bool]) -> None:
            self._loaded(session)

        self._order.add(Job(f"initial weights of {session.worker}", lambda: shard.load_work(data), finish))
        self._deadline = float("inf")

    def _loaded(self, session: Session) -> None:
        state = self._state
        state.initialised = True
        state.budget.started = state.now
        self._asked = self._data = session.transfer = None
        self._queue.clear()
        self._out.say("info", f"{session.worker} supplied the initial weights.")
        self._out.record("initialised", worker=session.worker, parameters=state.hosted.shard.layout.parameters)
        self._out.tell(
            session,
            Ack(
                session.token,
                session.connection,
                NUMBER,
                "applied",
                "",
                "initial weights taken",
                state.version,
                state.durable,
                1.0,
                False,
                state.settings.local_steps,
            ),
        )
        for other in state.sessions.values():
            if other.waits_for_init:
                other.waits_for_init = False
                if other is not session and other.live:
                    self._welcome(other)
