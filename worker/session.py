"""What a worker knows of its own session: who it is, what goes up, what comes down. Pure; mirror of the server's.

Laws
* Numbers of pushes grow by one and are never used twice within a session; gaps are allowed.
* The bytes of a push do not change until it is settled: a retry sends the very same.
* At most one push is under way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from common.chunks import Plan
from common.codecs.base import F32, U8
from common.messages import NOWHERE, Reply, Resume, Scalars, Version, Welcome


@dataclass(slots=True)
class Upload:
    """A push (or the initial weights) on its way up. data: (plan.bytes,) uint8."""

    kind: Literal["init", "push"]
    number: int
    data: U8
    plan: Plan
    scalars: Scalars
    base: Version
    fragment: int
    ready: int
    """Chunks that are encoded."""
    sent: int = 0
    """Chunks handed to the transport on this connection."""
    until: int = 0
    """Chunks below this index may be sent."""
    committed: bool = False
    whole: bool = False
    """Whether it travels in one message on this connection."""
    tried: bool = False
    """Whether anything of it was ever sent: if not, nobody can have applied it."""
    shared: bool = False
    """Whether it lies in memory that the server reads."""
    rewound: bool = False
    """Whether it began on an earlier connection."""
    answered_s: float | None = None
    """When the server first said what becomes of it; None where that tells nothing of how long it took."""

    def rewind(self) -> None:
        """A new connection: everything is sent again."""
        self.sent = self.until = 0
        self.committed = self.whole = False
        self.rewound, self.answered_s = True, None

    def answered(self, now: float) -> None:
        """The server says what becomes of it."""
        if self.answered_s is None and not self.rewound:
            self.answered_s = now


@dataclass(slots=True)
class Download:
    """A reply on its way down, in the order of its chunks or not; each is decoded into its place as it arrives.

    values: (elements,) float32, complete with the last chunk. replica: what it is added to as it arrives, where it is
    a difference.
    """

    reply: Reply
    purpose: Literal["push", "anchor", "evaluate", "order"]
    number: int
    plan: Plan
    source: str
    values: F32
    received: bytearray
    replica: F32 | None = None
    until: int = 0

    @property
    def complete(self) -> bool:
        return 0 not in self.received


@dataclass(slots=True)
class Membership:
    """This worker as the server welcomed it."""

    token: str = ""
    connection: int = 0
    worker: str = ""
    welcome: Welcome | None = None
    last_number: int = 0
    last_applied: int = 0
    merged: int = 0
    """Last reply merged."""
    anchored: bool = False
    """Whether the server knows what center this worker goes on from."""
    trained: bool = False
    """Whether it ever was given a center: from then on it has something to lose."""
    known: Version = field(default=NOWHERE)
    """Highest version heard of."""

    def __repr__(self) -> str:
        return f"<Membership {self.worker or 'nobody'}, connection {self.connection}, last number {self.last_number}>"

    def resume(self) -> Resume | None:
        """What to remind the server of; None before there is anything."""
        if not self.trained:
            return None
        return Resume(self.token, self.last_number, self.last_applied, self.merged)
