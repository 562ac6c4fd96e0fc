"""The protocol's messages, as values. `common.wire` turns them into frames and back; docs/protocol.md explains them.

Laws
* Every message after Welcome carries the session token and the connection number it belongs to.
* A version is always the pair (epoch, version); it only grows.
* A transfer that fits one chunk is one message each way (`Push` up, the payload of `Ack` or `Offer` down).
* Windows are absolute (`until`: chunks with a smaller index may be sent), so repeating one changes nothing.
* Tensor bytes are only ever in `payload`, the second frame, never in the header. Between two processes that share
  memory the payload is a view of it, and may be a whole reply.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal, NamedTuple, TypeAlias

from common.values import dataclass

PROTOCOL = 5
"""Version of this protocol. A peer with another is refused with a sentence, before anything else is read."""

Buffer: TypeAlias = bytes | bytearray | memoryview
Scalar: TypeAlias = bool | int | float | str


class Version(NamedTuple):
    """A state of the center. `epoch`: life of the server, durable; `version`: changes of the center so far."""

    epoch: int
    version: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.version}"


NOWHERE = Version(0, 0)
"""Before the first center: epochs start at 1."""


@dataclass(frozen=True, slots=True)
class Resume:
    """What a worker remembers of its session when it says Hello again."""

    session: str
    last_sent: int
    last_applied: int
    """Highest number this worker was told is applied."""
    merged: int


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What the rule may know of a worker's inner optimizer."""

    name: str
    lr: float
    momentum: float
    groups: int
    nesterov: bool
    dampening: float


@dataclass(frozen=True, slots=True)
class Hello:
    """First word of a connection. `payload`: the layout (`Layout.describe`), so that a mismatch can be named."""

    library: str
    instance: str
    """Drawn when the worker starts: tells a repeated Hello from a second worker of the same name."""
    role: Literal["worker", "observer"]
    """An observer pulls the center to evaluate it; it never pushes and is no member."""
    worker: str
    fingerprint: str
    elements: int
    codecs: tuple[str, ...]
    host: str
    """Machine it runs on: groups may be one per host."""
    group: int | None = None
    """The group it wants to be in, under a rule that has groups; None leaves it to the server."""
    optimizer: Optimizer | None = None
    resume: Resume | None = None
    payload: Buffer = b""


@dataclass(frozen=True, slots=True)
class Welcome:
    """The server's answer to Hello; sent again when `init` changes."""

    session: str
    connection: int
    worker: str
    """The name this worker goes by: its own, or with a suffix where a live worker already has it."""
    version: Version
    settings: dict[str, Scalar]
    rule_settings: dict[str, Scalar]
    init: Literal["send", "wait", "have"]
    """Initial weights: send yours; wait for another's; the server has them."""
    resumed: Literal["new", "live", "record"]
    """`live`: the session goes on. `record`: its numbers are known, what the rule kept of it is not: re-anchor."""
    last_decided: int
    outcome: Outcome
    lost: tuple[int, ...]
    """(first, last) of this worker's applied updates that a crash of the server lost; empty if none."""


@dataclass(frozen=True, slots=True)
class Diversity:
    """What a worker measured of its gradients since it last told: means over `measurements` pairs of half batches."""

    gradient: float
    """Estimate of |G|^2, G the mean gradient; may be negative."""
    noise: float
    """Estimate of tr(Sigma), Sigma the covariance of one sample's gradient."""
    measurements: int


@dataclass(frozen=True, slots=True)
class Scalars:
    """What rides on a push beside the tensor."""

    loss: float
    """Mean training loss since the last push."""
    samples: int
    steps: int
    """Optimizer steps since the last push (H)."""
    lr: float
    diversity: Diversity | None = None
    """None: nothing was measured since the last push."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where another process of the same machine finds memory (`common.shared`)."""

    process: int
    descriptor: int
    bytes: int
    mark: str
    """Hexadecimal: what the memory bears, so that it is known for sure."""


@dataclass(frozen=True, slots=True)
class Share:
    """My updates lie in this memory; Shared answers. Until it does, bytes travel in messages."""

    session: str
    connection: int
    place: Place


@dataclass(frozen=True, slots=True)
class Shared:
    """Yours is mapped, and replies to your pushes lie in mine from now on. None: they travel in messages, because of
    the sentence."""

    session: str
    connection: int
    place: Place | None
    sentence: str


@dataclass(frozen=True, slots=True)
class Begin:
    """Asks to transfer `bytes` of an update (or of the initial weights); Grant answers."""

    session: str
    connection: int
    kind: Literal["init", "push"]
    number: int
    fragment: int
    """The part of the vector that is pushed, under a rule that cuts it; else 0."""
    codec: str
    bytes: int
    base: Version
    """The version the worker started from."""
    merged: int
    """Last reply merged (0: none)."""


@dataclass(frozen=True, slots=True)
class Push:
    """A whole transfer that fits one chunk: Begin, payload and Commit in one message."""

    begin: Begin
    scalars: Scalars
    payload: Buffer = b""


@dataclass(frozen=True, slots=True)
class Grant:
    """Go ahead (`until` chunks), wait for a transfer slot, or no."""

    session: str
    connection: int
    number: int
    decision: Literal["go", "wait", "refuse"]
    until: int
    code: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of a transfer. `transfer`: the number of the push going up, the id of the reply coming down."""

    session: str
    connection: int
    transfer: int
    index: int
    payload: Buffer = b""


@dataclass(frozen=True, slots=True)
class Commit:
    """All chunks are sent; apply the update."""

    session: str
    connection: int
    number: int
    scalars: Scalars


Outcome: TypeAlias = Literal["none", "applied", "held", "rejected"]


@dataclass(frozen=True, slots=True)
class Reply:
    """What comes down: `bytes` in `codec`, the center at `version`."""

    id: int
    bytes: int
    codec: str
    version: Version


@dataclass(frozen=True, slots=True)
class Ack:
    """What became of push `number`. The payload is the reply where it fits one chunk, else More fetches it."""

    session: str
    connection: int
    number: int
    outcome: Outcome
    code: str
    sentence: str
    version: Version
    durable: Version
    """What is at or below this survives kill -9 and power loss of the server."""
    weight: float
    finished: bool
    local_steps: int
    """H from now on, before the rule's own schedule."""
    reply: Reply | None = None
    payload: Buffer = b""


@dataclass(frozen=True, slots=True)
class More:
    """The receiver of chunks allows those with an index below `until`."""

    session: str
    connection: int
    transfer: int
    until: int


Purpose: TypeAlias = Literal["anchor", "evaluate", "order"]


@dataclass(frozen=True, slots=True)
class Pull:
    """Asks for the center. `anchor`: the worker goes on from it; `evaluate`: it only looks; `order`: it was told to
    pull from the rule's `source`, such as a leader."""

    session: str
    connection: int
    purpose: Purpose
    source: str
    minimum: Version
    merged: int


@dataclass(frozen=True, slots=True)
class Offer:
    """Answer to Pull. The payload is the center where it fits one chunk, else More fetches it."""

    session: str
    connection: int
    purpose: Purpose
    source: str
    reply: Reply
    finished: bool
    payload: Buffer = b""


@dataclass(frozen=True, slots=True)
class Report:
    """Under a rule that schedules: so many optimizer steps and samples are done in all, the last step with this loss;
    `orders`: the last order that was carried out. Said after every step, and again on a new connection."""

    session: str
    connection: int
    steps: int
    samples: int
    loss: float
    orders: int
    diversity: Diversity | None = None
    """Of the last step; None: it was not measured."""


@dataclass(frozen=True, slots=True)
class Order:
    """Under a rule that schedules: upload the parameters, pull from these sources in this order, then train until so
    many steps are done in all. `id` grows; the latest order counts."""

    session: str
    connection: int
    id: int
    upload: bool
    pull: tuple[str, ...]
    until: int
    sentence: str


@dataclass(frozen=True, slots=True)
class Beat:
    """I am here. `steps`: optimizer steps so far (progress, which a beat alone is not). The server echoes it."""

    session: str
    connection: int
    steps: int


@dataclass(frozen=True, slots=True)
class Bye:
    """The session is over, on purpose."""

    session: str
    connection: int
    reason: str


@dataclass(frozen=True, slots=True)
class Fault:
    """Something was refused: the stable code, what happened, what to do. `number`: the push it concerns, or 0."""

    session: str
    connection: int
    code: str
    sentence: str
    fix: str
    number: int


@dataclass(frozen=True, slots=True)
class Query:
    """Asks what is going on; needs no session."""

    what: Literal["status"] = "status"


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer to Query; `payload` is JSON."""

    what: Literal["status"] = "status"
    payload: Buffer = field(default=b"")


Message: TypeAlias = (
    Hello
    | Welcome
    | Share
    | Shared
    | Begin
    | Push
    | Grant
    | Chunk
    | Commit
    | Ack
    | More
    | Pull
    | Offer
    | Report
    | Order
    | Beat
    | Bye
    | Fault
    | Query
    | Answer
)
