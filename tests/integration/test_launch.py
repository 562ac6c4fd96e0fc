"""A whole run on this machine, with real processes: how it ends, and that nothing of it is left, however it ends.

A process belongs to a run if its command line names the run's directory.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from common.errors import NetworkError
from common.query import status
from tests.processes import Process, until

TASK = '''
import torch
from torch.nn import functional
from worker.tasks import Task
from worker.tasks.base import Evaluation

def make_task(context):
    """Which half-space a point lies in."""
    x = torch.randn(512, 8)
    y = (x.sum(1) > 0).long()
    model = torch.nn.Linear(8, 2)

    def evaluate(model):
        with torch.no_grad():
            right = (model(x).argmax(1) == y).float().mean()
            return Evaluation(float(functional.cross_entropy(model(x), y)), float(right), len(x))

    return Task(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        list(zip(x.split(32), y.split(32))),
        lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]),
        evaluate=evaluate,
    )
'''
ENDLESS = ("--no-solo", "--budget-updates", "100000000")


class Launch(Process):
    """`paramserver launch` in a directory of its own."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.directory = folder / "run"
        task = folder / "points.py"
        task.write_text(TASK)
        words = ["-m", "deploy", "launch", "--task", str(task), "--directory", str(self.directory), *flags]
        super().__init__(words, folder / "launch.log")

    def status(self) -> dict[str, Any]:
        """What its server says; empty before it is there."""
        with suppress(OSError, NetworkError):
            return status((self.directory / "address").read_text().strip(), timeout_s=20.0)
        return {}

    def wait_for_training(self) -> None:
        """Until the first updates are applied."""
        until(lambda: not self.running or self.status().get("updates", 0) > 20, "training")
        assert self.running, self.text

    def child(self, name: str) -> int:
        """Process id of the server, or of a worker."""
        words = "serve" if name == "server" else f"--name={name}"
        return next(pid for pid, line in processes(self.directory) if words in line)


def processes(directory: Path) -> Iterator[tuple[int, list[str]]]:
    """Process id and command line of each process of a run."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(str(directory) in word for word in line):
                yield int(folder.name), line


def assert_nothing_is_left(directory: Path, timeout_s: float = 0.0) -> None:
    deadline = time.monotonic() + timeout_s
    while (left := list(processes(directory))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    assert not [path for path in directory.rglob("*") if path.is_socket()]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Any]:
    started: list[Launch] = []

    def start(*flags: str) -> Launch:
        started.append(Launch(tmp_path, *flags))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        for pid, _ in processes(one.directory):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(180)
def test_a_run_ends_by_itself_and_reports(launch: Any) -> None:
    run = launch("--workers", "2", "--rule", "gem", "--set", "kappa=0.5", "--budget-updates", "200", "--seed", "3")
    assert run.wait() == 0, run.text
    assert_nothing_is_left(run.directory)
    assert not (run.directory / "address").exists()
    assert list(run.directory.glob("checkpoint-*-*/manifest.json"))
    assert (run.directory / "report.html").stat().st_size > 1000
    found = json.loads((run.directory / "report.json").read_text())
    assert found["updates"] == 200
    assert found["center_accuracy"] > 0.6
    assert found["solo_accuracy"] > 0.6
    assert found["curve"][-1]["updates"] == 200
    assert found["solo"]["steps"] == 100
    assert {row["name"]: row["exit"] for row in found["workers"]} == {"worker-0": 0, "worker-1": 0}
    assert sum(row["updates"] for row in found["workers"]) == 200
    assert found["seeds"] == {"server": 3, "weights": 3, "worker-0": 3, "worker-1": 4}
    origins = {row["name"]: row["origin"] for row in found["settings"]}
    assert origins["rule"] == "flag --rule"
    assert origins["bind"] == "launch"
    for word in ("accuracy", "one worker alone", "lag", "report.html"):
        assert word in run.text


@pytest.mark.timeout(180)
def test_a_killed_worker_does_not_stop_the_run(launch: Any) -> None:
    run = launch("--workers", "2", "--no-solo", "--budget-s", "3")
    run.wait_for_training()
    victim = run.child("worker-1")
    os.kill(victim, signal.SIGKILL)
    assert run.wait() == 0, run.text
    assert "worker-1 died (killed by SIGKILL)" in run.text
    assert_nothing_is_left(run.directory)
    rows = {row["name"]: row for row in json.loads((run.directory / "report.json").read_text())["workers"]}
    assert (rows["worker-0"]["exit"], rows["worker-1"]["exit"]) == (0, -signal.SIGKILL)
    assert rows["worker-0"]["updates"] > 20


@pytest.mark.timeout(180)
def test_ctrl_c_leaves_nothing(launch: Any) -> None:
    run = launch("--workers", "2", *ENDLESS)
    run.wait_for_training()
    until(lambda: " updates " in run.text, "the launcher to have seen an update")
    run.signal(signal.SIGINT)
    assert run.wait(8.0) == 130, run.text
    assert_nothing_is_left(run.directory)
    assert list(run.directory.glob("checkpoint-*-*/manifest.json")), "the last state is saved"
    assert "Traceback" not in run.text
    log = [json.loads(line) for line in (run.directory / "run.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "leave" and line["role"] == "worker" for line in log) == 2, "workers say goodbye"
    report = json.loads((run.directory / "report.json").read_text())
    assert report["exit"] == "stopped before the budget was used up"
    assert report["updates"] > 0


@pytest.mark.timeout(180)
def test_a_killed_launcher_leaves_nothing(launch: Any) -> None:
    run = launch("--workers", "1", *ENDLESS)
    run.wait_for_training()
    run.kill()
    assert_nothing_is_left(run.directory, timeout_s=5.0)


@pytest.mark.timeout(180)
def test_a_killed_server_ends_the_run_with_its_reason(launch: Any) -> None:
    run = launch("--workers", "1", *ENDLESS)
    run.wait_for_training()
    os.kill(run.child("server"), signal.SIGKILL)
    assert run.wait(20.0) == 1, run.text
    assert "error: The server died (killed by SIGKILL). Its last lines:" in run.text
    assert "worker-0 supplied the initial weights." in run.text
    assert "Traceback" not in run.text
    assert_nothing_is_left(run.directory)
