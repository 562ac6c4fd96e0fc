"""memory://: both ends in one process, for tests. Carries encoded frames, so that nothing skips the wire format."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from common.messages import Buffer
from common.transports.base import SERVER

QUEUE_MESSAGES = 4096
"""Messages waiting at one end at most."""


class MemoryEndpoint:
    """One end of any number of in-process connections."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._peers: dict[bytes, tuple[MemoryEndpoint, bytes]] = {}
        self._inbox: deque[tuple[bytes, list[Buffer]]] = deque()
        self._released: list[int] = []
        self._connections = 0

    @property
    def address(self) -> str:
        return self._address

    def fileno(self) -> int:
        """There is none: whoever drives both ends knows when something was sent."""
        return -1

    def connect(self) -> MemoryEndpoint:
        """A new dialer to this listener."""
        self._connections += 1
        name = b"memory-%d" % self._connections
        dialer = MemoryEndpoint(self._address)
        dialer._peers[SERVER] = (self, name)
        self._peers[name] = (dialer, SERVER)
        return dialer

    def send(self, peer: bytes, frames: Sequence[Buffer], hold: int = 0) -> str:
        if peer not in self._peers:
            return "the peer is gone"
        other, name = self._peers[peer]
        if len(other._inbox) >= QUEUE_MESSAGES:
            return "the peer does not read"
        other._inbox.append((name, [bytes(frame) for frame in frames]))
        if hold:
            self._released.append(hold)
        return ""

    def receive(self) -> tuple[bytes, list[Buffer]] | None:
        return self._inbox.popleft() if self._inbox else None

    def released(self) -> list[int]:
        done, self._released = self._released, []
        return done

    def close(self) -> None:
        for other, name in self._peers.values():
            other._peers.pop(name, None)
        self._peers.clear()
        self._inbox.clear()
