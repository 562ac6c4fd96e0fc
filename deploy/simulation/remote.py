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
import io
import logging
import mmap
import os
import pickle
import random
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.random import mtrand

from common.buffers import zeros
from common.codecs.base import F32
from common.config import ServerSettings, WorkerSettings
from common.errors import ParamserverError
from paramserver import daemon
from worker import core, loop, tasks
from worker.core import WorkerCore
from worker.driver import Carrier, Machine
from worker.loop import WorkerReport
from worker.tasks import Context

T = TypeVar("T")

MESSAGE_BYTES = 16 << 20
"""Without its vectors, the longest that is taken: a model has as many tensors as a Hello can name."""
ALIGNED_BYTES = 64
WORDS_LIMIT = 2_000
"""Characters of an error that are told."""


@dataclass(frozen=True, slots=True)
class Life:
    """What a worker's process is told first: who it is. `number` and `life`: which worker, and which of its lives."""

    settings: WorkerSettings
    number: int
    life: int


# Wishes: what a process waits for


@dataclass(frozen=True, slots=True)
class Carry:
    """To be carried: this core, which nothing has happened to, to be driven."""

    core: WorkerCore


@dataclass(frozen=True, slots=True)
class Wait:
    """News, for at most so long; None: for ever."""

    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class Compute:
    """A free core, for so many optimizer steps."""

    steps: int


@dataclass(frozen=True, slots=True)
class Computed:
    """That the time of what was computed has passed."""


@dataclass(frozen=True, slots=True)
class Close:
    """That nothing is carried any more."""

    timeout_s: float


@dataclass(frozen=True, slots=True)
class End:
    """Nothing more: it is over."""

    report: WorkerReport | None
    error: ParamserverError | None


@dataclass(frozen=True, slots=True)
class Said:
    """From a worker's process. posts: events for its core, in order; used_s: CPU time that it used so far."""

    posts: tuple[Any, ...]
    wish: Carry | Wait | Compute | Computed | Close | End
    used_s: float


@dataclass(frozen=True, slots=True)
class Go:
    """To a worker's process: compute."""


@dataclass(frozen=True, slots=True)
class Told:
    """To a worker's process: the time, all news, and of its core and its membership what changed."""

    now_s: float
    news: tuple[Any, ...] = ()
    phase: str = "greeting"
    membership: dict[str, Any] = field(default_factory=dict)


class TaskFailed(ParamserverError):
    """What a task raised, in words."""


# Between the two


class Pipe:
    """One end. `out`, `into`: files in memory, one for the vectors of each direction; each has one who writes."""

    def __init__(self, line: int, out: int, into: int) -> None:
        self._line = Connection(line)
        self._out, self._into = _Shelf(out), _Shelf(into)

    def fileno(self) -> int:
        """To wait for."""
        return self._line.fileno()

    def send(self, message: Any) -> None:
        """Say it; raises OSError where nobody is there."""
        vectors: list[pickle.PickleBuffer] = []
        body = pickle.dumps(message, 5, buffer_callback=vectors.append)
        places = self._out.put([vector.raw() for vector in vectors])
        self._line.send_bytes(pickle.dumps((places, body), 5))

    def receive(self) -> Any:
        """What was said; its vectors are not to be written to. Raises EOFError where nobody is there."""
        places, body = pickle.loads(self._line.recv_bytes(MESSAGE_BYTES))
        return pickle.loads(body, buffers=self._into.see(places))

    def close(self) -> None:
        """Nothing more will be said; vectors that were seen stay."""
        self._line.close()
        self._out.close()
        self._into.close()


class _Shelf:
    """A file in memory with the vectors of the last message that had any."""

    def __init__(self, descriptor: int) -> None:
        self._file = descriptor
        self._memory = memoryview(b"")

    def put(self, vectors: list[memoryview]) -> list[tuple[int, int]]:
        """Copies; returns where each one lies: its first byte and its size."""
        places, end = list[tuple[int, int]](), 0
        for vector in vectors:
            places.append((end, vector.nbytes))
            end += -(-vector.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES
        if end > self._memory.nbytes:
            os.ftruncate(self._file, end)
            self._map(mmap.PROT_READ | mmap.PROT_WRITE)
        for (first, size), vector in zip(places, vectors, strict=True):
            self._memory[first : first + size] = vector
        return places

    def see(self, places: list[tuple[int, int]]) -> list[memoryview]:
        """What lies there."""
        if places and places[-1][0] + places[-1][1] > self._memory.nbytes:
            self._map(mmap.PROT_READ)
        return [self._memory[first : first + size] for first, size in places]

    def close(self) -> None:
        os.close(self._file)

    def _map(self, access: int) -> None:
        self._memory = memoryview(mmap.mmap(self._file, 0, mmap.MAP_SHARED, access))


# In the family


def prepare(
    server: dict[str, Any], task: str, data: str | None, optimizer: str, model_seed: int, threads: int
) -> Callable[..., None]:
    """Rehearse what each member does first, so that it is loaded once, and in memory once; returns what members run.

    server: its settings.
    """
    logging.getLogger("paramserver.worker").addHandler(logging.NullHandler())  # workers' warnings are the scenario
    torch.set_num_threads(1)  # a thread here would be none in a member
    folder = Path(data) if data else None
    context = Context(0, model_seed, "worker", torch.device("cpu"), folder, optimizer)
    with contextlib.suppress(Exception, SystemExit), contextlib.redirect_stdout(io.StringIO()):
        loop.train_alone(tasks.load(task).make(context), 1)  # what is wrong with it, each worker says for itself
        daemon.warm(ServerSettings.model_validate(server))

    def live(line: int, out: int, into: int) -> None:
        _Remote(Pipe(line, out, into)).live(model_seed, folder, threads)

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
            for name, value in told.membership.items():
                setattr(self.core.membership, name, value)

    def post(self, event: Any) -> None:
        """To be said with the next wish; one vector at a time."""
        if isinstance(event, core.PushWanted | core.InitialWeights) and any(
            isinstance(posted, core.PushWanted | core.InitialWeights) for posted in self._posts
        ):
            self.ask(Wait(0.0))
        self._posts.append(event)

    @property
    def posted(self) -> bool:
        return bool(self._posts)

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
        """The next piece of news; meanwhile virtual time passes."""
        news = self._remote.news
        if not news and (self._remote.posted or timeout_s != 0.0):
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
    found = TaskFailed(
        f"{type(error).__name__}: {words}".rstrip(" :."), fix=f"Look at {last.filename}, line {last.lineno}."
    )
    found.add_note("".join(traceback.format_exception(error))[-10 * WORDS_LIMIT :])
    return found
