"""The training side of one simulated worker, in a process of its own.

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

Left out: what a step takes, and when it is a worker's turn.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.random import mtrand

from common.buffers import zeros
from common.codecs.base import F32
from common.config import ServerSettings
from common.errors import ParamserverError
from deploy.simulation.pipe import Carry, Close, Compute, Computed, End, Life, Pipe, Said, Wait
from paramserver import daemon
from worker import events, loop, tasks
from worker.core import WorkerCore
from worker.driver import Carrier, Machine
from worker.loop import WorkerReport
from worker.tasks import Context

T = TypeVar("T")

WORDS_LIMIT = 2_000
"""Characters of an error that are told."""


class TaskFailed(ParamserverError):
    """What a task raised, in words."""


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
        if isinstance(event, events.PushWanted | events.InitialWeights) and any(
            isinstance(posted, events.PushWanted | events.InitialWeights) for posted in self._posts
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
        if isinstance(event, events.PushWanted):
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
