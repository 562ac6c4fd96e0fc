"""Virtual time: a clock, hosts that drive sans-IO nodes, and links on which messages are late, lost or doubled. Pure.

    world = World()
    server = Host(world, core, do)               its events in, its actions to `do`
    link = Link(world, conditions, chance, ...)   one connection between two hosts

Laws
* Nothing reads a clock. Everything random comes from a `Chance` that is given; so one seed is one run, bit for bit.
* What happens at the same time happens in the order in which it was arranged; what is called off leaves no trace.
* Nodes meet only as encoded frames. A link that may double or delay carries copies, made when sent; any other carries
  the buffers themselves, which senders must not change until they are released or answered.
* Messages of one way keep their order, but for those that are late on purpose. A pipe is idle only when nothing waits
  for it.
* A buffer sent under a hold is released once no copy of it is on its way any more.
* A node that asks for Ticks without end, or a world in which time stands still, is an error and no endless loop.
* The dead take nothing in and do nothing more; what they had sent may still arrive.

Left out: what the nodes are, and faults that are more than a link's (`deploy.simulation`, and the tests' own).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from common.distributions import Chance, Distribution, expovariate
from common.messages import Buffer
from common.node import Node, Received, Released, Tick, Unsendable
from common.transports.base import SERVER

EVENTS_AT_ONCE = 100_000
"""So many events without any time passing are a world that turns without end."""
TICKS_AT_ONCE = 1_000
"""So many Ticks after which a node at once wants another are a node that turns without end."""
CALLED_OFF = 64
"""So many entries that were called off may lie on the agenda, and as many as there are others."""
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
        self._agenda: list[tuple[float, int]] = []
        """A heap of when, and under which number; what was called off stays until it is the next, or too much."""
        self._acts: dict[int, Callable[[], None]] = {}
        self._count = itertools.count(1)
        self._at_once = 0

    def __repr__(self) -> str:
        return f"<World at {self.now:g} s, {self.events:,} events, {len(self._acts):,} to come>"

    def at(self, time_s: float, act: Callable[[], None]) -> int:
        """Do `act` at that time, or next where it has passed; returns the number under which it is called off."""
        number = next(self._count)
        self._acts[number] = act
        heapq.heappush(self._agenda, (max(self.now, time_s), number))
        return number

    def after(self, delay_s: float, act: Callable[[], None]) -> int:
        """Do `act` in so many seconds; returns the number under which it is called off."""
        return self.at(self.now + delay_s, act)

    def call_off(self, number: int) -> None:
        """Let it not happen; where it has happened, nothing."""
        if self._acts.pop(number, None) and len(self._agenda) > 2 * len(self._acts) + CALLED_OFF:
            self._agenda = [entry for entry in self._agenda if entry[1] in self._acts]
            heapq.heapify(self._agenda)

    def step(self, until_s: float = float("inf")) -> bool:
        """Let the next thing happen; False where nothing is to come until then. Raises RuntimeError where time stands
        still."""
        while self._agenda and self._agenda[0][1] not in self._acts:
            heapq.heappop(self._agenda)
        if not self._agenda or self._agenda[0][0] > until_s:
            return False
        at, number = heapq.heappop(self._agenda)
        act = self._acts.pop(number)
        self._at_once = self._at_once + 1 if at == self.now else 0
        if self._at_once >= EVENTS_AT_ONCE:
            raise RuntimeError(f"{EVENTS_AT_ONCE:,} events, and it is still {self.now:g} s: {self!r}, next {act!r}")
        self.now = at
        self.events += 1
        act()
        return True

    def run_for(self, seconds: float) -> None:
        """Let so much time pass."""
        end = self.now + seconds
        while self.step(end):
            pass
        self.now = end


class Host:
    """Drives one node: events in, actions to `do`, a Tick at each deadline. Once dead it takes nothing more.

    check: validate the node after each event.
    """

    def __init__(self, world: World, node: Node, do: Callable[[Any], None], *, check: bool = False) -> None:
        self.world, self.node, self.dead = world, node, False
        self._do, self._check = do, check
        self._wake_at = float("inf")
        self._timer = 0
        """Its number on the agenda."""
        self._ticks = 0
        """So many in a row after each of which another was wanted at once."""

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
        self.world.call_off(self._timer)

    def _set_timer(self) -> None:
        """A Tick at the deadline. Deadlines mostly move away: one that is set stays, and looks again when it comes."""
        deadline, now = self.node.deadline(), self.world.now
        if deadline is None or deadline > now + LATE_S:
            self._ticks = 0
        if not self.dead and deadline is not None and deadline < self._wake_at:
            self.world.call_off(self._timer)
            self._wake_at = deadline
            self._timer = self.world.at(max(deadline, now) + LATE_S, self._wake)

    def _wake(self) -> None:
        self._wake_at = float("inf")
        deadline = self.node.deadline()
        self._ticks += 1
        if self._ticks > TICKS_AT_ONCE:
            raise RuntimeError(f"{self!r} wants Ticks without end: at {self.world.now:g} s one for {deadline:g} s")
        if deadline is not None and deadline <= self.world.now:
            self.handle(Tick())
        else:
            self._set_timer()


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


UP, DOWN = 0, 1


class _Message(NamedTuple):
    way: int
    frames: Sequence[Buffer]
    reach: Callable[[Sequence[Buffer]], None]
    """Called when a copy arrives."""
    read: Callable[[], None] | None = None
    """Called when its buffers are no longer read."""


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
        own = Pipe(conditions.bytes_per_s), Pipe(conditions.bytes_per_s)
        ways = (own[UP], shared[UP]), (shared[DOWN], own[DOWN])
        self._pipes = [[pipe for pipe in way if pipe.bytes_per_s] for way in ways]
        """Of each way, those that a message passes, in order."""
        self._last = [0.0, 0.0]
        self._left = False

    def __repr__(self) -> str:
        state = "open" if self.open else "broken"
        return f"<Link {self.peer.decode()} {state}, {self.carried} carried, {self.lost} lost>"

    def up(self, frames: Sequence[Buffer]) -> None:
        """From the worker to the server as it is now; one that starts meanwhile hears nothing of it."""
        server = self._server()
        if self.open and server is not None:
            self._send(_Message(UP, frames, partial(self._reach_server, server)))

    def down(self, server: Host, frames: Sequence[Buffer], hold: int) -> None:
        """From the server to the worker; Released and Unsendable go to the server."""
        if self.open:
            read = partial(self.read, server, hold) if hold else None
            self._send(_Message(DOWN, frames, self._reach_worker, read))
        else:
            unsent(server, self.peer, hold)

    def read(self, server: Host, hold: int) -> None:
        """Nothing that was sent under this hold is read any more."""
        server.handle(Released((hold,)))

    def read_at(self, arrivals_s: Sequence[float]) -> float:
        """When the buffers of a message, whose copies arrive then, are no longer read: with the last of them."""
        return max(arrivals_s, default=self._world.now)

    def cut(self, lost: Any) -> None:
        """Break. The worker hears of it, as the event `lost`, or only silence tells."""
        if self.open:
            self.open = False
            if self._chance.random() < HEARD_OF:
                self._world.after(0.0, partial(self._hear, lost))

    def close(self) -> None:
        """The worker leaves it, and hears nothing more of it."""
        self.open, self._left = False, True

    def _hear(self, lost: Any) -> None:
        if not self._left:
            self.worker.handle(lost)

    def _send(self, message: _Message) -> None:
        self.carried += 1
        if self._conditions.faulty:
            message = message._replace(frames=[bytes(frame) for frame in message.frames])
        self._enter(self._pipes[message.way], message)

    def _enter(self, pipes: Sequence[Pipe], message: _Message) -> None:
        """Into the first of these pipes, once it has come so far: none that is still elsewhere keeps a place in it."""
        through = self._world.now
        if pipes:
            through = pipes[0].pass_through(through, sum(memoryview(frame).nbytes for frame in message.frames))
        if len(pipes) > 1:
            self._world.at(through, partial(self._enter, pipes[1:], message))
            return
        arrivals = [self._arrival(message.way, through) for _ in range(self._copies())]
        for at in arrivals:
            self._world.at(at, partial(message.reach, message.frames))
        if message.read is not None:
            self._world.at(self.read_at(arrivals), message.read)

    def _copies(self) -> int:
        c = self._conditions
        if not (c.loss or c.duplicate):
            return 1
        draw = self._chance.random()
        copies = 0 if draw < c.loss else 2 if draw > 1 - c.duplicate else 1
        self.lost += copies == 0
        self.doubled += copies == 2
        return copies

    def _arrival(self, way: int, through: float) -> float:
        c, chance = self._conditions, self._chance
        at = through + c.latency.draw(chance)
        if c.reorder and chance.random() < c.reorder:
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
        server.soon(Released((hold,)))
    server.soon(Unsendable(peer, "the peer is gone"))
