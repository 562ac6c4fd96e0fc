"""Whole messages over one Unix stream socket, both ways.

    MAGIC (u32)   header bytes (u32)   payload bytes (u32)   header   payload          little-endian; a message

Laws
* A payload goes from where it lies, and comes into memory of its own that nobody else writes.
* What the system does not take at once waits, in order: so many messages, and no more.
* Whoever says anything else than messages, or longer ones than there are, has ended.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from common.messages import Buffer
from common.wire import HEADER_BYTES, PAYLOAD_BYTES

QUEUED_MESSAGES = 64
"""For one peer, at most: well above what the windows of one session allow."""
MAGIC = 0x31765350
_START = struct.Struct("<III")
_IN, _IN_AND_OUT = select.EPOLLIN, select.EPOLLIN | select.EPOLLOUT


class Stream:
    """One connection: whole messages, both ways."""

    def __init__(self, name: bytes, connected: socket.socket, watched: select.epoll) -> None:
        connected.setblocking(False)
        # room for a chunk that nobody has read yet: else both sides wake each other for every few pages
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PAYLOAD_BYTES)
        self.name = name
        self.ended = False
        """Whether nothing will come any more."""
        self.broken = False
        """Whether nothing can be sent any more; what came before is still to be received."""
        self.spoke = False
        """Whether any message came."""
        self.moved = time.monotonic()
        """When it began, or anything of what waits was sent last."""
        self.queued: deque[tuple[list[memoryview], int]] = deque()
        """Messages, or what is left of them, and their holds."""
        self._socket = connected
        self._watched = watched
        self._start = bytearray(_START.size)
        self._parts = [memoryview(self._start)]
        """What is to be filled: first the start of a message, then the rest of it."""
        self._frames: list[memoryview] = []
        """Of the message that is coming; none before its start is there."""
        watched.register(connected.fileno(), _IN)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, frames: Sequence[Buffer], hold: int) -> tuple[str, bool]:
        """(why it could not be sent or "", whether the system has all of it)."""
        if self.ended or self.broken:
            return "the peer is gone", False
        if len(self.queued) >= QUEUED_MESSAGES:
            return "the peer does not read", False
        header, payload = frames[0], frames[1] if len(frames) > 1 else b""
        start = b"".join((_START.pack(MAGIC, len(header), len(payload)), header))
        parts = [memoryview(start), memoryview(payload)]
        if not self.queued:
            if (left := self._sent(parts)) is None:
                return "the peer is gone", False
            if not left:
                return "", True
            self._watched.modify(self.fileno(), _IN_AND_OUT)
            self.moved, parts = time.monotonic(), left
        self.queued.append((parts, hold))
        return "", False

    def flush(self) -> list[int]:
        """Hand the system what it takes; the holds of what it has all of."""
        done: list[int] = []
        while self.queued and not self.broken:
            parts, hold = self.queued[0]
            if (left := self._sent(parts)) is None:
                return done
            if left is not parts:
                self.moved = time.monotonic()
            if left:
                self.queued[0] = left, hold
                return done
            self.queued.popleft()
            if hold:
                done.append(hold)
        if not (self.ended or self.broken):
            self._watched.modify(self.fileno(), _IN)
        return done

    def _sent(self, parts: list[memoryview]) -> list[memoryview] | None:
        """What is left of them after sending; None where the peer is gone."""
        try:
            size = self._socket.sendmsg(parts, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return parts
        except OSError:
            self.broken = True
            with contextlib.suppress(OSError):  # its end is to be received, whatever the reason
                self._socket.shutdown(socket.SHUT_RDWR)
            return None
        return _after(parts, size)

    def receive(self) -> list[Buffer] | None:
        """The next message, where all of it is there."""
        while True:
            try:
                size = self._socket.recvmsg_into(self._parts)[0]
            except BlockingIOError:
                return None
            except OSError:
                size = 0
            if size == 0:
                self.ended = True
                return None
            self._parts = _after(self._parts, size)
            if self._parts:  # nothing else is there yet
                return None
            if self._frames:
                frames, self._frames, self._parts = self._frames, [], [memoryview(self._start)]
                self.spoke = True
                return list(frames)
            magic, header, payload = _START.unpack(self._start)
            if magic != MAGIC or not 0 < header <= HEADER_BYTES or payload > PAYLOAD_BYTES:
                self.ended = True
                return None
            self._frames = [memoryview(bytearray(header))]
            if payload:
                self._frames.append(np.empty(payload, np.uint8).data)
            self._parts = list(self._frames)

    def close(self) -> list[int]:
        """A second call does nothing; the holds of what nobody will read any more."""
        with contextlib.suppress(OSError, ValueError):  # it is closed already
            self._watched.unregister(self.fileno())  # a forked process may keep it open
            self._socket.shutdown(socket.SHUT_RDWR)
        self.ended = True
        self._socket.close()
        held = [hold for _, hold in self.queued if hold]
        self.queued.clear()
        return held


def _after(parts: list[memoryview], size: int) -> list[memoryview]:
    """What of them lies behind the first so many bytes."""
    for index, part in enumerate(parts):
        if size < len(part):
            return [part[size:], *parts[index + 1 :]]
        size -= len(part)
    return []
