"""A cluster in virtual time: the real server, the real training loop in every worker, a made-up network between them.

    cluster = Cluster(plan, scenario, say)
    cluster.run(screen)                      until the budget is used up and everybody has left
    cluster.status, cluster.rows(), cluster.center.curve, cluster.sha256

Laws
* One seed, one run: the same plan and scenario give the same center, bit for bit, however fast the machine is. (The
  same versions of torch and numpy, and the same number of threads, are taken for granted.)
* Gradients are real. How long a step takes is drawn; nothing of others reaches a worker but by its exchanges.
* Each worker draws from sources of its own: more workers, or faults, do not change what one draws.

Left out: what is reported (`deploy.simulation`).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from common.distributions import expovariate
from common.errors import NetworkError, ParamserverError
from common.layout import center_sha256
from deploy import nursery
from deploy.measure import Center
from deploy.plan import Plan
from deploy.screens import Say, Screen
from deploy.simulation.cores import Cores, WorkerEnded
from deploy.simulation.remote import TaskFailed
from deploy.simulation.scenario import Scenario
from deploy.simulation.server import Server
from deploy.simulation.workers import Ether, SimulatedWorker, Watcher
from paramserver import daemon, status

EVENTS_PER_LOOK = 64
"""Between two looks at whether all is done, and at whether to show progress."""
SHOW_S = 0.2
"""Of real time, between two looks of the person who watches."""
AWAY_S = (0.5, 2.0)
"""A crashed server is away for so long, at least and at most; a crashed worker, too."""
SPARE = 1
"""So many workers more than there are cores compute at one time: one or the other always waits for a word."""
START_S = 1e-3
"""Workers start so far apart."""
STILL_LEASES, STILL_STEPS = 100, 1000
"""So many leases and steps without anything new are a cluster that stands still."""
STILL_EVENTS, STILL_EVENTS_EACH = 100_000, 100_000
"""So many events, and so many more for each worker, without anything new are one, too."""
LEAVE_LEASES = 4
"""After the end, workers have so long to leave."""


class Cluster:
    """One server, its workers, and what befalls them. at_once: workers that compute at one time; None: as many as
    there are cores for, and a spare one."""

    def __init__(self, plan: Plan, scenario: Scenario, say: Say, *, at_once: int | None = None) -> None:
        self._plan, self._scenario = plan, scenario
        settings = plan.server.settings
        family = nursery.family(
            "deploy.simulation.remote:prepare",
            server=settings.model_dump(mode="json", exclude_unset=True),
            task=plan.task,
            data=str(plan.data) if plan.data else None,
            optimizer=plan.optimizer,
            model_seed=plan.seed,
            threads=plan.threads,
        )
        try:
            at_once = at_once or len(os.sched_getaffinity(0)) // plan.threads + SPARE
            self._cores = Cores(family, at_once, len(plan.devices))
            daemon.warm(settings)
            self._make(say)
            family.wait()
        except BaseException:
            family.close()
            raise

    def _make(self, say: Say) -> None:
        plan, scenario, settings = self._plan, self._scenario, self._plan.server.settings
        torch.set_num_threads(plan.threads)
        self._ether = ether = Ether(scenario, plan.seed, say)
        self.world = ether.world
        self.server = Server(ether.world, settings, ether.links, say, check=scenario.check)
        ether.server = lambda: self.server.host
        self.server.start()
        self.workers: list[SimulatedWorker] = []
        for number in range(len(plan.devices)):
            self.world.after(number * START_S, partial(self._start_worker, number, 0))
        self._watcher = Watcher(ether, plan, lambda: self.status)
        self._status: dict[str, Any] = {}
        self._looked = 0
        self._news: tuple[Any, float, int] = (None, 0.0, 0)
        """The last thing that was new; at what time, after how many events."""
        self.crashes = {"worker": 0, "server": 0, "cut": 0}
        self.sha256 = ""
        self.real_seconds = 0.0, 0.0
        """What training took of real time, and of CPU time."""
        self._arrange_faults()

    @property
    def center(self) -> Center:
        """Its curve: how good the center was over time."""
        return self._watcher.center

    @property
    def status(self) -> dict[str, Any]:
        """What the server says of itself; while it is down, what it said last."""
        if self.server.core is not None:
            self._status = status.describe(self.server.core, self.world.now)
        return self._status

    def run(self, screen: Screen) -> None:
        """Until the budget is used up and everybody has left; raises ParamserverError where it comes to no end."""
        started_s, used_s = time.monotonic(), self._used_s
        try:
            self._train(screen)
            self.real_seconds = time.monotonic() - started_s, self._used_s - used_s
            self._leave()
            trained_s = self.status["elapsed_s"]
            self._finish()
            self._status["elapsed_s"] = trained_s
        finally:
            self.close()

    def close(self) -> None:
        """Leave nothing running."""
        for one in (*self.workers, self._watcher):
            one.crash()
        self._cores.close()
        self.server.close()

    @property
    def _used_s(self) -> float:
        """CPU time so far, of this process and of the workers'."""
        return time.process_time() + self._cores.used_s

    def rows(self) -> list[dict[str, Any]]:
        """What each worker did: what it said at its end, and what the server counted."""
        counted = {row["name"]: row for row in self._status.get("workers", [])}
        return [
            {"device": self._plan.devices[number], "exit": 0 if worker.report else 1 if worker.error else None}
            | (asdict(worker.report) if worker.report else {})
            | counted.get(worker.known_as, {})
            | {"name": worker.known_as}
            for number, worker in enumerate(self.workers)
        ]

    # From the first to the last

    def _train(self, screen: Screen) -> None:
        shown_s = 0.0
        while True:
            self._step()
            if self.world.events % EVENTS_PER_LOOK:
                continue
            core = self.server.core
            if core is not None:
                if core.state.diverged:
                    raise ParamserverError(
                        "Training diverged: the center is no longer finite.",
                        fix="Lower the learning rate, or choose a rule that scales updates, such as gem.",
                    )
                if core.finished:
                    break
                self._look_if_due(core.state.budget.share(self.world.now))
            self._expect_progress()
            if time.monotonic() >= shown_s:
                screen.show(self.status, self.center.curve)
                shown_s = time.monotonic() + SHOW_S

    def _leave(self) -> None:
        """Let the workers say goodbye, and whoever does not hear it give up."""
        end = self.world.now + LEAVE_LEASES * self._plan.server.settings.lease_s
        end += STILL_STEPS * self._slowest_s / 100
        while self.world.now < end and not all(worker.over for worker in self.workers):
            self._step()

    def _finish(self) -> None:
        """A last look at the center, and the end of the server."""
        while self.server.core is None or self.server.core.shard is None:
            self._step()
        self._watcher.look()
        while not self._watcher.done:
            self._step()
        if self._watcher.error is not None:
            raise self._watcher.error
        self._status = self.status
        shard = self.server.core.shard
        self.sha256 = center_sha256(shard.center)
        self._watcher.crash()
        self.server.stop("the simulation ends")
        while not self.server.exited:
            self._step()

    def _step(self) -> None:
        self._cores.turn()
        if not self.world.step():
            raise ParamserverError("Nothing is left to happen, and the budget is not used up.", fix="Report this.")

    def _look_if_due(self, share: float) -> None:
        """A point of the center's curve; evenly over the budget, the last one at the end."""
        if share * self._scenario.evaluations >= self._looked + 1 and self._looked + 1 < self._scenario.evaluations:
            self._looked += 1
            self._watcher.look()

    # Workers

    @property
    def _slowest_s(self) -> float:
        return max(self._scenario.factors) * self._scenario.compute.mean_s

    def _start_worker(self, number: int, life: int) -> None:
        worker = SimulatedWorker(self._ether, self._cores, self._plan, number, life)
        self.workers[number : number + 1] = [worker]

    def _expect_progress(self) -> None:
        """Raises where every worker failed, or the center cannot be looked at, or nothing new comes for very long."""
        if self._watcher.error is not None:
            raise self._watcher.error
        if self.workers and all(worker.error for worker in self.workers):
            error = self.workers[-1].error
            if isinstance(error, TaskFailed | WorkerEnded):
                raise ParamserverError(f"Every worker failed, the last one so: {error.sentence}", fix=error.fix)
            assert error is not None
            raise error
        budget = self.server.core.state.budget if self.server.core is not None else None
        news = (budget.updates, budget.samples) if budget else None
        if news != self._news[0]:
            self._news = news, self.world.now, self.world.events
            return
        still_s = STILL_LEASES * self._plan.server.settings.lease_s + STILL_STEPS * self._slowest_s
        still_events = STILL_EVENTS + STILL_EVENTS_EACH * len(self.workers)
        if self.world.now - self._news[1] > still_s or self.world.events - self._news[2] > still_events:
            waits = "; ".join(self.status.get("waiting_for", [])) or "the next update"
            raise NetworkError(
                f"The simulated cluster stands still since {self._news[1]:,.0f} s of its time: it waits for {waits}.",
                fix="Make the faults rarer, or the network faster.",
            )

    # Faults

    def _arrange_faults(self) -> None:
        faults = self._scenario.faults
        kinds = (
            ("cut", faults.cuts, self._cut),
            ("worker", faults.worker_crashes, self._crash_worker),
            ("server", faults.server_crashes, self._crash_server),
        )
        for kind, every_s, befall in kinds:
            if every_s is not None:
                self._again_and_again(kind, every_s, befall)

    def _again_and_again(self, kind: str, every_s: float, befall: Callable[[random.Random], bool]) -> None:
        chance = self._ether.chance("faults", kind)

        def happen() -> None:
            if not (self.server.exited or (self.server.core is not None and self.server.core.finished)):
                self.crashes[kind] += befall(chance)
                self.world.after(expovariate(chance, every_s), happen)

        self.world.after(expovariate(chance, every_s), happen)

    def _cut(self, chance: random.Random) -> bool:
        carriers = [worker.carrier for worker in self.workers if worker.carrier is not None and not worker.over]
        if carriers:
            chance.choice(carriers).cut()
        return bool(carriers)

    def _crash_worker(self, chance: random.Random) -> bool:
        alive = [number for number, worker in enumerate(self.workers) if not worker.over]
        if not alive:
            return False
        number = chance.choice(alive)
        self.workers[number].crash()
        life = self.workers[number].life + 1
        self.world.after(chance.uniform(*AWAY_S), partial(self._start_worker, number, life))
        return True

    def _crash_server(self, chance: random.Random) -> bool:
        if self.server.core is None:
            return False
        self._status = self.status
        self.server.crash()
        for worker in self.workers:
            if worker.carrier is not None:
                worker.carrier.cut()
        if self._watcher.carrier is not None:
            self._watcher.carrier.cut()
        self.world.after(chance.uniform(*AWAY_S), self.server.start)
        return True
