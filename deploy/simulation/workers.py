"""Who lives in a simulated cluster: its workers, each in a process of its own, and the watcher, in this one.

    worker = SimulatedWorker(ether, cores, plan, number, life)      it lives when the world comes to it
    worker.crash()                                                  kill -9
    worker.report, worker.error                                     once it is `over`

Laws
* What a worker's process wishes is done here, in virtual time: its fiber does for it what its own thread would do.
* Each draws from sources of its own: more workers, or faults, do not change what one draws.
* Whatever ends a worker, nothing of it stays: no process, no connection, nothing on the agenda.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar, cast

from common import distributions
from common.codecs.base import F32
from common.config import WorkerSettings
from common.simulator import Conditions, Host, Link, Pipe, World
from deploy.measure import Center
from deploy.plan import Plan
from deploy.screens import Say
from deploy.simulation.carrier import SimulatedCarrier
from deploy.simulation.cores import Cores
from deploy.simulation.fibers import Fiber
from deploy.simulation.pipe import Carry, Close, Compute, Computed, End, Life, Said, Told, Wait
from deploy.simulation.remote import seed
from deploy.simulation.scenario import Scenario
from worker.core import WorkerCore
from worker.driver import Machine
from worker.events import PushWanted
from worker.loop import WorkerReport
from worker.session import Membership

T = TypeVar("T")

SEEN = tuple(one.name for one in fields(Membership))
ADDRESS = "tcp://simulated:1"
AT_ONCE = distributions.parse("0", "the watcher's network")


class Ether:
    """What lies between the machines of a cluster: its time, its sources of chance, its connections."""

    def __init__(self, scenario: Scenario, seed: int, say: Say) -> None:
        self.world, self.scenario, self.say = World(), scenario, say
        self.links: dict[bytes, Link] = {}
        self.server: Callable[[], Host | None] = lambda: None
        self._seed = seed
        self._shared = Pipe(scenario.server_bytes_per_s), Pipe(scenario.server_bytes_per_s)
        self._dialled = 0

    def chance(self, *purpose: Any) -> random.Random:
        """A source of random numbers for one purpose."""
        return random.Random(f"{self._seed} {purpose}")

    def dial(self, name: str, conditions: Conditions, chance: random.Random, host: Host) -> Link:
        """A fresh connection, under a name that was never used; broken ones are forgotten."""
        self._dialled += 1
        peer = b"%s-%d" % (name.encode(), self._dialled)
        link = Link(self.world, conditions, chance, host, self.server, peer, self._shared)
        for broken in [key for key, one in self.links.items() if not one.open]:
            del self.links[broken]
        self.links[peer] = link
        return link


class Inhabitant(ABC):
    """Whoever lives in a cluster with a session at its server: one program on one machine."""

    def __init__(self, ether: Ether, name: str, life: int, conditions: Conditions) -> None:
        self.name, self.life = name, life
        self.error: Exception | None = None
        self.carrier: SimulatedCarrier | None = None
        self._ether = ether
        self._dial = partial(ether.dial, name, conditions, ether.chance("network", name, life))
        self.fiber = Fiber(ether.world, self.live, self._ended)

    @abstractmethod
    def live(self) -> None:
        """The program; it may wait."""

    @property
    def over(self) -> bool:
        return self.fiber.over

    def crash(self) -> None:
        """kill -9."""
        if self.carrier is not None:
            self.carrier.crash()
        self.fiber.kill()

    def _carry(self, core: WorkerCore, address: str = ADDRESS) -> SimulatedCarrier:
        say = self._ether.say
        self.carrier = SimulatedCarrier(core, self.fiber, self._dial, say, check=self._ether.scenario.check)
        return self.carrier

    def _ended(self, error: Exception | None) -> None:
        self.error = error
        if self.carrier is not None:
            self.carrier.crash()  # whatever it was: nothing of it stays


class SimulatedWorker(Inhabitant):
    """One life of one worker: the reference training loop in a process, and the time that its steps take."""

    def __init__(self, ether: Ether, cores: Cores, plan: Plan, number: int, life: int) -> None:
        super().__init__(ether, f"worker-{number}", life, ether.scenario.conditions)
        self.report: WorkerReport | None = None
        self._chance = ether.chance("compute", number, life)
        self._factor = ether.scenario.factors[number]
        self._seen = _Seen()
        self._spare: F32 | None = None
        """The last vector that was told, and copied so: memory for the next one."""
        settings = WorkerSettings(
            address=ADDRESS,
            name=self.name,
            task=plan.task,
            device=plan.devices[number],
            seed=plan.seed_of(number + len(plan.devices) * life),
            optimizer=cast(Any, plan.optimizer or "task"),
            mechanism=plan.mechanism or None,
            connect_timeout_s=86_400,
        )
        self._process = cores.start(Life(settings, number, life))

    @property
    def known_as(self) -> str:
        """Its name on the server, which may have given the one that it asked for to an earlier life."""
        return (self.carrier.core.membership.worker if self.carrier is not None else "") or self.name

    def live(self) -> None:
        """Do what its process wishes, until it has no wish left."""
        while True:
            said = self._process.hear()
            self._post(said)
            match said.wish:
                case Compute(steps):
                    seconds = sum(self._step_s() for _ in range(steps))
                    self._process.compute(self._ether.world.now + seconds)
                    self.fiber.sleep(seconds)
                case Computed():
                    self._tell(0.0)
                case Carry(core):
                    self._carry(core)
                    self._tell(0.0)
                case Wait(timeout_s):
                    self._tell(timeout_s)
                case Close(timeout_s):
                    assert self.carrier is not None
                    self.carrier.close(timeout_s)
                    self._tell(0.0)
                case End(report, error):
                    self.report = report
                    if error is not None:
                        raise error
                    return

    def crash(self) -> None:
        """kill -9."""
        super().crash()
        self._process.end()

    def _post(self, said: Said) -> None:
        for event in said.posts:
            assert self.carrier is not None
            if isinstance(event, PushWanted):
                event, self._spare = replace(event, spare=self._spare), None
            self.carrier.post(event)

    def _tell(self, timeout_s: float | None) -> None:
        """All news, once there is some, or so much time has passed."""
        if self.carrier is None:
            self._process.tell(Told(self._ether.world.now))
            return
        news = self.carrier.all_news(timeout_s)
        core = self.carrier.core
        self._process.tell(Told(self._ether.world.now, news, core.phase, self._seen.changes(core.membership)))
        for one in news:
            self._spare = getattr(one, "values", None) if self._spare is None else self._spare

    def _step_s(self) -> float:
        return self._factor * self._ether.scenario.compute.draw(self._chance)

    def _ended(self, error: Exception | None) -> None:
        super()._ended(error)
        self._process.end()


class Watcher(Inhabitant):
    """Looks at the center when it is told to, over a network without delay or fault."""

    def __init__(self, ether: Ether, plan: Plan, describe: Callable[[], dict[str, Any]]) -> None:
        super().__init__(ether, "watcher", 0, Conditions(AT_ONCE))
        self._describe = describe
        self._wanted = self._looks = 0
        machine = Machine(
            host="host-watcher",
            process=0,
            instance="watcher-0",
            carry=self._carry,
            now=lambda: ether.world.now,
            compute=self._compute,
        )
        self.center = Center(plan.center, ether.say, machine=machine)
        seed(0)

    def look(self) -> None:
        """Look once more, as soon as nothing that was wanted before is left to do."""
        self._wanted += 1
        self.fiber.wake()

    @property
    def done(self) -> bool:
        """Whether it has looked as often as was wanted, or cannot."""
        return self._looks == self._wanted or self.over

    def live(self) -> None:
        while True:
            while self._looks == self._wanted:
                self.fiber.wait(None)
            found = self._describe()
            if found["version"] and self.center.evaluates:
                self.center.look(ADDRESS, found, self._ether.world.now)
            self._looks += 1

    def _compute(self, work: Callable[[], T], steps: int) -> T:
        self.fiber.sleep(0.0)
        return work()


class _Seen:
    """What a process knows of the membership that is here."""

    def __init__(self) -> None:
        self._told: dict[str, Any] = {}

    def changes(self, membership: Membership) -> dict[str, Any]:
        """What it does not know yet."""
        found = dict[str, Any]()
        for name in SEEN:
            value = getattr(membership, name)
            if name not in self._told or (value is not self._told[name] and value != self._told[name]):
                self._told[name] = found[name] = value
        return found
