"""ipc:// by Unix sockets of our own: whoever needs a message takes it from the system, with no thread in between.

    MAGIC (u32)   header bytes (u32)   payload bytes (u32)   header   payload          little-endian; a message

Laws
* A payload goes from where it lies, and comes into memory of its own that nobody else writes.
* What the system does not take at once waits, in order: so many messages for a peer, and no more.
* Whoever says anything else than messages, or longer ones than there are, is cut off, and nobody else notices. So is
  who says nothing after it has called, or reads nothing of what waits for it, for too long.
* A path belongs to one listener: not to be had while that lives, free when it is dead, and gone when it has closed.

Left out: encryption, for the system says who may open a path.

ZeroMQ has threads of its own, on both sides, that have to be woken for a message and share no cache with those that
work on it: on a machine whose cores are all busy that is a fifth of an exchange (docs/log.md).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import math
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import numpy as np

from common.buffers import keep_freed_memory
from common.errors import NetworkError
from common.messages import Buffer
from common.transports.base import SERVER
from common.wire import HEADER_BYTES, PAYLOAD_BYTES

SCHEME = "ipc://"
PATH_BYTES = 107
QUEUED_MESSAGES = 64
"""For one peer, at most: well above what the windows of one session allow."""
BACKLOG = 1024
ACCEPTED_AT_ONCE = 64
CALL_S = 0.1
"""Where nobody listens yet, it is called this often."""
FIRST_MESSAGE_S, STALLED_S = 10.0, 60.0
"""Who has called and said nothing, or takes nothing of what waits, is given up after so long."""
STARTING_S = 2.0
"""So long another server may take to come by a path beside this one."""
DEAF_S = 0.1
"""Where no connection can be taken, because this process has too many descriptors, nobody is asked for so long."""
MAGIC = 0x31765350
NAME = b"\0unix "
"""So peers' names begin."""
_START = struct.Struct("<III")
_IN, _IN_AND_OUT = select.EPOLLIN, select.EPOLLIN | select.EPOLLOUT
_numbers = itertools.count(1)
Message = tuple[bytes, list[Buffer]]


class _Stream:
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


class _End:
    """What both ends of `common.transports.base.Sockets` have."""

    overlooked = False
    """The descriptor tells of everything, as long as it is there."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._watched = select.epoll()
        self._released: list[int] = []

    @property
    def descriptors(self) -> list[int]:
        return [self._watched.fileno()]

    def fileno(self) -> int:
        return self._watched.fileno()

    @property
    def monitors(self) -> list[int]:
        return []

    def listen_to_monitor(self) -> None:
        """There is none."""

    def woken(self, descriptors: Container[int]) -> None:
        """Nothing is to be remembered."""

    def released(self) -> list[int]:
        done, self._released = self._released, []
        return done


class UnixListener(_End):
    """Takes connections at a path."""

    patience_s = math.inf

    def __init__(self, listening: socket.socket, address: str) -> None:
        super().__init__(address)
        self._socket = listening
        self._path = _path(address)
        self._inode = _inode(self._path)
        self._watched.register(listening.fileno(), _IN)
        self._streams: dict[bytes, _Stream] = {}
        self._by_descriptor: dict[int, _Stream] = {}
        self._readable: deque[_Stream] = deque()
        """Those of which something may be there, in turn."""
        self._mute: deque[_Stream] = deque()
        """Those who called, in order; who has said something since leaves it when its turn comes."""
        self._sending: set[_Stream] = set()
        """Those for which something waits."""
        self._deaf_until = 0.0

    def send(self, peer: bytes, frames: Sequence[Buffer], hold: int = 0) -> str:
        if (stream := self._streams.get(peer)) is None:
            return "the peer is gone"
        refusal, done = stream.send(frames, hold)
        if done and hold:
            self._released.append(hold)
        elif not (done or refusal):
            self._sending.add(stream)
        return refusal

    def receive(self) -> Message | None:
        while self._readable or self._look():
            stream = self._readable.popleft()
            if (frames := stream.receive()) is not None:
                return stream.name, frames
            if stream.ended:
                self._drop(stream)
        return None

    def _look(self) -> bool:
        """Ask the system what can be read, and written, and who calls; whether anything can be read."""
        if self._watched.closed:
            return False
        if self._mute or self._deaf_until:
            self._lose_patience(time.monotonic())
        for descriptor, event in self._watched.poll(0):
            if descriptor == self._socket.fileno():
                self._accept()
                continue
            if (stream := self._by_descriptor.get(descriptor)) is None:
                continue
            if event & select.EPOLLOUT:
                self._flush(stream)
            if event & ~select.EPOLLOUT:
                self._readable.append(stream)
        return bool(self._readable)

    def _lose_patience(self, now: float) -> None:
        if self._deaf_until and now >= self._deaf_until:
            self._deaf_until = 0.0
            self._watched.register(self._socket.fileno(), _IN)
        while self._mute:
            first = self._mute[0]
            if not (first.spoke or first.ended):
                if now <= first.moved + FIRST_MESSAGE_S:
                    return
                self._drop(first)
            self._mute.popleft()

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                caller, _ = self._socket.accept()
                stream = _Stream(NAME + b"%d" % next(_numbers), caller, self._watched)
            except (BlockingIOError, ConnectionError):
                return
            except OSError:
                self._watched.unregister(self._socket.fileno())
                self._deaf_until = time.monotonic() + DEAF_S
                return
            self._streams[stream.name] = self._by_descriptor[stream.fileno()] = stream
            self._mute.append(stream)

    def _flush(self, stream: _Stream) -> None:
        self._released += stream.flush()
        if not stream.queued:
            self._sending.discard(stream)

    def _drop(self, stream: _Stream) -> None:
        """Close and forget it; a second call does nothing."""
        self._sending.discard(stream)
        if self._streams.pop(stream.name, None) is not None:
            del self._by_descriptor[stream.fileno()]
            self._released += stream.close()

    def released(self) -> list[int]:
        for stream in tuple(self._sending):
            self._flush(stream)
            if stream.queued and time.monotonic() > stream.moved + STALLED_S:
                self._drop(stream)
        return super().released()

    @property
    def holding(self) -> bool:
        held = any(hold for stream in self._sending for _, hold in stream.queued)
        return bool(self._released or self._deaf_until) or held

    def lost(self) -> bool:
        return False

    def close(self) -> None:
        if self._watched.closed:
            return
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        self._by_descriptor.clear()
        self._readable.clear()
        self._sending.clear()
        self._mute.clear()
        self._watched.close()
        self._socket.close()
        if self._inode is not None and _inode(self._path) == self._inode:
            Path(os.fsdecode(self._path)).unlink(missing_ok=True)


class UnixDialer(_End):
    """A connection to a path, or calls there until there is one."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._path = _path(address)
        self._stream: _Stream | None = None
        self._closed = False
        self._told = False
        """Whether somebody knows that it is lost."""
        self._early: deque[tuple[Sequence[Buffer], int]] = deque()
        """What was sent before there was a connection."""
        self._called = -math.inf
        self._call()

    @property
    def patience_s(self) -> float:
        return CALL_S if self._stream is None else math.inf

    def _call(self) -> None:
        self._called, connecting = time.monotonic(), _new()
        try:
            connecting.connect(self._path)
        except OSError:  # silence tells that nobody is there
            connecting.close()
            return
        self._stream = _Stream(SERVER, connecting, self._watched)
        while self._early:
            frames, hold = self._early.popleft()
            self._send(self._stream, frames, hold)

    def send(self, peer: bytes, frames: Sequence[Buffer], hold: int = 0) -> str:
        if self._stream is not None:
            return self._send(self._stream, frames, hold)
        if len(self._early) >= QUEUED_MESSAGES:
            return "nobody listens there"
        self._early.append((frames, hold))
        return ""

    def _send(self, stream: _Stream, frames: Sequence[Buffer], hold: int) -> str:
        refusal, done = stream.send(frames, hold)
        if done and hold:
            self._released.append(hold)
        return refusal

    def receive(self) -> Message | None:
        if (stream := self._stream) is None:
            if not self._closed and time.monotonic() >= self._called + CALL_S:
                self._call()
            return None
        if self._told:
            return None
        if stream.queued:
            self._released += stream.flush()
        if (frames := stream.receive()) is not None:
            return SERVER, frames
        if stream.ended:
            self._released += stream.close()
        return None

    @property
    def holding(self) -> bool:
        return bool(self._released or self._early) or (self._stream is not None and bool(self._stream.queued))

    def lost(self) -> bool:
        lost = self._stream is not None and self._stream.ended and not self._told
        self._told |= lost
        return lost

    def close(self) -> None:
        self._closed = self._told = True
        self._early.clear()
        if self._stream is not None:
            self._stream.close()
        self._watched.close()


def dial(address: str) -> UnixDialer:
    """Connected to ipc://PATH or ipc://@NAME, or soon; raises NetworkError for what can be no path."""
    keep_freed_memory(PAYLOAD_BYTES)
    if not 0 < len(_path(address)) <= PATH_BYTES:
        raise NetworkError(f"'{address}' is no address to dial.", fix=f"A path has 1 to {PATH_BYTES} bytes.")
    return UnixDialer(address)


def listen(address: str) -> UnixListener:
    """Bound to ipc://PATH, or ipc://@NAME for one without a file; raises NetworkError."""
    keep_freed_memory(PAYLOAD_BYTES)
    path, listening = _path(address), _new()
    try:
        if not 0 < len(path) <= PATH_BYTES:
            raise OSError(errno.ENAMETOOLONG, f"a path has 1 to {PATH_BYTES} bytes")
        with _alone_at(path):
            if _is_dead(path):
                os.unlink(path)
            listening.bind(path)
            listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise _cannot_listen(address, error) from None
    return UnixListener(listening, address)


def _cannot_listen(address: str, error: OSError) -> NetworkError:
    if error.errno == errno.EADDRINUSE:
        return NetworkError(
            f"Cannot listen on {address}: something else already does.", fix="Stop it, or choose another path."
        )
    return NetworkError(f"Cannot listen on {address}: {error.strerror or error}.", fix="Check the path.")


def _new() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


def _path(address: str) -> bytes:
    """As the system wants it; a name without a file begins with a zero."""
    path = os.fsencode(address.removeprefix(SCHEME))
    return b"\0" + path[1:] if path.startswith(b"@") else path


def _inode(path: bytes) -> int | None:
    """Of the socket there; None where there is none, or something else."""
    with contextlib.suppress(OSError, ValueError):  # a name without a file
        if Path(os.fsdecode(path)).is_socket():
            return os.stat(path).st_ino
    return None


@contextlib.contextmanager
def _alone_at(path: bytes) -> Iterator[None]:
    """No other server comes by a path in this folder inside the block; raises OSError."""
    if path.startswith(b"\0"):  # the system sees to it
        yield
        return
    folder = os.open(os.path.dirname(path) or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + STARTING_S
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise OSError(errno.EBUSY, "another program holds its folder") from None
                time.sleep(0.001)
        yield
    finally:
        os.close(folder)


def _is_dead(path: bytes) -> bool:
    """Whether a socket lies there that nobody has any more; raises OSError where anything else does."""
    if path.startswith(b"\0") or not os.path.lexists(path):
        return False
    if _inode(path) is None:
        raise OSError(errno.EEXIST, "there is something that is no socket")
    with _new() as probe:
        found = probe.connect_ex(path)
    if found in (errno.EACCES, errno.EPERM):
        raise OSError(found, os.strerror(found))
    if found != errno.ECONNREFUSED:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    return True
