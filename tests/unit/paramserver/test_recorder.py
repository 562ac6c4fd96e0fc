"""Recording never holds up the server: every way in which it ends leaves a log that can be read and says why."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from common.messages import Buffer, Version
from common.node import Received, Tick
from paramserver import recorder as module
from paramserver.arrivals import Arrival, Begin, End, Started, Stopped, name_of, read
from paramserver.core import ServerCore
from paramserver.recorder import LAST_BYTES, Recorder, Unrecorded
from tests.cluster import Desk

MIB = 1 << 20
BEGIN = Begin("paramserver 0", 1, {}, None, "")
END = End(Version(1, 0), "00")
NOISE = Received(b"peer", [b"no message", os.urandom(1000)])


class Taps:
    """A recorder, a core, and what was announced."""

    def __init__(self, directory: Path, *, limit_bytes: int = MIB, epoch: int = 1) -> None:
        self.said: list[str] = []
        self.path = directory / name_of(epoch)
        begin = BEGIN._replace(epoch=epoch)
        self.recorder = Recorder.open(directory, begin, limit_bytes, lambda _, line: self.said.append(line))
        self.core: ServerCore = Desk().core

    def enter(self, count: int, event: Any = NOISE, now: float = 100.0) -> None:
        for _ in range(count):
            assert self.recorder.enter(self.core, event, now)

    def records(self) -> list[Any]:
        with self.path.open("rb") as stream:
            return list(read(stream, self.path.name))

    def close(self) -> list[Any]:
        self.recorder.close(lambda: END)
        return self.records()


def test_a_life_is_recorded_whole_and_for_its_owner_alone(tmp_path: Path) -> None:
    taps = Taps(tmp_path)
    taps.recorder.drew("token")
    taps.enter(3)
    begin, *arrivals, end = taps.close()
    assert begin == BEGIN
    assert end == END
    assert [arrival.event for arrival in arrivals] == [NOISE] * 3
    assert [list(arrival.tokens) for arrival in arrivals] == [["token"], [], []]
    assert all(arrival.left for arrival in arrivals)
    assert taps.path.stat().st_mode & 0o777 == 0o600
    assert taps.said == []


def test_what_was_flushed_is_there_when_it_has_settled(tmp_path: Path) -> None:
    taps = Taps(tmp_path)
    taps.enter(3)
    taps.recorder.flush()
    taps.recorder.settle()
    assert len(taps.records()) == 4
    taps.close()


def test_what_has_gathered_for_a_while_is_written(tmp_path: Path) -> None:
    taps = Taps(tmp_path)
    for i in range(100):
        taps.recorder.enter(taps.core, NOISE, 100.0 + i * module.BATCH_S / 10)
    taps.recorder.settle()
    assert len(taps.records()) > 90
    taps.close()


def test_at_the_limit_recording_ends_and_the_server_goes_on(tmp_path: Path) -> None:
    limit_bytes = 40_000
    taps = Taps(tmp_path, limit_bytes=limit_bytes)
    taps.enter(100)
    assert taps.said == ["Arrivals are no longer recorded: the logs of this directory have reached max_arrivals_mib."]
    *before, last = taps.close()
    assert last == Stopped("the logs of this directory have reached max_arrivals_mib.")
    assert len(before) > 20
    assert limit_bytes - LAST_BYTES - 2000 < taps.path.stat().st_size <= limit_bytes


def test_the_limit_is_that_of_all_lives(tmp_path: Path) -> None:
    first = Taps(tmp_path, limit_bytes=20_000)
    first.enter(10)
    first.close()
    second = Taps(tmp_path, limit_bytes=20_000, epoch=2)
    second.enter(100)
    second.close()
    taken = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert taken <= 20_000
    third = Taps(tmp_path, limit_bytes=taken, epoch=3)
    assert isinstance(third.recorder, Unrecorded)
    assert "fill all" in third.said[0]
    third.enter(1)
    third.recorder.close(lambda: END)


def test_no_log_is_written_over(tmp_path: Path) -> None:
    Taps(tmp_path).close()
    before = (tmp_path / name_of(1)).read_bytes()
    again = Taps(tmp_path)
    assert isinstance(again.recorder, Unrecorded)
    assert "File exists" in again.said[0]
    assert (tmp_path / name_of(1)).read_bytes() == before


@pytest.mark.parametrize("bytes_left", [0, 1, 3000])
def test_a_full_disk_ends_recording_between_two_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_left: int
) -> None:
    taps = Taps(tmp_path)
    taps.enter(3, now=200.0)
    taps.recorder.flush()
    taps.recorder.settle()
    whole = taps.path.stat().st_size

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def nearly_full(file: int, buffers: Sequence[Buffer]) -> int:
        monkeypatch.setattr(module.os, "writev", before)
        return os.write(file, b"".join(buffers)[:bytes_left]) if bytes_left else full()

    before, write = os.writev, os.write
    monkeypatch.setattr(module.os, "writev", nearly_full)
    if bytes_left:
        monkeypatch.setattr(module.os, "write", lambda *a: full() if len(a[1]) != bytes_left else write(*a))
    taps.enter(5, now=201.0)
    taps.recorder.flush()
    taps.recorder.settle()
    taps.enter(1, now=202.0)
    taps.recorder.flush()
    *_, arrival, last = taps.close()
    assert last == Stopped("the log cannot be written: No space left on device.")
    assert isinstance(arrival, Arrival)
    assert whole < taps.path.stat().st_size < whole + 200
    assert taps.said == ["Arrivals are no longer recorded: the log cannot be written: No space left on device."]


def test_a_disk_that_is_too_slow_ends_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING_BYTES", 20_000)
    taps = Taps(tmp_path)
    taps.recorder.settle()
    goes_on, before = threading.Event(), os.writev

    def slow(file: int, buffers: Sequence[Buffer]) -> int:
        goes_on.wait(20.0)
        return before(file, buffers)

    monkeypatch.setattr(module.os, "writev", slow)
    taps.enter(100)
    assert "slower than what arrives" in taps.said[0]
    goes_on.set()
    assert isinstance(taps.close()[-1], Stopped)


def test_what_came_out_of_the_core_is_recorded_and_raised(tmp_path: Path) -> None:
    taps = Taps(tmp_path)
    assert isinstance(taps.recorder, Recorder)
    with pytest.raises(TypeError):
        taps.recorder.enter(taps.core, Received(b"peer", 7), 100.0)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        taps.recorder.enter(None, Tick(), 100.0)  # type: ignore[arg-type]
    assert taps.close()[-2].raised == "AttributeError"


def test_the_start_of_a_core_is_an_event(tmp_path: Path) -> None:
    taps = Taps(tmp_path)
    taps.recorder.enter(taps.core, Started(), 100.0)
    assert taps.close()[1].event == Started()
