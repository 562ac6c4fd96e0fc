"""Coming by the path of a Unix socket: a path has one server.

Laws
* It is not to be had while its server lives, free when that is dead, and nobody who comes by it at the same instant
  takes it from whoever was first.
* What lies there and is no socket stays.

A name that begins with a zero has no file; the system itself sees to it all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator

SCHEME = "ipc://"
PATH_BYTES = 107
BACKLOG = 1024
STARTING_S = 2.0
"""So long another server may take to come by a path beside this one."""


def encoded(address: str) -> bytes:
    """The path of ipc://PATH or ipc://@NAME as the system wants it; raises OSError for what can be none."""
    path = os.fsencode(address.removeprefix(SCHEME))
    if not 0 < len(path) <= PATH_BYTES:
        raise OSError(errno.ENAMETOOLONG, f"a path has 1 to {PATH_BYTES} bytes")
    return b"\0" + path[1:] if path.startswith(b"@") else path


def stream_socket() -> socket.socket:
    """One that never blocks."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


class Claim:
    """A path that `socket` listens at, until it is closed."""

    def __init__(self, path: bytes) -> None:
        """Take it, or raise OSError."""
        self.socket = stream_socket()
        try:
            with _alone_at(path):
                if _is_dead(path):
                    os.unlink(path)
                self.socket.bind(path)
                self.socket.listen(BACKLOG)
        except OSError:
            self.socket.close()
            raise
        self._path, self._inode = path, _inode(path)

    def close(self) -> None:
        """The file goes first, unless it is another's by now: while the socket lives nobody else can have its inode."""
        if self._inode is not None and _inode(self._path) == self._inode:
            with contextlib.suppress(OSError):  # whoever comes next finds it dead
                os.unlink(self._path)
        self.socket.close()


def _inode(path: bytes) -> int | None:
    """Of the socket there; None where there is none, or something else."""
    with contextlib.suppress(OSError, ValueError):  # a name without a file
        if stat.S_ISSOCK((found := os.stat(path)).st_mode):
            return found.st_ino
    return None


@contextlib.contextmanager
def _alone_at(path: bytes) -> Iterator[None]:
    """No other server comes by a path in this folder inside the block; raises OSError."""
    if path.startswith(b"\0"):  # the system sees to it
        yield
        return
    folder = os.open(os.path.dirname(path) or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + STARTING_S
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise OSError(errno.EBUSY, "another program holds its folder") from None
                time.sleep(0.001)
        yield
    finally:
        os.close(folder)


def _is_dead(path: bytes) -> bool:
    """Whether a socket lies there that nobody has any more; raises OSError where anything else does."""
    if path.startswith(b"\0") or not os.path.lexists(path):
        return False
    if _inode(path) is None:
        raise OSError(errno.EEXIST, "there is something that is no socket")
    with stream_socket() as probe:
        found = probe.connect_ex(path)
    if found in (errno.EACCES, errno.EPERM):
        raise OSError(found, os.strerror(found))
    if found != errno.ECONNREFUSED:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    return True
