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

from collections.abc import Sequence
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
