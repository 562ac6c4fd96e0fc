"""What ipc:// keeps besides what every transport does: paths, strangers, those who stall and those who do not read."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from common import transports
from common.errors import NetworkError
from common.transports import unix
from common.transports.base import SERVER
from common.transports.sharing import SharingEndpoint
from common.transports.streams import MAGIC, QUEUED_MESSAGES
from common.transports.unix import DEAF_S, FIRST_MESSAGE_S, NAME, STALLED_S, UnixListener
from common.wire import HEADER_BYTES, PAYLOAD_BYTES
from tests.processes import until

PIPE = """
import signal, sys
from common import transports
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
listener, dialer = transports.listen([sys.argv[1]]), transports.dial(sys.argv[1])
dialer.send(b"", [b"x"])
while listener.receive() is None:
    pass
listener.close()
dialer.send(b"", [b"x"])
dialer.close()
"""
CLAIM = """
import sys
from common import transports
from common.errors import NetworkError
print("ready", flush=True)
sys.stdin.readline()
try:
    listener = transports.listen([sys.argv[1]])
except NetworkError:
    print("refused", flush=True)
else:
    print("has it", flush=True)
    sys.stdin.readline()
"""
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


@pytest.mark.parametrize("address", ["ipc:///" + "x" * 200, "ipc://"])
def test_what_can_be_no_path_is_said_so_both_ways(address: str) -> None:
    for open_ in (transports.dial, lambda one: transports.listen([one])):
        with pytest.raises(NetworkError, match=r"path|dial") as caught:
            open_(address)
        assert caught.value.fix


def test_a_folder_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="Cannot listen") as caught:
        transports.listen([f"ipc://{tmp_path}/none/server"])
    assert caught.value.fix


def test_who_calls_before_anybody_listens_is_heard_soon_after(path: Path) -> None:
    dialer = transports.dial(f"ipc://{path}")
    for number in range(3):
        assert dialer.send(SERVER, [b"%d" % number]) == ""
    started = time.monotonic()
    assert not dialer.wait(PATIENCE_S, also=-1)
    assert time.monotonic() - started < PATIENCE_S / 2, "it is to be asked now and then"
    assert dialer.receive() is None
    assert not dialer.lost()
    while not (refusal := dialer.send(SERVER, [b"more"])):
        pass
    assert "nobody" in refusal
    listener = transports.listen([f"ipc://{path}"])
    found: list[bytes] = []

    def all_came() -> bool:
        assert dialer.receive() is None
        if (message := listener.receive()) is not None:
            found.append(bytes(message[1][0]))
        return len(found) == QUEUED_MESSAGES

    until(all_came, "what was said before", PATIENCE_S)
    assert found == [b"0", b"1", b"2"] + [b"more"] * (QUEUED_MESSAGES - 3)
    dialer.close()
    listener.close()


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
        assert listener.holding, "so that it is asked again without being woken"
        time.sleep(DEAF_S)
        assert received(listener)[1] == [b"patient"]
        assert not listener.holding


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
    assert "gone" in listener.send(NAME + b"0", [b"x"])
    assert "gone" in listener.send(b"\0nobody", [b"x"])
    for end in (*dialers, listener):
        end.close()


def test_a_live_socket_of_another_type_is_left_alone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        inode = path.stat().st_ino
        with pytest.raises(NetworkError):
            transports.listen([f"ipc://{path}"])
        assert path.stat().st_ino == inode


def test_a_live_listener_that_takes_nobody_holds_up_no_other(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stopped, contextlib.ExitStack() as callers:
        stopped.bind(str(path))
        stopped.listen(1)
        for _ in range(5):
            one = callers.enter_context(socket.socket(socket.AF_UNIX))
            one.setblocking(False)
            one.connect_ex(str(path))
        started = time.monotonic()
        with pytest.raises(NetworkError, match="already"):
            transports.listen([f"ipc://{path}"])
        assert time.monotonic() - started < PATIENCE_S / 2


def test_of_those_who_come_by_a_path_at_once_one_has_it(path: Path) -> None:
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as dead:
            path.unlink(missing_ok=True)
            dead.bind(str(path))
        claim = [sys.executable, "-c", CLAIM, f"ipc://{path}"]
        starting = [subprocess.Popen(claim, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
        for one in starting:
            assert one.stdout is not None
            assert one.stdout.readline() == b"ready\n"
        for one in starting:
            assert one.stdin is not None
            one.stdin.write(b"now\n")
            one.stdin.flush()
        told = [one.stdout.readline() for one in starting if one.stdout is not None]
        for one in starting:
            one.communicate(timeout=PATIENCE_S)
        assert sorted(told) == [b"has it\n"] + [b"refused\n"] * 3


def test_nobody_takes_a_name_of_the_other_transport(tmp_path: Path) -> None:
    listener = transports.listen([f"ipc://{tmp_path}/s", "tcp://127.0.0.1:0"])
    of_port = listener._sockets._listeners[1].address  # type: ignore[attr-defined]
    dialer, honest = transports.dial(listener.address), transports.dial(of_port)
    assert dialer.send(SERVER, [b"mine"]) == ""
    peer, _ = received(listener)
    with zmq.Context.instance().socket(zmq.DEALER) as forger:
        forger.linger, forger.routing_id = 0, peer
        forger.connect(of_port)
        forger.send_multipart([b"forged"])
        time.sleep(0.05)
        assert honest.send(SERVER, [b"honest"]) == ""
        assert received(listener)[1] == [b"honest"]
        assert listener.receive() is None
    for end in (dialer, honest, listener):
        end.close()


def test_what_came_before_a_loss_is_received_before_it_is_told(listener: SharingEndpoint) -> None:
    dialer = transports.dial(listener.address)
    assert dialer.send(SERVER, [b"x"]) == ""
    peer, _ = received(listener)
    assert listener.send(peer, [b"reply"]) == listener.send(peer, [b"goodbye"]) == ""
    listener.close()
    assert "gone" in dialer.send(SERVER, [b"y"])
    found: list[bytes] = []
    lost = False
    while not lost:
        if (one := dialer.receive()) is not None:
            found.append(bytes(one[1][0]))
        lost = dialer.lost()
    dialer.close()
    assert found == [b"reply", b"goodbye"]


def test_a_peer_that_is_gone_does_not_end_a_process_that_handles_no_such_signal(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PIPE, f"ipc://{path}"], timeout=60, check=False)
    assert done.returncode == 0


def test_a_process_that_has_forked_is_not_kept_awake_by_what_it_closed(listener: SharingEndpoint, path: Path) -> None:
    with caller(path) as stranger:
        stranger.sendall(b"x")
        until(lambda: listener.receive() or listener._sockets._streams, "a connection")  # type: ignore[attr-defined]
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        try:
            stranger.sendall(b"no message, as long as a start")
            until(lambda: listener.receive() or not listener._sockets._streams, "its end")  # type: ignore[attr-defined]
            assert not readable(listener)
            assert stranger.recv(1) == b"", "it is over for the other side, too"
        except ConnectionResetError:
            pass
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_who_says_nothing_or_reads_nothing_is_given_up(
    listener: SharingEndpoint, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialer = transports.dial(listener.address)
    assert dialer.send(SERVER, [b"hello"]) == ""
    peer, _ = received(listener)
    with caller(path) as mute:
        until(lambda: listener.receive() or len(listener._sockets._streams) == 2, "both")  # type: ignore[attr-defined]
        held = 0
        while not listener.send(peer, [b"h", bytes(1 << 18)], hold=7):
            held += 1
        assert len(listener.released()) < held
        now = time.monotonic()
        monkeypatch.setattr(unix.time, "monotonic", lambda: now + FIRST_MESSAGE_S + 1)
        assert listener.receive() is None
        assert mute.recv(1) == b""
        assert listener.send(peer, [b"h"]) == "the peer does not read"
        monkeypatch.setattr(unix.time, "monotonic", lambda: now + STALLED_S + FIRST_MESSAGE_S)
        assert set(listener.released()) == {7}
        assert not listener.holding
        assert listener.send(peer, [b"h"]) == "the peer is gone"
    dialer.close()
