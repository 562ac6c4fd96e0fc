"""Simulated workers are processes: whatever ends one ends no other, and however a simulation ends, none is left.

Laws
* A worker that exits, crashes or raises what nobody else can read is that worker's failure, told in words.
* A run comes to the same center however many workers compute at one time.
* Killed or interrupted, a simulation leaves no process behind.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common import config
from common.config import ServerSettings
from common.errors import ParamserverError
from deploy import plan, simulation
from deploy.screens import console
from deploy.simulation import Cluster, scenario
from tests.processes import Process, cleaned_up, until

FAULTS = "loss=0.03,duplicate=0.03,cuts=4s,worker_crashes=3s,server_crashes=5s"
TASK = """
import os, sys, time
from pathlib import Path
import torch

steps = 0

class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(lambda: "no pickle takes this")
    def __str__(self):
        return "odd"

def make_task(context):
    Path(__file__).with_name(f"pid-{context.seed}-{os.getpid()}").touch()
    model = torch.nn.Linear(2, 1)
    def loss(model, batch):
        global steps
        steps += 1
        if steps > 3 and context.seed in ENDS:
            exec(ENDS[context.seed])
        time.sleep(SLEEP_S)
        return model(batch).pow(2).mean()
    return model, torch.optim.SGD(model.parameters(), lr=0.01), [torch.ones(4, 2)], loss

"""
ENDS = {1: "sys.exit(7)", 2: "os._exit(0)", 3: "os.kill(os.getpid(), 11)", 4: "raise Odd(1, 2)", 5: "sys.exit('bye')"}
WORDS: dict[str, Any] = {
    "compute": "lognormal:100ms,0.2",
    "network": "lognormal:2ms,0.5",
    "bandwidth_mb_s": 0.0,
    "server_bandwidth_mb_s": 0.0,
    "stragglers": "",
    "faults": "",
    "evaluations": 2,
    "check": True,
}


def written(folder: Path, ends: dict[int, str], sleep_s: float = 0.0) -> Path:
    """A task, some of whose workers, by their seed, do not live long."""
    task = folder / "task.py"
    task.write_text(f"ENDS, SLEEP_S = {ends!r}, {sleep_s}\n{TASK}")
    return task


def planned(directory: Path, task: Path | str, *, workers: int, updates: int) -> plan.Plan:
    flags = {"rule": "gem", "directory": str(directory), "budget_updates": str(updates), "lease_s": "4"}
    loaded = config.load(ServerSettings, file=None, environ={}, flags=flags | {"checkpoint_interval_s": "1"})
    return plan.make(loaded, task=str(task), workers=workers, solo=False, threads=1)


def running(pid: int) -> bool:
    """Whether there is such a process; one that only waits to be counted has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_what_ends_one_worker_ends_no_other_and_is_told_in_words(tmp_path: Path) -> None:
    told: list[str] = []
    made = planned(tmp_path / "run", written(tmp_path, ENDS), workers=7, updates=60)
    found = simulation.simulate(
        made, scenario.make(workers=7, **WORDS), console(), lambda level, sentence: told.append(sentence)
    )
    said = "\n".join(told)
    for sentence in (
        "worker-1 ended with exit status 7, before its training was over.",
        "worker-2 ended with exit status 0, before its training was over.",
        "worker-3 was ended by SIGSEGV, before its training was over.",
        "worker-4 failed: Odd: odd. Look at",
        "worker-5 ended with exit status 1, before its training was over.",
    ):
        assert sentence in said
    assert [row["exit"] for row in found["workers"]] == [0, 1, 1, 1, 1, 1, 0]
    assert found["updates"] >= 60


def test_workers_that_all_exit_are_one_sentence(tmp_path: Path) -> None:
    made = planned(tmp_path / "run", written(tmp_path, dict.fromkeys(range(3), "sys.exit(3)")), workers=3, updates=60)
    with pytest.raises(
        ParamserverError, match=r"^Every worker failed, the last one so: worker-2 ended with exit status 3"
    ):
        simulation.simulate(made, scenario.make(workers=3, **WORDS), console(), lambda level, sentence: None)


class Screen:
    """Nobody looks."""

    def show(self, status: dict[str, Any], curve: list[dict[str, Any]]) -> None:
        pass


def test_the_center_is_the_same_however_many_compute_at_one_time(tmp_path: Path) -> None:
    found = set()
    for at_once in (1, 2, 7):
        made = planned(tmp_path / str(at_once), "digits", workers=5, updates=60)
        cluster = Cluster(
            made, scenario.make(workers=5, **WORDS | {"faults": FAULTS}), lambda level, sentence: None, at_once=at_once
        )
        cluster.run(Screen())  # type: ignore[arg-type]
        found.add((cluster.sha256, cluster.world.events, cluster.world.now))
    assert len(found) == 1


@pytest.fixture
def simulated(tmp_path: Path) -> Iterator[Process]:
    """A simulation of three workers that takes long, once all of them train."""
    task = written(tmp_path, {}, sleep_s=0.02)
    words = ["-m", "deploy", "simulate", f"--task={task}", "--workers=3", "--budget-updates=1000", "--no-solo"]
    with cleaned_up() as processes:
        process = Process([*words, f"--directory={tmp_path / 'run'}"], tmp_path / "log")
        processes.append(process)
        until(lambda: len(workers(tmp_path)) == 3 or not process.running, "the workers")
        assert process.running, process.text
        yield process


def workers(folder: Path) -> dict[int, int]:
    """Process ids of the workers that live, by their seed: whose parent, the family, made the task, too."""
    made = [path.name.split("-")[1:] for path in folder.glob("pid-*")]
    alive = {int(pid): int(seed) for seed, pid in made if running(int(pid))}
    return {seed: pid for pid, seed in alive.items() if parent_of(pid) in alive}


def everybody(folder: Path) -> set[int]:
    """The workers, their family, and the nursery."""
    members = set(workers(folder).values())
    families = {parent_of(pid) for pid in members}
    return members | families | {parent_of(pid) for pid in families}


def test_a_worker_killed_from_outside_is_told_and_the_others_go_on(simulated: Process, tmp_path: Path) -> None:
    os.kill(workers(tmp_path)[1], signal.SIGKILL)
    until(lambda: not simulated.running, "the end", 90)
    assert simulated.wait() == 0, simulated.text
    assert "worker-1 was ended by SIGKILL, before its training was over." in simulated.text


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -9), (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_simulation_that_is_stopped_leaves_no_process(
    simulated: Process, tmp_path: Path, number: int, code: int
) -> None:
    left = everybody(tmp_path)
    assert len(left) == 5
    simulated.signal(number)
    assert simulated.wait() == code, simulated.text
    until(lambda: not any(running(pid) for pid in left), "nobody")
