"""Programs that wait in virtual time: each on a stack of its own, one at a time, with random numbers of its own.

    fiber = Fiber(world, program, seed)     program() runs when the world comes to it
    fiber.sleep(0.1)                        in it: let so much virtual time pass
    fiber.wait(5.0)                         in it: until somebody calls `fiber.wake()`, or for so long

Laws
* A fiber runs until it waits; nothing else happens meanwhile, and no virtual time passes.
* Each fiber finds the random numbers of Python, numpy and torch as it left them: what others draw does not disturb it.
* A fiber that is killed is left through its `finally` blocks, and they cannot wait any more.

So a training loop that knows nothing of simulators runs in one, unchanged.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import greenlet
import numpy as np
import torch

from common.simulator import World


class Killed(greenlet.GreenletExit):
    """Raised in a fiber that is killed, where it waits."""


class Fiber:
    """One program. `ended(error)` is called when it is over: None, or what it raised; not where it was killed."""

    _running: Fiber | None = None
    """Whose random numbers are in place."""

    def __init__(
        self, world: World, program: Callable[[], None], seed: int, ended: Callable[[Exception | None], None]
    ) -> None:
        self.world = world
        self._program = program
        self._ended = ended
        self._draws: tuple[Any, ...] = _draws_of(seed)
        self._stack = greenlet.greenlet(self._run)
        self._waiting = 0
        """Counts waits; 0 while it runs."""
        self._waits = 0
        self.killed = False
        world.after(0.0, self._resume)

    @property
    def over(self) -> bool:
        """Whether the program has ended."""
        return self._stack.dead or self.killed

    def sleep(self, seconds: float) -> None:
        """Let so much virtual time pass. Called in the fiber."""
        self._expect_alive()
        self.world.after(seconds, self._resume)
        self._leave()

    def wait(self, timeout_s: float | None) -> None:
        """Until `wake`, or until so much virtual time has passed. Called in the fiber."""
        self._expect_alive()
        self._waits += 1
        self._waiting = waiting = self._waits
        if timeout_s is not None:
            self.world.after(timeout_s, partial(self._end_wait, waiting))
        self._leave()

    def wake(self) -> None:
        """End its wait, as the next thing that happens; while it does not wait, nothing."""
        if self._waiting:
            self.world.after(0.0, partial(self._end_wait, self._waiting))

    def kill(self) -> None:
        """End it where it waits. Not to be called by a fiber."""
        if not self.over:
            self.killed = True
            if self._stack.gr_frame is not None:  # else it never started
                self._switch(partial(self._stack.throw, Killed))

    def _run(self) -> None:
        error: Exception | None = None
        try:
            self._program()
        except Killed:
            return
        except Exception as caught:
            error = caught
        if not self.killed:
            self._ended(error)

    def _end_wait(self, waiting: int) -> None:
        if waiting == self._waiting:
            self._waiting = 0
            self._resume()

    def _resume(self) -> None:
        if not self.over:
            self._switch(self._stack.switch)

    def _switch(self, go: Callable[[], Any]) -> None:
        if Fiber._running is not self:
            if Fiber._running is not None:
                Fiber._running._draws = _draws_now()
            _draw_from(self._draws)
            Fiber._running = self
        go()

    def _leave(self) -> None:
        self._stack.parent.switch()

    def _expect_alive(self) -> None:
        if self.killed:
            raise Killed


def _draws_now() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _draw_from(states: tuple[Any, ...]) -> None:
    python, numpy, torchs = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torchs)


def _draws_of(seed: int) -> tuple[Any, ...]:
    before = _draws_now()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    states = _draws_now()
    _draw_from(before)
    return states
