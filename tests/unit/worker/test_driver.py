"""The thread that carries a session, against a server played by hand on a real socket: its memory, and what is left."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import scheduling, shared, transports, wire
from common.codecs.base import U8
from common.layout import Layout, Tensor
from common.messages import (
    Ack,
    Beat,
    Begin,
    Bye,
    Chunk,
    Grant,
    Hello,
    Message,
    More,
    Offer,
    Pull,
    Push,
    Reply,
    Scalars,
    Share,
    Shared,
    Version,
    Welcome,
)
from common.shared import Memory
from tests.processes import until
from tests.unit.worker.test_core import SETTINGS
from worker import events
from worker.core import WorkerCore
from worker.driver import Driver

LAYOUT = Layout((Tensor("w", (400, 1000), "float32", "parameter"),))
"""Two chunks in fp32."""
HERE = SETTINGS | {"machine": shared.MACHINE}
PATIENCE_S = 20.0
FIRST = Version(1, 0)


class Server:
    """Says what it is told to."""

    def __init__(self) -> None:
        self.end = transports.listen(["tcp://127.0.0.1:0"])
        self.peer = b""
        self.connection = 0
        self.heard: list[tuple[bytes, Message]] = []

    def hears(self, kind: type[Any]) -> Any:
        """The next message of that kind; others but beats are an error. Its payload is what lies there now."""

        def one() -> Any:
            if (found := self.end.receive()) is None:
                return None
            return found[0], wire.decode(found[1], payload_bytes=1 << 24)

        while True:
            peer, message = until(one, kind.__name__, PATIENCE_S)
            self.heard.append((peer, message))
            if isinstance(message, kind):
                self.peer = peer
                return message
            assert isinstance(message, Beat), message

    def said_by(self, peer: bytes) -> list[str]:
        """What came on a connection, beats and all."""
        return [type(message).__name__ for other, message in self.heard if other == peer]

    def anchors(self, worker: Worker) -> None:
        """The worker pulls, and is given a center, all zero."""
        self.hears(Pull)
        plan = worker.core.plan("fp32")
        self.says(Offer("s", self.connection, "anchor", "", Reply(5, plan.bytes, "fp32", FIRST), False))
        self.hears(More)
        for index, chunk in enumerate(plan.chunks):
            self.says(Chunk("s", self.connection, 5, index, bytes(chunk.size)))
        worker.told(events.Fetched)

    def says(self, *messages: Message) -> None:
        for message in messages:
            refusal = self.end.send(self.peer, wire.encode(message))
            assert not refusal or isinstance(message, Bye), refusal

    def welcomes(self, resumed: Any = "new") -> None:
        """Hello is heard and answered: the weights are there."""
        self.hears(Hello)
        self.connection += 1
        welcome = Welcome("s", self.connection, "w", FIRST, HERE, {}, "have", resumed, 0, "none", ())
        self.says(welcome)


class Worker:
    """A driver, and a trainer's side of it."""

    def __init__(self, address: str) -> None:
        self.core = WorkerCore(name="w", instance="i", library="test", layout=LAYOUT, optimizer=None)
        self.driver = Driver(self.core, address)

    def told(self, kind: type[Any]) -> Any:
        while True:
            news = self.driver.news(PATIENCE_S)
            assert news is not None, f"no {kind.__name__}"
            if isinstance(news, kind):
                return news


@pytest.fixture
def both() -> Iterator[tuple[Server, Worker]]:
    """A server, and a worker that said Hello to it; in the end its thread is gone, and so is what it offered."""
    server = Server()
    worker = Worker(server.end.address)
    yield server, worker
    worker.driver.post(events.Leave("done"))
    server.says(Bye("s", server.connection, "as you wish"))
    worker.driver.close(PATIENCE_S)
    assert not worker.driver._thread.is_alive()
    server.end.close()
    for _, message in server.heard:
        if isinstance(message, Share):
            with pytest.raises(shared.CannotAttach, match=r"opened|no such memory|mark"):
                shared.attach(message.place, expect=message.place.bytes)


def memories() -> set[str]:
    """Descriptors of this process behind which lies such memory."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "memfd:paramserver" in os.readlink(f"/proc/self/fd/{number}"):
                found.add(number)
    return found


def mapped() -> int:
    """How often such memory is mapped by this process."""
    return Path("/proc/self/maps").read_text().count("/memfd:paramserver")


def joined(server: Server, worker: Worker) -> tuple[U8, Share]:
    """Joined, anchored at zero, and with memory for updates that was offered: (the memory, Share)."""
    server.welcomes()
    worker.told(events.Joined)
    server.anchors(worker)
    data = worker.driver.staging(worker.core.plan("fp32").bytes, shared.MACHINE)
    share = server.hears(Share)
    return data, share


def push(worker: Worker, data: U8, value: float) -> None:
    """Have the worker push that everywhere."""
    flat = np.full(LAYOUT.elements, value, np.float32)
    worker.driver.push(flat, worker.core.plan("fp32"), data, Scalars(0.0, 1, 1, 0.1), FIRST, None)


def test_updates_are_read_where_the_trainer_wrote_them(both: tuple[Server, Worker]) -> None:
    server, worker = both
    data, share = joined(server, worker)
    plan = worker.core.plan("fp32")
    theirs, mine = shared.attach(share.place, expect=plan.bytes), Memory.make(plan.bytes)
    server.end.share(server.peer, mine, (bytes.fromhex(share.place.mark), theirs))
    server.says(Shared("s", 1, mine.place, ""))
    until(lambda: worker.driver._endpoint._shared, "shared memory", PATIENCE_S)
    push(worker, data, 3.0)
    pushed = server.hears(Push)
    lying = np.frombuffer(pushed.payload, np.uint8)
    assert lying.size == plan.bytes, "all of it, in one message"
    assert not lying.flags.writeable
    assert set(lying.view(np.float32)) == {3.0}
    data[:] = 0
    assert not lying.any(), "it is no copy"

    mine.data.view(np.float32)[:] = 9.0
    reply = Reply(7, plan.bytes, "fp32", Version(1, 1))
    number = pushed.begin.number
    ack = Ack("s", 1, number, "applied", "", "", Version(1, 1), FIRST, 1.0, False, 1, reply, mine.data.data)
    server.says(ack)
    settled = worker.told(events.Settled)
    assert set(settled.values) == {9.0}
    mine.withdraw()

    before = mapped()
    server.says(Bye("s", 1, "enough"))
    worker.told(events.Left)
    worker.driver.close(PATIENCE_S)
    assert mapped() == before - 1, "the worker lets go of what is the server's"


@pytest.mark.parametrize("wrong", ["mark", "gone"])
def test_what_cannot_be_attached_ends_the_connection_and_nothing_of_it_is_said_on_the_next(
    both: tuple[Server, Worker], wrong: str
) -> None:
    """Or else the server would take the next one for an old one, and doubt would breed doubt."""
    server, worker = both
    data, share = joined(server, worker)
    mine = Memory.make(share.place.bytes)
    place = replace(mine.place, mark="00" * 16) if wrong == "mark" else replace(mine.place, process=1 << 50)
    old = server.peer
    worker.core._beat_due = 0.0  # with Shared, a beat is due
    server.says(Shared("s", 1, place, ""))
    server.welcomes("live")
    assert server.peer != old
    assert server.said_by(server.peer) == ["Hello"]
    push(worker, data, 1.0)
    server.hears(Begin)
    assert "Share" not in server.said_by(server.peer)
    assert {
        message.connection for peer, message in server.heard if peer == server.peer and isinstance(message, Beat)
    } <= {2}
    mine.withdraw()


def test_ctrl_c_never_leaves_an_event_half_handled(
    both: tuple[Server, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while the core is at work for the trainer: the work is done, then the trainer is interrupted."""
    server, worker = both
    data, _ = joined(server, worker)
    handle, handled = worker.core.handle, []

    def interrupted(event: Any, now: float) -> list[Any]:
        if isinstance(event, events.PushWanted):
            signal.raise_signal(signal.SIGINT)
        actions = handle(event, now)
        handled.append(type(event))
        return actions

    monkeypatch.setattr(worker.core, "handle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        push(worker, data, 1.0)
    assert events.PushWanted in handled
    server.hears(Begin)


def test_what_is_posted_while_another_thread_drives_is_not_left_lying(both: tuple[Server, Worker]) -> None:
    """Many threads post at once: each event is handled once, and none waits for the next message."""
    server, worker = both
    joined(server, worker)
    before = worker.core._progress.steps
    threads = [
        threading.Thread(target=lambda: [worker.driver.post(events.Progress(before + n)) for n in range(200)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: not worker.driver._posted or None, "all that was posted is handled", PATIENCE_S)


def test_who_goes_on_encoding_hears_that_chunks_may_be_sent(both: tuple[Server, Worker]) -> None:
    server, worker = both
    server.welcomes()
    server.anchors(worker)
    driver, plan = worker.driver, worker.core.plan("fp32")
    driver._attended = True  # so nobody else takes anything in
    data = np.zeros(plan.bytes, np.uint8)
    driver.post(events.PushWanted(data, "fp32", Scalars(0.0, 1, 1, 0.1), FIRST, 0, None))
    begin = server.hears(Begin)
    server.says(Grant("s", server.connection, begin.number, "go", 2, "", ""))

    def chunk() -> Any:
        driver.post(events.Encoded(1))
        return server.end.receive()

    message = wire.decode(until(chunk, "the first chunk", PATIENCE_S)[1])
    assert isinstance(message, Chunk)
    assert message.index == 0
    driver._attended = False


def test_news_arrives_whoever_drives(both: tuple[Server, Worker]) -> None:
    """With the trainer waiting, computing, and just back from waiting."""
    server, worker = both
    joined(server, worker)
    plan = worker.core.plan("fp32")
    for number, pause_s in enumerate([0.0, 0.001, 0.004, 0.006, 0.05] * 4):
        worker.driver.post(events.PullWanted("evaluate"))
        time.sleep(pause_s)
        server.hears(Pull)
        reply = Reply(10 + number, plan.bytes, "fp32", FIRST)
        server.says(Offer("s", 1, "evaluate", "", reply, False))
        time.sleep(pause_s)
        server.hears(More)
        for index, chunk in enumerate(plan.chunks):
            server.says(Chunk("s", 1, reply.id, index, bytes(chunk.size)))
        time.sleep(pause_s)
        started = time.monotonic()
        worker.told(events.Fetched)
        assert time.monotonic() - started < 1.0


def test_a_trainer_waits_its_turn_while_it_is_connected_and_its_carrier_never() -> None:
    before = os.sched_getscheduler(0)
    server = Server()
    worker = Worker(server.end.address)
    carrier = worker.driver._thread.native_id
    assert carrier is not None
    assert os.sched_getscheduler(0) == scheduling.BATCH
    until(lambda: os.sched_getscheduler(carrier) == scheduling.USUAL, "the carrier's kind", PATIENCE_S)
    worker.driver.post(events.Leave("done"))
    worker.driver.close(PATIENCE_S)
    assert os.sched_getscheduler(0) == before
    server.end.close()


def test_hello_is_said_once_however_soon_the_trainer_waits() -> None:
    for _ in range(20):
        server = Server()
        worker = Worker(server.end.address)
        assert worker.driver.news(0.002) is None
        server.welcomes()
        worker.told(events.Joined)
        server.hears(Pull)
        assert [type(message) for _, message in server.heard if not isinstance(message, Beat)] == [Hello, Pull]
        server.says(Bye("s", 1, "enough"))
        worker.driver.close(PATIENCE_S)
        server.end.close()


def test_memory_that_is_asked_for_when_the_thread_has_ended_is_not_left_open() -> None:
    """It may end between the word that the worker joined and the trainer's answer to it."""
    before = memories()
    server = Server()
    worker = Worker(server.end.address)
    server.welcomes()
    worker.told(events.Joined)
    server.hears(Pull)
    server.says(Bye("s", 1, "enough"))
    worker.driver.close(PATIENCE_S)
    for _ in range(3):
        data = worker.driver.staging(worker.core.plan("fp32").bytes, shared.MACHINE)
        data[:] = 1
        del data
    assert memories() == before
    server.end.close()


def test_memory_that_is_replaced_is_withdrawn(both: tuple[Server, Worker]) -> None:
    server, worker = both
    _, first = joined(server, worker)
    worker.driver.staging(first.place.bytes, shared.MACHINE)
    second = server.hears(Share)
    assert second.place.mark != first.place.mark
    with pytest.raises(shared.CannotAttach):
        shared.attach(first.place, expect=first.place.bytes)
    shared.attach(second.place, expect=first.place.bytes)


@pytest.mark.parametrize("machine", ["", "another"])
def test_a_server_elsewhere_is_offered_none(both: tuple[Server, Worker], machine: str) -> None:
    server, worker = both
    before = memories()
    server.welcomes()
    worker.told(events.Joined)
    data = worker.driver.staging(100, machine)
    assert (data.shape, data.any()) == ((100,), False)
    assert memories() == before


def test_a_machine_without_memory_to_share_trains_as_ever(
    both: tuple[Server, Worker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    server, worker = both
    monkeypatch.setattr(os, "posix_fallocate", fails)
    server.welcomes()
    worker.told(events.Joined)
    server.anchors(worker)
    data = worker.driver.staging(worker.core.plan("fp32").bytes, shared.MACHINE)
    assert "updates are sent in messages: " in caplog.text
    assert "No space left" in caplog.text
    push(worker, data, 3.0)
    begin = server.hears(Begin)
    server.says(Grant("s", 1, begin.number, "go", 8, "", ""))
    assert set(np.frombuffer(server.hears(Chunk).payload, np.float32)) == {3.0}
