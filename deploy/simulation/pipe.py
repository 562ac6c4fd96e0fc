"""What a simulated worker's process and the cluster say to each other, and the pipe that they say it through.

    pipe.send(Said(posts, wish, used_s)); pipe.receive()

Laws
* Vectors lie in memory that both see, and are valid until the one who put them there sends others.
* What is said is taken as Python objects: it comes from this program, over a pipe that nobody else can reach.
* A file in memory that one reads never shrinks under it; whoever makes it sees to that.

Left out: who says what, and when (`deploy.simulation.remote`, `deploy.simulation.workers`).
"""

from __future__ import annotations

import copyreg
import mmap
import os
import pickle
import socket
import struct
from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, NamedTuple

from common.config import WorkerSettings
from common.errors import ParamserverError
from common.messages import Scalars
from worker import events
from worker.core import WorkerCore
from worker.loop import WorkerReport

PACKET_BYTES = 1 << 16
"""The longest message that goes through the pipe itself."""
SIZE = struct.Struct("<q")
ALIGNED_BYTES = 64


class Life(NamedTuple):
    """What a worker's process is told first: who it is. `number` and `life`: which worker, and which of its lives."""

    settings: WorkerSettings
    number: int
    life: int


# Wishes: what a process waits for


class Carry(NamedTuple):
    """To be carried: this core, which nothing has happened to, to be driven."""

    core: WorkerCore


class Wait(NamedTuple):
    """News, for at most so long; None: for ever."""

    timeout_s: float | None


class Compute(NamedTuple):
    """A free core, for so many optimizer steps."""

    steps: int


class Computed(NamedTuple):
    """That the time of what was computed has passed."""


class Close(NamedTuple):
    """That nothing is carried any more."""

    timeout_s: float


class End(NamedTuple):
    """Nothing more: it is over."""

    report: WorkerReport | None
    error: ParamserverError | None


class Said(NamedTuple):
    """From a worker's process. posts: events for its core, in order; used_s: CPU time that it used so far."""

    posts: tuple[Any, ...]
    wish: Carry | Wait | Compute | Computed | Close | End
    used_s: float


class Go(NamedTuple):
    """To a worker's process: compute."""


class Told(NamedTuple):
    """To a worker's process: the time, all news, and of its core and its membership what changed."""

    now_s: float
    news: tuple[Any, ...] = ()
    phase: str = "greeting"
    membership: dict[str, Any] | None = None


class Pipe:
    """One end. `out`, `into`: files in memory, one for the vectors of each direction; each has one who writes.

    A message is one packet: how many vectors, their sizes, the message itself; a long one lies with the vectors.
    """

    def __init__(self, line: socket.socket, out: int, into: int) -> None:
        self._line = line
        self._out, self._into = _Shelf(out), _Shelf(into)
        self._packet = bytearray(PACKET_BYTES)

    def fileno(self) -> int:
        """To wait for."""
        return self._line.fileno()

    def send(self, message: Any) -> None:
        """Say it; raises OSError where nobody is there."""
        buffers: list[pickle.PickleBuffer] = []
        body = pickle.dumps(message, 5, buffer_callback=buffers.append)
        vectors = [buffer.raw() for buffer in buffers]
        if len(body) > PACKET_BYTES - SIZE.size * (len(vectors) + 2):
            vectors, body = [memoryview(body), *vectors], b""
        if vectors:
            self._out.put(vectors)
        sizes = [len(vectors), *(vector.nbytes for vector in vectors)]
        self._line.send(b"".join([*map(SIZE.pack, sizes), body]))

    def receive(self) -> Any:
        """What was said; its vectors are not to be written to. Raises EOFError where nobody is there."""
        if not (end := self._line.recv_into(self._packet)):
            raise EOFError
        packet = memoryview(self._packet)[:end]
        count = SIZE.unpack_from(packet)[0]
        first = SIZE.size * (1 + count)
        vectors = self._into.see([SIZE.unpack_from(packet, SIZE.size * (1 + n))[0] for n in range(count)])
        body = packet[first:] if first < end else vectors.pop(0)
        return pickle.loads(body, buffers=vectors)

    def close(self) -> None:
        """Nothing more will be said; vectors that were seen stay."""
        self._line.close()
        self._out.close()
        self._into.close()


class _Shelf:
    """A file in memory with the vectors of the last message that had any, each where a cache line begins."""

    def __init__(self, descriptor: int) -> None:
        self._file = descriptor
        self._memory = memoryview(b"")

    def put(self, vectors: Sequence[memoryview]) -> None:
        """Copies, one after the other."""
        places, end = _places([vector.nbytes for vector in vectors])
        if end > self._memory.nbytes:
            os.ftruncate(self._file, end)
            self._map(mmap.PROT_READ | mmap.PROT_WRITE)
        for place, vector in zip(places, vectors, strict=True):
            self._memory[place] = vector.cast("B")

    def see(self, sizes: Sequence[int]) -> list[memoryview]:
        """What was put there, of these sizes."""
        places, end = _places(sizes)
        if end > self._memory.nbytes:
            self._map(mmap.PROT_READ)
        return [self._memory[place] for place in places]

    def close(self) -> None:
        """What was seen stays."""
        os.close(self._file)

    def _map(self, access: int) -> None:
        self._memory = memoryview(mmap.mmap(self._file, 0, mmap.MAP_SHARED, access))


def _places(sizes: Sequence[int]) -> tuple[list[slice], int]:
    """Where vectors of these sizes lie, and where they end."""
    places, end = list[slice](), 0
    for size in sizes:
        places.append(slice(end, end + size))
        end += -(-size // ALIGNED_BYTES) * ALIGNED_BYTES
    return places, end


def _plainly(kind: type[Any]) -> None:
    """Have values of a frozen dataclass with slots copied field by field; what pickle does with them takes 5 times as
    long."""
    names = attrgetter(*(one.name for one in fields(kind)))
    single = len(fields(kind)) == 1
    copyreg.pickle(kind, lambda value: (kind, (names(value),) if single else names(value)))


for _kind in (events.Progress, events.PushWanted, events.Settled, Scalars):  # what every step and exchange brings
    _plainly(_kind)
