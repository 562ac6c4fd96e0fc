"""What a transport is: it moves frames between named peers, and nothing else.

Laws
* A listener serves many peers, a dialer one; both send without waiting and receive without waiting.
* Messages of one connection arrive in order and whole, or not at all; none arrives twice.
* A transport knows no session, no version, no retry: those live in the cores.
* The peer's name is the transport's own and new for each connection; it is never identity.
* A payload sent with a hold must not change until `released()` names that hold.
* Queues are bounded. What does not fit is not sent, and `send` says so.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Protocol

from common.messages import Buffer

SERVER = b""
"""The peer's name on a dialer."""


class Endpoint(Protocol):
    """One end: a listener (many peers) or a dialer (one: `SERVER`)."""

    @property
    def address(self) -> str:
        """Where others reach (or this one reached) the listener; a wildcard port is resolved."""

    def fileno(self) -> int:
        """A descriptor that becomes readable when `receive` may have something (edge-triggered: receive until None)."""

    def send(self, peer: bytes, frames: Sequence[Buffer], hold: int = 0) -> str:
        """Queue one message; returns '' or why it could not be sent. With a `hold`, `released` will name it."""

    def receive(self) -> tuple[bytes, list[Buffer]] | None:
        """The next message, or None where none is waiting."""

    def released(self) -> list[int]:
        """Holds whose buffers are no longer read; each is named once."""

    def close(self) -> None:
        """Drop what is queued and close. A second call does nothing."""


class Sockets(Endpoint, Protocol):
    """An end that can be waited for, by descriptors."""

    @property
    def descriptors(self) -> list[int]:
        """Of which one becomes readable when a message, or a loss, may be there."""

    @property
    def overlooked(self) -> bool:
        """Whether there is anything to receive of which no descriptor may tell. It costs nothing where all is quiet."""

    @property
    def patience_s(self) -> float:
        """Seconds after which `receive` is to be asked, whatever the descriptors tell."""

    @property
    def holding(self) -> bool:
        """Whether any buffer is still being read."""

    def woken(self, descriptors: Container[int]) -> None:
        """Whoever waited for a dialer's `descriptors` found these readable."""

    def lost(self) -> bool:
        """Whether a dialer's connection broke since the last call; to be asked after `woken` and `receive`."""

    @property
    def monitors(self) -> list[int]:
        """Descriptors that become readable when `listen_to_monitor` is due, once that was called a first time."""

    def listen_to_monitor(self) -> None:
        """Take in which connections began, whether or not anybody will ever speak there."""
