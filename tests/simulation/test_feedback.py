"""Error feedback through the real session and the real server, whatever the network does to their messages.

Law: the center and what the workers remember make up all that was trained: nothing is lost, and nothing counts twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import codecs
from common.codecs.base import F32
from common.config import ServerSettings
from deploy.simulation import scenario
from deploy.simulation.server import Server
from deploy.simulation.workers import ADDRESS, Ether, Inhabitant
from worker import join
from worker.driver import Machine
from worker.trainer import Session

STEPS, STEP_S = 60, 0.05
WORKERS = 2
CODECS = ["topk:0.05", "ef:int8", "int4", "e3m0", "sign", "ef:randomk:0.05", "topk:0.05:int8", "powersgd"]
FAULTS = {"none": "", "loss": "loss=0.05", "all": "loss=0.03,duplicate=0.1,reorder=0.1", "cuts": "cuts=1s"}


def silent(level: str, sentence: str) -> None:
    """Nobody listens."""


class Trainer(Inhabitant):
    """Adds made-up progress to a model and pushes it, once a step."""

    steps = STEPS

    def __init__(self, ether: Ether, number: int) -> None:
        self.model = torch.nn.Linear(100, 70)
        for parameter in self.model.parameters():
            torch.nn.init.zeros_(parameter)
        self.session: Session | None = None
        self.total = np.zeros(sum(p.numel() for p in self.model.parameters()))
        self._number, self._random = number, np.random.default_rng(number)
        super().__init__(ether, f"worker-{number}", 0, ether.scenario.conditions)
        self.machine = Machine("here", number, f"{self.name}-0", self._carry, lambda: ether.world.now)

    def live(self) -> None:
        self.session = self.join(torch.optim.SGD(self.model.parameters(), lr=0.1))
        for _ in range(self.steps):
            self.fiber.sleep(STEP_S * (1 + 0.46 * self._number))
            d, refused = self.train(), self.session.exchanges.rejected
            self.session.step(1.0, samples=1)
            if self.session.exchanges.rejected == refused:
                self.total += d  # of what is refused nothing stays
        assert self.session.flush(600.0)
        self.done()
        self.session.close()

    def join(self, optimizer: torch.optim.Optimizer) -> Session:
        return join(ADDRESS, self.model, optimizer, name=self.name, machine=self.machine)

    def done(self) -> None:
        """All is pushed and settled, and the session is still there."""

    def train(self) -> F32:
        """x <- x + d."""
        d = (self._random.standard_normal(self.total.size) * 0.01).astype(np.float32)
        with torch.no_grad():
            at = 0
            for parameter in self.model.parameters():
                parameter += torch.from_numpy(d[at : at + parameter.numel()]).view_as(parameter)
                at += parameter.numel()
        return d

    @property
    def remembered(self) -> Any:
        assert self.session is not None
        memory = self.session._vectors.memory
        assert memory is not None
        return memory.e


@contextmanager
def ran(
    directory: Path,
    faults: str,
    *,
    kind: type[Trainer] = Trainer,
    seed: int = 0,
    network: str = "lognormal:2ms,0.5",
    bandwidth_mb_s: float = 0.0,
    **settings: Any,
) -> Iterator[tuple[Any, list[Trainer]]]:
    """The center, (elements,) float64, and the workers, when all have left. seed: the network's."""
    made = scenario.make(
        workers=WORKERS,
        compute="50ms",
        network=network,
        bandwidth_mb_s=bandwidth_mb_s,
        server_bandwidth_mb_s=0.0,
        stragglers="",
        faults=faults,
        evaluations=1,
        check=True,
    )
    ether = Ether(made, seed, silent)
    server = Server(ether.world, ServerSettings(directory=directory, **settings), ether.links, silent, check=True)
    ether.server = lambda: server.host
    server.start()
    trainers = [kind(ether, number) for number in range(WORKERS)]
    if made.faults.cuts is not None:
        for number in range(1, 40):
            ether.world.after(number * 0.31, partial(cut, trainers[number % WORKERS]))
    try:
        while not all(trainer.over for trainer in trainers):
            assert ether.world.step(), "nothing is left to happen"
        for trainer in trainers:
            if trainer.error is not None:
                raise trainer.error
        assert server.core is not None
        assert server.core.shard is not None
        yield server.core.shard.center.astype(np.float64), trainers
    finally:
        for trainer in trainers:
            trainer.crash()
        server.close()


def cut(trainer: Trainer) -> None:
    """Its connection, unless it is gone."""
    if trainer.carrier is not None and not trainer.over:
        trainer.carrier.cut()


def expect_conserved(center: Any, trainers: list[Trainer], share: float = 1.0) -> None:
    """share: the part of an update that moves the center."""
    remembered = sum(trainer.remembered.astype(np.float64) for trainer in trainers)
    assert np.abs(remembered).max() > 1e-6, "there is something to remember"
    total = sum(trainer.total for trainer in trainers)
    np.testing.assert_allclose(center + share * remembered, share * total, atol=1e-4)


@pytest.mark.parametrize("faults", FAULTS)
@pytest.mark.parametrize("codec", CODECS)
def test_center_and_memories_make_up_all_that_was_trained(codec: str, faults: str, tmp_path: Path) -> None:
    with ran(tmp_path, FAULTS[faults], codec=codec, lease_s=4) as (center, trainers):
        expect_conserved(center, trainers)


@pytest.mark.parametrize("codec", ["topk:0.05", "powersgd"])
def test_a_refused_update_leaves_the_memory_as_it_was(codec: str, tmp_path: Path) -> None:
    more = {"max_lag": 1, "beyond_max_lag": "reject", "rejected_per_minute": 1000}
    with ran(tmp_path, "", codec=codec, lease_s=4, **more) as (center, trainers):
        assert sum(trainer.session.exchanges.rejected for trainer in trainers if trainer.session) >= 3
        expect_conserved(center, trainers)


@pytest.mark.parametrize("faults", FAULTS)
def test_overlap_changes_nothing_of_that(faults: str, tmp_path: Path) -> None:
    with ran(tmp_path, FAULTS[faults], codec="topk:0.05", lease_s=4, overlap=True) as (center, trainers):
        expect_conserved(center, trainers)


def test_nor_do_rounds(tmp_path: Path) -> None:
    more = {"rule": "local_sgd", "local_steps": 2, "workers": WORKERS}
    with ran(tmp_path, FAULTS["all"], codec="topk:0.05", lease_s=4, **more) as (center, trainers):
        expect_conserved(center, trainers, share=1 / WORKERS)


def test_one_run_is_one_sequence_of_random_numbers(tmp_path: Path) -> None:
    """Whatever the network repeats: the seed decides, also where a codec rounds at random."""
    centers = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        with ran(tmp_path / name, FAULTS["all"], codec="terngrad", lease_s=4, seed=seed) as (center, _):
            centers.append(center.tobytes())
    assert centers[0] == centers[1] != centers[2]


def test_the_codecs_here_feed_back() -> None:
    assert all(codecs.load(name).remembers for name in CODECS)
