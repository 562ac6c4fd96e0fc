"""Processes that are born with their libraries: forked, whenever one is wanted, from one that does nothing else.

    nursery.start()                                   early: it takes its time, beside whatever comes next
    family = nursery.family("package.module:prepare", wanted=...); family.wait()
    number = family.fork(descriptor, ...)             a process; it runs what prepare(wanted=...) returned
    family.kill(number); family.reap(number)          end it; wait for it and learn how it ended
    family.close()                                    nothing of it is left

This process may have threads, which no fork survives, so it never forks itself: the nursery is an interpreter of its
own, with one thread and everything imported. It forks families, and a family, once it is prepared, forks its members:
what was prepared is in memory once for all of them.

Laws
* Whoever loses its parent ends: at the end of the line to it, and by the kernel's hand. A family that ends has ended
  its members before, and waited for each: no process is left, and no zombie.
* Ctrl-C in a terminal reaches none of them: the nursery has a session of its own.
* A member has no descriptors but those it was given, and those of the nursery's output.

Left out: what members say and do (`deploy.simulation.remote`).
"""

from __future__ import annotations

import atexit
import gc
import importlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from common.errors import ParamserverError
from deploy.children import ROOT, die_with

LOAD = "deploy.simulation.remote:load"
"""What it does first."""
REQUEST_BYTES = 1 << 17
DESCRIPTORS = 8
"""That one process may be given."""
PATIENCE_S = 5.0
"""So long a process that is to end by itself may take."""

Live = Callable[..., None]
"""live(*descriptors): the life of one member."""


# In the process that wants others


class Line:
    """The line to a process that forks others when it is told to."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._numbers = itertools.count(1)

    def fork(self, *descriptors: int) -> int:
        """A process with copies of these descriptors; returns its number. It says itself whether it is there."""
        number = next(self._numbers)
        self._send(f"fork {number}", descriptors)
        return number

    def kill(self, number: int) -> None:
        """SIGKILL, soon; nothing where it has ended."""
        with suppress(ParamserverError):  # without a line it is dead already
            self._send(f"kill {number}")

    def reap(self, number: int) -> str:
        """Wait for one that ends by itself, but not for long; returns how it ended, in words."""
        self._send(f"reap {number}")
        try:
            return self._line.recv(REQUEST_BYTES).decode() or "is gone"
        except OSError:
            return "is gone"

    def close(self) -> None:
        """Have it end."""
        self._line.close()

    def _send(self, request: str, descriptors: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self._line, [request.encode()], descriptors)
        except OSError as error:
            raise ParamserverError(f"The process that starts the others is gone ({error.strerror}).") from None


class Family(Line):
    """Members that share what was prepared for all."""

    def __init__(self, nursery: Nursery, line: socket.socket, number: int) -> None:
        super().__init__(line)
        self._nursery, self._number = nursery, number
        nursery.families.add(number)

    def wait(self) -> None:
        """Until it is prepared; raises ParamserverError where it cannot be."""
        with suppress(OSError):
            if self._line.recv(REQUEST_BYTES):
                return
        raise ParamserverError(
            "The process that starts the others ended before it was prepared; what it said is above."
        )

    def close(self) -> None:
        """End its members and the family; nothing of it is left."""
        super().close()
        with suppress(ParamserverError), _lock:
            self._nursery.families.discard(self._number)
            self._nursery.reap(self._number)


class Nursery(Line):
    """The prepared interpreter, a child of this process."""

    def __init__(self) -> None:
        line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        super().__init__(line)
        self.families: set[int] = set()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with theirs:
            command = [sys.executable, "-P", "-m", "deploy.nursery", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env=dict(os.environ) | {"PYTHONPATH": path},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End it, and whatever it started."""
        super().close()
        if not self.families:
            self._process.kill()  # it may still be importing
        self._process.wait()


_lock = threading.Lock()
_nursery: Nursery | None = None


def start() -> Nursery:
    """The nursery of this process; it ends with it."""
    global _nursery
    with _lock:
        if _nursery is None or not _nursery.alive:
            if _nursery is not None:
                atexit.unregister(_nursery.close)
                _nursery.close()
            _nursery = Nursery()
            atexit.register(_nursery.close)
        return _nursery


def family(prepare: str, **wanted: Any) -> Family:
    """Members that run what `prepare`, a function "module:name", makes of what is `wanted`: values that JSON knows."""
    nursery = start()
    setup = {"path": sys.path, "directory": os.getcwd(), "prepare": prepare, "wanted": wanted}
    line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, _lock:
        number = nursery.fork(theirs.fileno())
    line.send(json.dumps(setup).encode())
    return Family(nursery, line, number)


# In the nursery, in a family, in a member


def main(descriptor: int) -> None:
    """Import everything, then fork families until the line ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _function(LOAD)()
    _serve(socket.socket(fileno=descriptor), _family, PATIENCE_S)


def _family(descriptor: int) -> None:
    line = socket.socket(fileno=descriptor)
    setup = json.loads(line.recv(REQUEST_BYTES) or "null")
    if setup is None:
        return
    sys.path[:] = setup["path"]
    os.chdir(setup["directory"])
    live = _function(setup["prepare"])(**setup["wanted"])
    line.send(b"prepared")
    _serve(line, live, 0.0)


def _function(name: str) -> Callable[..., Any]:
    module, _, name = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _serve(line: socket.socket, live: Live, patience_s: float) -> None:
    """Fork, kill and wait, as the line says, until it ends; whoever has not ended then may take so long."""
    gc.collect()
    gc.freeze()  # what is here stays; a collector that looks through it would copy its pages
    children: dict[int, int] = {}
    with line:
        while True:
            request, descriptors, _, _ = socket.recv_fds(line, REQUEST_BYTES, DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
            if not request:
                break
            word, number = request.split()
            match word:
                case b"fork":
                    with suppress(OSError):  # no process: its descriptors end, and that says so
                        children[int(number)] = _fork(line, live, descriptors)
                    for descriptor in descriptors:
                        os.close(descriptor)
                case b"kill":
                    if pid := children.pop(int(number), 0):
                        _wait(pid, 0.0)
                case b"reap":
                    pid = children.pop(int(number), 0)
                    line.send((_wait(pid, PATIENCE_S) if pid else "could not be started").encode())
    if not patience_s:
        for pid in children.values():
            os.kill(pid, signal.SIGKILL)
    for pid in children.values():
        _wait(pid, patience_s)


def _fork(line: socket.socket, live: Live, descriptors: Sequence[int]) -> int:
    parent = os.getpid()
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    line.close()
    _live(parent, live, descriptors)


def _live(parent: int, live: Live, descriptors: Sequence[int]) -> NoReturn:
    """One life, from its first to its last instruction."""
    code = 1
    try:
        die_with(parent, signal.SIGKILL)
        live(*descriptors)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def _wait(pid: int, patience_s: float) -> str:
    """Wait for a child, and end it where that takes too long; how it ended, in words."""
    watched = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    if not poll.poll(1e3 * patience_s):
        os.kill(pid, signal.SIGKILL)
    os.close(watched)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return f"ended with exit status {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


if __name__ == "__main__":
    main(int(sys.argv[1]))
