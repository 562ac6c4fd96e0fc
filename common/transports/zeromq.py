"""tcp:// by ZeroMQ: a ROUTER listens, a DEALER dials.

Laws
* Routing ids are made by the ROUTER, so no peer can take another's place.
* High-water marks are no flow control (a low RCVHWM with heartbeats disconnects healthy peers); the protocol's
  windows are, and the marks lie above them.
* LINGER 0: what was queued for a connection dies with it. A DEALER that survived would hand the tail of an old
  transfer to a new server, so a worker that has doubts closes it and dials again.
* ZeroMQ's heartbeats only reap dead TCP connections; leases are the cores' business.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import socket as sockets
import struct
from collections.abc import Container, Sequence
from typing import Any

import zmq

from common import scheduling
from common.buffers import keep_freed_memory
from common.errors import NetworkError
from common.messages import Buffer
from common.transports.base import SERVER
from common.transports.lending import Loan, lend, prepare
from common.transports.libzmq import Opening, Readable
from common.wire import HEADER_BYTES, PAYLOAD_BYTES

COPY_BYTES = 64 * 1024
"""Payloads up to this size are copied into the message: cheaper than watching until they have been read."""
WINDOW_CHUNKS = 64
"""Messages queued for one peer at most: well above what the windows of one session allow."""
LENT_MESSAGES = 2 * WINDOW_CHUNKS
"""So many before somebody looks which of them were read."""
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 10_000, 60_000
HANDSHAKE_MS = 2_000
BACKLOG = 1024
UNPACED = b"reno"
"""The congestion control within this machine: every Linux has it and lets everybody choose it."""
# Plain sending and receiving: what zmq.Socket puts around them, and its enumerations, cost more than they do
_plain_send: Any = zmq.backend.Socket.send
_plain_receive: Any = zmq.backend.Socket.recv
_NOBLOCK = int(zmq.NOBLOCK)
_NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENT = struct.Struct("=Hi")
"""Of a monitor: what, and of which descriptor."""
_ANY_PORT = re.compile(r"^(tcp://.*):0$")


class ZeroMQEndpoint:
    """A ROUTER or DEALER socket, and its monitor, behind `common.transports.base.Endpoint`."""

    def __init__(self, socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes], address: str) -> None:
        self._socket = socket
        self._address = address
        self._routes = socket.type == zmq.ROUTER
        self._lent: list[tuple[int, Loan]] = []
        """Holds, and what they hold."""
        self._released: list[int] = []
        self._has_message = Readable(socket)
        self._opening = Opening(socket) if self._routes else None
        self._monitor = monitor
        self._monitor_has = Readable(monitor)
        self._quiet = False
        """Whether nothing was there, and nothing was sent since: then the descriptor tells of whatever comes."""
        self._took = False
        """Whether a dialer took one last. The next look mostly finds none then: to ask costs less than to fail."""
        self._monitor_spoke = True
        """Whether a dialer's monitor was readable since it was last asked."""
        self._silent = False
        """Whether all was quiet, and the descriptor has just said that it still is: the next look is spared."""
        self._broke = False
        """Whether a connection broke, and nobody was told."""
        self.descriptors = [int(one.getsockopt(zmq.FD)) for one in (socket, monitor)]
        """Of which one becomes readable when a message, or a loss, may be there."""

    @property
    def address(self) -> str:
        return self._address

    def fileno(self) -> int:
        return self.descriptors[0]

    @property
    def monitors(self) -> list[int]:
        return self.descriptors[-1:]

    def send(self, peer: bytes, frames: Sequence[Buffer], hold: int = 0) -> str:
        self._quiet = False
        try:
            if self._routes:
                _plain_send(self._socket, peer, _NOBLOCK_MORE)
            loan = self._send(frames[0], frames[1] if len(frames) > 1 else b"")
        except zmq.Again:
            return "the peer does not read"
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:
                return "the peer is gone"
            raise
        if loan is not None:
            self._lent.append((hold, loan))
            if len(self._lent) > LENT_MESSAGES:
                self._sweep()
        elif hold:
            self._released.append(hold)
        return ""

    def _send(self, header: Buffer, payload: Buffer) -> Loan | None:
        """One message after its peer; the payload, where it is lent and not copied."""
        if not payload:
            _plain_send(self._socket, header, _NOBLOCK)
            return None
        _plain_send(self._socket, header, _NOBLOCK_MORE)
        if len(payload) > COPY_BYTES:
            return lend(self._socket, payload)
        _plain_send(self._socket, payload, _NOBLOCK)
        return None

    def _sweep(self) -> None:
        """Find what was returned."""
        lent, self._lent = self._lent, []
        for hold, loan in lent:
            if not loan.returned:
                self._lent.append((hold, loan))
            elif hold:
                self._released.append(hold)

    @property
    def overlooked(self) -> bool:
        """Whether `receive` has something of which the descriptor may not tell. It costs nothing where all is quiet."""
        if self._quiet:
            return False
        self._quiet = not self._has_message()
        return not self._quiet

    def receive(self) -> tuple[bytes, list[Buffer]] | None:
        if self._opening is None:
            return self._receive_from_server()
        if (peer := self._opening()) is None:
            self._quiet = True
            return None
        return peer, self._rest(_plain_receive(self._socket, _NOBLOCK, False))

    def _receive_from_server(self) -> tuple[bytes, list[Buffer]] | None:
        silent, self._silent = self._silent, False
        took, self._took = self._took, False
        if silent or (took and not self.overlooked):
            return None
        try:
            first = _plain_receive(self._socket, _NOBLOCK, False)
        except zmq.Again:
            self._quiet = True
            return None
        self._took = True
        return SERVER, self._rest(first)

    def _rest(self, frame: Any) -> list[Buffer]:
        """The frames of a message from this one on."""
        self._quiet = False  # what came along is not announced again
        frames: list[Buffer] = [frame.buffer]
        while frame.more:
            frame = _plain_receive(self._socket, _NOBLOCK, False)
            frames.append(frame.buffer)
        return frames

    def released(self) -> list[int]:
        if self._lent:
            self._sweep()
        done, self._released = self._released, []
        return done

    patience_s = math.inf

    @property
    def holding(self) -> bool:
        """Whether any buffer is still being read."""
        return bool(self._lent or self._released)

    def woken(self, descriptors: Container[int]) -> None:
        """Whoever waited for a dialer's `descriptors` found these readable. Another thread may send meanwhile: nothing
        here makes anybody overlook what came because of that."""
        if self.descriptors[0] in descriptors:
            self._quiet = self._took = False
        self._silent = self._quiet
        self._monitor_spoke |= self.descriptors[-1] in descriptors

    def lost(self) -> bool:
        """Whether a dialler's connection broke since the last call; to be told of `woken` before."""
        if self._monitor_spoke:
            self._monitor_spoke = False
            self.listen_to_monitor()
        broke, self._broke = self._broke, False
        return broke

    def listen_to_monitor(self) -> None:
        """Take in which connections began or broke. Call it whenever there is something: ZeroMQ's own thread, and with
        it every connection, waits for whoever leaves a few thousand of them there."""
        while self._monitor_has():
            event, value = _EVENT.unpack(self._monitor.recv_multipart(zmq.NOBLOCK)[0])
            if event == zmq.EVENT_DISCONNECTED:
                self._broke = True
            else:
                _tune(value)

    def close(self) -> None:
        self._has_message.closed = self._monitor_has.closed = True
        _close(self._socket, self._monitor)
        self._lent.clear()


def _tune(descriptor: int) -> None:
    """Have a connection that has just begun not be paced, where it does not leave this machine.

    BBR, for one, paces what it sends: that costs a quarter of the time for nothing, for there is no queue to spare.
    """
    with contextlib.suppress(OSError):  # it is over already, and the number perhaps another's
        kept = os.dup(descriptor)
        try:
            connection = sockets.socket(fileno=kept)
        except OSError:
            os.close(kept)
            return
        with connection:
            if connection.getpeername()[0] == connection.getsockname()[0]:
                connection.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_CONGESTION, UNPACED)


def listen(addresses: Sequence[str]) -> ZeroMQEndpoint:
    """A ROUTER bound to every address; raises NetworkError where one is taken or cannot be."""
    keep_freed_memory(PAYLOAD_BYTES)
    prepare()
    socket: zmq.Socket[bytes] = _context().socket(zmq.ROUTER)
    _limit(socket)
    monitor = socket.get_monitor_socket(zmq.EVENT_ACCEPTED)  # before anything happens
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.BACKLOG, BACKLOG)
    bound: list[str] = []
    for address in addresses:
        try:
            socket.setsockopt(zmq.IPV6, int("[" in address))
            socket.bind(_ANY_PORT.sub(r"\1:*", address))
        except zmq.ZMQError as error:
            _close(socket, monitor)
            raise _cannot_bind(address, error) from None
        bound.append(socket.getsockopt_string(zmq.LAST_ENDPOINT))
    return ZeroMQEndpoint(socket, monitor, bound[0])


def dial(address: str) -> ZeroMQEndpoint:
    """A DEALER connected to `address`. Connecting never fails; silence is what tells that nobody is there."""
    keep_freed_memory(PAYLOAD_BYTES)
    socket: zmq.Socket[bytes] = _context().socket(zmq.DEALER)
    _limit(socket)
    monitor = socket.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
    socket.setsockopt(zmq.IPV6, int("[" in address))
    try:
        socket.connect(address)
    except zmq.ZMQError as error:
        _close(socket, monitor)
        raise NetworkError(
            f"'{address}' is no address to dial ({error.strerror}).", fix="Write it as tcp://HOST:PORT or ipc://PATH."
        ) from None
    return ZeroMQEndpoint(socket, monitor, address)


def _context() -> zmq.Context[zmq.Socket[bytes]]:
    """Whose threads wait their turn (`common.scheduling`)."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    if scheduling.is_free():
        context.set(zmq.THREAD_SCHED_POLICY, scheduling.BATCH)  # of threads that start with the first socket
    return context


def _limit(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max(PAYLOAD_BYTES, HEADER_BYTES))
    socket.setsockopt(zmq.SNDHWM, WINDOW_CHUNKS)
    socket.setsockopt(zmq.RCVHWM, 2 * WINDOW_CHUNKS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)


def _close(socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
    """Both at once; a second call does nothing."""
    if not socket.closed:
        socket.disable_monitor()
    monitor.close(linger=0)
    socket.close(linger=0)


def _cannot_bind(address: str, error: zmq.ZMQError) -> NetworkError:
    if error.errno == errno.EADDRINUSE:
        return NetworkError(
            f"Cannot listen on {address}: something else already does.",
            fix="Stop it, choose another port, or use port 0 for any free one.",
        )
    return NetworkError(f"Cannot listen on {address}: {os.strerror(error.errno or 0)}.", fix="Check host and port.")
