"""Lines: how two processes of one machine that share memory hand each other short messages. Unix sockets, no threads.

    door = Door(mark)               the worker; `mark`: of the memory that it offers
    line = dial(mark, greeting)     the server, which has that memory; greeting: the mark of its own
    line = door.take(greeting)      the worker again, when it was told of the server's memory

Laws
* A message arrives whole, once, and in order; and it has arrived when `send` returns.
* Nobody but a process of the same user that knows the mark is talked to.
* A door has no file: when its process is gone, however it ended, nothing is left of it.

Left out: payloads. ZeroMQ hands every message to a thread of its own on each side, and a machine whose cores all train
has to wake both: four changes of context for an exchange of small models, where two do.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct

from common.messages import Buffer

MESSAGE_BYTES = 128 * 1024
"""Longer messages are cut, and then refused as malformed by whoever reads them."""
WAITING = 8
"""Callers at a door that were not let in yet: one for each connection of its worker that failed."""
_CREDENTIALS = struct.Struct("3i")  # process, user, group


class Line:
    """One end. A descriptor that becomes readable, and stays so, while there is something to receive."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self.ended = False
        """Whether the other end is closed, and all that it sent received."""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Buffer) -> str:
        """Returns "" or why it could not be sent."""
        try:
            self._socket.send(message)
        except BlockingIOError:
            return "the peer does not read"
        except OSError:
            return "the peer is gone"
        return ""

    def receive(self) -> bytes | None:
        """The next message; None where there is none."""
        try:
            message = self._socket.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            message = b""
        self.ended = not message
        return message or None

    def close(self) -> None:
        """A second call does nothing."""
        self._socket.close()


class Door:
    """Where a server calls that was offered the memory with this mark; raises OSError where there can be none."""

    def __init__(self, mark: str) -> None:
        self._socket = _new()
        try:
            self._socket.bind(_address(mark))
            self._socket.listen(WAITING)
        except OSError:
            self._socket.close()
            raise

    def take(self, greeting: str) -> Line | None:
        """The caller with this greeting, which has called before; None where none has. Others are sent away."""
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:
                return None
            caller.setblocking(False)
            line = Line(caller)
            if _is_of_this_user(caller) and line.receive() == greeting.encode():
                return line
            line.close()

    def close(self) -> None:
        """A second call does nothing."""
        self._socket.close()


def dial(mark: str, greeting: str) -> Line | None:
    """A line to the process that offered memory with this mark; None where it has no door that this one can reach."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as unused:
        caller = unused.enter_context(_new())
        caller.connect(_address(mark))
        line = Line(caller)
        if _is_of_this_user(caller) and not line.send(greeting.encode()):
            unused.pop_all()
            return line
    return None


def _new() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def _address(mark: str) -> bytes:
    """In Linux's abstract namespace, where names end with their sockets, and everybody sees them, but not the mark."""
    return b"\0paramserver-" + hashlib.sha256(mark.encode()).hexdigest()[:32].encode()


def _is_of_this_user(connected: socket.socket) -> bool:
    found = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(found)
    return bool(user == os.geteuid())
