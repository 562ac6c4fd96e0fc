"""What arrived at a server, as bytes: every event that entered its core, so that its life can be lived again. Pure.

    file      MAGIC  record ...       one file for each life of the server: arrivals-EPOCH.log
    record    head  body  payload     body: a msgpack list, its kind first;  payload: frames as they came
    head      body bytes (u32)  payload bytes (u32)  xxh3 of both (u64)  xxh32 of these 16 bytes (u32), little-endian

    kinds     begin, then an arrival for each event, then end or stopped

Laws
* The core is a function of its events, their times and the tokens it draws: all three are in an arrival, to the last
  bit. So is a hash of what left the core, by which another life notices where it goes apart.
* A record is whole or it is not there: a file that was cut off ends with `Torn`, and what is before it stands. Anything
  else that is not as it was written raises StateError, which names the place.
* What was computed is not recorded: a job is run again when it is done.

Left out: getting these bytes to a disk (`paramserver.recorder`), and living a life again (`deploy.arrivals`).
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, TypeAlias, cast

import msgpack
import xxhash

from common.errors import StateError
from common.messages import Buffer, Version
from common.node import JobDone, Received, Released, Run, Send, Tick, Unsendable
from paramserver.core import Exit, Save, Saved, SaveFailed, ServerCore, Stop

MAGIC = b"arrivals 2\n"
SAMPLE_BYTES = 4096
"""Of each payload with encoded arrays that leaves the core, so much is hashed: to hash all would cost too much."""
RANGES_LIMIT = 4096
_LENGTHS, _CHECK = struct.Struct("<IIQ"), struct.Struct("<I")
HEAD_BYTES = _LENGTHS.size + _CHECK.size
_NAME = re.compile(r"arrivals-([0-9]+)\.log")
_MALFORMED = (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError)
"""What unpacking raises when the content makes no sense; msgpack's own errors are ValueErrors."""


class Begin(NamedTuple):
    """The first record: what this life of the server was made of."""

    library: str
    epoch: int
    settings: dict[str, Any]
    """ServerSettings as plain values."""
    recovered: Version | None
    """The checkpoint it goes on from; None where there was none."""
    fingerprint: str
    """Of that checkpoint, as `paramserver.checkpoint` makes it."""


@dataclass(frozen=True, slots=True)
class Started:
    """Event: `core.start`, before all others."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One event. Of a JobDone only the number of results is kept."""

    event: Any
    now: float
    """Monotonic seconds, as the core was told."""
    tokens: tuple[str, ...] = ()
    """Session tokens drawn meanwhile."""
    left: int = 0
    """What left the core, as `left_of` makes it."""
    raised: str = ""
    """Name of the exception that came out of the core instead: a defect, and the last event of a life."""


class End(NamedTuple):
    """The last record of an orderly end. sha256: `common.layout.center_sha256`; "" where there never was a model."""

    version: Version
    sha256: str


class Stopped(NamedTuple):
    """The last record where recording ended before the server did, or the server failed: why."""

    sentence: str


class Torn(NamedTuple):
    """No record: so many bytes at the end of a file are the beginning of one that was never completed."""

    bytes: int


Record: TypeAlias = Begin | Arrival | End | Stopped
Packed: TypeAlias = tuple[bytes, Sequence[Buffer]]
"""A body, and the buffers of its payload."""


def name_of(epoch: int) -> str:
    """The file of one life."""
    return f"arrivals-{epoch}.log"


def epoch_of(name: str) -> int | None:
    """The life that a file is of; None where it is no such file."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def left_of(actions: Sequence[Any]) -> int:
    """A hash of what left the core: messages (headers, and the first bytes of encoded arrays), jobs, checkpoints.

    0 where nothing did.
    """
    parts: list[Buffer] = []
    for action in actions:
        match action:
            case Send(peer, frames, hold):
                parts += (peer, frames[0])
                if hold and len(frames) > 1:
                    parts.append(frames[1][:SAMPLE_BYTES])
            case Run(job, count, elements):
                parts.append(b"run %d %d %d" % (job, count, elements))
            case Save(version):
                parts.append(b"save %d %d" % version)
            case Exit():
                parts.append(b"exit")
    return xxhash.xxh3_64_intdigest(b"".join(parts)) if parts else 0


def enter(core: ServerCore, event: Any, now: float) -> list[Any]:
    """One event into a core; what shall be done."""
    return core.start(now) if isinstance(event, Started) else core.handle(event, now)


# To bytes


def pack(record: Record) -> Packed:
    """Body and payload of a record."""
    match record:
        case Arrival(event, now, tokens, left, raised):
            kind, fields, payload = _plain(event)
            return _body([kind, now, list(tokens), left, raised, *fields]), payload
        case Begin():
            return _body(["begin", {**record._asdict(), "recovered": record.recovered and list(record.recovered)}]), ()
        case End(version, sha256):
            return _body(["end", list(version), sha256]), ()
        case Stopped(sentence):
            return _body(["stopped", sentence]), ()


def head(packed: Packed) -> bytes:
    """What stands before body and payload in the file."""
    body, payload = packed
    hasher = xxhash.xxh3_64(body)
    for buffer in payload:
        hasher.update(buffer)
    lengths = _LENGTHS.pack(len(body), sum(len(buffer) for buffer in payload), hasher.intdigest())
    return lengths + _CHECK.pack(xxhash.xxh32_intdigest(lengths))


def size_of(packed: Packed) -> int:
    """Bytes of a record in the file."""
    return HEAD_BYTES + len(packed[0]) + sum(len(buffer) for buffer in packed[1])


def _body(values: list[Any]) -> bytes:
    return cast(bytes, msgpack.packb(values, unicode_errors="surrogatepass"))


def _plain(event: Any) -> tuple[str, list[Any], Sequence[Buffer]]:
    match event:
        case Received(peer, frames):
            return "received", [peer, [len(frame) for frame in frames]], frames
        case JobDone(job, results):
            return "job", [job, len(results)], ()
        case Released(holds):
            return "released", list(holds), ()
        case Tick():
            return "tick", [], ()
        case Unsendable(peer, reason):
            return "unsendable", [peer, reason], ()
        case Saved(version, seconds):
            return "saved", [list(version), seconds], ()
        case SaveFailed(sentence):
            return "save_failed", [sentence], ()
        case Stop(reason):
            return "stop", [reason], ()
        case Started():
            return "start", [], ()
    raise TypeError(f"{type(event).__name__} has no form in a log of arrivals")


# From bytes


def read(stream: BinaryIO, name: str) -> Iterator[Record | Torn]:
    """Every record of a file in order, and `Torn` where it was cut off; raises StateError, which says `name`."""
    left = stream.seek(0, 2)
    stream.seek(0)
    magic = stream.read(len(MAGIC))
    if not MAGIC.startswith(magic):
        fix = "Replay it with the version of paramserver that wrote it."
        raise StateError(f"{name} is no log of arrivals that this version reads.", fix=fix)
    if len(magic) < len(MAGIC):
        yield Torn(len(magic))
        return
    at, left = len(MAGIC), left - len(MAGIC)
    for number in itertools.count(1):
        if not left:
            return
        try:
            found = _next(stream, left)
            record = None if found is None else unpack(*found)
        except _MALFORMED as error:
            sentence = f"{name} is corrupt: record {number}, at byte {at:,}: {error}."
            raise StateError(sentence, fix="Restore it; what is before that record cannot prove the rest.") from error
        if found is None or record is None:
            yield Torn(left)
            return
        yield record
        size = HEAD_BYTES + sum(map(len, found))
        at, left = at + size, left - size


def unpack(body: bytes, payload: bytes) -> Record:
    """The inverse of `pack`; raises ValueError, TypeError and the like where they make no sense."""
    kind, *values = msgpack.unpackb(body, unicode_errors="surrogatepass")
    match kind:
        case "begin":
            begin = Begin(**values[0])
            return begin._replace(recovered=begin.recovered and Version(*begin.recovered))
        case "end":
            return End(Version(*values[0]), values[1])
        case "stopped":
            return Stopped(values[0])
    now, tokens, left, raised, *fields = values
    return Arrival(_EVENTS[kind](payload, *fields), now, tuple(tokens), left, raised)


def _next(stream: BinaryIO, left: int) -> tuple[bytes, bytes] | None:
    """Body and payload of the next record of `left` bytes, or None where it is torn; raises ValueError."""
    taken = stream.read(HEAD_BYTES)
    if len(taken) < HEAD_BYTES:
        return None
    lengths, check = taken[: _LENGTHS.size], taken[_LENGTHS.size :]
    if _CHECK.pack(xxhash.xxh32_intdigest(lengths)) != check:
        if not any(taken) and not any(stream.read()):  # after a power cut a file may end in zeros
            return None
        raise ValueError("its head does not match its check")
    body_bytes, payload_bytes, expected = _LENGTHS.unpack(lengths)
    if HEAD_BYTES + body_bytes + payload_bytes > left:
        return None
    body, payload = stream.read(body_bytes), stream.read(payload_bytes)
    hasher = xxhash.xxh3_64(body)
    hasher.update(payload)
    if hasher.intdigest() != expected:
        raise ValueError("it does not match its hash")
    return body, payload


def _received(payload: bytes, peer: bytes, lengths: Sequence[int]) -> Received:
    if sum(lengths) != len(payload):
        raise ValueError("its frames are not as long as they say")
    ends = list(itertools.accumulate(lengths, initial=0))
    return Received(peer, [payload[first:last] for first, last in itertools.pairwise(ends)])


def _job_done(payload: bytes, job: int, results: int) -> JobDone:
    if not 1 <= results <= RANGES_LIMIT:
        raise ValueError(f"a job in {results} ranges")
    return JobDone(job, [None] * results)


_EVENTS: dict[str, Callable[..., Any]] = {
    "received": _received,
    "job": _job_done,
    "released": lambda payload, *holds: Released(holds),
    "tick": lambda payload: Tick(),
    "unsendable": lambda payload, peer, reason: Unsendable(peer, reason),
    "saved": lambda payload, version, seconds: Saved(Version(*version), seconds),
    "save_failed": lambda payload, sentence: SaveFailed(sentence),
    "stop": lambda payload, reason: Stop(reason),
    "start": lambda payload: Started(),
}
"""By the kind of a record, the event it is of."""
