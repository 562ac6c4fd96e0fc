"""What ipc:// keeps besides what every transport does: paths, strangers, those who stall and those who do not read."""

from __future__ import annotations

import os
import resource
import select
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import transports
from common.errors import NetworkError
from common.transports.base import SERVER
from common.transports.sharing import SharingEndpoint
from common.transports.unix import DEAF_S, MAGIC, QUEUED_MESSAGES, UnixListener
from common.wire import HEADER_BYTES, PAYLOAD_BYTES
from tests.processes import until

START = struct.Struct("<III")
PATIENCE_S = 10.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "server"


@pytest.fixture
def listener(path: Path) -> Iterator[SharingEndpoint]:
    made = transports.listen([f"ipc://{path}"])
    yield made
    made.close()


def caller(path: Path) -> socket.socket:
    """Somebody who says what it likes."""
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(PATIENCE_S)
    made.connect(str(path))
    return made


def message(header: bytes, payload: bytes = b"") -> bytes:
    return START.pack(MAGIC, len(header), len(payload)) + header + payload


def received(end: SharingEndpoint) -> tuple[bytes, list[bytes]]:
    peer, frames = until(end.receive, "a message", PATIENCE_S)
    return peer, [bytes(frame) for frame in frames]


def readable(end: SharingEndpoint) -> bool:
    return bool(select.select([end.fileno()], [], [], 0)[0])


STRANGERS: dict[str, bytes] = {
    "a greeting of ZeroMQ's": b"\xff\0\0\0\0\0\0\0\1\x7f\3",
    "another magic": START.pack(MAGIC ^ 1, 1, 0) + b"h",
    "no header": START.pack(MAGIC, 0, 0),
    "a header too long": START.pack(MAGIC, HEADER_BYTES + 1, 0),
    "a payload too long": START.pack(MAGIC, 1, PAYLOAD_BYTES + 1) + b"h",
    "noise": bytes(range(256)),
}


@pytest.mark.parametrize("said", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_is_cut_off_and_nobody_else_notices(listener: SharingEndpoint, path: Path, said: bytes) -> None:
    dialer = transports.dial(listener.address)
    assert dialer.send(SERVER, [b"first"]) == ""
    peer, _ = received(listener)
    with caller(path) as stranger:
        stranger.sendall(said.ljust(START.size, b"\0"))
        stranger.setblocking(False)

        def cut_off() -> bool:
            assert listener.receive() is None
            try:
                return stranger.recv(1) == b""
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True

        until(cut_off, "the end of the connection", PATIENCE_S)
    assert not readable(listener), "it wakes nobody any more"
    assert listener.send(peer, [b"answer"]) == ""
    assert received(dialer) == (SERVER, [b"answer"])
    dialer.close()


def test_a_message_may_come_in_pieces_of_any_size(listener: SharingEndpoint, path: Path) -> None:
    payload = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    whole = message(b"header", payload) + message(b"h") + message(b"last", b"p")
    for size in (1, 5, START.size, 17, len(whole)):
        with caller(path) as sender:
            found = []
            for first in range(0, len(whole), size):
                sender.sendall(whole[first : first + size])
                if (one := listener.receive()) is not None:
                    found.append(one)
            while len(found) < 3:
                found.append(until(listener.receive, "the rest", PATIENCE_S))
        assert [[bytes(frame) for frame in frames] for _, frames in found] == [
            [b"header", payload],
            [b"h"],
            [b"last", b"p"],
        ]


def test_who_stalls_within_a_message_holds_nobody_up(listener: SharingEndpoint, path: Path) -> None:
    with caller(path) as stalled:
        stalled.sendall(message(b"header", bytes(1000))[:-1])
        dialer = transports.dial(listener.address)
        for number in range(10):
            assert dialer.send(SERVER, [b"%d" % number]) == ""
            assert received(listener)[1] == [b"%d" % number]
        assert listener.receive() is None
        assert not readable(listener), "what is not there wakes nobody"
        stalled.sendall(b"\0")
        assert received(listener)[1] == [b"header", bytes(1000)]
        dialer.close()


def test_what_waits_for_a_slow_reader_arrives_in_order_and_then_wakes_nobody(listener: SharingEndpoint) -> None:
    dialer = transports.dial(listener.address)
    dialer.send(SERVER, [b"hello"])
    peer, _ = received(listener)
    payload, sent = memoryview(np.arange(1 << 18, dtype=np.uint8)), 0
    while not (refusal := listener.send(peer, [b"%d" % sent, payload], hold=sent + 1)):
        sent += 1
    assert "does not read" in refusal
    assert sent > QUEUED_MESSAGES
    assert listener.holding
    released: list[int] = []
    for number in range(sent):

        def arrived() -> Any:
            released.extend(listener.released())
            return dialer.receive()

        _, frames = until(arrived, "the next", PATIENCE_S)
        assert [bytes(frame) for frame in frames] == [b"%d" % number, bytes(payload)]
    assert listener.receive() is None
    released += listener.released()
    assert sorted(released) == list(range(1, sent + 1))
    assert not listener.holding
    assert not readable(listener)
    dialer.close()


def test_whoever_went_is_forgotten_with_what_waited_for_it(listener: SharingEndpoint) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        dialer = transports.dial(listener.address)
        dialer.send(SERVER, [b"hello"])
        peer, _ = received(listener)
        held = 0
        while not listener.send(peer, [b"h", bytes(1 << 18)], hold=7):
            held += 1
        dialer.close()
        released: list[int] = []

        def all_released(held: int = held, released: list[int] = released) -> bool:
            assert listener.receive() is None
            released.extend(listener.released())
            return len(released) == held

        until(all_released, "every hold", PATIENCE_S)
        assert not listener.holding
    assert len(os.listdir("/proc/self/fd")) == before
    assert not readable(listener)


def test_a_name_without_a_file() -> None:
    address = f"ipc://@paramserver-test-{os.getpid()}"
    listener = transports.listen([address])
    with pytest.raises(NetworkError, match="already"):
        transports.listen([address])
    dialer = transports.dial(address)
    dialer.send(SERVER, [b"hello"])
    assert received(listener)[1] == [b"hello"]
    dialer.close()
    listener.close()
    transports.listen([address]).close()


def test_a_path_goes_with_its_listener_and_no_other(listener: SharingEndpoint, path: Path) -> None:
    assert path.is_socket()
    listener.close()
    assert not path.exists()
    first = transports.listen([f"ipc://{path}"])
    path.unlink()
    second = transports.listen([f"ipc://{path}"])
    first.close()
    assert path.is_socket(), "it is the other's"
    second.close()


def unreachable(path: Path) -> None:
    path.mkdir()


def taken(path: Path) -> None:
    path.write_text("of somebody else")


@pytest.mark.parametrize("make", [unreachable, taken])
def test_what_lies_at_a_path_and_is_no_socket_stays(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    with pytest.raises(NetworkError, match="Cannot listen") as caught:
        transports.listen([f"ipc://{path}"])
    assert caught.value.fix
    assert path.exists()


@pytest.mark.parametrize("name", ["x" * 200, "none/such/folder"])
def test_a_path_that_cannot_be_is_said_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(NetworkError, match="Cannot listen") as caught:
        transports.listen([f"ipc://{tmp_path}/{name}"])
    assert caught.value.fix
    nobody = transports.dial(f"ipc://{tmp_path}/{name}")
    assert "nobody" in nobody.send(SERVER, [b"hello"])
    assert nobody.receive() is None
    assert not nobody.lost()
    nobody.close()


def test_where_no_descriptor_is_left_callers_wait_and_are_taken_later(listener: SharingEndpoint, path: Path) -> None:
    with caller(path) as waiting:
        waiting.sendall(message(b"patient"))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        unused = os.dup(0)
        os.close(unused)
        resource.setrlimit(resource.RLIMIT_NOFILE, (unused, limits[1]))
        try:
            assert listener.receive() is None
            assert not readable(listener), "it does not spin"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert DEAF_S < PATIENCE_S
        assert received(listener)[1] == [b"patient"]


def test_paths_and_ports_are_one_listener(tmp_path: Path) -> None:
    addresses = [f"ipc://{tmp_path}/a", "tcp://127.0.0.1:0", f"ipc://{tmp_path}/b"]
    listener = transports.listen(addresses)
    assert listener.address == addresses[0]
    assert len(listener.monitors) == 1
    several = listener._sockets
    port = next(one.address for one in several._listeners if not isinstance(one, UnixListener))  # type: ignore[attr-defined]
    dialers = [transports.dial(address) for address in (addresses[0], port, addresses[2])]
    for dialer in dialers:
        for number in range(5):
            assert dialer.send(SERVER, [b"up %d" % number]) == ""
    heard: dict[bytes, list[bytes]] = {}
    for _ in range(15):
        assert select.select([listener.fileno()], [], [], PATIENCE_S)[0]
        peer, frames = received(listener)
        heard.setdefault(peer, []).extend(frames)
    assert list(heard.values()) == [[b"up %d" % number for number in range(5)]] * 3
    for peer in heard:
        assert listener.send(peer, [b"down", bytes(100_000)], hold=1) == ""
    for dialer in dialers:
        assert received(dialer)[1] == [b"down", bytes(100_000)]
    released: list[int] = []
    until(lambda: released.extend(listener.released()) or len(released) == 3, "every hold", PATIENCE_S)
    assert "gone" in listener.send(b"unix 0", [b"x"])
    assert "gone" in listener.send(b"\0nobody", [b"x"])
    for end in (*dialers, listener):
        end.close()
