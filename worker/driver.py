"""Who carries a session: the background thread that owns the socket and drives the worker's core. It decides nothing.

    Machine.this()      this machine: real time, and a `Driver` for each session
    Carrier             what a session asks of its carrier; a simulator has one of its own

Laws
* Only this thread touches the socket and the core. The trainer posts events and takes news, both through queues.
* What is posted is bounded: the trainer has at most one push and two pulls under way.
* If this thread fails, the trainer learns the error with its next call.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from common import shared, transports
from common.buffers import zeros
from common.chunks import Plan
from common.codecs.base import F32, U8
from common.errors import CodecError, ParamserverError, StateError
from common.messages import Place, Scalars, Version
from common.node import Received, Say, Send, Tick
from common.shared import Memory
from common.transports import ZeroMQEndpoint
from common.transports.base import SERVER
from worker.core import (
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
    WorkerCore,
)

BATCH_MESSAGES = 64
ENCODE_CHUNKS = 8
"""So many chunks are encoded between two words to the thread that sends them."""
log = logging.getLogger("paramserver.worker")


SWITCH_INTERVAL_S = 0.0005
"""How long Python lets one thread hold the interpreter: short, so that training does not starve the connection."""


class Carrier(ABC):
    """Carries what a session wants to its core, and the core's news to the session."""

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
    ) -> None:
        """Have `flat` pushed: (elements,), encoded into data: (plan.bytes,) while its first chunks are on their way.

        `spare`: memory for the reply; `key`: of this push, for codecs that round at random. Raises CodecError where
        `flat` cannot be encoded; then nothing is pushed.
        """
        chunks = len(plan.chunks)
        if chunks == 1:
            plan.encode(flat, data, key=key)
        self.post(PushWanted(data, plan.codec, scalars, base, 1 if chunks == 1 else 0, spare, fragment))
        for ready in range(0, chunks if chunks > 1 else 0, ENCODE_CHUNKS):
            end = min(ready + ENCODE_CHUNKS, chunks)
            try:
                plan.encode(flat, data, plan.chunks[ready].first, plan.chunks[end - 1].last, key=key)
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
    """Runs `core` on a thread of its own, on connections to `address`."""

    def __init__(
        self, core: WorkerCore, address: str, *, dial: Callable[[str], ZeroMQEndpoint] = transports.dial
    ) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._core = core
        self._address = address
        self._dial = dial
        self._endpoint = dial(address)
        self._posted: deque[Any] = deque()
        self._news: deque[Any] = deque()
        self._arrived = threading.Condition()
        self._error: BaseException | None = None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._wake_lock = threading.Lock()
        self._memory: Memory | None = None
        self._thread = threading.Thread(target=self._run, name="paramserver-driver", daemon=True)
        self._thread.start()

    def staging(self, size: int, machine: str) -> U8:
        """Shared with the server where that runs on this machine."""
        if machine != shared.MACHINE or not machine:
            return super().staging(size, machine)
        try:
            memory = Memory.make(size)
        except StateError as error:
            log.warning("updates are sent in messages: %s", error)
            return super().staging(size, machine)
        with self._wake_lock:
            ended = self._wake < 0
            unused, self._memory = (memory, None) if ended else (self._memory, memory)
        if unused is not None:
            unused.withdraw()
        self.post(Staged(memory.place))
        return memory.data

    def post(self, event: Any) -> None:
        """Hand an event to the core, soon; to one that has ended, nothing."""
        with self._wake_lock:
            if self._wake >= 0:
                self._posted.append(event)
                os.eventfd_write(self._wake, 1)

    def news(self, timeout_s: float | None = 0.0) -> Any | None:
        """The next piece of news, waiting up to `timeout_s` (None: for ever); None where there is none."""
        with self._arrived:
            self._arrived.wait_for(lambda: bool(self._news) or self._error is not None, timeout_s)
            if self._news:
                return self._news.popleft()
            if self._error is not None:
                raise ParamserverError(f"The connection's thread failed: {self._error!r}.") from self._error
        return None

    def close(self, timeout_s: float) -> None:
        """Wait for the thread, which ends when the core has."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._do(self._core.handle(Dialled(), time.monotonic()))
            while self._core.phase != "ended":
                self._turn()
        except BaseException as error:
            with self._arrived:
                self._error = error
                self._arrived.notify_all()
        finally:
            self._endpoint.close()
            with self._wake_lock:  # a descriptor's number is soon somebody else's
                os.close(self._wake)
                self._wake = -1
                memory, self._memory = self._memory, None
            if memory is not None:
                memory.withdraw()

    def _turn(self) -> None:
        deadline = self._core.deadline()
        self._endpoint.wait(max((deadline or 0.0) - time.monotonic(), 0.0), also=self._wake)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._posted:
            self._do(self._core.handle(self._posted.popleft(), time.monotonic()))
        for _ in range(BATCH_MESSAGES):
            message = self._endpoint.receive()
            if message is None:
                break
            self._do(self._core.handle(Received(*message), time.monotonic()))
        if self._endpoint.lost():
            self._do(self._core.handle(LinkLost(), time.monotonic()))
        self._endpoint.released()
        self._do(self._core.handle(Tick(), time.monotonic()))

    def _do(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Send(peer, frames, hold):
                    if refusal := self._endpoint.send(peer, frames, hold):
                        log.debug("not sent: %s", refusal)  # silence will tell the core
                case Redial():
                    self._endpoint.close()
                    self._endpoint = self._dial(self._address)
                    self._do(self._core.handle(Dialled(), time.monotonic()))
                case Attach(place):
                    if not self._attach(place):
                        return  # the rest was for the connection that this has ended
                case Deliver(news):
                    with self._arrived:
                        self._news.append(news)
                        self._arrived.notify_all()
                case Say(level, sentence):
                    log.log(logging.getLevelNamesMapping()[level.upper()], sentence)

    def _attach(self, place: Place) -> bool:
        try:
            theirs = shared.attach(place, expect=place.bytes)
        except shared.CannotAttach as error:
            self._do(self._core.handle(CannotAttach(str(error)), time.monotonic()))
            return False
        self._endpoint.share(SERVER, self._memory, (bytes.fromhex(place.mark), theirs))
        return True
