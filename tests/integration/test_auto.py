"""Codec `auto` on real links: it compresses where 100 Mbit/s limit it, not in shared memory, and says why."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch

from tests.processes import Server, cleaned_up
from worker import join
from worker.choosing import ROUNDS

LIMIT_BYTES_S = 100e6 / 8
PIECE_BYTES = 65_536
CANDIDATES = 3
UPDATE_BYTES = 4 * 300_000


def relay(source: socket.socket, target: socket.socket) -> None:
    """Whatever arrives goes on, at the limit: each piece when the one before it has had its time."""
    free = time.monotonic()
    with suppress(OSError):  # somebody hung up
        while piece := source.recv(PIECE_BYTES):
            free = max(free, time.monotonic()) + len(piece) / LIMIT_BYTES_S
            time.sleep(max(free - time.monotonic(), 0.0))
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def limited(address: str) -> Iterator[str]:
    """Another address of the same server, for one connection, over a link of 100 Mbit/s each way."""
    with ExitStack() as stack:
        door = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        there = stack.enter_context(socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))))
        threads = []

        def serve() -> None:
            here = stack.enter_context(door.accept()[0])
            threads.append(threading.Thread(target=relay, args=(there, here)))
            threads[-1].start()
            relay(here, there)

        threads.append(threading.Thread(target=serve))
        threads[0].start()
        yield f"tcp://127.0.0.1:{door.getsockname()[1]}"
        for thread in threads:
            thread.join(10.0)


def chosen(address: str, caplog: pytest.LogCaptureFixture) -> str:
    """What a worker with 300,000 parameters, two chunks as fp32, chooses there, in the words of its log."""
    caplog.set_level(logging.INFO, "paramserver.worker")
    model = torch.nn.Linear(1000, 300, bias=False)
    with join(address, model, torch.optim.SGD(model.parameters(), lr=0.1)) as session:
        for _ in range(CANDIDATES * ROUNDS):
            with torch.no_grad():
                model.weight += 0.001
            session.step(1.0, samples=1)
        reason = session.exchanges.choice
        assert session.exchanges.rejected == 0
    assert [record.getMessage() for record in caplog.records if "auto" in record.getMessage()] == [
        f"codec auto chooses {reason}"
    ]
    return reason


def test_a_link_of_100_mbit_takes_a_codec_that_compresses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with cleaned_up() as processes:
        server = Server(tmp_path, "--codec", "auto", "--reply-codec", "int8", "--no-shared-memory")
        processes.append(server)
        with limited(server.address) as address:
            reason = chosen(address, caplog)
    # int8 on a machine at rest; beside other work encoding may cost more than the bytes between these two
    assert reason.startswith(("int8: an exchange takes ", "bf16: an exchange takes ")), reason
    assert "ms with fp32" in reason


def test_in_shared_memory_no_loss_is_worth_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with cleaned_up() as processes:
        server = Server(tmp_path, "--codec", "auto")
        processes.append(server)
        reason = chosen(server.address, caplog)
        [row] = server.status()["workers"]
    assert reason == "fp32: updates lie in memory shared with the server, where no link could be relieved"
    assert row["updates"] == CANDIDATES * ROUNDS
    all_fp32 = (CANDIDATES * ROUNDS + 1) * UPDATE_BYTES  # with the initial weights
    assert all_fp32 - UPDATE_BYTES <= row["bytes_up"] <= all_fp32, "but for what was tried before memory was shared"
