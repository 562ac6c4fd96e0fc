"""Who carries a session: drives the worker's core and its connection. It decides nothing.

    Machine.this()      this machine: real time, and a `Driver` for each session
    Carrier             what a session asks of its carrier; a simulator has one of its own

Laws
* One thread at a time touches the socket and the core: the trainer's while it posts or waits, one in the background
  while it computes. A thread that has to be woken costs more than a small exchange.
* What is posted is bounded: the trainer has at most one push and two pulls under way.
* If driving fails, the trainer learns the error with its next call. Ctrl-C never leaves an event half handled.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import socket
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np

from common import scheduling, shared, transports
from common.buffers import zeros
from common.chunks import Plan
from common.codecs.base import F32, U8
from common.errors import CodecError, ParamserverError, StateError
from common.messages import Place, Scalars, Version
from common.node import Received, Say, Send, Tick
from common.shared import Memory
from common.transports import SharingEndpoint
from common.transports.base import SERVER
from common.transports.lines import Door, Line
from worker.core import WorkerCore
from worker.events import (
    Attach,
    CannotAttach,
    Deliver,
    Dialled,
    Encoded,
    LinkLost,
    PushWanted,
    Redial,
    Staged,
    Withdrawn,
)
from worker.interrupts import Interrupts

BATCH_MESSAGES = 64
ENCODE_CHUNKS = 8
"""So many chunks are encoded between two words to the thread that sends them."""
log = logging.getLogger("paramserver.worker")


ASIDE_S = 0.02
"""The thread in the background stays aside for so long after the trainer has waited, because it mostly waits again."""
SWITCH_INTERVAL_S = 0.0005
"""How long Python lets one thread hold the interpreter: short, so that training does not starve the connection."""


class Carrier(ABC):
    """Carries what a session wants to its core, and the core's news to the session."""

    on_any_thread = False
    """Whether `post` may be said on any thread; else on the session's alone."""

    @abstractmethod
    def post(self, event: Any) -> None:
        """Hand an event to the core, soon; to one that has ended, nothing."""

    @abstractmethod
    def news(self, timeout_s: float | None = 0.0) -> Any | None:
        """The next piece of news, waiting up to `timeout_s` (None: for ever); None where there is none."""

    def staging(self, size: int, machine: str) -> U8:
        """(size,) where the bytes of every push shall lie, all zero. machine: the server's, as it said (Welcome)."""
        return zeros(size, np.uint8)

    @abstractmethod
    def close(self, timeout_s: float) -> None:
        """Wait until nothing is carried any more: soon after the core has ended."""

    def push(
        self,
        flat: F32,
        plan: Plan,
        data: U8,
        scalars: Scalars,
        base: Version,
        spare: F32 | None,
        fragment: int = 0,
        *,
        key: int = 0,
        before: Mapping[int, U8] | None = None,
    ) -> None:
        """Have `flat` pushed: (elements,), encoded into data: (plan.bytes,) while its first chunks are on their way.

        `spare`: memory for the reply; `key`: of this push, for codecs that round at random; `before`: for codecs that
        start from their last update. Raises CodecError where `flat` cannot be encoded; then nothing is pushed.
        """
        chunks = len(plan.chunks)
        if chunks == 1:
            plan.encode(flat, data, key=key, before=before)
        self.post(PushWanted(data, plan.codec, scalars, base, 1 if chunks == 1 else 0, spare, fragment))
        for ready in range(0, chunks if chunks > 1 else 0, ENCODE_CHUNKS):
            end = min(ready + ENCODE_CHUNKS, chunks)
            try:
                first, last = plan.chunks[ready].first, plan.chunks[end - 1].last
                plan.encode(flat, data, first, last, key=key, before=before)
            except CodecError:
                self.post(Withdrawn())
                raise
            self.post(Encoded(end))


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a session runs. instance: unguessable, and never the same for two sessions."""

    host: str
    process: int
    instance: str
    carry: Callable[[WorkerCore, str], Carrier]
    now: Callable[[], float] = time.monotonic
    """Seconds, of which only differences mean anything."""
    compute: Callable[[Callable[[], Any], int], Any] = lambda work, steps: work()
    """compute(work, steps): do the work of so many optimizer steps, which alone may be long and draw random numbers."""

    @classmethod
    def this(cls) -> Self:
        """The one this process runs on."""
        return cls(socket.gethostname(), os.getpid(), secrets.token_hex(8), Driver)


class Driver(Carrier):
    """Runs `core` on connections to `address`: on a thread of its own, and on the trainer's while that waits."""

    on_any_thread = True

    def __init__(
        self, core: WorkerCore, address: str, *, dial: Callable[[str], SharingEndpoint] = transports.dial
    ) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._core = core
        self._address = address
        self._dial = dial
        self._endpoint = dial(address)
        self._posted: deque[Any] = deque()
        self._news: deque[Any] = deque()
        self._error: BaseException | None = None
        self._over = False
        """Whether the core has ended, or an error has ended all."""
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._wake).atexit = False  # then the thread may still be at work
        self._wheel = threading.Lock()
        """Whoever has it, and nobody else, touches the core and the connection."""
        self._attended = False
        """Whether the trainer waits, and drives meanwhile."""
        self._attended_until = -math.inf
        self._due = 0.0
        """When the core wants a Tick, at the latest."""
        self._interrupts = Interrupts()
        self._offered: _Offered | None = None
        self._closed = False
        self._drive(lambda: self._do(self._core.handle(Dialled(), time.monotonic())))
        self._thread = threading.Thread(target=self._run, name="paramserver-driver", daemon=True)
        self._thread.start()
        scheduling.wait_turn()
        self._trainer = threading.get_ident()

    def staging(self, size: int, machine: str) -> U8:
        """Shared with the server where that runs on this machine."""
        if machine != shared.MACHINE or not machine:
            return super().staging(size, machine)
        try:
            offered = _Offered.make(size)
        except StateError as error:
            log.warning("updates are sent in messages: %s", error)
            return super().staging(size, machine)
        with self._wheel:
            unused, self._offered = (offered, None) if self._closed else (self._offered, offered)
        if unused is not None:
            unused.withdraw()
        self.post(Staged(offered.memory.place))
        return offered.memory.data

    def post(self, event: Any) -> None:
        """Hand an event to the core, at once where nobody else drives; to one that has ended, nothing."""
        self._posted.append(event)
        while self._posted and self._wheel.acquire(blocking=False):  # whoever gives it back looks once more
            try:
                due = self._due
                # whoever goes on encoding learns meanwhile that chunks may be sent
                self._drive(partial(self._turn, False) if isinstance(event, Encoded) else self._take_posted)
                if self._attended or self._over or self._due < due:
                    self._call()
            finally:
                self._wheel.release()

    def news(self, timeout_s: float | None = 0.0) -> Any | None:
        """The next piece of news, waiting up to `timeout_s` (None: for ever); None where there is none."""
        if not self._news and timeout_s != 0.0:
            self._attend(time.monotonic() + (math.inf if timeout_s is None else timeout_s))
        if self._news:
            return self._news.popleft()
        if self._error is not None:
            raise ParamserverError(f"The connection failed: {self._error!r}.") from self._error
        return None

    def close(self, timeout_s: float) -> None:
        """Wait for the thread, which ends when the core has."""
        self._thread.join(timeout_s)
        if threading.get_ident() == self._trainer:
            self._trainer = 0
            scheduling.end()
        if threading.current_thread() is threading.main_thread():
            self._interrupts.end()

    def _attend(self, end: float) -> None:
        """Drive until there is news, or time is up."""
        self._attended, waited, called = True, False, False
        try:
            while True:
                with self._wheel:
                    if not (self._news or self._over) and (waited or self._endpoint.overlooked):
                        self._drive(partial(self._turn, called))
                now = time.monotonic()
                if self._news or self._over or now >= end:
                    return
                called = bool(self._posted) or self._endpoint.wait(max(min(end, self._due) - now, 0.0), also=self._wake)
                waited = True
        finally:
            self._attended_until, self._attended = time.monotonic(), False

    def _run(self) -> None:
        """The thread in the background."""
        scheduling.be_usual()
        while not self._over:
            now, called = time.monotonic(), False
            if self._attended or now < self._attended_until + ASIDE_S:
                time.sleep(ASIDE_S)
                continue
            try:
                called = bool(self._posted) or self._endpoint.wait(max(self._due - now, 0.0), also=self._wake)
            except Exception as error:
                self._error, self._over = error, True
            with self._wheel:
                if not self._attended:
                    self._drive(partial(self._turn, called))
        with self._wheel:
            self._endpoint.close()
            self._closed = True
            offered, self._offered = self._offered, None
        self._call()
        if offered is not None:
            offered.withdraw()

    def _call(self) -> None:
        """Whoever waits shall look again."""
        os.eventfd_write(self._wake, 1)

    # Whoever has the wheel

    def _drive(self, work: Callable[[], None]) -> None:
        """Do it, unless all is over; an error ends all."""
        if self._over:
            self._posted.clear()
            return
        self._interrupts.hold()
        try:
            work()
        except Exception as error:
            self._error = error
        self._over = self._error is not None or self._core.phase == "ended"
        self._due = self._core.deadline() or 0.0
        if self._endpoint.overlooked:  # sending may have used up what the descriptor had to tell
            self._call()
        self._interrupts.release()

    def _turn(self, called: bool) -> None:
        """Take in what is there. called: somebody may have called."""
        if called:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        self._take_posted()
        for _ in range(BATCH_MESSAGES):
            message = self._endpoint.receive()
            if message is None:
                break
            self._do(self._core.handle(Received(*message), time.monotonic()))
            if self._attended and self._news:
                break  # the trainer has what it waits for; descriptors tell of the rest
        else:
            self._call()  # there may be more
        if self._endpoint.lost():
            self._do(self._core.handle(LinkLost(), time.monotonic()))
        if time.monotonic() >= self._due:
            self._do(self._core.handle(Tick(), time.monotonic()))

    def _take_posted(self) -> None:
        while self._posted:
            self._do(self._core.handle(self._posted.popleft(), time.monotonic()))

    def _do(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Send(peer, frames, hold):
                    if refusal := self._endpoint.send(peer, frames, hold):
                        log.debug("not sent: %s", refusal)  # silence will tell the core
                case Redial():
                    self._endpoint.close()
                    self._endpoint = self._dial(self._address)
                    self._call()  # whoever waits for the old one
                    self._do(self._core.handle(Dialled(), time.monotonic()))
                case Attach(place):
                    if not self._attach(place):
                        return  # the rest was for the connection that this has ended
                case Deliver(news):
                    self._news.append(news)
                case Say(level, sentence):
                    log.log(logging.getLevelNamesMapping()[level.upper()], sentence)

    def _attach(self, place: Place) -> bool:
        try:
            theirs = shared.attach(place, expect=place.bytes)
        except shared.CannotAttach as error:
            self._do(self._core.handle(CannotAttach(str(error)), time.monotonic()))
            return False
        memory, line = (self._offered.memory, self._offered.line(place)) if self._offered else (None, None)
        self._endpoint.share(SERVER, memory, (bytes.fromhex(place.mark), theirs), line)
        return True


@dataclass(frozen=True, slots=True)
class _Offered:
    """What the server may share: the memory of updates, and the door at which it calls for a line."""

    memory: Memory
    door: Door | None

    @classmethod
    def make(cls, size: int) -> Self:
        """For updates of so many bytes; raises StateError where there is no memory to share."""
        memory = Memory.make(size)
        try:
            return cls(memory, Door(memory.place.mark))
        except OSError as error:
            log.warning("the server is reached without a line, which takes longer: %s", error)
            return cls(memory, None)

    def line(self, theirs: Place) -> Line | None:
        """To the server that has just told of its memory; None where it did not call."""
        return self.door.take(theirs.mark) if self.door is not None else None

    def withdraw(self) -> None:
        """Nobody can attach, or call, any more. A second call is a defect."""
        self.memory.withdraw()
        if self.door is not None:
            self.door.close()
