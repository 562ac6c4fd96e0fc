"""The training side of one simulated worker, in a process of its own; and what it and the cluster say to each other.

    here (a member of a family of `deploy.nursery`)        there (`deploy.simulation.workers`)
    Said(posts, wish, used_s)                          ->
                                                       <-  Told(now_s, news, core)
    Said((), Compute(1), ...), and it waits            ->
                                                       <-  Go(): a core is free
    Said((), Computed(), ...), and it waits            ->
                                                       <-  Told: so much virtual time has passed

Laws
* The loop, the session and the model are here, the worker's core is there: the one beside the session is never driven,
  and shows what is said of the other.
* They take turns: while this process runs, no virtual time passes and nothing happens there; but for the work between
  Go and Computed, on which nothing depends that happens meanwhile.
* Vectors lie in memory that both see, and are valid until the one who put them there sends others.
* What is said is taken as Python objects: it comes from this program, over a pipe that nobody else can reach.

Left out: what a step takes, and when it is a worker's turn.
"""

from __future__ import annotations

import contextlib
import copyreg
import io
import logging
import mmap
import os
import pickle
import random
import socket
import struct
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.random import mtrand

from common.buffers import zeros
from common.codecs.base import F32
from common.config import ServerSettings, WorkerSettings
from common.errors import ParamserverError
from common.messages import Scalars
from paramserver import daemon
from worker import core, loop, tasks
from worker.core import WorkerCore
from worker.driver import Carrier, Machine
from worker.loop import WorkerReport
from worker.tasks import Context

T = TypeVar("T")

PACKET_BYTES = 1 << 16
"""The longest message that goes through the pipe itself."""
SIZE = struct.Struct("<q")
ALIGNED_BYTES = 64
WORDS_LIMIT = 2_000
"""Characters of an error that are told."""


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


class TaskFailed(ParamserverError):
    """What a task raised, in words."""


# Between the two


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


for _kind in (core.Progress, core.PushWanted, core.Settled, Scalars):  # what every step and exchange brings
    _plainly(_kind)


# In the nursery, in a family


def load() -> None:
    """Import what training needs, before anybody says what is to be trained."""
    torch.set_num_threads(1)  # a thread here would be none in a member
    torch.optim.SGD([torch.zeros(1)], 0.1)  # the first optimizer of a process imports 800 modules


def prepare(
    server: dict[str, Any], task: str, data: str | None, optimizer: str, model_seed: int, threads: int
) -> Callable[..., None]:
    """Rehearse what each member does first, so that it is loaded once, and in memory once; returns what members run.

    server: its settings.
    """
    logging.getLogger("paramserver.worker").addHandler(logging.NullHandler())  # workers' warnings are the scenario
    folder = Path(data) if data else None
    context = Context(0, model_seed, "worker", torch.device("cpu"), folder, optimizer)
    with contextlib.suppress(Exception, SystemExit), contextlib.redirect_stdout(io.StringIO()):
        loop.train_alone(tasks.load(task).make(context), 1)  # what is wrong with it, each worker says for itself
        daemon.warm(ServerSettings.model_validate(server))

    def live(line: int, out: int, into: int) -> None:
        _Remote(Pipe(socket.socket(fileno=line), out, into)).live(model_seed, folder, threads)

    return live


def seed(number: int) -> None:
    """Start the process's own random numbers, which a task may draw from while it is made."""
    random.seed(number)
    mtrand.set_bit_generator(np.random.MT19937(number))
    torch.manual_seed(number)


# In a worker's process


class _Remote:
    """The machine that a session of this process runs on."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._posts: list[Any] = []
        self.news: deque[Any] = deque()
        self.now_s = 0.0
        self.core: WorkerCore | None = None
        """Shows what is said of the one that is driven."""
        self.spare: F32 | None = None
        """Memory for the next vector that is news."""

    def live(self, model_seed: int, data: Path | None, threads: int) -> None:
        """From the first word to the last."""
        life: Life = self._pipe.receive()
        name = life.settings.name
        machine = Machine(
            host=f"host-{name}",
            process=life.number,
            instance=f"{name}-{life.life}",
            carry=self._carry,
            now=lambda: self.now_s,
            compute=self._compute,
        )
        seed(life.number)
        report: WorkerReport | None = None
        error: ParamserverError | None = None
        try:
            report = loop.run(life.settings, model_seed=model_seed, data=data, threads=threads, machine=machine)
        except Exception as caught:
            error = _told(caught)
        sys.stdout.flush()
        self.say(End(report, error))

    def say(self, wish: Any) -> None:
        """With all that was posted."""
        posts, self._posts = tuple(self._posts), []
        try:
            self._pipe.send(Said(posts, wish, time.process_time()))
        except OSError:
            os._exit(0)  # nobody is there any more

    def ask(self, wish: Any) -> None:
        """Say it, and take in what is told."""
        self.say(wish)
        told = self._hear()
        self.now_s = told.now_s
        self.news.extend(self._owned(news) for news in told.news)
        if self.core is not None:
            self.core.phase = told.phase
            for name, value in (told.membership or {}).items():
                setattr(self.core.membership, name, value)

    def post(self, event: Any) -> None:
        """To be said with the next wish; one vector at a time."""
        if isinstance(event, core.PushWanted | core.InitialWeights) and any(
            isinstance(posted, core.PushWanted | core.InitialWeights) for posted in self._posts
        ):
            self.ask(Wait(0.0))
        self._posts.append(event)

    def _carry(self, fresh: WorkerCore, address: str) -> Carrier:
        self.core = fresh
        self.ask(Carry(fresh))
        return _RemoteCarrier(self)

    def _compute(self, work: Callable[[], T], steps: int) -> T:
        self.say(Compute(steps))
        self._hear()
        try:
            return work()
        finally:
            self.ask(Computed())

    def _hear(self) -> Any:
        try:
            return self._pipe.receive()
        except (EOFError, OSError):
            os._exit(0)

    def _owned(self, news: Any) -> Any:
        """The news with a vector that is the trainer's to keep."""
        values = getattr(news, "values", None)
        if values is None:
            return news
        own, self.spare = self.spare, None
        if own is None or own.shape != values.shape:
            own = zeros(len(values), np.float32)
        own[:] = values
        return replace(news, values=own)


class _RemoteCarrier(Carrier):
    """Carries a session of this process to its core, which is in another."""

    def __init__(self, remote: _Remote) -> None:
        self._remote = remote

    def post(self, event: Any) -> None:
        """To the core, before anything else happens there."""
        if isinstance(event, core.PushWanted):
            self._remote.spare = event.spare if event.spare is not None else self._remote.spare
            event = replace(event, spare=None)
        self._remote.post(event)

    def news(self, timeout_s: float | None = 0.0) -> Any | None:
        """The next piece of news; meanwhile virtual time passes. Where none may pass, nothing can have come."""
        news = self._remote.news
        if not news and timeout_s != 0.0:
            self._remote.ask(Wait(timeout_s))
        return news.popleft() if news else None

    def close(self, timeout_s: float) -> None:
        """Nothing is carried any more."""
        self._remote.ask(Close(timeout_s))


def _told(error: Exception) -> ParamserverError:
    """An error as it can be told to another process: our own as they are, all others in words."""
    if isinstance(error, ParamserverError) and type(error).__module__.startswith("common."):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    last = next((frame for frame in reversed(frames) if "site-packages" not in frame.filename), frames[-1])
    try:
        words = str(error)[:WORDS_LIMIT]
    except Exception:
        words = "(it cannot be said)"
    where = f"Look at {last.filename}, line {last.lineno}."
    found = TaskFailed(f"{type(error).__name__}: {words}".rstrip(" :.") + ".", fix=where)
    found.add_note("".join(traceback.format_exception(error))[-10 * WORDS_LIMIT :])
    return found
