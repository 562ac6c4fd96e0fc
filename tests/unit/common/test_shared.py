"""Memory that two processes share: what is attached is what was offered, or nothing is; and nothing is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import shared
from common.errors import StateError
from common.messages import Place
from common.shared import MARK_BYTES, PAGE_BYTES, SEALS, CannotAttach, Memory, attach

SIZE = 3 * PAGE_BYTES + 100
MADV_REMOVE, PUNCH_HOLE_KEEP_SIZE = 9, 3  # of linux/mman.h and linux/falloc.h
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory.make(SIZE)
    yield made
    with contextlib.suppress(OSError):
        made.withdraw()


def descriptors() -> set[str]:
    """What this process has open."""
    return set(os.listdir("/proc/self/fd"))


def mappings() -> int:
    """How often memory of the kind is mapped here."""
    return Path("/proc/self/maps").read_text().count(f"/memfd:{shared.NAME}")


def like(descriptor: int, mark: bytes = bytes(MARK_BYTES)) -> Place:
    """That descriptor of this process, offered as memory."""
    return Place(os.getpid(), descriptor, SIZE, mark.hex())


def memfd(name: str = shared.NAME, *, size: int = PAGE_BYTES + SIZE, seals: int = SEALS) -> int:
    """Memory made by somebody who cuts corners."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.posix_fallocate(descriptor, 0, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def refused(place: Place, expect: int = SIZE) -> str:
    """The sentence, of an attempt that leaves nothing behind and takes no time."""
    before, started = (descriptors(), mappings()), time.monotonic()
    with pytest.raises(CannotAttach) as caught:
        attach(place, expect=expect)
    assert time.monotonic() - started < 2.0
    sentence = caught.value.sentence
    del caught  # its traceback holds the frame that mapped
    assert (descriptors(), mappings()) == before
    assert sentence[0].isupper()
    assert sentence.endswith(".")
    return sentence


def no(errno_: int, call: Any, *arguments: Any) -> None:
    """A call of the C library is refused."""
    assert call(*arguments) == -1
    assert ctypes.get_errno() == errno_


# What is attached


def test_what_the_owner_writes_is_what_the_other_reads(memory: Memory) -> None:
    found = attach(memory.place, expect=SIZE)
    assert found.shape == memory.data.shape == (SIZE,)
    for value in (1, 255):
        memory.data[:] = value
        assert (found == value).all()
    assert found.ctypes.data % 8 == memory.data.ctypes.data % 8 == 0, "as codecs want it"


def test_it_is_all_there_before_it_is_offered(memory: Memory) -> None:
    """Or else a full machine kills whoever writes the first byte of a page."""
    found = os.stat(memory.place.descriptor)
    assert found.st_blocks * 512 >= PAGE_BYTES + SIZE
    assert not memory.data.any()


def test_another_process_reads_it(memory: Memory) -> None:
    memory.data[:] = np.arange(SIZE) % 251
    p = memory.place
    script = (
        "from common.messages import Place; from common.shared import attach;"
        f"print(int(attach(Place({p.process}, {p.descriptor}, {p.bytes}, '{p.mark}'), expect={SIZE}).sum()))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(found.stdout) == int(memory.data.sum())


def test_who_attaches_cannot_write(memory: Memory) -> None:
    """Not by the array, not by asking the system for more, not by opening it anew."""
    found = attach(memory.place, expect=SIZE)
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        found.flags.writeable = True
    page = found.ctypes.data
    assert page % mmap.PAGESIZE == 0
    no(errno.EACCES, libc.mprotect, page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)

    again = os.open(f"/proc/self/fd/{memory.place.descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", PAGE_BYTES)
        with pytest.raises(PermissionError):
            mmap.mmap(again, PAGE_BYTES + SIZE, mmap.MAP_SHARED)
    finally:
        os.close(again)
    assert not memory.data.any()


def test_the_owner_cannot_take_it_away(memory: Memory) -> None:
    """Each of these, if it worked, could kill a process that reads."""
    descriptor, size = memory.place.descriptor, PAGE_BYTES + SIZE
    memory.data[:] = 7
    for length in (0, PAGE_BYTES, size - 1, size + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, length)
    no(errno.EPERM, libc.fallocate, descriptor, PUNCH_HOLE_KEEP_SIZE, PAGE_BYTES, PAGE_BYTES)
    no(errno.EPERM, libc.madvise, memory.data.ctypes.data, PAGE_BYTES, MADV_REMOVE)
    with pytest.raises(PermissionError):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) == SEALS
    assert (memory.data == 7).all()


def test_it_is_nowhere_in_the_file_system(memory: Memory) -> None:
    assert os.stat(memory.place.descriptor).st_nlink == 0
    assert not os.get_inheritable(memory.place.descriptor)


def test_whoever_has_it_keeps_it_when_it_is_withdrawn(memory: Memory) -> None:
    found = attach(memory.place, expect=SIZE)
    memory.withdraw()
    memory.data[:] = 5
    assert (found == 5).all()
    refused(memory.place)


def test_it_outlives_the_process_that_made_it() -> None:
    """Killed, it leaves its reader what was there, and nothing else."""
    script = (
        "import sys, time; from common.shared import Memory;"
        f"m = Memory.make({SIZE}); m.data[:] = 9; p = m.place;"
        "print(p.process, p.descriptor, p.bytes, p.mark, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        process, descriptor, size, mark = owner.stdout.readline().split()
        place = Place(int(process), int(descriptor), int(size), mark)
        found = attach(place, expect=SIZE)
        owner.kill()
    assert (found == 9).all()
    assert "opened" in refused(place)


@pytest.mark.parametrize("at", [0, 1, SIZE - 10])
def test_where_a_buffer_lies_in_it(memory: Memory, at: int) -> None:
    assert memory.holds(memory.data[at : at + 10].data) == at
    assert memory.holds(memory.data.data) == 0


def test_buffers_elsewhere_do_not_lie_in_it(memory: Memory) -> None:
    found = attach(memory.place, expect=SIZE)
    assert memory.holds(bytes(10)) is None
    assert memory.holds(found[:10].data) is None, "the same bytes, but not where the owner wrote them"
    whole = np.lib.stride_tricks.as_strided(memory.data, (SIZE + 1,))
    assert memory.holds(whole[1:].data) is None, "one byte beyond the end"
    assert memory.holds(whole.data) is None


# What is not


def test_wrong_mark(memory: Memory) -> None:
    for mark in ("00" * MARK_BYTES, "", memory.place.mark[:-2], memory.place.mark + "00", "?", "é" * 32):
        assert "mark" in refused(replace(memory.place, mark=mark))


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE + 1, 1 << 52])
def test_wrong_size(memory: Memory, size: int) -> None:
    """Other than what is expected, and other than what is there."""
    assert "expected" in refused(replace(memory.place, bytes=size))
    assert "were offered" in refused(replace(memory.place, bytes=size), expect=size)


@pytest.mark.parametrize("lacking", [fcntl.F_SEAL_SEAL, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, 0x10, SEALS])
def test_memory_that_lacks_a_seal(lacking: int) -> None:
    descriptor = memfd(seals=SEALS & ~lacking)
    try:
        assert "sealed" in refused(like(descriptor))
    finally:
        os.close(descriptor)


def test_memory_that_cannot_be_sealed() -> None:
    descriptor = os.memfd_create(shared.NAME)
    try:
        os.posix_fallocate(descriptor, 0, PAGE_BYTES + SIZE)
        assert "sealed" in refused(like(descriptor))
    finally:
        os.close(descriptor)


def test_memory_of_another_name() -> None:
    descriptor = memfd("other")
    try:
        assert "no such memory" in refused(like(descriptor))
    finally:
        os.close(descriptor)


def test_descriptors_that_are_no_memory(tmp_path: Path) -> None:
    """None of them is even opened: opening a FIFO may wait for ever, and opening a device may do something."""
    file, fifo = tmp_path / f"memfd:{shared.NAME}", tmp_path / "fifo"
    file.write_bytes(bytes(PAGE_BYTES + SIZE))
    os.mkfifo(fifo)
    reader, writer = os.pipe()
    opened = [
        os.open(file, os.O_RDWR),
        os.open(fifo, os.O_RDWR),
        os.open(tmp_path, os.O_RDONLY),
        os.open("/dev/zero", os.O_RDWR),
        os.eventfd(0),
        reader,
        writer,
    ]
    try:
        for descriptor in opened:
            assert "no such memory" in refused(like(descriptor))
    finally:
        for descriptor in opened:
            os.close(descriptor)


def test_processes_and_descriptors_that_are_not() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    nowhere = Place(os.getpid(), 1 << 20, SIZE, "00" * MARK_BYTES)
    for process in (ended.pid, 0, (1 << 22) + 1, 1 << 52):
        assert "opened" in refused(replace(nowhere, process=process))
    for descriptor in (1 << 20, 1 << 52):
        assert "opened" in refused(replace(nowhere, descriptor=descriptor))


def test_a_zombie_has_no_memory() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        refused(Place(child, 3, SIZE, "00" * MARK_BYTES))
    finally:
        os.waitpid(child, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_memory_of_another_user(memory: Memory) -> None:
    """Root could open it, and does not want it; the other way round it cannot be opened."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        theirs = Memory.make(SIZE).place
        try:
            attach(memory.place, expect=SIZE)
            said = "attached"
        except CannotAttach as error:
            said = error.sentence
        os.write(writer, f"{theirs.process} {theirs.descriptor} {theirs.bytes} {theirs.mark} {said}".encode())
        signal.pause()
        os._exit(0)
    try:
        process, descriptor, size, mark, said = os.read(reader, 1000).decode().split(maxsplit=4)
        assert "opened" in said
        assert "another user" in refused(Place(int(process), int(descriptor), int(size), mark))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


# A machine that has none to give


@pytest.mark.parametrize("step", ["memfd_create", "posix_fallocate", "_map", "fcntl"])
def test_a_machine_that_has_none_says_so_and_leaks_nothing(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = {"_map": shared, "fcntl": shared.fcntl}.get(step, os)
    before = descriptors(), mappings()
    monkeypatch.setattr(owner, step, fails)
    with pytest.raises(StateError, match="No space left on device") as caught:
        Memory.make(SIZE)
    monkeypatch.undo()
    del caught
    assert (descriptors(), mappings()) == before


def test_without_descriptors_it_is_refused_both_ways(memory: Memory) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, limits[1]))
        with pytest.raises(StateError, match="Too many open files"):
            Memory.make(SIZE)
        with pytest.raises(CannotAttach, match="Too many open files"):
            attach(memory.place, expect=SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_thousand_times_leaks_nothing() -> None:
    before = descriptors(), mappings()
    for _ in range(1000):
        memory = Memory.make(PAGE_BYTES)
        found = attach(memory.place, expect=PAGE_BYTES)
        memory.withdraw()
        del memory, found
    assert (descriptors(), mappings()) == before
