"""Virtual time: a clock, hosts that drive sans-IO nodes, and links on which messages are late, lost or doubled. Pure.

    world = World()
    server = Host(world, core, do)               its events in, its actions to `do`
    link = Link(world, conditions, chance, ...)   one connection between two hosts

Laws
* Nothing reads a clock. Everything random comes from a `Chance` that is given; so one seed is one run, bit for bit.
* What happens at the same time happens in the order in which it was arranged.
* Nodes meet only as encoded frames. A link that may double or delay carries copies, made when sent; any other carries
  the buffers themselves, which senders must not change until they are released or answered.
* A buffer sent under a hold is released once no copy of it is on its way any more.
* A node that asks for Ticks without end, or a world in which time stands still, is an error and no endless loop.

Left out: what the nodes are, and faults that are more than a link's (`deploy.simulation`, and the tests' own).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from common.distributions import Chance, Distribution, expovariate
from common.messages import Buffer
from common.node import Node, Received, Released, Tick, Unsendable
from common.transports.base import SERVER

EVENTS_AT_ONCE = 100_000
"""So many events without any time passing are a world that turns without end."""
LATE_S = 1e-6
"""A timer is never early, and always a little late."""
OVERTAKEN = 10.0
"""A message that others may overtake is late by so many times its usual delay, on average."""
LEAST_DELAY_S = 1e-4
"""What is taken for the usual delay of a link that has none."""
ARRIVES_ANYWAY = 0.5
"""Share of the messages under way that still reach the server after their connection broke."""
HEARD_OF = 0.5
"""Share of the breaks that the worker's transport notices; of the others only silence tells."""


class World:
    """Virtual time, and what will happen in it."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds."""
        self.events = 0
        """Happened so far."""
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count(1)
        self._at_once = 0

    def __repr__(self) -> str:
        return f"<World at {self.now:g} s, {self.events:,} events, {len(self._agenda):,} to come>"

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        """Do `act` in so many seconds."""
        heapq.heappush(self._agenda, (self.now + delay_s, next(self._count), act))

    def step(self) -> bool:
        """Let the next thing happen; False where nothing is to come. Raises RuntimeError where time stands still."""
        if not self._agenda:
            return False
        at, _, act = heapq.heappop(self._agenda)
        self._at_once = self._at_once + 1 if at <= self.now else 0
        if self._at_once >= EVENTS_AT_ONCE:
            raise RuntimeError(f"{EVENTS_AT_ONCE:,} events, and it is still {self.now:g} s: {self!r}, next {act!r}")
        self.now = max(at, self.now)
        self.events += 1
        act()
        return True

    def run_for(self, seconds: float) -> None:
        """Let so much time pass."""
        end = self.now + seconds
        while self._agenda and self._agenda[0][0] <= end:
            self.step()
        self.now = end


class Host:
    """Drives one node: events in, actions to `do`, a Tick at each deadline. Once dead it takes nothing more."""

    def __init__(self, world: World, node: Node, do: Callable[[Any], None], *, check: bool = False) -> None:
        self.world, self.node, self.dead = world, node, False
        self._do, self._check = do, check
        self._wake_at = float("inf")
        self._waking = 0

    def __repr__(self) -> str:
        return f"<Host{' (dead)' if self.dead else ''} of {self.node!r}>"

    def handle(self, event: Any) -> None:
        """One event through the node, and what it wants done; to a dead one, nothing."""
        if not self.dead:
            self.carry_out(self.node.handle(event, self.world.now))

    def soon(self, event: Any) -> None:
        """The event as the next thing that happens."""
        self.world.after(0.0, partial(self.handle, event))

    def carry_out(self, actions: Sequence[Any]) -> None:
        """Do what the node wants, then set its timer."""
        if self._check:
            self.node.validate()
        for action in actions:
            self._do(action)
        self._set_timer()

    def die(self) -> None:
        """As with kill -9."""
        self.dead = True

    def _set_timer(self) -> None:
        """A Tick at the deadline; deadlines mostly move away, so one that is set stays, and looks again when it comes."""
        deadline = self.node.deadline()
        if self.dead or deadline is None or deadline >= self._wake_at:
            return
        self._wake_at = deadline
        self._waking += 1
        self.world.after(max(deadline - self.world.now, 0.0) + LATE_S, partial(self._wake, self._waking))

    def _wake(self, waking: int) -> None:
        if self.dead or waking != self._waking:
            return
        self._wake_at = float("inf")
        deadline = self.node.deadline()
        if deadline is not None and deadline > self.world.now:
            self._set_timer()
        else:
            self.handle(Tick())


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a connection is like. Shares are of messages."""

    latency: Distribution
    """One way, for each message."""
    bytes_per_s: float = 0.0
    """Each way; 0: without limit."""
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    """Share that later ones may overtake, which no real transport lets happen."""
    cuts: bool = False
    """Whether connections break: then buffers may be used again while an old message is still under way."""

    @property
    def faulty(self) -> bool:
        return bool(self.loss or self.duplicate or self.reorder or self.cuts)


class Pipe:
    """Where bytes pass one after the other. 0 bytes/s: without limit."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_at = 0.0

    def pass_through(self, now: float, size: int) -> float:
        """When the last byte of `size` is through, where the first comes at `now`."""
        if not self.bytes_per_s:
            return now
        self._free_at = max(now, self._free_at) + size / self.bytes_per_s
        return self._free_at


class Link:
    """One connection: made by a dial, never used again after it broke. `peer`: its name on the server's side.

    shared: pipes of the server, up and down, that its links share.
    """

    def __init__(
        self,
        world: World,
        conditions: Conditions,
        chance: Chance,
        worker: Host,
        server: Callable[[], Host | None],
        peer: bytes,
        shared: tuple[Pipe, Pipe],
    ) -> None:
        self.worker, self.peer, self.open = worker, peer, True
        self.carried = self.lost = self.doubled = 0
        """Messages that were given to it, and what became of them."""
        self._world, self._conditions, self._chance = world, conditions, chance
        self._server = server
        self._pipes = Pipe(conditions.bytes_per_s), Pipe(conditions.bytes_per_s)
        self._shared = shared
        self._last = [0.0, 0.0]

    def __repr__(self) -> str:
        state = "open" if self.open else "broken"
        return f"<Link {self.peer.decode()} {state}, {self.carried} carried, {self.lost} lost>"

    def up(self, frames: Sequence[Buffer]) -> None:
        """From the worker to the server as it is now; one that starts meanwhile hears nothing of it."""
        server = self._server()
        if self.open and server is not None:
            frames, times = self._travel(0, frames)
            for at in times:
                self._world.after(at - self._world.now, partial(self._reach_server, server, frames))

    def down(self, server: Host, frames: Sequence[Buffer], hold: int) -> None:
        """From the server to the worker; Released and Unsendable go to the server."""
        if not self.open:
            unsent(server, self.peer, hold)
            return
        frames, times = self._travel(1, frames)
        for at in times:
            self._world.after(at - self._world.now, partial(self._reach_worker, frames))
        if hold:
            self._world.after(max(times, default=self._world.now) - self._world.now, partial(self.read, server, hold))

    def read(self, server: Host, hold: int) -> None:
        """Nothing that was sent under this hold is read any more."""
        server.handle(Released(hold))

    def cut(self, lost: Any) -> None:
        """Break. The worker hears of it, as the event `lost`, or only silence tells."""
        if self.open:
            self.open = False
            if self._chance.random() < HEARD_OF:
                self.worker.soon(lost)

    def _travel(self, way: int, frames: Sequence[Buffer]) -> tuple[Sequence[Buffer], list[float]]:
        """The frames as they are on the way, and when each copy of them arrives."""
        c, chance, world = self._conditions, self._chance, self._world
        self.carried += 1
        through = world.now
        if c.bytes_per_s or self._shared[way].bytes_per_s:
            size = sum(memoryview(frame).nbytes for frame in frames)
            through = self._shared[way].pass_through(self._pipes[way].pass_through(world.now, size), size)
        if not c.faulty:
            self._last[way] = at = max(through + c.latency.draw(chance), self._last[way])
            return frames, [at]
        draw = chance.random()
        copies = 0 if draw < c.loss else 2 if draw > 1 - c.duplicate else 1
        self.lost += copies == 0
        self.doubled += copies == 2
        return [bytes(frame) for frame in frames], [self._arrival(way, through) for _ in range(copies)]

    def _arrival(self, way: int, through: float) -> float:
        c, chance = self._conditions, self._chance
        at = through + c.latency.draw(chance)
        if chance.random() < c.reorder:
            return at + expovariate(chance, OVERTAKEN * max(c.latency.mean_s, LEAST_DELAY_S))
        self._last[way] = at = max(at, self._last[way])
        return at

    def _reach_server(self, server: Host, frames: Sequence[Buffer]) -> None:
        if self.open or self._chance.random() < ARRIVES_ANYWAY:
            server.handle(Received(self.peer, frames))

    def _reach_worker(self, frames: Sequence[Buffer]) -> None:
        if self.open:
            self.worker.handle(Received(SERVER, frames))


def unsent(server: Host, peer: bytes, hold: int) -> None:
    """Tell a server that what it sent to `peer` reaches nobody."""
    if hold:
        server.soon(Released(hold))
    server.soon(Unsendable(peer, "the peer is gone"))
