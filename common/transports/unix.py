"""ipc:// by Unix sockets of our own: whoever needs a message takes it from the system, with no thread in between.

Laws
* A peer keeps the laws of `common.transports.streams`, and a path those of `common.transports.paths`.
* Who breaks them is cut off, and nobody else notices. So is who says nothing after it has called, or reads nothing of
  what waits for it, for too long.

Left out: encryption, for the system says who may open a path.

ZeroMQ has threads of its own, on both sides, that have to be woken for a message and share no cache with those that
work on it: on a machine whose cores are all busy that is a fifth of an exchange (docs/log.md).
"""

from __future__ import annotations

import errno
import itertools
import math
import select
import time
from collections import deque
from collections.abc import Container, Sequence

from common.buffers import keep_freed_memory
from common.errors import NetworkError
from common.messages import Buffer
from common.transports.base import SERVER
from common.transports.paths import Claim, encoded, stream_socket
from common.transports.streams import QUEUED_MESSAGES, Stream
from common.wire import PAYLOAD_BYTES

ACCEPTED_AT_ONCE = 64
CALL_S = 0.1
"""Where nobody listens yet, it is called this often."""
FIRST_MESSAGE_S, STALLED_S = 10.0, 60.0
"""Who has called and said nothing, or takes nothing of what waits, is given up after so long."""
DEAF_S = 0.1
"""Where no connection can be taken, because this process has too many descriptors, nobody is asked for so long."""
NAME = b"\0unix "
"""So peers' names begin."""
_numbers = itertools.count(1)
Message = tuple[bytes, list[Buffer]]


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

    def __init__(self, claim: Claim, address: str) -> None:
        super().__init__(address)
        self._claim = claim
        self._socket = claim.socket
        self._watched.register(self._socket.fileno(), select.EPOLLIN)
        self._streams: dict[bytes, Stream] = {}
        self._by_descriptor: dict[int, Stream] = {}
        self._readable: deque[Stream] = deque()
        """Those of which something may be there, in turn."""
        self._mute: deque[Stream] = deque()
        """Those who called, in order; who has said something since leaves it when its turn comes."""
        self._sending: set[Stream] = set()
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
            self._watched.register(self._socket.fileno(), select.EPOLLIN)
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
                stream = Stream(NAME + b"%d" % next(_numbers), caller, self._watched)
            except (BlockingIOError, ConnectionError):
                return
            except OSError:
                self._watched.unregister(self._socket.fileno())
                self._deaf_until = time.monotonic() + DEAF_S
                return
            self._streams[stream.name] = self._by_descriptor[stream.fileno()] = stream
            self._mute.append(stream)

    def _flush(self, stream: Stream) -> None:
        self._released += stream.flush()
        if not stream.queued:
            self._sending.discard(stream)

    def _drop(self, stream: Stream) -> None:
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
        self._claim.close()


class UnixDialer(_End):
    """A connection to a path, or calls there until there is one."""

    def __init__(self, path: bytes, address: str) -> None:
        super().__init__(address)
        self._path = path
        self._stream: Stream | None = None
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
        self._called, connecting = time.monotonic(), stream_socket()
        try:
            connecting.connect(self._path)
        except OSError:  # silence tells that nobody is there
            connecting.close()
            return
        self._stream = Stream(SERVER, connecting, self._watched)
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

    def _send(self, stream: Stream, frames: Sequence[Buffer], hold: int) -> str:
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
    try:
        return UnixDialer(encoded(address), address)
    except OSError as error:
        raise NetworkError(f"'{address}' is no address to dial: {error.strerror}.", fix="Check the path.") from None


def listen(address: str) -> UnixListener:
    """Bound to ipc://PATH, or ipc://@NAME for one without a file; raises NetworkError."""
    keep_freed_memory(PAYLOAD_BYTES)
    try:
        return UnixListener(Claim(encoded(address)), address)
    except OSError as error:
        raise _cannot_listen(address, error) from None


def _cannot_listen(address: str, error: OSError) -> NetworkError:
    if error.errno == errno.EADDRINUSE:
        return NetworkError(
            f"Cannot listen on {address}: something else already does.", fix="Stop it, or choose another path."
        )
    return NetworkError(f"Cannot listen on {address}: {error.strerror or error}.", fix="Check the path.")
