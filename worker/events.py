"""What is said to the worker's core and by it: events in, actions out, and news for the trainer. Plain values.

actions = core.handle(event, now)        Deliver(news) is one of them
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from common.codecs.base import F32, U8
from common.errors import PeerError
from common.messages import Diversity, Order, Place, Purpose, Scalars, Version, Welcome
from common.values import dataclass

# Events: what the trainer and the driver say


@dataclass(frozen=True, slots=True)
class Dialled:
    """A fresh connection is open."""


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The transport saw the connection break."""


@dataclass(frozen=True, slots=True)
class InitialWeights:
    """Answer to NeedWeights. data: all of the vector in the lossless codec."""

    data: U8


@dataclass(frozen=True, slots=True)
class PushWanted:
    """Push this update; the bytes stay as they are until it is settled. data: (plan.bytes,), encoded in `codec`.

    ready: so many chunks are encoded; Encoded tells of the others, while these are on their way.
    spare: (elements,) a vector that the trainer needs no longer: the next reply may land in it.
    """

    data: U8
    codec: str
    scalars: Scalars
    base: Version
    ready: int
    spare: F32 | None = None
    fragment: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """The first `ready` chunks of the push are encoded."""

    ready: int


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The push turned out not to be encodable: forget it; its number stays undecided."""


@dataclass(frozen=True, slots=True)
class PullWanted:
    """Get the center, to look at it or to go on from it; or what an order said to pull."""

    purpose: Purpose
    source: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """Optimizer steps and samples so far, the last step with this loss; `obeyed`: the last order is carried out.
    diversity: what was measured in the last step, where steps are reported."""

    steps: int
    samples: int = 0
    loss: float = 0.0
    obeyed: bool = False
    diversity: Diversity | None = None


@dataclass(frozen=True, slots=True)
class Staged:
    """The bytes of every push lie here, where the server can read them if it runs on this machine."""

    place: Place


@dataclass(frozen=True, slots=True)
class CannotAttach:
    """What the server offers cannot be mapped: share nothing from now on."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Say Bye."""

    reason: str


# Actions: what the driver shall do


@dataclass(frozen=True, slots=True)
class Redial:
    """Close the connection, dropping what is queued, and open a fresh one."""


@dataclass(frozen=True, slots=True)
class Attach:
    """The server reads this worker's memory; map what it offers, before any other message is taken."""

    place: Place


@dataclass(frozen=True, slots=True)
class Deliver:
    """News for the trainer."""

    news: Any


# News


@dataclass(frozen=True, slots=True)
class Joined:
    """The server took this worker in, with these settings."""

    welcome: Welcome


@dataclass(frozen=True, slots=True)
class NeedWeights:
    """This worker's weights become the first center: answer with InitialWeights."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of push `number`. values: (elements,) the reply, the trainer's to keep. `base`: its version.
    answered_s: when the server first said what becomes of it, as `handle` was told the time; None where it was begun
    on an earlier connection, or was not taken. `shared`: it lay in memory that the server reads."""

    number: int
    outcome: str
    code: str
    sentence: str
    base: Version
    local_steps: int
    values: F32 | None = field(repr=False)
    answered_s: float | None = None
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Orphaned:
    """The session that push `number` belonged to is gone. `pushed`: take it as pushed (else it is taken back)."""

    number: int
    pushed: bool


@dataclass(frozen=True, slots=True)
class Fetched:
    """The center, or `source`, at version `base`. values: (elements,), the trainer's to keep."""

    purpose: str
    source: str
    base: Version
    values: F32 = field(repr=False)


@dataclass(frozen=True, slots=True)
class Ordered:
    """What the server says is next, under a rule that schedules."""

    order: Order


@dataclass(frozen=True, slots=True)
class Undone:
    """Pushes `first` to `last` were applied, and a crash of the server undid them."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Away:
    """The server does not answer; train on."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Back:
    """The server answers again."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Training is over."""


@dataclass(frozen=True, slots=True)
class Left:
    """Bye was said, and heard or not."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The server refused this worker for good."""

    error: PeerError
