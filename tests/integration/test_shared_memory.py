"""Shared memory between real processes: the same training bit for bit, whatever the other side does to its memory.

The server is a process of its own; what is hostile, or killed, is a worker here or another process.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

from common import shared, wire
from common.codecs.base import F32
from common.messages import Bye, Scalars
from common.transports.base import SERVER
from tests.cluster import LARGE
from tests.processes import ROOT, Process, Server, cleaned_up, until
from worker import events, join
from worker.core import WorkerCore
from worker.driver import Driver

PATIENCE_S = 30.0
GOODBYE_S = 0.04
"""Of what a server that stops waits for them, at least so much."""
SCALARS = Scalars(0.5, 8, 1, 0.1)
HOSTILE = ("--rejected-per-minute", "1000000", "--malformed-in-a-row", "1000000")
"""Nobody is put in quarantine, so that hostility may go on."""


class Peer:
    """A worker of the model LARGE: its core on a real connection; the trainer is the test, and so is what lies in its
    memory."""

    def __init__(self, address: str, name: str = "w") -> None:
        self.core = WorkerCore(name=name, instance=os.urandom(8).hex(), library="test", layout=LARGE, optimizer=None)
        self.driver = Driver(self.core, address)
        joined = self.told(events.Joined)
        settings = joined.welcome.settings
        self.plan = self.core.plan(str(settings["codec"]))
        self.data = self.driver.staging(self.plan.bytes, str(settings["machine"]))
        while not isinstance(self.told(events.NeedWeights | events.Fetched), events.Fetched):
            self.driver.post(events.InitialWeights(np.zeros(self.core.plan("fp32").bytes, np.uint8)))
        if settings["machine"]:
            self.shares()

    def shares(self) -> None:
        """Wait until memory is shared."""
        until(lambda: self.driver._endpoint._shared, "shared memory", PATIENCE_S)
        assert self.driver._endpoint._shared[SERVER].line is not None

    def told(self, kind: Any) -> Any:
        """The next news of that kind; what comes before it is passed over, but a center is gone on from."""
        while True:
            news = self.driver.news(PATIENCE_S)
            assert news is not None, f"no {kind}"
            assert not isinstance(news, events.Failed), news
            if isinstance(news, events.Fetched):
                self.base, self.center = news.base, news.values
            if isinstance(news, kind):
                return news

    def push(self, flat: F32 | None = None) -> events.Settled:
        """Push `flat`, or what lies in the memory by then; again, where the session was lost meanwhile."""
        if flat is not None:
            self.plan.encode(flat, self.data)
        base = self.base
        self.driver.post(events.PushWanted(self.data, self.plan.codec, SCALARS, base, len(self.plan.chunks)))
        settled: events.Settled | events.Orphaned = self.told(events.Settled | events.Orphaned)
        if isinstance(settled, events.Orphaned):
            if self.base == base:  # the center to go on from is still to come
                self.told(events.Fetched)
            return self.push()
        if settled.values is not None:
            self.base, self.center = settled.base, settled.values
        return settled

    def leave(self) -> None:
        self.driver.post(events.Leave("done"))
        self.driver.close(PATIENCE_S)
        assert not self.driver._thread.is_alive()


@contextmanager
def served(folder: Path, *flags: str) -> Iterator[Server]:
    with cleaned_up() as processes:
        server = Server(folder, *flags)
        processes.append(server)
        yield server
        assert server.running, server.text
        assert server.stop() == 0, server.text


def pid(server: Process) -> int:
    return server._process.pid


def held(process: int) -> tuple[int, int]:
    """What a process has: (descriptors, mappings of shared memory)."""
    maps = Path(f"/proc/{process}/maps").read_text().count(f"/memfd:{shared.NAME}")
    return len(os.listdir(f"/proc/{process}/fd")), maps


def resident_mib(process: int) -> float:
    """Its own memory; shared memory is counted by its mappings."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no RssAnon")


def row(server: Server, name: str) -> dict[str, Any]:
    """What `status` says of a worker."""
    return next((row for row in server.status()["workers"] if row["name"] == name), {})


# Training


STEPS = 6


def trained(address: str) -> tuple[bytes, bytes]:
    """A user's loop on a model of several chunks: (the center in the end, the worker's own weights)."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(400, 900), torch.nn.Tanh(), torch.nn.Linear(900, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(5)
    with join(address, model, optimizer, name="w") as session:
        for _ in range(STEPS):
            loss = model(torch.randn(4, 400, generator=generator)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.step(loss, samples=4)
        assert session.flush()
        center = session.global_model()
    flat = torch.nn.utils.parameters_to_vector
    return tuple(flat(m.parameters()).detach().numpy().tobytes() for m in (center, model))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("--rule", "easgd"), marks=pytest.mark.slow),
        ("--codec", "int8", "--reply-codec", "bf16"),
    ],
    ids=" ".join,
)
def test_training_is_the_same_bit_for_bit_with_and_without_it(tmp_path: Path, flags: tuple[str, ...]) -> None:
    found = []
    for index, more in enumerate(((), ("--no-shared-memory",))):
        folder = tmp_path / str(index)
        folder.mkdir()
        with served(folder, *flags, *more) as server:
            found.append(trained(server.address))
            assert server.status()["workers"][0]["updates"] == STEPS
    assert found[0] == found[1]
    assert np.isfinite(np.frombuffer(found[0][0], np.float32)).all()


def test_status_tells_who_shares(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        peer = Peer(server.address)
        assert row(server, "w")["shares_memory"]
        assert held(pid(server))[1] == 2, "what it reads, and what it writes"
        for number in range(1, 4):
            settled = peer.push(np.full(LARGE.elements, 1.0, np.float32))
            assert (settled.outcome, settled.base.version) == ("applied", number)
            assert set(peer.center) == {float(number)}
        peer.leave()
        until(lambda: held(pid(server))[1] == 0, "the end of what was shared")
        assert not row(server, "w")["shares_memory"]


def test_without_it_nothing_is_mapped(tmp_path: Path) -> None:
    with served(tmp_path, "--no-shared-memory") as server:
        peer = Peer(server.address)
        assert peer.push(np.ones(LARGE.elements, np.float32)).outcome == "applied"
        assert not row(server, "w")["shares_memory"]
        assert held(pid(server))[1] == 0
        peer.leave()


# Hostility


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
def test_nan_anywhere_is_refused_and_changes_nothing(tmp_path: Path, codec: str) -> None:
    with served(tmp_path, "--codec", codec, *HOSTILE) as server:
        peer = Peer(server.address)
        assert peer.push(np.ones(LARGE.elements, np.float32)).outcome == "applied"
        ends = [chunk.offset + chunk.size for chunk in peer.plan.chunks]
        places = {0, ends[0] - 8, ends[0] % peer.plan.bytes, peer.plan.blocks[-1].offset}
        for place in places:
            peer.plan.encode(np.ones(LARGE.elements, np.float32), peer.data)
            peer.data[place : place + 4] = [0x80, 0x7F, 0x80, 0x7F] if codec == "bf16" else [0, 0, 0xC0, 0x7F]
            if codec == "int8":  # a scale, or the codes
                peer.data[place : place + 4] = [0x80, 0x80, 0x80, 0x7F]
            before = server.status()["version"]
            settled = peer.push()
            assert (settled.outcome, settled.code) in {("rejected", "non_finite"), ("rejected", "encoding")}, place
            assert server.status()["version"] == before
        assert peer.push(np.ones(LARGE.elements, np.float32)).outcome == "applied"
        assert np.unique(peer.center.round(2)).tolist() == [2.0]
        peer.leave()


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def flip(values: Any, low: Any, high: Any, bad: Any, running: Any) -> int:
    """Write one and another valid value all over the vector, and now and then what is not valid, until told to stop."""
    state, rounds, at = np.uint64(88172645463325252), 0, 0
    while running[0]:
        state ^= state << np.uint64(13)
        state ^= state >> np.uint64(7)
        state ^= state << np.uint64(17)
        rounds += 1
        first = np.int64(state % np.uint64(values.size - 4096))
        values[first : first + 4096] = low if rounds % 2 else high
        if rounds % 8 == 0:
            at = first
            values[at : at + 4096] = bad
        elif rounds % 8 == 1:
            values[at : at + 4096] = low
    return rounds


@pytest.mark.parametrize(
    ("codec", "seconds"), [("fp32", 2.0), ("int8", 2.0), pytest.param("fp32", 60.0, marks=pytest.mark.slow)]
)
def test_memory_that_changes_while_it_is_read_cannot_harm(tmp_path: Path, codec: str, seconds: float) -> None:
    """What is applied is what was checked: each value is one of two, and never NaN; and the books balance."""
    with served(tmp_path, "--codec", codec, *HOSTILE) as server:
        peer = Peer(server.address)
        running = np.ones(1, np.int8)
        if codec == "fp32":
            values = peer.data.view(np.float32)[: LARGE.elements]
            kinds = [np.float32(v) for v in (1.0, 2.0, np.nan)]
        else:
            peer.plan.encode(np.full(LARGE.elements, 127.0, np.float32), peer.data)
            block = peer.plan.blocks[0]
            codes = block.offset + 4 * 64
            assert (peer.data[codes : codes + 65536] == 127).all()
            values = peer.data[codes : codes + 65536].view(np.int8)
            kinds = [np.int8(v) for v in (1, 2, -128)]
        values[:] = kinds[0]
        flip(values, *kinds, np.zeros(1, np.int8))
        thread = threading.Thread(target=flip, args=(values, *kinds, running))
        thread.start()
        outcomes = []
        try:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                before = peer.center
                settled = peer.push()
                outcomes.append((settled.outcome, settled.code))
                if settled.outcome == "applied":
                    moved = (peer.center - before)[: LARGE.parameters]
                    moved = moved if codec == "fp32" else moved[:65536]
                    assert set(np.unique(moved)) <= {1.0, 2.0}
        finally:
            running[0] = 0
            thread.join()
        assert {outcome for outcome, _ in outcomes} == {"applied", "rejected"}, "or else nothing was shown"
        assert {code for _, code in outcomes} <= {"", "non_finite", "encoding"}
        assert server.status()["version"] == sum(outcome == "applied" for outcome, _ in outcomes)
        assert np.isfinite(peer.center).all()
        peer.leave()


def test_memory_cannot_be_taken_from_under_the_server(tmp_path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with served(tmp_path, *HOSTILE) as server:
        peer = Peer(server.address)
        assert peer.driver._offered is not None
        descriptor = peer.driver._offered.memory.place.descriptor
        for number in range(1, 4):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, 0)
            page = peer.data.ctypes.data
            assert libc.madvise(page, 1 << 20, 9) == -1, "MADV_REMOVE"
            assert libc.madvise(page, 1 << 20, 4) == 0, "MADV_DONTNEED drops what is mapped here, and nothing else"
            assert peer.push(np.ones(LARGE.elements, np.float32)).outcome == "applied"
            assert set(peer.center) == {float(number)}
        peer.leave()


def test_memory_that_is_not_as_it_should_be_is_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker trains on in messages, and the server says why."""
    make = shared.Memory.make

    def with_another_mark(size: int) -> shared.Memory:
        memory = make(size)
        return replace(memory, place=replace(memory.place, mark="11" * 16))

    monkeypatch.setattr(Peer, "shares", lambda peer: None)
    with served(tmp_path) as server:
        for change, sentence in {
            (shared, "SEALS", 0): "It is not sealed",
            (shared.Memory, "make", lambda size: make(size // 2)): "expected",
            (shared.Memory, "make", with_another_mark): "It does not bear the mark",
        }.items():
            with monkeypatch.context() as changed:
                changed.setattr(*change)
                peer = Peer(server.address)
            until(lambda sentence=sentence: sentence in server.text, "word of it")
            peer.data = np.zeros(peer.plan.bytes, np.uint8)
            assert peer.push(np.ones(LARGE.elements, np.float32)).outcome == "applied"
            assert not row(server, "w")["shares_memory"]
            assert held(pid(server))[1] == 0
            peer.leave()


# Death


WORKER = f"""
import sys, numpy as np
sys.path.insert(0, {str(ROOT)!r})
from tests.integration.test_shared_memory import Peer, LARGE
peer = Peer(sys.argv[1], "doomed")
while True:
    peer.push(np.ones(LARGE.elements, np.float32))
"""


def test_a_killed_worker_leaves_nothing_and_the_others_go_on(tmp_path: Path) -> None:
    before = os.listdir("/dev/shm")
    with served(tmp_path, "--lease-s", "2") as server:
        peer = Peer(server.address)
        doomed = Process(["-c", WORKER, server.address], tmp_path / "doomed.log")
        try:
            until(lambda: row(server, "doomed").get("updates", 0) > 20, "updates of the other")
            assert row(server, "doomed")["shares_memory"]
            assert held(pid(server))[1] == 4
        finally:
            doomed.kill()
        for _ in range(5):
            assert peer.push(np.ones(LARGE.elements, np.float32)).outcome == "applied"
        until(lambda: row(server, "doomed")["state"] == "gone", "the end of its lease")
        assert held(pid(server))[1] == 2
        assert server.status()["version"] == row(server, "w")["updates"] + row(server, "doomed")["updates"]
        assert set(peer.center) <= {float(v) for v in range(server.status()["version"] + 1)}
        peer.leave()
    assert os.listdir("/dev/shm") == before


def test_a_server_that_stops_gives_its_goodbyes_time_before_its_lines_end(tmp_path: Path) -> None:
    """A line that ends is a loss: the worker would dial anew, and never hear them."""
    with cleaned_up() as processes:
        processes.append(server := Server(tmp_path))
        peer = Peer(server.address)
        with peer.driver._wheel:  # so that nobody takes what comes
            endpoint = peer.driver._endpoint
            line = endpoint._shared[SERVER].line
            assert line is not None
            poller = select.poll()
            poller.register(line.fileno(), select.POLLIN)
            os.kill(pid(server), signal.SIGTERM)
            started = time.monotonic()
            assert poller.poll(PATIENCE_S * 1000)
            assert time.monotonic() - started >= GOODBYE_S
            said = endpoint.receive()
            assert said is not None
            assert isinstance(wire.decode(said[1]), Bye)
        assert server._process.wait(PATIENCE_S) == 0
        peer.leave()


def test_a_killed_server_is_shared_with_anew_when_it_is_back(tmp_path: Path) -> None:
    before = os.listdir("/dev/shm")
    flags = ("--directory", str(tmp_path / "state"), "--checkpoint-interval-s", "0.2", "--lease-s", "4")
    processes: list[Any]
    with cleaned_up() as processes:
        server = Server(tmp_path, *flags)
        processes.append(server)
        mapped = held(os.getpid())[1]
        peer = Peer(server.address)
        for _ in range(2):
            until(lambda: peer.push(np.ones(LARGE.elements, np.float32)).outcome == "applied", "an update")
            until(
                lambda: row(processes[-1], "w")["updates"] and processes[-1].status()["durable"] != "0.0",
                "a checkpoint",
            )
            peer.driver.post(events.PushWanted(peer.data, peer.plan.codec, SCALARS, peer.base, len(peer.plan.chunks)))
            server.kill()
            server = Server(tmp_path, *flags, address=server.address)
            processes.append(server)
            news = peer.told(events.Settled | events.Orphaned)
            fetched = peer.told(events.Fetched) if isinstance(news, events.Orphaned) else news
            assert fetched.values is not None
            peer.base, peer.center = fetched.base, fetched.values
            peer.shares()
            until(lambda: row(processes[-1], "w").get("shares_memory"), "memory shared anew")
            assert held(pid(server))[1] == 2
            assert held(os.getpid())[1] == mapped + 2, "what the dead server had is let go of"
        settled = peer.push(np.ones(LARGE.elements, np.float32))
        assert settled.outcome == "applied"
        assert len(set(peer.center)) == 1
        assert peer.center[0] == settled.base.version
        peer.leave()
        assert server.stop() == 0
    assert os.listdir("/dev/shm") == before


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_coming_and_going_leaks_nothing(tmp_path: Path, times: int) -> None:
    """Neither here nor in the server: no descriptor, no mapping, and no memory that grows with each."""
    with served(tmp_path) as server:
        first = Peer(server.address)
        ones = np.ones(LARGE.elements, np.float32)

        def come_and_go(name: str) -> None:
            peer = Peer(server.address, name)
            assert peer.push(ones).outcome == "applied"
            peer.leave()

        for warm in range(10):
            come_and_go(f"warm{warm}")
        until(lambda: held(pid(server))[1] == 2, "the end of what was shared")
        before = held(pid(server)), held(os.getpid()), resident_mib(pid(server))
        for number in range(times):
            come_and_go(f"w{number}")
        until(lambda: held(pid(server))[1] == 2, "the end of what was shared")
        # no more than before: then, too, a connection may not have been gone yet
        until(lambda: held(pid(server))[0] <= before[0][0], "its descriptors")
        until(lambda: held(os.getpid()) <= before[1], "our descriptors")
        assert held(os.getpid())[1] == before[1][1]
        assert resident_mib(pid(server)) < before[2] + 8 + times * 0.02, "a record of each remains"
        first.leave()
        assert json.dumps(server.status())
