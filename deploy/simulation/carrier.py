"""Carries a session in virtual time: in place of the thread and the socket of `worker.driver`.

Laws
* The session, its core and its messages are those of a real worker; only time and wire are made up.
* A dead carrier carries nothing, and tells its session that it has left, as often as it asks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

from common.node import Say, Send
from common.simulator import Host, Link
from deploy.simulation.fibers import Fiber
from worker.core import WorkerCore
from worker.driver import Carrier
from worker.events import Deliver, Dialled, Left, LinkLost, Redial

Dial = Callable[[Host], Link]
"""dial(host): a fresh connection to the server."""


class SimulatedCarrier(Carrier):
    """Carries one session, whose program runs on `fiber`."""

    def __init__(
        self, core: WorkerCore, fiber: Fiber, dial: Dial, say: Callable[[str, str], None], *, check: bool
    ) -> None:
        self._fiber, self._dial, self._say = fiber, dial, say
        self.core = core
        self._news: deque[Any] = deque()
        self.host = Host(fiber.world, core, self._do, check=check)
        self.link = dial(self.host)
        self.host.handle(Dialled())

    def post(self, event: Any) -> None:
        """To the core, at once."""
        self.host.handle(event)

    def news(self, timeout_s: float | None = 0.0) -> Any | None:
        """The next piece of news; meanwhile virtual time passes."""
        self._wait(timeout_s)
        if self.host.dead:
            return Left()
        return self._news.popleft() if self._news else None

    def all_news(self, timeout_s: float | None) -> tuple[Any, ...]:
        """All news there is, waiting for some."""
        self._wait(timeout_s)
        news, self._news = tuple(self._news), deque()
        return (Left(),) if self.host.dead else news

    def close(self, timeout_s: float) -> None:
        """Nothing is left to wait for."""
        self.link.close()
        self.host.die()

    def now(self) -> float:
        """Virtual seconds."""
        return self.host.world.now

    def crash(self) -> None:
        """As with kill -9 of the worker."""
        self.link.close()
        self.host.die()

    def cut(self) -> None:
        """Break the connection."""
        self.link.cut(LinkLost())

    def _wait(self, timeout_s: float | None) -> None:
        end_s = math.inf if timeout_s is None else self.now() + timeout_s
        while not (self._news or self.host.dead) and self.now() < end_s:
            self._fiber.wait(None if timeout_s is None else end_s - self.now())

    def _do(self, action: Any) -> None:
        match action:
            case Send(_, frames):
                self.link.up(frames)
            case Redial():
                self.link.close()
                self.link = self._dial(self.host)
                self.host.soon(Dialled())
            case Deliver(news):
                self._news.append(news)
                self._fiber.wake()
            case Say(level, sentence):
                self._say(level, sentence)
