"""One listener made of several: each address has a transport of its own, and whoever serves them sees one.

Names tell which transport a peer came by. With ZeroMQ a peer may choose its own, and one that chose another transport's
is not heard.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Container, Sequence

from common.messages import Buffer
from common.transports import unix
from common.transports.base import Sockets


class Several:
    """Listeners behind `common.transports.base.Sockets`: any of paths, and at most one other."""

    def __init__(self, listeners: Sequence[Sockets]) -> None:
        self._listeners = list(listeners)
        self._turns = deque(listeners)
        """Who is asked first goes last."""
        self._watched = select.epoll()
        for descriptor in self.descriptors:
            self._watched.register(descriptor, select.EPOLLIN)

    @property
    def address(self) -> str:
        return self._listeners[0].address

    @property
    def descriptors(self) -> list[int]:
        return [descriptor for one in self._listeners for descriptor in one.descriptors]

    @property
    def overlooked(self) -> bool:
        return any([one.overlooked for one in self._listeners])  # each is to be asked

    @property
    def patience_s(self) -> float:
        return min(one.patience_s for one in self._listeners)

    @property
    def holding(self) -> bool:
        return any(one.holding for one in self._listeners)

    def fileno(self) -> int:
        return self._watched.fileno()

    @property
    def monitors(self) -> list[int]:
        return [descriptor for one in self._listeners for descriptor in one.monitors]

    def listen_to_monitor(self) -> None:
        for one in self._listeners:
            one.listen_to_monitor()

    def send(self, peer: bytes, frames: Sequence[Buffer], hold: int = 0) -> str:
        refusal = "the peer is gone"
        for one in self._listeners:
            if self._is_of(peer, one) and not (refusal := one.send(peer, frames, hold)):
                break
        return refusal

    def receive(self) -> tuple[bytes, list[Buffer]] | None:
        for _ in self._listeners:
            self._turns.rotate()
            while (message := self._turns[0].receive()) is not None:
                if self._is_of(message[0], self._turns[0]):
                    return message
        return None

    @staticmethod
    def _is_of(peer: bytes, listener: Sockets) -> bool:
        return peer.startswith(unix.NAME) == isinstance(listener, unix.UnixListener)

    def released(self) -> list[int]:
        return [hold for one in self._listeners for hold in one.released()]

    def woken(self, descriptors: Container[int]) -> None:
        for one in self._listeners:
            one.woken(descriptors)

    def lost(self) -> bool:
        return any([one.lost() for one in self._listeners])

    def close(self) -> None:
        self._watched.close()
        for one in self._listeners:
            one.close()
