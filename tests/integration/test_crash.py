"""Kill -9, for real: three workers count, one of them and then the server are killed, and the books still balance.

The oracle is the counting model: every slot is 0 or 1; all elements of the guard tensor equal the number of set slots;
whatever is missing was undone by the crash, its worker was told so, and it is above what was durable.
"""

from __future__ import annotations

import json
import socket
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest

from paramserver.checkpoint import Directory
from tests.counting_worker import STEPS_LIMIT, WORKERS
from tests.processes import Process, Server, cleaned_up, until

STEPS = 700
SCRIPT = str(Path(__file__).parent.parent / "counting_worker.py")


@pytest.mark.timeout(180)
def test_killed_worker_and_killed_server_apply_every_update_at_most_once(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    flags = ("--directory", str(directory), "--checkpoint-interval-s", "0.4", "--lease-s", "5")
    with cleaned_up() as processes:
        server = Server(tmp_path, *flags)
        processes.append(server)
        workers = []
        for index in range(3):
            arguments = [SCRIPT, server.address, f"w{index}", str(index), str(STEPS), str(tmp_path / f"w{index}.json")]
            workers.append(Process(arguments, tmp_path / f"w{index}.log"))
        processes += workers
        until(lambda: server.status()["updates"] > 150, "150 updates")
        workers[2].kill()
        until(lambda: server.status()["updates"] > 500, "500 updates")
        server.kill()
        server = Server(tmp_path, *flags, address=server.address)
        processes.append(server)
        assert server.status()["epoch"] == 2
        for worker in workers[:2]:
            assert worker.wait() == 0, worker.text
        assert server.stop() == 0, server.text

    kept = Directory.open(directory)
    loaded = kept.load()
    kept.close()
    assert loaded is not None
    slots = loaded.arrays["center"][: WORKERS * STEPS_LIMIT].reshape(WORKERS, STEPS_LIMIT)
    guard = loaded.arrays["center"][WORKERS * STEPS_LIMIT :]
    assert set(np.unique(slots)) <= {0.0, 1.0}
    assert (guard == slots.sum()).all()
    assert loaded.version.version == loaded.record["updates"]
    assert not slots[3].any()
    for index in range(2):
        told = json.loads((tmp_path / f"w{index}.json").read_text())
        assert told["flushed"]
        assert told["away"] >= 1
        assert sum(told["pushes"]) == STEPS
        ends = list(accumulate(told["pushes"]))
        missing = np.zeros(STEPS, bool)
        for first, last in told["undone"]:
            missing[ends[first - 1] - told["pushes"][first - 1] : ends[last - 1]] = True
        assert (slots[index, :STEPS] == ~missing).all(), (index, told["undone"])
        # what was trained while the server was away came along in one push
        assert max(told["pushes"]) > 1


@pytest.mark.timeout(120)
def test_a_server_outlives_connections_on_which_nobody_ever_speaks(tmp_path: Path) -> None:
    """As a balancer makes them to see whether it is there: more than ZeroMQ keeps for a monitor that nobody hears."""
    with cleaned_up() as processes:
        server = Server(tmp_path)
        processes.append(server)
        host, _, port = server.address.removeprefix("tcp://").rpartition(":")
        for _ in range(3000):
            socket.create_connection((host, int(port)), timeout=20.0).close()
        assert server.status()["updates"] == 0
        assert server.stop() == 0, server.text
