"""An end that, with peers of this machine, shares memory: what lies there is pointed at, and need not be sent.

    frames    header | payload          or, of a payload in shared memory:     header | pointer: mark, offset, length

Laws
* A pointer takes the place of a payload that lies in shared memory. No payload is taken for one, since it bears the
  memory's random mark. Whoever sends one sees to it that what it points at stays until the peer is done, for nothing
  tells when.
* Where there is a line to the peer (`common.transports.lines`), what has a pointer goes by it, all else by
  the sockets. A line is emptied before a message of theirs is taken: so what goes by it may overtake what was sent
  before, and is never overtaken. The cores bear messages in any order; what must not be split, a reply in chunks, is
  not.
* Without a line, pointers go by the sockets, in order with everything.
"""

from __future__ import annotations

import contextlib
import select
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from common.codecs.base import U8
from common.messages import Buffer
from common.shared import MARK_BYTES, Memory
from common.transports.base import SERVER, Sockets
from common.transports.lines import Line
from common.wire import PAYLOAD_BYTES

POINT_BYTES = 16 * 1024
"""Shorter payloads are sent by the sockets, though they lie in shared memory: it costs no more."""
AHEAD_MESSAGES = 64
"""So many at most: nobody who keeps a line full holds up what others sent otherwise. A session has one or two there."""
_POINTER = struct.Struct(f"<{MARK_BYTES}sQQ")
Message = tuple[bytes, list[Buffer]]


@dataclass(frozen=True, slots=True)
class _Shared:
    """With one peer."""

    mine: Memory | None
    """What it reads."""
    mark: bytes
    theirs: memoryview
    """What it writes, under this mark."""
    line: Line | None
    my_mark: bytes

    def pointer(self, payload: Buffer) -> bytes:
        """To where the payload lies; empty where it is to be sent."""
        if self.mine is None or len(payload) <= POINT_BYTES or (at := self.mine.holds(payload)) is None:
            return b""
        return _POINTER.pack(self.my_mark, at, len(payload))

    def found(self, pointer: Buffer) -> Buffer:
        """What it points at; nothing where there is no such place, which the core then refuses. A payload that is no
        pointer is returned as it is."""
        mark, at, size = _POINTER.unpack(pointer)
        if mark != self.mark:
            return pointer
        if size > len(self.theirs) or at > len(self.theirs) - size:
            return b""
        return self.theirs[at : at + size]


class SharingEndpoint:
    """Sockets behind `common.transports.base.Endpoint`, with memory shared beside them."""

    def __init__(self, sockets: Sockets) -> None:
        self._sockets = sockets
        self._shared: dict[bytes, _Shared] = {}
        self._kept: Message | None = None
        """Taken from the sockets, and kept until the line of its peer is empty."""
        self._ahead = 0
        """Messages of that line that were let go first."""
        self._released: list[int] = []
        self._lost = False
        """Whether a line has ended, and nobody was told."""
        self._watched = select.epoll()
        """What a dialer waits for. Whatever is closed is no longer watched."""
        for descriptor in sockets.descriptors:
            self._watched.register(descriptor, select.EPOLLIN)
        self._also = -1

    @property
    def address(self) -> str:
        return self._sockets.address

    def fileno(self) -> int:
        return self._sockets.fileno()

    @property
    def monitors(self) -> list[int]:
        """Descriptors that become readable when `listen_to_monitor` is due, once that was called a first time. A
        listener's; a dialer is asked whether its connection is `lost`."""
        return self._sockets.monitors

    def listen_to_monitor(self) -> None:
        """Take in which connections began, whether or not anybody will ever speak there."""
        self._sockets.listen_to_monitor()

    def share(self, peer: bytes, mine: Memory | None, theirs: tuple[bytes, U8], line: Line | None = None) -> None:
        """From now on `peer` reads payloads that lie in `mine` there, and this side its own in `theirs`: (mark, bytes).

        line: to the peer; this end's to close.
        """
        self.unshare(peer)
        mark, memory = theirs
        my_mark = bytes.fromhex(mine.place.mark) if mine is not None else b""
        self._shared[peer] = _Shared(mine, mark, memory.data, line, my_mark)
        if peer == SERVER and line is not None:
            self._watched.register(line.fileno(), select.EPOLLIN)

    def unshare(self, peer: bytes) -> None:
        """Payloads to and from `peer` travel in messages again, and its line is closed."""
        if (shared := self._shared.pop(peer, None)) is not None and shared.line is not None:
            shared.line.close()

    def send(self, peer: bytes, frames: Sequence[Buffer], hold: int = 0) -> str:
        if len(frames) == 1:
            return self._sockets.send(peer, frames, hold)
        header, payload = frames
        shared = self._shared.get(peer)
        pointer = b"" if shared is None else shared.pointer(payload)
        if not pointer and len(payload) > PAYLOAD_BYTES:
            return "the memory that it lies in is no longer shared"
        if not pointer or shared is None or shared.line is None:
            return self._sockets.send(peer, (header, pointer or payload), hold)
        if not (refusal := shared.line.send(b"".join((header, pointer)))) and hold:
            self._released.append(hold)
        return refusal

    @property
    def overlooked(self) -> bool:
        """Whether there is anything to receive, or released, of which no descriptor may tell: this end has sent since.
        Wait for descriptors only where it is not."""
        return self._kept is not None or bool(self._released) or self._sockets.overlooked

    def receive(self) -> Message | None:
        """The next message of a peer. A dialer's line is looked at, too; a listener's lines have `receive_from`."""
        if not self._shared and self._kept is None:
            return self._sockets.receive()
        if (pointed := self.receive_from(SERVER)) is not None:
            return pointed
        message, self._kept = self._kept or self._sockets.receive(), None
        if message is None or (shared := self._shared.get(message[0])) is None:
            return message
        if self._ahead < AHEAD_MESSAGES and (earlier := self.receive_from(message[0])) is not None:
            self._kept, self._ahead = message, self._ahead + 1
            return earlier
        self._ahead = 0
        if len(message[1]) == 2 and len(message[1][1]) == _POINTER.size:
            message[1][1] = shared.found(message[1][1])
        return message

    def receive_from(self, peer: bytes) -> Message | None:
        """The next message of the line to `peer`."""
        if (shared := self._shared.get(peer)) is None or (line := shared.line) is None or line.ended:
            return None
        if (message := line.receive()) is None:
            self._note_end(peer, line)
            return None
        at = len(message) - _POINTER.size
        return peer, [message[:at], shared.found(message[at:])] if at > 0 else [b"", b""]

    def _note_end(self, peer: bytes, line: Line) -> None:
        if line.ended:
            self._lost = True
            if peer == SERVER:
                self._watched.unregister(line.fileno())

    def released(self) -> list[int]:
        done, self._released = self._released, []
        return done + self._sockets.released()

    @property
    def holding(self) -> bool:
        """Whether any buffer is still being read."""
        return bool(self._released) or self._sockets.holding

    def wait(self, timeout_s: float, *, also: int) -> bool:
        """Wait until a message or a loss may be there, or the descriptor `also` is readable, or time is up; whether
        `also` is. A dialer's.

        Call it only where nothing is `overlooked`. It touches no socket, so that another thread may use this end
        meanwhile, or close it.
        """
        try:
            if also != self._also:
                self._watch_also(also)
            readable = dict(self._watched.poll(min(timeout_s, self._sockets.patience_s)))
        except (OSError, ValueError):  # another thread has closed this end
            return False
        self._sockets.woken(readable)
        return also in readable

    def _watch_also(self, also: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # it was closed
            if self._also >= 0:
                self._watched.unregister(self._also)
        self._also = also
        if also >= 0:
            self._watched.register(also, select.EPOLLIN)

    def lost(self) -> bool:
        """Whether a dialer's connection, or its line, broke since the last call."""
        lost, self._lost = self._lost, False
        return self._sockets.lost() or lost

    def close(self) -> None:
        for peer in list(self._shared):
            self.unshare(peer)
        self._kept = None
        self._watched.close()
        self._sockets.close()
