"""A real server's arrivals, replayed in another process: the same center to the last bit, also after kill -9."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from common.layout import center_sha256
from deploy import arrivals
from paramserver.arrivals import name_of
from paramserver.checkpoint import checkpoints, read
from tests.processes import Process, Server, cleaned_up, until
from worker import join, tasks
from worker.tasks import Context

SHA_DIGITS = 64


def train(address: str, number: int, *, hidden: int = 0) -> int:
    """One worker on digits until training is over; how many steps it made. `hidden`: a wide model of that width."""
    task = tasks.load("digits").make(Context(0, number, f"w{number}", torch.device("cpu"), None, ""))
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10)) if hidden else task.model
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    steps = 0
    with join(address, model, optimizer, name=f"w{number}") as session:
        while not session.finished:
            for batch in task.batches:
                if session.finished:
                    break
                loss = task.loss(model, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                session.step(loss, samples=len(batch[0]))
                steps += 1
    return steps


def started(pool: ThreadPoolExecutor, address: str, *, hidden: int = 0) -> list[Future[int]]:
    return [pool.submit(train, address, number, hidden=hidden) for number in range(2)]


def saved(directory: Path) -> str:
    """SHA-256 of the center in the newest checkpoint."""
    return center_sha256(read(checkpoints(directory)[0][1]).arrays["center"])


def test_a_run_is_replayed_to_the_same_center(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    flags = ("--directory", str(directory), "--arrivals", "--rule", "gem", "--codec", "int8", "--budget-updates", "150")
    with cleaned_up() as processes, ThreadPoolExecutor(2) as pool:
        server = Server(tmp_path, *flags)
        processes.append(server)
        for worker in started(pool, server.address):
            assert worker.result(60.0) > 20
        assert server.stop() == 0, server.text
    (life,) = arrivals.replay(directory)
    assert life.verdict == "Identical."
    assert life.updates == 150
    assert life.sha256 == life.live_sha256 == saved(directory)
    assert len(life.sha256) == SHA_DIGITS


def test_a_killed_server_and_the_one_after_it_are_replayed(tmp_path: Path) -> None:
    """Updates of several chunks, on a pool of threads."""
    directory = tmp_path / "state"
    flags = ("--directory", str(directory), "--arrivals", "--checkpoint-interval-s", "0.2", "--kernel-threads", "3")
    flags += ("--reply-codec", "int8", "--budget-updates", "120")
    with cleaned_up() as processes, ThreadPoolExecutor(2) as pool:
        server = Server(tmp_path, *flags)
        processes.append(server)
        workers = started(pool, server.address, hidden=5000)
        until(lambda: (found := server.status())["updates"] > 30 and found["durable"] != "0.0", "30 updates and a save")
        server.kill()
        server = Server(tmp_path, *flags, address=server.address)
        processes.append(server)
        for worker in workers:
            assert worker.result(60.0) > 20
        assert server.stop() == 0, server.text
    first, second = arrivals.replay(directory)
    assert not first.apart
    assert "killed" in first.verdict
    assert second.verdict == "Identical."
    assert second.sha256 == second.live_sha256 == saved(directory)

    data = bytearray((directory / name_of(2)).read_bytes())
    data[-3000] ^= 4
    (directory / name_of(2)).write_bytes(data)
    replayed = Process(["-m", "deploy", "replay", "--log", str(directory)], tmp_path / "replay.log")
    assert replayed.wait() == 3
    assert "arrivals-2.log is corrupt" in " ".join(replayed.text.split())


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--rule", "downpour"), ("--rule", "gem", "--codec", "int8")], ids=" ".join)
def test_a_launch_is_replayed(tmp_path: Path, flags: tuple[str, ...]) -> None:
    directory = tmp_path / "run"
    words = ["launch", "--arrivals", "--workers=2", "--no-solo", f"--directory={directory}", "--budget-updates=300"]
    launched = Process(["-m", "deploy", *words, *flags], tmp_path / "launch.log")
    assert launched.wait() == 0, launched.text
    replayed = Process(["-m", "deploy", "replay", f"--log={directory}", "--json"], tmp_path / "replay.log")
    assert replayed.wait() == 0, replayed.text
    found = json.loads(replayed.text)
    assert found["identical"]
    assert found["sha256"] == found["live_sha256"] == saved(directory)
