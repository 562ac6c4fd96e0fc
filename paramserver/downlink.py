"""What is on its way down: replies and snapshots, handed to the transport as far as the receiver allows.

Laws
* A reply of one chunk rides in the message that announces it; a longer one waits for More, and at most the window the
  receiver granted is ever with the transport.
* The bytes do not change, and their buffer is not given back, until the transport has read them (`Released`), even
  where the receiver is gone meanwhile.
* Ids of replies are never used twice within a life of the server.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from common import wire
from common.chunks import Plan
from common.codecs.base import U8
from common.messages import Chunk, Message, Reply, Version
from common.node import Send


@dataclass(slots=True)
class Outgoing:
    """One reply on its way to one connection."""

    reply: Reply
    data: U8
    plan: Plan
    session: str
    connection: int
    peer: bytes
    done: Callable[[], None]
    sent: int = 0
    reading: int = 0
    """Messages that the transport still reads from."""
    cancelled: bool = False
    of_push: bool = False
    """Whether it answers a push: the next push of its session says that nobody waits for it any more."""
    asked: float = 0.0
    """When the receiver last asked for more of it (monotonic seconds)."""

    @property
    def finished(self) -> bool:
        return (self.cancelled or self.sent == len(self.plan.chunks)) and self.reading == 0


class Downlink:
    """All replies under way, by id."""

    def __init__(self) -> None:
        self._outgoing: dict[int, Outgoing] = {}
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._outgoing)

    def offer(
        self,
        announce: Callable[[Reply, memoryview | bytes], Message],
        data: U8,
        plan: Plan,
        version: Version,
        to: tuple[str, int, bytes],
        done: Callable[[], None],
        *,
        now: float,
        of_push: bool = False,
        whole: bool = False,
    ) -> Send:
        """Announce `data` to (session, connection, peer); `done` runs once nobody reads it any more. `whole`: in one
        message, because it lies in memory that the receiver shares."""
        self._last_id += 1
        reply = Reply(self._last_id, plan.bytes, plan.codec, version)
        session, connection, peer = to
        if whole:  # nothing tells when it is read there
            send = Send(peer, wire.encode(announce(reply, data.data)))
            done()
            return send
        out = Outgoing(reply, data, plan, session, connection, peer, done, of_push=of_push, asked=now)
        self._outgoing[reply.id] = out
        if len(plan.chunks) > 1:
            return Send(peer, wire.encode(announce(reply, b"")))
        out.sent, out.reading = len(plan.chunks), 1
        return Send(peer, wire.encode(announce(reply, data.data)), hold=reply.id)

    def more(self, reply_id: int, session: str, connection: int, until: int, now: float) -> list[Send]:
        """The chunks below `until` that were not sent yet."""
        out = self._outgoing.get(reply_id)
        if out is None or out.cancelled or (out.session, out.connection) != (session, connection):
            return []
        out.asked = now
        sends = []
        while out.sent < min(until, len(out.plan.chunks)):
            piece = out.plan.chunks[out.sent]
            payload = out.data[piece.offset : piece.offset + piece.size].data
            message = Chunk(session, connection, reply_id, out.sent, payload)
            sends.append(Send(out.peer, wire.encode(message), hold=reply_id))
            out.sent += 1
            out.reading += 1
        return sends

    def released(self, reply_id: int) -> None:
        """The transport has read one message of this reply."""
        if out := self._outgoing.get(reply_id):
            out.reading -= 1
            self._settle(out)

    def cancel(self, session: str, *, of_push: bool = False) -> None:
        """Send no more to this session: its connection is gone, or (`of_push`) it has gone on to its next push."""
        if self._outgoing:
            for out in [out for out in self._outgoing.values() if out.session == session and out.of_push >= of_push]:
                self._cancel(out)

    def expire(self, before: float) -> None:
        """Give up replies of which nobody has asked for more since `before`, so that they hold no buffer for ever."""
        for out in [out for out in self._outgoing.values() if out.asked < before]:
            self._cancel(out)

    def _cancel(self, out: Outgoing) -> None:
        out.cancelled = True
        self._settle(out)

    def _settle(self, out: Outgoing) -> None:
        if out.finished and out.reply.id in self._outgoing:
            del self._outgoing[out.reply.id]
            out.done()

    def validate(self) -> None:
        """Nothing that is finished is still kept."""
        for out in self._outgoing.values():
            assert out.reading >= 0 and not out.finished, out
