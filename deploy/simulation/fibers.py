"""Programs that wait in virtual time, each on a stack of its own; and the thread that computes for all of them.

    fiber = Fiber(world, program, ended)     program() runs when the world comes to it
    fiber.sleep(0.1)                         in it: let so much virtual time pass
    fiber.wait(5.0)                          in it: until somebody calls `fiber.wake()`, or for so long
    fiber.compute(pool, draws, work, 0.1)    in it: work() on the thread, while so much virtual time passes

Laws
* A fiber runs until it waits; nothing else happens meanwhile, and no virtual time passes.
* What is computed depends on nothing that happens meanwhile. So the thread may run ahead of virtual time, and the
  result is the same as if it did not.
* Each `Draws` finds the random numbers of Python, numpy and torch as it left them: what others draw does not disturb
  it. Only computed work may draw; one thread does all of it, for these sources belong to the process.
* A fiber that is killed is left through its `finally` blocks, and they cannot wait any more. So is one that Ctrl-C
  falls into: whoever stops the run is not kept waiting.

So a training loop that knows nothing of simulators runs in one, unchanged.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

import greenlet
import numpy as np
import torch
from numpy.random import mtrand

from common.simulator import World

T = TypeVar("T")


class Killed(greenlet.GreenletExit):
    """Raised in a fiber that is killed, where it waits."""


class Draws:
    """The random numbers of one program: of Python, numpy and torch, as it left them.

    One exception: numpy makes legacy normal numbers in pairs, and forgets the second where others drew in between.
    """

    _in_place: Draws | None = None
    """Whose are the process's own now."""

    def __init__(self, seed: int) -> None:
        self._python = random.Random(seed).getstate()
        self._numpy = np.random.MT19937(seed)
        self._torch = torch.Generator().manual_seed(seed).get_state()

    def run(self, work: Callable[[], T]) -> T:
        """work(), with these random numbers. On the computing thread."""
        if Draws._in_place is not self:
            if Draws._in_place is not None:
                Draws._in_place._put_aside()
            random.setstate(self._python)
            mtrand.set_bit_generator(self._numpy)
            torch.set_rng_state(self._torch)
            Draws._in_place = self
        return work()

    def _put_aside(self) -> None:
        self._python, self._torch = random.getstate(), torch.get_rng_state()


class Fiber:
    """One program. `ended(error)` is called when it is over: None, or what it raised; not where it was killed."""

    def __init__(self, world: World, program: Callable[[], None], ended: Callable[[Exception | None], None]) -> None:
        self.world = world
        self._program = program
        self._ended = ended
        self._stack = greenlet.greenlet(self._run)
        self._waiting = 0
        """Counts waits; 0 while it runs."""
        self._waits = 0
        self._alarm = world.after(0.0, self._resume)
        """What resumes it, by its number on the agenda."""
        self.killed = False

    @property
    def over(self) -> bool:
        """Whether the program has ended."""
        return self._stack.dead or self.killed

    def sleep(self, seconds: float) -> None:
        """Let so much virtual time pass. Called in the fiber."""
        self._expect_alive()
        self._alarm = self.world.after(seconds, self._resume)
        self._leave()

    def wait(self, timeout_s: float | None) -> None:
        """Until `wake`, or until so much virtual time has passed. Called in the fiber."""
        self._expect_alive()
        self._waits += 1
        self._waiting = waiting = self._waits
        if timeout_s is not None:
            self._alarm = self.world.after(timeout_s, partial(self._end_wait, waiting))
        self._leave()

    def compute(self, pool: Executor, draws: Draws, work: Callable[[], T], seconds: float) -> T:
        """work() on the thread of `pool`, while so much virtual time passes; what it returns or raises."""
        self._expect_alive()
        future = pool.submit(draws.run, work)
        self.sleep(seconds)
        result: T = future.result()
        return result

    def wake(self) -> None:
        """End its wait, as the next thing that happens; while it does not wait, nothing."""
        if self._waiting:
            self.world.after(0.0, partial(self._end_wait, self._waiting))

    def kill(self) -> None:
        """End it where it waits. Not to be called by a fiber."""
        if not self.over:
            self.killed = True
            self.world.call_off(self._alarm)
            if self._stack.gr_frame is not None:  # else it never started
                self._stack.throw(Killed)

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
            self.world.call_off(self._alarm)
            self._resume()

    def _resume(self) -> None:
        if not self.over:
            self._stack.switch()

    def _leave(self) -> None:
        assert self._stack.parent is not None
        self._stack.parent.switch()

    def _expect_alive(self) -> None:
        if self.killed:
            raise Killed
        if isinstance(interrupt := sys.exception(), KeyboardInterrupt):
            raise interrupt
