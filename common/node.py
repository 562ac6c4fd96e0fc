"""The sans-IO contract: events and the time go in, actions come out.

    actions = node.handle(event, now)

Laws
* `handle` is the one door for change. It never waits, reads no clock, draws no random number, touches no socket.
* What takes time (a kernel, a checkpoint, a send) is an action that the shell carries out; its outcome, success or
  failure, comes back as an event. So the daemon, the simulator and a test drive the very same cores.
* Time is monotonic seconds; only differences mean anything. `deadline()` says when a Tick is wanted next.
* `validate()` raises AssertionError when an invariant is broken; tests call it after every event.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, Protocol

from common.messages import Buffer
from common.values import dataclass

# Events: what happened


@dataclass(frozen=True, slots=True)
class Received:
    """A message arrived. `peer`: the transport's name for the connection, never identity."""

    peer: bytes
    frames: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Tick:
    """The deadline has come (or time has passed)."""


@dataclass(frozen=True, slots=True)
class Unsendable:
    """A message could not be sent: the peer is gone, or does not read."""

    peer: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Released:
    """The transport no longer reads these: a hold for each message that was sent under one."""

    holds: Sequence[int]


@dataclass(frozen=True, slots=True)
class JobDone:
    """A job ran to its end. `results`: what each part returned, in order of the parts."""

    job: int
    results: Sequence[Any]


# Actions: what shall be done


@dataclass(frozen=True, slots=True)
class Send:
    """Send frames to a peer. A `hold` other than 0 asks for Released once the payload is no longer read."""

    peer: bytes
    frames: Sequence[Buffer]
    hold: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """Run `work(first, last, scratch)` over the parts [0, parts), in ranges, in any order, on any threads.

    `scratch` is a float32 block that belongs to the thread. A job of at most `SMALL_ELEMENTS` runs at once.
    """

    job: int
    parts: int
    elements: int
    work: Callable[[int, int, Any], Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Record:
    """One line for the run log: `kind` and plain values."""

    kind: str
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Say:
    """One line for the person who watches."""

    level: str
    sentence: str


SMALL_ELEMENTS = 512 * 1024
"""Up to this size it costs more than the kernels to have threads take turns at it (docs/log.md)."""


class Node(Protocol):
    """A core: server or worker."""

    def handle(self, event: Any, now: float) -> list[Any]:
        """Take in one event at time `now` (monotonic seconds); return what shall be done."""

    def deadline(self) -> float | None:
        """When a Tick is wanted, monotonic seconds, or None."""

    def validate(self) -> None:
        """Raise AssertionError when an invariant is broken."""
