"""Memory that two processes of one machine share: written by its owner alone, read by the one it is offered to.

    memory = Memory.make(size)            memory.data: (size,) uint8, to write;  memory.place: plain values to send
    found = attach(place, expect=size)    (size,) uint8, read only

Laws
* It has no name: when both sides are gone, however they ended, nothing is left of it.
* All its pages are there before it is offered, so that no access finds a full machine, and seals keep its size for
  ever: no peer can make an access fail. Nobody but the owner can map it for writing.
* `attach` maps nothing that it has not checked: the same user, really such memory, its seals, its size, and the random
  mark in it, without which a process number may mean another process in another container.
* It lies on huge pages where the system gives any: on small ones the way from an address to its page costs a third of
  the time of a copy.
* Being able to attach is the test of being on one machine; `MACHINE` only says when trying is worth it.

Left out: who offers what to whom, and when it may be written to again (the cores), and messages about places in it
(`common.transports`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import secrets
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from common.buffers import HUGE_PAGE_BYTES
from common.codecs.base import U8
from common.errors import ParamserverError, StateError
from common.messages import Buffer, Place

NAME = "paramserver"
"""What /proc calls it, for people who look."""
MARK_BYTES = 16
PAGE_BYTES = 4096
"""The first page holds the mark."""
F_SEAL_FUTURE_WRITE = 0x10  # of linux/fcntl.h; the module fcntl does not name it before Python 3.13
PROT_NONE, MAP_FIXED, MAP_NORESERVE = 0, 0x10, 0x4000  # of linux/mman.h, and so is
MADV_COLLAPSE = 25
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE


def _machine() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


MACHINE = _machine()
"""Differs from machine to machine, and from start to start; "" where it is not known."""


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """What its owner has of it. data: (size,) uint8."""

    data: U8
    address: int
    """Of `data`, in this process."""
    place: Place

    @classmethod
    def make(cls, size: int) -> Self:
        """Memory of so many bytes, all there; raises StateError where the machine has none to give."""
        try:
            descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (AttributeError, OSError) as error:
            raise StateError(f"This system has no memory to share: {error}.") from None
        try:
            os.posix_fallocate(descriptor, 0, PAGE_BYTES + size)
            mapped = _map(descriptor, PAGE_BYTES + size, mmap.PROT_READ | mmap.PROT_WRITE)
            _LIBC.madvise(mapped.ctypes.data, mapped.size, MADV_COLLAPSE)  # where it cannot, the pages stay small
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        except OSError as error:
            os.close(descriptor)
            raise StateError(f"{size / 2**20:,.1f} MiB cannot be shared: {error.strerror}.") from None
        mark = secrets.token_bytes(MARK_BYTES)
        mapped[:MARK_BYTES] = np.frombuffer(mark, np.uint8)
        data = mapped[PAGE_BYTES:]
        return cls(data, data.ctypes.data, Place(os.getpid(), descriptor, size, mark.hex()))

    def holds(self, buffer: Buffer) -> int | None:
        """Where in `data` the buffer begins; None where it does not lie in it."""
        try:
            start = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) - self.address
        except (TypeError, ValueError):  # nobody may write there, or it is empty
            return None
        return start if 0 <= start <= self.data.size - len(buffer) else None

    def withdraw(self) -> None:
        """Nobody can attach any more; whoever has it, and `data`, keep it. A second call is a defect."""
        os.close(self.place.descriptor)


class CannotAttach(ParamserverError):
    """Memory that was offered is not to be had; the sentence says why."""


def attach(place: Place, *, expect: int) -> U8:
    """(expect,) uint8, read only; raises CannotAttach."""
    if place.bytes != expect:
        raise CannotAttach(f"It has {place.bytes:,} bytes, {expect:,} expected.")
    path = Path(f"/proc/{place.process}/fd/{place.descriptor}")
    try:
        if not os.readlink(path).startswith(f"/memfd:{NAME}"):
            raise CannotAttach("It is no such memory.")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CannotAttach(f"It cannot be opened: {error.strerror}.") from None
    try:
        return _mapped(descriptor, place)
    except OSError as error:
        raise CannotAttach(f"It cannot be mapped: {error.strerror}.") from None
    finally:
        os.close(descriptor)


def _mapped(descriptor: int, place: Place) -> U8:
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid():
        raise CannotAttach("It belongs to another user.")
    if found.st_size != PAGE_BYTES + place.bytes:
        raise CannotAttach(f"It has {found.st_size - PAGE_BYTES:,} bytes, and {place.bytes:,} were offered.")
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
        raise CannotAttach("It is not sealed, so its owner could take it away.")
    mapped = _map(descriptor, found.st_size, mmap.PROT_READ)
    if mapped[:MARK_BYTES].tobytes().hex() != place.mark:
        raise CannotAttach("It does not bear the mark that was told.")
    return mapped[PAGE_BYTES:]


# Mapping where huge pages can be; the module mmap lets nobody choose the address


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _map(descriptor: int, size: int, protection: int) -> U8:
    """(size,) all of a file, from a huge page's address on, mapped as long as anything refers to it; raises OSError."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    room = _address_or_error(_LIBC.mmap(None, size + HUGE_PAGE_BYTES, PROT_NONE, private, -1, 0))
    start = -(-room // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    there = mmap.MAP_SHARED | mmap.MAP_POPULATE | MAP_FIXED
    try:
        _address_or_error(_LIBC.mmap(start, size, protection, there, descriptor, 0))
    except OSError:
        _LIBC.munmap(room, size + HUGE_PAGE_BYTES)
        raise
    owner = (ctypes.c_ubyte * size).from_address(start)
    weakref.finalize(owner, _LIBC.munmap, room, size + HUGE_PAGE_BYTES).atexit = False
    whole = memoryview(owner).cast("B")
    return np.frombuffer(whole if protection & mmap.PROT_WRITE else whole.toreadonly(), np.uint8)


def _address_or_error(found: Any) -> int:
    if found == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(found)
