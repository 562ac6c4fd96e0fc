"""Records what arrives at a server in `arrivals-EPOCH.log`, so that its life can be lived again.

    recorder = Recorder.open(directory, begin, limit_bytes, announce)
    actions = recorder.enter(core, event, now)                     in place of core.handle(event, now)

Laws
* Recording costs the loop some ten microseconds an event: hashing payloads and the disk are a thread's business.
* It never holds up training, and never ends it: where the limit is reached, the disk fails, or it is slower than what
  arrives, recording stops, with a warning and a last record that says why.
* Records reach the file in order; of what a killed process leaves at most the last one is not whole. What led to a
  checkpoint is in the file before the checkpoint is (`settle`).
* The files of all lives in a directory together stay under the limit.

Left out: what is in the file (`paramserver.arrivals`). A power cut may lose more than a kill does: nothing waits for
the disk itself, only for the system to have it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.messages import Buffer
from paramserver.arrivals import (
    MAGIC,
    Arrival,
    Begin,
    End,
    Packed,
    Record,
    Stopped,
    enter,
    epoch_of,
    head,
    left_of,
    name_of,
    pack,
    size_of,
)
from paramserver.core import ServerCore

WAITING_BYTES = 256 << 20
"""Records that wait for the disk, at most."""
BATCH_BYTES, BATCH_S = 256 << 10, 0.2
"""So much, or what has gathered in so long, is handed to the thread at once."""
LAST_BYTES = 4096
"""Room that is kept for the last record."""
SETTLE_S = 30.0
BUFFERS_AT_ONCE = 512
"""In one call of the system; its own limit is 1024."""


class Unrecorded:
    """A life of which nothing is recorded."""

    def drew(self, token: str) -> str:
        """The same."""
        return token

    enter = staticmethod(enter)
    """One event into the core, by no way round."""

    def flush(self) -> None:
        """There is nothing to hand over."""

    def settle(self) -> None:
        """There is nothing to wait for."""

    def close(self, last: Callable[[], End | Stopped]) -> None:
        """There is nothing to close."""


class Recorder:
    """The log of one life. All methods but `settle` are called on the loop."""

    def __init__(self, file: int, room_bytes: int, announce: Callable[[str, str], None]) -> None:
        self._file = file
        self._room_bytes = room_bytes
        self._announce = announce
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="arrivals")
        self._last: Future[None] | None = None
        self._batch: list[Packed] = []
        self._batch_bytes = 0
        self._batch_due = 0.0
        self._handed_bytes = 0
        self._written_bytes = 0
        """Changed on the thread alone."""
        self._failure = ""
        """Set on the thread: why nothing can be written any more."""
        self._tokens: list[str] = []
        self.stopped = ""
        """Why recording ended, once it has."""

    @classmethod
    def open(
        cls, directory: Path, begin: Begin, limit_bytes: int, announce: Callable[[str, str], None]
    ) -> Recorder | Unrecorded:
        """Begin the log of a life; where it cannot be, a warning says so."""
        path = directory / name_of(begin.epoch)
        try:
            taken = sum(file.stat().st_size for file in directory.iterdir() if epoch_of(file.name) is not None)
            room_bytes = limit_bytes - taken - LAST_BYTES
            if room_bytes <= 0:
                mib = limit_bytes >> 20
                announce("warning", f"Arrivals are not recorded: earlier logs in {directory} fill all {mib:,} MiB.")
                return Unrecorded()
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # it holds the session tokens
        except OSError as error:
            announce("warning", f"Arrivals are not recorded: {path} cannot be made: {error.strerror}.")
            return Unrecorded()
        recorder = cls(file, room_bytes, announce)
        recorder._add(begin)
        recorder.flush()
        return recorder

    def drew(self, token: str) -> str:
        """The core was given this session token."""
        self._tokens.append(token)
        return token

    def enter(self, core: ServerCore, event: Any, now: float) -> list[Any]:
        """One event into the core, and into the log."""
        try:
            actions = enter(core, event, now)
        except BaseException as error:
            self._arrived(Arrival(event, now, self._drawn(), raised=type(error).__name__))
            raise
        self._arrived(Arrival(event, now, self._drawn(), left_of(actions)))
        return actions

    def flush(self) -> None:
        """Hand what has gathered to the thread."""
        if self._failure and not self.stopped:
            self.stopped = self._failure
            self._announce("warning", f"Arrivals are no longer recorded: {self.stopped}")
        batch, self._batch = self._batch, []
        self._handed_bytes += self._batch_bytes
        self._batch_bytes = 0
        if batch and not self._failure:
            self._last = self._thread.submit(self._write, batch)

    def settle(self) -> None:
        """Wait until the system has all that was handed over; on any thread."""
        if self._last is not None:
            wait([self._last], SETTLE_S)

    def close(self, last: Callable[[], End | Stopped]) -> None:
        """Write the last record, which is made only here, and end the thread."""
        if not self.stopped:
            self._add(last())
        self.flush()
        self._thread.shutdown(wait=True)
        os.close(self._file)

    def _arrived(self, arrival: Arrival) -> None:
        if self.stopped:
            return
        packed = pack(arrival)
        size = size_of(packed)
        waiting = self._handed_bytes + self._batch_bytes - self._written_bytes
        if self._handed_bytes + self._batch_bytes + size > self._room_bytes:
            self._stop("the logs of this directory have reached max_arrivals_mib.")
        elif waiting + size > WAITING_BYTES:
            self._stop(f"the disk is slower than what arrives, and {WAITING_BYTES >> 20} MiB wait for it.")
        else:
            self._batch.append(packed)
            self._batch_bytes += size
            if self._batch_bytes >= BATCH_BYTES or arrival.now >= self._batch_due:
                self._batch_due = arrival.now + BATCH_S
                self.flush()

    def _stop(self, sentence: str) -> None:
        self.stopped = sentence
        self._announce("warning", f"Arrivals are no longer recorded: {sentence}")
        self._add(Stopped(sentence))
        self.flush()

    def _add(self, record: Record) -> None:
        packed = pack(record)
        self._batch.append(packed)
        self._batch_bytes += size_of(packed)

    def _drawn(self) -> tuple[str, ...]:
        tokens, self._tokens = tuple(self._tokens), []
        return tokens

    # On the thread

    def _write(self, batch: list[Packed]) -> None:
        """A batch as it is into the file, after the magic where it is the first; or none of it."""
        if self._failure:
            return
        whole = os.lseek(self._file, 0, os.SEEK_CUR)
        begun: list[Buffer] = [] if whole else [MAGIC]
        buffers = begun + [buffer for packed in batch for buffer in (head(packed), packed[0], *packed[1])]
        try:
            for first in range(0, len(buffers), BUFFERS_AT_ONCE):
                self._put(buffers[first : first + BUFFERS_AT_ONCE])
        except OSError as error:
            self._failure = f"the log cannot be written: {error.strerror}."
            with suppress(OSError):
                os.ftruncate(self._file, whole)
                os.lseek(self._file, whole, os.SEEK_SET)
                last = pack(Stopped(self._failure))
                self._put([*begun, head(last), last[0]])
        self._written_bytes += sum(size_of(packed) for packed in batch)

    def _put(self, buffers: Sequence[Buffer]) -> None:
        size = sum(len(buffer) for buffer in buffers)
        written = os.writev(self._file, buffers)
        while written < size:  # the disk is full, most likely, and the next call will say so
            written += os.write(self._file, b"".join(buffers)[written:])
