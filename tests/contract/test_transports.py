"""What every transport keeps, whatever carries it: tcp, ipc, memory; and what sockets keep besides.

Nothing here waits for a fixed time and then asserts: everything is polled until it is so, or a deadline has passed.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import transports
from common.errors import NetworkError
from common.shared import MARK_BYTES, Memory, attach
from common.transports import lines
from common.transports.base import SERVER
from common.transports.lines import Door
from common.transports.memory import MemoryEndpoint
from common.transports.sharing import POINT_BYTES, SharingEndpoint
from common.transports.zeromq import COPY_BYTES, UNPACED
from common.wire import PAYLOAD_BYTES

TIMEOUT_S = 10.0
MEGABYTE = 1 << 20


class Wires:
    """One listener and any number of dialers of one kind."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self._dialers: list[Any] = []
        self.listener: Any
        if kind == "memory":
            self.listener = MemoryEndpoint("memory://test")
        else:
            address = {"tcp": "tcp://127.0.0.1:0", "ipc": f"ipc://{folder}/server"}[kind]
            self.listener = transports.listen([address])

    def dial(self) -> Any:
        end = self.listener.connect() if self.kind == "memory" else transports.dial(self.listener.address)
        self._dialers.append(end)
        return end

    def met(self) -> tuple[Any, bytes]:
        """A dialer that has spoken, and its name at the listener."""
        dialer = self.dial()
        assert dialer.send(SERVER, [b"hello"]) == ""
        peer, frames = received(self.listener)
        assert [bytes(frame) for frame in frames] == [b"hello"]
        return dialer, peer

    def close(self) -> None:
        for end in (*self._dialers, self.listener):
            end.close()


@pytest.fixture(params=["tcp", "ipc", "memory"])
def wires(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wires]:
    made = Wires(request.param, tmp_path_factory.mktemp("s"))
    yield made
    made.close()


@pytest.fixture(params=["tcp", "ipc"])
def sockets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wires]:
    made = Wires(request.param, tmp_path_factory.mktemp("s"))
    yield made
    made.close()


def until(done: Callable[[], Any], what: str) -> Any:
    """Poll until `done` gives something; the deadline is generous, because it is no measurement."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if (value := done()) not in (None, False):
            return value
        time.sleep(0.0005)
    pytest.fail(f"{what}: not within {TIMEOUT_S:g} s")


def received(end: Any) -> tuple[bytes, list[Any]]:
    found: tuple[bytes, list[Any]] = until(end.receive, "a message")
    return found


def sent(end: Any, peer: bytes, frames: list[Any], hold: int = 0) -> None:
    """Send, with patience where the queue is full."""
    until(lambda: end.send(peer, frames, hold) == "", "room in the queue")


# All transports


def test_both_ways_whole_and_in_order(wires: Wires) -> None:
    dialer, peer = wires.met()
    for number in range(300):
        sent(dialer, SERVER, [b"up %d" % number, b"x" * (number + 1)])
        sent(wires.listener, peer, [b"down %d" % number])
        if number % 40 == 39:
            for back in range(number - 39, number + 1):
                name, frames = received(wires.listener)
                assert name == peer
                assert [bytes(frame) for frame in frames] == [b"up %d" % back, b"x" * (back + 1)]
                name, frames = received(dialer)
                assert name == SERVER
                assert [bytes(frame) for frame in frames] == [b"down %d" % back]


@pytest.mark.parametrize("size", [1, 100, 128 * 1024, 128 * 1024 + 1, MEGABYTE, PAYLOAD_BYTES])
def test_payloads_of_any_size_arrive_as_they_are(wires: Wires, size: int) -> None:
    dialer, peer = wires.met()
    payload = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    for source, target, name in ((dialer, wires.listener, SERVER), (wires.listener, dialer, peer)):
        assert source.send(name, [b"header", memoryview(payload)], hold=5) == ""
        _, frames = received(target)
        assert [bytes(frame) for frame in frames] == [b"header", payload.tobytes()]


def test_empty_payload_is_no_trouble(wires: Wires) -> None:
    dialer, peer = wires.met()
    for source, target, name in ((dialer, wires.listener, SERVER), (wires.listener, dialer, peer)):
        assert source.send(name, [b"header", b""]) == ""
        _, frames = received(target)
        assert bytes(frames[0]) == b"header"
        assert all(len(frame) == 0 for frame in frames[1:])


def test_many_peers_are_told_apart(wires: Wires) -> None:
    dialers = [wires.dial() for _ in range(60)]
    for number, dialer in enumerate(dialers):
        assert dialer.send(SERVER, [b"%d" % number]) == ""
    names = {}
    for _ in dialers:
        peer, frames = received(wires.listener)
        names[int(bytes(frames[0]))] = peer
    assert len(set(names.values())) == len(dialers)
    for number, peer in names.items():
        assert wires.listener.send(peer, [b"for %d" % number]) == ""
    for number, dialer in enumerate(dialers):
        assert bytes(received(dialer)[1][0]) == b"for %d" % number
        assert dialer.receive() is None


def test_name_is_new_for_each_connection(wires: Wires) -> None:
    names = []
    for _ in range(3):
        dialer, peer = wires.met()
        dialer.close()
        names.append(peer)
    assert len(set(names)) == 3


def test_unknown_peer_is_a_reason_and_not_an_exception(wires: Wires) -> None:
    assert "gone" in wires.listener.send(b"nobody", [b"x"])
    dialer, peer = wires.met()
    dialer.close()
    reason = until(lambda: wires.listener.send(peer, [b"x"]) or None, "word that the peer is gone")
    assert "gone" in reason


def test_queue_is_bounded_and_says_so(wires: Wires) -> None:
    """Nobody reads at the other end."""
    dialer, peer = wires.met()
    for end, name in ((wires.listener, peer), (dialer, SERVER)):
        payload, reason, count = bytes(MEGABYTE if wires.kind != "memory" else 10), "", 0
        while not reason:
            reason = end.send(name, [b"x", payload])
            count += 1
            assert count < 10_000, "grows without end"
        assert "read" in reason
        assert count > 16, "room for two windows of a session"


def test_each_hold_is_released_once_for_each_send(wires: Wires) -> None:
    dialer, peer = wires.met()
    payload = memoryview(bytearray(MEGABYTE))
    holds = [1, 1, 1, 2, 3, 3]
    for hold in holds:
        sent(wires.listener, peer, [b"x", payload], hold)
    sent(wires.listener, peer, [b"small", b"y"], 4)
    sent(wires.listener, peer, [b"none"], 5)
    sent(wires.listener, peer, [b"without", payload])
    released: list[int] = []

    def all_released() -> bool:
        dialer.receive()
        released.extend(wires.listener.released())
        return len(released) >= len(holds) + 2

    until(all_released, "the release of every hold")
    for _ in range(5):
        dialer.receive()
        released.extend(wires.listener.released())
    assert sorted(released) == [*holds, 4, 5]


def test_hold_of_a_peer_that_went_is_released_too(wires: Wires) -> None:
    """Or else its buffer would be lost for ever."""
    dialer, peer = wires.met()
    payload = memoryview(bytearray(MEGABYTE))
    taken = 0
    for _ in range(30):
        taken += wires.listener.send(peer, [b"x", payload], 7) == ""
    assert taken
    dialer.close()
    released: list[int] = []

    def all_released() -> bool:
        wires.listener.receive()  # as whoever waits for a release does: it lets the socket notice
        released.extend(wires.listener.released())
        return len(released) == taken

    until(all_released, "the release of every hold")


def test_what_was_refused_holds_nothing(wires: Wires) -> None:
    assert wires.listener.send(b"nobody", [b"x", bytes(MEGABYTE)], 9)
    assert wires.listener.released() == []


def test_close_twice_and_with_much_queued_returns_at_once(wires: Wires) -> None:
    dialer, peer = wires.met()
    for _ in range(40):
        dialer.send(SERVER, [b"x", bytes(MEGABYTE)])
        wires.listener.send(peer, [b"x", bytes(MEGABYTE)], 3)
    started = time.monotonic()
    for end in (dialer, wires.listener):
        end.close()
        end.close()
    assert time.monotonic() - started < 2.0


def test_nothing_arrives_twice_and_nothing_after_the_end(wires: Wires) -> None:
    dialer, peer = wires.met()
    assert dialer.receive() is None
    assert wires.listener.receive() is None
    wires.listener.send(peer, [b"one"])
    assert bytes(received(dialer)[1][0]) == b"one"
    assert dialer.receive() is None


# Sockets


def test_address_is_where_others_reach_it(sockets: Wires) -> None:
    assert sockets.listener.address.startswith(f"{sockets.kind}://")
    assert not sockets.listener.address.endswith((":0", ":*"))
    dialer, _ = sockets.met()
    assert dialer.address == sockets.listener.address


def test_several_addresses_at_once(tmp_path: Path) -> None:
    listener = transports.listen(["tcp://127.0.0.1:0", f"ipc://{tmp_path}/s"])
    ends = [transports.dial(listener.address), transports.dial(f"ipc://{tmp_path}/s")]
    for end in ends:
        end.send(SERVER, [b"hello"])
    assert len({received(listener)[0] for _ in ends}) == 2
    for end in (*ends, listener):
        end.close()


@pytest.mark.parametrize("pause_s", [0.0, 0.05, 0.3])
def test_after_a_pause_the_next_message_wakes_the_reader(sockets: Wires, pause_s: float) -> None:
    """Burst, idle, burst: the descriptor is edge-triggered, and an edge that is missed would never come again."""
    dialer, peer = sockets.met()
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        for burst in (5, 1, 40, 1):
            for number in range(burst):
                sent(sockets.listener, peer, [b"%d" % number])
            got = 0
            deadline = time.monotonic() + TIMEOUT_S
            while True:
                while dialer.receive() is not None:
                    got += 1
                if got == burst:
                    break
                assert time.monotonic() < deadline, f"woke up for {got} of {burst}"
                dialer.wait(TIMEOUT_S, also=wake)
            time.sleep(pause_s)
    finally:
        os.close(wake)


def test_what_came_along_with_a_message_is_never_overlooked(sockets: Wires) -> None:
    """Whoever takes one message, without having waited for it, and leaves the next where it is."""
    dialer, peer = sockets.met()
    for _ in range(20):
        assert dialer.receive() is None
        for number in range(2):
            sent(sockets.listener, peer, [b"%d" % number])
        assert select.select([dialer.fileno()], [], [], TIMEOUT_S)[0]
        time.sleep(0.001)  # so that mostly both are there
        assert bytes(received(dialer)[1][0]) == b"0"
        until(lambda: dialer.overlooked or select.select([dialer.fileno()], [], [], 0)[0] != [], "word of the second")
        assert bytes(received(dialer)[1][0]) == b"1"


def test_waiting_ends_by_a_wake_up_a_loss_or_the_time(sockets: Wires) -> None:
    dialer, _ = sockets.met()
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        started = time.monotonic()
        dialer.wait(0.05, also=wake)
        assert time.monotonic() - started >= 0.045
        os.eventfd_write(wake, 1)
        started = time.monotonic()
        dialer.wait(TIMEOUT_S, also=wake)
        assert time.monotonic() - started < TIMEOUT_S / 2
        os.eventfd_read(wake)
        assert not dialer.lost()
        sockets.listener.close()
        until(lambda: dialer.wait(0.1, also=wake) or dialer.receive() or dialer.lost(), "word of the loss")
        assert not dialer.lost(), "once"
    finally:
        os.close(wake)


def test_round_trips_are_quick_also_after_idling(sockets: Wires) -> None:
    dialer, peer = sockets.met()
    best = []
    for _ in range(3):
        time.sleep(0.05)
        times = []
        for _ in range(20):
            started = time.perf_counter()
            dialer.send(SERVER, [b"ping"])
            until_received = received(sockets.listener)
            sockets.listener.send(until_received[0], [b"pong"])
            received(dialer)
            times.append(time.perf_counter() - started)
        best.append(min(times))
    assert max(best) < 0.1, "a round trip on one machine"
    assert peer


def test_a_connection_over_ipc_has_room_for_a_chunk(tmp_path: Path) -> None:
    """Or as much as the system allows, which takes it twice for its own bookkeeping."""
    before = unix_rooms()
    wires = Wires("ipc", tmp_path)
    try:
        dialer, _ = wires.met()

        def both_have_it() -> bool:
            dialer.wait(0.1, also=-1)
            wires.listener.listen_to_monitor()
            return not dialer.lost() and len(unix_rooms() - before) == 2

        until(both_have_it, "room both ways")
        allowed = int(Path("/proc/sys/net/core/wmem_max").read_text())
        assert [room for _, room in unix_rooms() - before] == [2 * min(PAYLOAD_BYTES, allowed)] * 2
    finally:
        wires.close()


def unix_rooms() -> set[tuple[int, int]]:
    """(descriptor, bytes) of the Unix connections of this process whose buffer for sending is not the system's."""
    usual, found = int(Path("/proc/sys/net/core/wmem_default").read_text()), set()
    for name, end in sockets_of_this_process():
        if end.family == socket.AF_UNIX and (room := end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)) != usual:
            found.add((name, room))
    return found


def sockets_of_this_process() -> Iterator[tuple[int, socket.socket]]:
    """By descriptor; what is made here is closed again."""
    for name in map(int, os.listdir("/proc/self/fd")):
        if os.path.realpath(f"/proc/self/fd/{name}").rpartition("/")[2].startswith("socket:"):
            with socket.socket(fileno=os.dup(name)) as end:
                yield name, end


def test_a_connection_over_tcp_within_the_machine_is_not_paced(tmp_path: Path) -> None:
    """Whatever the system chooses for those that leave it."""
    wires = Wires("tcp", tmp_path)
    try:
        dialer, _ = wires.met()
        port = int(wires.listener.address.rpartition(":")[2])

        def of_both_ends() -> list[bytes]:
            found = []
            for _, end in sockets_of_this_process():
                if end.family == socket.AF_INET and end.type == socket.SOCK_STREAM:
                    with contextlib.suppress(OSError):  # it listens
                        if port in (end.getpeername()[1], end.getsockname()[1]):
                            found.append(end.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0"))
            return found

        def both_chose() -> bool:
            dialer.wait(0.1, also=-1)
            wires.listener.listen_to_monitor()
            return not dialer.lost() and of_both_ends() == [UNPACED] * 2

        assert len(of_both_ends()) == 2
        until(both_chose, "no pacing at either end")
    finally:
        wires.close()


def test_message_beyond_the_limit_is_never_delivered(sockets: Wires) -> None:
    dialer, _ = sockets.met()
    dialer.send(SERVER, [b"too large", bytes(PAYLOAD_BYTES + 1)])
    other, peer = sockets.dial(), b""
    other.send(SERVER, [b"fits"])
    while not peer:
        name, frames = received(sockets.listener)
        assert bytes(frames[0]) == b"fits", "nothing of the other"
        peer = name
    assert sockets.listener.receive() is None


def test_port_in_use_says_so() -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    try:
        with pytest.raises(NetworkError, match="already") as caught:
            transports.listen([f"tcp://127.0.0.1:{taken.getsockname()[1]}"])
        assert caught.value.fix
    finally:
        taken.close()


def test_second_listener_on_a_live_ipc_path_is_refused(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/s"
    first = transports.listen([address])
    with pytest.raises(NetworkError, match="already"):
        transports.listen([address])
    dialer = transports.dial(address)
    dialer.send(SERVER, [b"still here"])
    assert bytes(received(first)[1][0]) == b"still here"
    dialer.close()
    first.close()


def test_ipc_file_of_a_dead_server_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "s"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    assert path.is_socket()
    listener = transports.listen([f"ipc://{path}"])
    dialer = transports.dial(f"ipc://{path}")
    dialer.send(SERVER, [b"hello"])
    assert bytes(received(listener)[1][0]) == b"hello"
    dialer.close()
    listener.close()


@pytest.mark.parametrize("address", ["nonsense", "tcp://", "tcp://127.0.0.1", "http://x:1"])
def test_bad_address_is_a_network_error_both_ways(address: str) -> None:
    for open_ in (transports.dial, lambda a: transports.listen([a])):
        with pytest.raises(NetworkError) as caught:
            open_(address)
        assert address in caught.value.sentence
        assert caught.value.fix


def test_second_address_that_fails_leaves_nothing_bound(tmp_path: Path) -> None:
    with pytest.raises(NetworkError):
        transports.listen([f"ipc://{tmp_path}/s", "tcp://203.0.113.1:1"])
    transports.listen([f"ipc://{tmp_path}/s"]).close()


def test_dialing_nobody_is_silence_and_bounded() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    end = transports.dial(f"tcp://127.0.0.1:{port}")
    count = 0
    while not (reason := end.send(SERVER, [b"anybody?"])):
        count += 1
        assert count < 10_000
    assert reason
    assert end.receive() is None
    end.close()


# Shared memory

POINTER = struct.Struct("<16sQQ")
SHARED_BYTES = PAYLOAD_BYTES + 3 * POINT_BYTES


class Sharing:
    """A connection both of whose ends have memory that the other reads."""

    def __init__(self, wires: Wires) -> None:
        self.wires = wires
        self.dialer, self.peer = wires.met()
        self.listener = wires.listener
        self.up, self.down = Memory.make(SHARED_BYTES), Memory.make(SHARED_BYTES)
        for number, memory in enumerate((self.up, self.down)):
            memory.data[:] = np.random.default_rng(number).integers(0, 256, SHARED_BYTES, np.uint8)
        self.dialer.share(SERVER, self.up, self.offered(self.down))
        self.listener.share(self.peer, self.down, self.offered(self.up))

    @staticmethod
    def offered(memory: Memory) -> tuple[bytes, Any]:
        return bytes.fromhex(memory.place.mark), attach(memory.place, expect=SHARED_BYTES)

    @property
    def ways(self) -> list[tuple[Any, bytes, Any, Memory]]:
        """Sender, whom it sends to, receiver, the sender's memory."""
        return [(self.dialer, SERVER, self.listener, self.up), (self.listener, self.peer, self.dialer, self.down)]

    def point(self, at: int, size: int, mark: bytes | None = None) -> list[Any]:
        """What the listener makes of a pointer, whoever wrote it."""
        mark = bytes.fromhex(self.up.place.mark) if mark is None else mark
        assert self.dialer._sockets.send(SERVER, [b"header", POINTER.pack(mark, at, size)]) == ""
        return received(self.listener)[1]

    def lies_in(self, memory: Memory, buffer: Any) -> bool:
        """Whether the buffer is no copy: it changes with the memory."""
        before = bytes(buffer)
        memory.data[:] ^= 0xFF
        changed = bytes(buffer)
        memory.data[:] ^= 0xFF
        return changed != before


@pytest.fixture
def sharing(sockets: Wires) -> Iterator[Sharing]:
    made = Sharing(sockets)
    yield made
    made.up.withdraw()
    made.down.withdraw()


@pytest.mark.parametrize("size", [POINT_BYTES + 1, COPY_BYTES + 1, PAYLOAD_BYTES + 1, SHARED_BYTES])
def test_a_payload_in_shared_memory_is_read_where_it_lies(sharing: Sharing, size: int) -> None:
    """Also one that is too long for a message, and what was sent before and after it keeps its place."""
    for sender, name, receiver, memory in sharing.ways:
        for at in {0, 1, SHARED_BYTES - size}:
            if at + size > SHARED_BYTES:
                continue
            assert sender.send(name, [b"before", b"x"]) == ""
            assert sender.send(name, [b"header", memory.data[at : at + size].data], hold=9) == ""
            assert sender.send(name, [b"after"]) == ""
            assert sender.released() == [9], "nothing tells when it was read"
            assert [bytes(frame) for frame in received(receiver)[1]] == [b"before", b"x"]
            header, payload = received(receiver)[1]
            assert bytes(header) == b"header"
            assert bytes(payload) == memory.data[at : at + size].tobytes()
            assert sharing.lies_in(memory, payload)
            assert memoryview(payload).readonly
            assert [bytes(frame) for frame in received(receiver)[1]] == [b"after"]


def test_short_payloads_and_those_that_lie_elsewhere_are_sent(sharing: Sharing) -> None:
    for sender, name, receiver, memory in sharing.ways:
        other = np.array(memory.data)
        for source in (memory.data[:POINT_BYTES], other[:PAYLOAD_BYTES]):
            before = source.tobytes()
            assert sender.send(name, [b"header", source.data]) == ""
            payload = received(receiver)[1][1]
            assert bytes(payload) == before
            assert not sharing.lies_in(memory, payload)


def test_what_is_too_long_and_not_shared_is_refused_and_not_sent(sharing: Sharing) -> None:
    for sender, name, receiver, memory in sharing.ways:
        for payload in (bytes(PAYLOAD_BYTES + 1), np.array(memory.data)[: PAYLOAD_BYTES + 1].data):
            assert "no longer shared" in sender.send(name, [b"header", payload], hold=3)
            assert sender.released() == []
        assert sender.send(name, [b"after"]) == ""
        assert [bytes(frame) for frame in received(receiver)[1]] == [b"after"], "nothing of it, not even its header"


def test_pointers_within_the_memory(sharing: Sharing) -> None:
    for at, size in ((0, 1), (0, SHARED_BYTES), (SHARED_BYTES - 1, 1), (5, 7)):
        assert bytes(sharing.point(at, size)[1]) == sharing.up.data[at : at + size].tobytes()


HUGE = 2**64 - 1


@pytest.mark.parametrize(
    ("at", "size"),
    [
        (0, SHARED_BYTES + 1),
        (1, SHARED_BYTES),
        (SHARED_BYTES - 1, 2),
        (SHARED_BYTES, 1),
        (SHARED_BYTES + 1, 1),
        (SHARED_BYTES + 1, 0),
        (HUGE, 1),
        (1, HUGE),
        (HUGE, HUGE),
        (HUGE - 9, 10),
        (HUGE - 9, 20),
        (1 << 63, 1 << 63),
        (0, HUGE),
        (0, 0),
    ],
)
def test_pointers_out_of_the_memory_are_nothing(sharing: Sharing, at: int, size: int) -> None:
    header, payload = sharing.point(at, size)
    assert (bytes(header), len(payload)) == (b"header", 0)


def test_pointers_into_memory_that_is_not_shared_are_payloads_as_any_other(sharing: Sharing, sockets: Wires) -> None:
    """With another mark, by a peer that shares nothing, and one peer into the memory of another."""
    for mark in (bytes(MARK_BYTES), bytes.fromhex(sharing.down.place.mark)):
        assert bytes(sharing.point(0, 100, mark)[1]) == POINTER.pack(mark, 0, 100)
    stranger, _ = sockets.met()
    for mark in (b"", bytes.fromhex(sharing.up.place.mark)):
        pointer = POINTER.pack(mark, 0, 0 if not mark else 100)
        assert stranger._sockets.send(SERVER, [b"header", pointer]) == ""
        assert bytes(received(sockets.listener)[1][1]) == pointer
    assert len(sharing.point(0, 100)[1]) == 100, "whose it is still points"


@pytest.mark.parametrize("pointer", [b"", b"x", bytes(POINTER.size - 1), bytes(POINTER.size + 1), bytes(1000)])
def test_payloads_that_are_no_pointer_are_passed_on(sharing: Sharing, pointer: bytes) -> None:
    assert sharing.dialer._sockets.send(SERVER, [b"header", pointer]) == ""
    frames = received(sharing.listener)[1]
    assert [bytes(frame) for frame in frames if len(frame)] == [b"header", pointer][: 1 + bool(pointer)]


def test_after_it_ends_payloads_travel_in_messages_again(sharing: Sharing) -> None:
    kept = sharing.point(0, 100)[1]
    sharing.listener.unshare(sharing.peer)
    sharing.listener.unshare(sharing.peer)
    assert len(sharing.point(0, 100)[1]) == POINTER.size
    assert "no longer shared" in sharing.listener.send(sharing.peer, [b"h", sharing.down.data.data], hold=4)
    assert sharing.listener.released() == []
    whole = sharing.down.data[:PAYLOAD_BYTES]
    assert sharing.listener.send(sharing.peer, [b"h", whole.data], hold=5) == ""
    payload = received(sharing.dialer)[1][1]
    assert bytes(payload) == whole.tobytes()
    assert not sharing.lies_in(sharing.down, payload)
    until(lambda: sharing.listener.released() == [5] or None, "the release of what was read by reference")
    assert bytes(kept) == sharing.up.data[:100].tobytes(), "who has a payload keeps it"


def test_memory_that_is_shared_anew_replaces_the_old(sharing: Sharing) -> None:
    old, new = sharing.up, Memory.make(SHARED_BYTES)
    sharing.listener.share(sharing.peer, sharing.down, sharing.offered(new))
    assert len(sharing.point(0, 100)[1]) == POINTER.size, "the old mark"
    new.data[:100] = 1
    assert bytes(sharing.point(0, 100, bytes.fromhex(new.place.mark))[1]) == bytes([1]) * 100
    assert sharing.listener.send(sharing.peer, [b"h", sharing.down.data.data]) == "", "the other way is as it was"
    assert len(received(sharing.dialer)[1][1]) == SHARED_BYTES
    new.withdraw()
    assert old is sharing.up


def test_pointers_to_a_peer_that_went_are_a_reason(sharing: Sharing) -> None:
    sharing.dialer.close()
    payload = sharing.down.data.data
    assert "gone" in until(lambda: sharing.listener.send(sharing.peer, [b"x", payload], 6) or None, "word of the loss")


def test_an_end_that_is_closed_holds_no_memory(sockets: Wires) -> None:
    """What was mapped for a connection goes with its end."""

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("/memfd:paramserver")

    before = mapped()
    made = Sharing(sockets)
    assert mapped() == before + 4
    sockets.listener.unshare(made.peer)
    assert isinstance(made.dialer, SharingEndpoint)
    made.dialer.close()
    sockets._dialers.remove(made.dialer)
    made.up.withdraw()
    made.down.withdraw()
    del made
    assert mapped() == before


# Lines


class Lined(Sharing):
    """A connection that shares memory, and has a line."""

    def __init__(self, wires: Wires) -> None:
        super().__init__(wires)
        self.door = Door(self.up.place.mark)
        called = lines.dial(self.up.place.mark, self.down.place.mark)
        answered = self.door.take(self.down.place.mark)
        assert called is not None
        assert answered is not None
        self.called, self.answered = called, answered
        self.dialer.share(SERVER, self.up, self.offered(self.down), answered)
        self.listener.share(self.peer, self.down, self.offered(self.up), called)

    def take(self, end: Any) -> list[bytes]:
        """Header and payload of the next message there."""

        def next_message() -> Any:
            return end.receive() or end.receive_from(self.peer if end is self.listener else SERVER)

        return [bytes(frame) for frame in until(next_message, "a message")[1]]


@pytest.fixture
def lined(sockets: Wires) -> Iterator[Lined]:
    made = Lined(sockets)
    yield made
    made.door.close()
    made.up.withdraw()
    made.down.withdraw()


def test_what_is_pointed_at_is_never_overtaken(lined: Lined) -> None:
    """Though it goes another way, it is there before what is sent after it; what was sent before may come after."""
    for sender, name, receiver, memory in lined.ways:
        whole = memory.data.data
        for number in range(50):
            sent(sender, name, [b"before %d" % number, b"x"])
            sent(sender, name, [b"lies %d" % number, whole], hold=number + 1)
            sent(sender, name, [b"after %d" % number])
            assert sender.released() == [number + 1], "nothing tells when it was read"
            found = [lined.take(receiver) for _ in range(3)]
            headers = [frames[0] for frames in found]
            assert sorted(headers) == sorted(b"%s %d" % (word, number) for word in (b"before", b"lies", b"after"))
            assert headers.index(b"lies %d" % number) < headers.index(b"after %d" % number)
            assert headers.index(b"before %d" % number) < headers.index(b"after %d" % number)
            assert found[headers.index(b"lies %d" % number)][1] == whole.tobytes()


def test_a_line_that_is_kept_full_holds_nobody_up(lined: Lined) -> None:
    """What others sent by ZeroMQ comes, though one peer sends again as soon as it was read."""
    other, _ = lined.wires.met()
    whole = lined.up.data.data
    sent(lined.dialer, SERVER, [b"by ZeroMQ"])
    sent(other, SERVER, [b"other"])
    sent(lined.dialer, SERVER, [b"flood", whole])
    found = []
    deadline = time.monotonic() + TIMEOUT_S
    while b"other" not in found or b"by ZeroMQ" not in found:
        assert time.monotonic() < deadline
        if (message := lined.listener.receive()) is not None:
            found.append(bytes(message[1][0]))
            if found[-1] == b"flood":
                sent(lined.dialer, SERVER, [b"flood", whole])


def test_a_line_wakes_whoever_waits(lined: Lined) -> None:
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        assert lined.dialer.receive() is None
        sent(lined.listener, lined.peer, [b"h", lined.down.data.data])
        for _ in range(2):  # as long as it is there
            started = time.monotonic()
            lined.dialer.wait(TIMEOUT_S, also=wake)
            assert time.monotonic() - started < TIMEOUT_S / 2
        assert lined.take(lined.dialer)[0] == b"h"
        started = time.monotonic()
        lined.dialer.wait(0.05, also=wake)
        assert time.monotonic() - started >= 0.045
    finally:
        os.close(wake)
    sent(lined.dialer, SERVER, [b"h", lined.up.data.data])
    poller = select.poll()
    poller.register(lined.called.fileno(), select.POLLIN)
    assert poller.poll(TIMEOUT_S * 1000)


def test_a_line_that_nobody_reads_is_bounded_and_says_so(lined: Lined) -> None:
    for sender, name, receiver, memory in lined.ways:
        count, reason = 0, ""
        while not (reason := sender.send(name, [b"%d" % count, memory.data.data], hold=1)):
            count += 1
            assert count < 100_000, "grows without end"
        assert "read" in reason
        assert count > 16
        assert len(sender.released()) == count, "what was not sent holds nothing"
        assert [lined.take(receiver)[0] for _ in range(count)] == [b"%d" % number for number in range(count)]
        assert sender.send(name, [b"again", memory.data.data]) == ""
        assert lined.take(receiver)[0] == b"again"


def test_the_end_of_a_line_is_a_loss_and_told_once(lined: Lined) -> None:
    sent(lined.listener, lined.peer, [b"last", lined.down.data.data])
    lined.listener.unshare(lined.peer)
    assert not lined.dialer.lost()
    assert lined.take(lined.dialer)[0] == b"last", "what was sent before"
    assert lined.dialer.receive() is None
    assert lined.dialer.lost()
    assert not lined.dialer.lost()
    assert "gone" in lined.dialer.send(SERVER, [b"h", lined.up.data.data])
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    started = time.monotonic()
    lined.dialer.wait(0.05, also=wake)
    assert time.monotonic() - started >= 0.045, "it does not wake anybody for ever"
    os.close(wake)


def test_waiting_bears_a_line_that_another_thread_has_just_closed(lined: Lined) -> None:
    """Whoever dials anew closes this end, and the one who waits may have been about to look at it."""
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    lined.answered.close()
    started = time.monotonic()
    lined.dialer.wait(0.05, also=wake)
    assert time.monotonic() - started < TIMEOUT_S / 2
    os.close(wake)


def test_a_listener_learns_the_end_of_a_line(lined: Lined) -> None:
    lined.dialer.close()
    assert lined.listener.receive_from(lined.peer) is None
    assert lined.called.ended
    assert "gone" in lined.listener.send(lined.peer, [b"h", lined.down.data.data])


@pytest.mark.parametrize("message", [b"x", bytes(POINTER.size - 1), bytes(POINTER.size), bytes(POINTER.size + 5)])
def test_malformed_messages_on_a_line_arrive_as_such(lined: Lined, message: bytes) -> None:
    """They are the core's to refuse; no payload is made of them."""
    assert lined.answered.send(message) == ""
    header, payload = until(lambda: lined.listener.receive_from(lined.peer), "the message")[1]
    assert bytes(header) == message[: max(len(message) - POINTER.size, 0)]
    assert len(payload) in (0, POINTER.size)


def test_nobody_is_let_in_who_does_not_greet(sharing: Sharing) -> None:
    """Nor is a caller of an earlier connection taken for that of this one."""
    mark = sharing.up.place.mark
    door = Door(mark)
    assert door.take("anybody") is None
    earlier, silent = lines.dial(mark, "earlier"), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    silent.connect(lines._address(mark))
    wanted = lines.dial(mark, "wanted")
    assert earlier is not None
    assert wanted is not None
    found = door.take("wanted")
    assert found is not None
    assert found.send(b"come in") == ""
    assert wanted.receive() == b"come in"
    assert earlier.receive() is None
    assert earlier.ended
    assert silent.recv(1) == b""
    assert lines.dial("0" * 32, "greeting") is None, "no such door"
    with pytest.raises(OSError, match="in use"):
        Door(mark)
    for end in (door, earlier, wanted, found):
        end.close()
    silent.close()
    assert lines.dial(mark, "too late") is None


def test_a_process_with_no_descriptor_left_dials_no_line(sharing: Sharing) -> None:
    door = Door(sharing.up.place.mark)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert lines.dial(sharing.up.place.mark, "greeting") is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert door.take("greeting") is None
    door.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_is_sent_away(sharing: Sharing) -> None:
    mark, nobody = sharing.up.place.mark, 65534
    door = Door(mark)
    os.seteuid(nobody)
    try:
        assert lines.dial(mark, "greeting") is None, "whose door it is"
        caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        caller.connect(lines._address(mark))
        caller.send(b"greeting")
    finally:
        os.seteuid(0)
    assert door.take("greeting") is None
    sent_away = lines.Line(caller)
    assert sent_away.receive() is None
    assert sent_away.ended
    sent_away.close()
    door.close()
