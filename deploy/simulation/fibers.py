"""Programs that wait in virtual time, each on a stack of its own.

    fiber = Fiber(world, program, ended)     program() runs when the world comes to it
    fiber.sleep(0.1)                         in it: let so much virtual time pass
    fiber.wait(5.0)                          in it: until somebody calls `fiber.wake()`, or for so long

Laws
* A fiber runs until it waits; nothing else happens meanwhile, and no virtual time passes.
* A fiber that is killed is left through its `finally` blocks, and they cannot wait any more. So is one that Ctrl-C
  falls into: whoever stops the run is not kept waiting.

So a session that knows nothing of simulators waits in one, unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import greenlet

from common.simulator import World


class Killed(greenlet.GreenletExit):
    """Raised in a fiber that is killed, where it waits."""


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
