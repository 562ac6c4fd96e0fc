"""Memory shared with workers of the same machine: asked for, attached, and given up with the connection. Pure.

    Share -> Attach (the shell maps theirs, makes ours) -> Attached -> Shared
    the connection ends -> Detach

Laws
* A worker's updates lie in its own memory, which the server only reads; replies to its pushes lie in the server's,
  which the worker only reads. What is validated is what was copied out of theirs, never what lies there.
* Ours holds one reply: the next one is written when the worker pushes again, so it has read the one before. Whatever
  else comes down, comes in messages.
* Both belong to one connection, on which they are asked for once, whatever comes of it. A kernel that still writes
  for one that is gone writes to memory nobody reads.
* Without it everything works as well: it is offered, never needed, and `status` tells who has it.
"""

from __future__ import annotations

from dataclasses import field

from common.codecs.base import U8
from common.errors import Code, PeerError
from common.messages import Place, Share, Shared
from common.values import dataclass
from paramserver import memory
from paramserver.session import Session
from paramserver.state import Outbox, ServerState


@dataclass(frozen=True, slots=True)
class Attach:
    """Action: map a worker's memory and make memory of `reply_bytes` for it; Attached tells."""

    peer: bytes
    session: str
    connection: int
    place: Place
    update_bytes: int
    reply_bytes: int


@dataclass(frozen=True, slots=True)
class Attached:
    """Event: the peer's payloads are read where they lie, and `memory` (reply_bytes,) is read by it; or why not."""

    peer: bytes
    session: str
    connection: int
    memory: U8 | None = field(repr=False)
    place: Place | None
    sentence: str = ""


@dataclass(frozen=True, slots=True)
class Detach:
    """Action: nothing is shared with this peer any more."""

    peer: bytes


class Sharing:
    """Who shares memory."""

    def __init__(self, state: ServerState, out: Outbox) -> None:
        self._state = state
        self._out = out

    def share(self, session: Session, message: Share) -> None:
        """A worker offers its memory; raises PeerError for what cannot be its updates'."""
        if session.role != "worker" or self._state.model is None:
            raise PeerError(Code.UNEXPECTED, "Only a worker whose model is known has memory to share.")
        if session.offered == session.connection:
            return
        session.offered = session.connection
        if not self._state.machine:
            self._tell(session, None, "This server shares none.")
            return
        if not self._has_room():
            self._tell(session, None, "`memory_limit_mib` of the server leaves none to share.")
            return
        shard = self._state.hosted.shard
        update_bytes, reply_bytes = shard.longest_update, shard.longest_reply
        peer, connection = session.peer, session.connection
        session.lent = True
        self._out.add(Attach(peer, session.token, connection, message.place, update_bytes, reply_bytes))

    def _has_room(self) -> bool:
        state = self._state
        limit = state.settings.memory_limit_mib
        plan = memory.plan(state.settings, state.hosted.shard.layout)
        return limit is None or plan.total(len(state.members), state.sharing + 1) <= limit << 20

    def attached(self, event: Attached) -> None:
        """The shell has mapped it, or could not."""
        session = self._state.sessions.get(event.session)
        if session is None or (session.peer, session.connection) != (event.peer, event.connection) or not session.live:
            self._out.add(Detach(event.peer))
            return
        session.memory = event.memory
        session.lent = event.memory is not None
        if event.memory is None:
            self._out.say("info", f"{session.worker} is sent messages; no memory is shared: {event.sentence}")
        self._tell(session, event.place, event.sentence)

    def stop(self, session: Session) -> None:
        """Its connection is over."""
        session.lent = False
        if session.memory is not None:
            session.memory = None
            self._out.add(Detach(session.peer))

    def _tell(self, session: Session, place: Place | None, sentence: str) -> None:
        self._out.tell(session, Shared(session.token, session.connection, place, sentence))
