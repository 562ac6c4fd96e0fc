"""A server's recorded lives, lived again: the same events lead to the same center, or it is told where they do not.

    for life in replay(Path("state")): ...         what `paramserver replay --log state` prints

Laws
* What is driven is the server's own core; this file decides and computes nothing. After each event its invariants are
  checked, and what left it is compared with what left the live one.
* A life goes on from the checkpoint that the live one went on from: as an earlier life saves it here again or, where
  the log of that one is missing, as the directory still holds it. It must be the same to the last bit.
* A life in which something is not as it was is the last one that is lived.

Left out: workers, sockets, files and the clock; all that they did is in the log (`paramserver.arrivals`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import LIBRARY
from common.codecs.base import BLOCK_ELEMENTS
from common.config import ServerSettings
from common.errors import ConfigError, ParamserverError, StateError
from common.layout import center_sha256
from common.messages import Version
from common.node import JobDone, Received, Run, Send
from common.wire import decode
from paramserver.arrivals import Arrival, Begin, End, Record, Stopped, Torn, enter, epoch_of, left_of, read
from paramserver.checkpoint import as_read, checkpoints, fingerprint
from paramserver.checkpoint import read as read_checkpoint
from paramserver.core import Recovered, Save, ServerCore
from paramserver.kernel_pool import cut

Kept = dict[Version, Recovered]
"""Checkpoints that later lives went on from."""


class _ApartError(Exception):
    """This life is no longer the live one."""


@dataclass(slots=True)
class Life:
    """What became of one life, lived again."""

    epoch: int
    events: int = 0
    seconds: float = 0.0
    """Of the live run, from the first event to the last."""
    updates: int = 0
    version: str = ""
    sha256: str = ""
    live_version: str = ""
    live_sha256: str = ""
    """As the log ends; "" where the live run came to no orderly end."""
    apart: str = ""
    """Where and how it went apart from the live run; "" where it did not."""
    end: str = ""
    """How the log ends."""
    note: str = ""
    reached: bool = False
    """Whether it came to the version that was asked for."""

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.apart:
            return self.apart
        if self.live_sha256 or self.live_version:
            return "Identical."
        return f"Identical as far as it goes: {self.end}"


def replay(directory: Path, to: str = "") -> Iterator[Life]:
    """Each life in order, until one goes apart or comes to version `to`: EPOCH.VERSION, or VERSION of any.

    Raises ConfigError, and StateError where a log or a checkpoint that is needed is missing or corrupt.
    """
    wanted = _wanted(to)
    logs = _logs(directory)
    lives = {epoch: begin for epoch, path in logs.items() if (begin := _begin(path)) is not None}
    if not lives:
        raise StateError(
            f"No log in {directory} holds a whole record.", fix="The server was killed too early: try again."
        )
    kept: Kept = {}
    for epoch, begin in lives.items():
        later = [other.recovered for number, other in lives.items() if number > epoch and other.recovered is not None]
        kept = {version: recovered for version, recovered in kept.items() if version in (begin.recovered, *later)}
        life = _Again(begin, _checkpoint(directory, begin, kept), kept, later).live(logs[epoch], wanted)
        yield life
        if life.apart or life.reached:
            return
    if wanted is not None:
        raise ConfigError(f"No recorded life reaches version {to}.", fix="Replay without --to to see how far they go.")


def summary(directory: Path, lives: Sequence[Life]) -> dict[str, Any]:
    """All lives as plain values."""
    last = lives[-1]
    return {
        "directory": str(directory),
        "lives": [asdict(life) for life in lives],
        "events": sum(life.events for life in lives),
        "updates": last.updates,
        "version": last.version,
        "sha256": last.sha256,
        "live_sha256": last.live_sha256 or None,
        "identical": not last.apart,
        "apart": last.apart or None,
    }


def lines(life: Life) -> Iterator[str]:
    """One life for a person to read."""
    yield (
        f"Life {life.epoch}: {life.events:,} events of {life.seconds:.1f} s, {life.updates:,} updates, "
        f"version {life.version}"
    )
    yield f"  replayed  {life.sha256 or 'no center'}"
    if life.live_version:
        at = "" if life.live_version == life.version else f" at version {life.live_version}"
        yield f"  live      {life.live_sha256 or 'no center'}{at}"
    if life.note:
        yield f"  {life.note}"
    yield f"  {life.verdict}"


# What there is


def _logs(directory: Path) -> dict[int, Path]:
    """The log of each life, by its epoch, the first first."""
    try:
        found = {epoch: path for path in directory.iterdir() if (epoch := epoch_of(path.name)) is not None}
    except OSError as error:
        raise ConfigError(f"{directory} cannot be read: {error.strerror}.", fix="Name a server's directory.") from None
    if not found:
        fix = "Record one: serve or launch with --arrivals and this --directory."
        raise ConfigError(f"There is no log of arrivals in {directory}.", fix=fix)
    return dict(sorted(found.items()))


def _records(path: Path) -> Iterator[Record | Torn]:
    try:
        with path.open("rb") as stream:
            yield from read(stream, path.name)
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}.", fix="Check its permissions.") from None


def _begin(path: Path) -> Begin | None:
    """What a life began with; None where the server was killed before that was written."""
    first = next(_records(path))
    if isinstance(first, Torn):
        return None
    if not isinstance(first, Begin) or first.epoch != epoch_of(path.name):
        raise StateError(f"{path.name} is no log of that life.", fix="Do not rename logs.")
    return first


def _checkpoint(directory: Path, begin: Begin, kept: Kept) -> Recovered | None:
    """What a life went on from; raises StateError where that is nowhere."""
    version = begin.recovered
    if version is None:
        return None
    which = f"checkpoint {version}, from which life {begin.epoch} went on,"
    recovered = kept.get(version)
    if recovered is None:
        path = dict(checkpoints(directory)).get(version)
        if path is None:
            sentence = f"No recorded life saves {which} and the directory no longer holds it."
            raise StateError(sentence, fix=f"Put arrivals-{version.epoch}.log or that checkpoint back.")
        loaded = read_checkpoint(path)
        recovered = Recovered(dict(loaded.arrays), dict(loaded.record))
        if fingerprint(recovered.arrays, recovered.record) != begin.fingerprint:
            raise StateError(f"{path.name} is not the {which} though it has its name.", fix="Put that one back.")
    # a life writes into its arrays, and a later one may go on from the same
    return Recovered({name: array.copy() for name, array in recovered.arrays.items()}, recovered.record)


def _wanted(to: str) -> tuple[int | None, int] | None:
    """Epoch (None: any) and version."""
    if not to:
        return None
    epoch, _, version = to.rpartition(".")
    if not version.isdecimal() or (epoch and not epoch.isdecimal()):
        fix = "Give it as it is shown, such as 2.1200, or as a number."
        raise ConfigError(f"'{to}' is no version.", fix=fix)
    return int(epoch) if epoch else None, int(version)


def _reached(wanted: tuple[int | None, int], version: Version) -> bool:
    epoch, number = wanted
    return version.version >= number and (epoch is None or version.epoch >= epoch)


# Living it


class _Again:
    """One life under way. Into `kept` goes what it saves of the versions that `later` lives went on from."""

    def __init__(self, begin: Begin, recovered: Recovered | None, kept: Kept, later: Sequence[Version]) -> None:
        self._begin, self._recovered, self._kept, self._later = begin, recovered, kept, later
        self._tokens: deque[str] = deque()
        self._job: Run | None = None
        self._scratch = np.zeros(BLOCK_ELEMENTS, np.float32)
        settings = ServerSettings.model_validate(begin.settings)
        self._core = ServerCore(settings, epoch=begin.epoch, token=self._token, recovered=recovered)
        self._life = life = Life(begin.epoch)
        if begin.library != LIBRARY:
            life.note = f"It was recorded by {begin.library}, this is {LIBRARY}."

    def live(self, path: Path, wanted: tuple[int | None, int] | None) -> Life:
        """From the first event to the last, or to the one with which `wanted` is reached."""
        life, core, started = self._life, self._core, None
        life.end = f"{path.name} has no last record: the server was killed, or is still running."
        try:
            self._expect_checkpoint()
            for record in _records(path):
                match record:
                    case Arrival():
                        started = record.now if started is None else started
                        life.seconds = record.now - started
                        life.events += 1
                        self._enter(record)
                        if wanted is not None and _reached(wanted, core.version):
                            life.reached, life.end = True, f"stopped at version {core.version}, as told."
                            break
                    case Stopped(sentence):
                        life.end = f"recording stopped: {sentence}"
                    case Torn(cut_off):
                        life.end = f"the server was killed; {cut_off:,} bytes of a torn record were cut off."
                    case End():
                        self._expect_end(record)
        except _ApartError as error:
            life.apart = f"Apart at {error}"
        shard = core.shard
        life.updates, life.version = core.state.budget.updates, str(core.version)
        life.sha256 = center_sha256(shard.center) if shard else ""
        return life

    def _enter(self, arrival: Arrival) -> None:
        """One event; raises _ApartError where it leads to something else than it did."""
        event, job = arrival.event, self._core.order.current
        try:
            actions = self._led_to(arrival)
        except _ApartError as error:
            what = f"the end of a job ({job.name})" if isinstance(event, JobDone) and job else self._described(event)
            place = f"event {self._life.events:,} of life {self._begin.epoch}, {what}, at version {self._core.version}"
            raise _ApartError(f"{place}: {error}") from error.__cause__
        for action in actions:
            match action:
                case Run():
                    self._job = action
                case Save(version, arrays, record) if version in self._later:
                    copies = {name: array.copy() for name, array in arrays.items()}
                    self._kept[version] = Recovered(copies, as_read(record))

    def _led_to(self, arrival: Arrival) -> list[Any]:
        """What shall be done after an event, as it was in the live run; raises _ApartError."""
        event, raised, actions = arrival.event, "", list[Any]()
        self._tokens.extend(arrival.tokens)
        try:
            actions = enter(self._core, self._work(event) if isinstance(event, JobDone) else event, arrival.now)
            self._core.validate()
        except _ApartError:
            raise
        except Exception as error:
            raised = type(error).__name__
            if raised != arrival.raised:
                raise _ApartError(f"{raised}: {error}") from error
        if raised != arrival.raised:
            raise _ApartError(f"the live server failed here with {arrival.raised}, and it does not now.")
        if self._tokens:
            raise _ApartError("the live server began a session here, and it does not now.")
        if not raised and left_of(actions) != arrival.left:
            left = ", ".join(map(_named, actions)) or "nothing"
            raise _ApartError(f"it led to something else than in the live run; here: {left}.")
        return actions

    def _work(self, event: JobDone) -> JobDone:
        """Run the job that is done, cut as it was: the arrays it reads belong to it alone until now."""
        job, self._job = self._job, None
        if job is None or job.job != event.job:
            raise _ApartError(f"that job does not run; what runs is {job!r}.")
        ranges = cut(job.parts, len(event.results))
        return JobDone(job.job, [job.work(first, last, self._scratch) for first, last in ranges])

    def _token(self) -> str:
        if not self._tokens:
            raise _ApartError("it begins a session, and the live server did not.")
        return self._tokens.popleft()

    def _described(self, event: Any) -> str:
        """An event for a person."""
        if not isinstance(event, Received):
            return type(event).__name__
        try:
            message = decode(event.frames)
        except ParamserverError:
            return "a malformed message"
        session = self._core.sessions.get(getattr(getattr(message, "begin", message), "session", ""))
        return f"{type(message).__name__} of {session.worker if session else 'somebody new'}"

    def _expect_checkpoint(self) -> None:
        if (recovered := self._recovered) is None:
            return
        if fingerprint(recovered.arrays, recovered.record) != self._begin.fingerprint:
            which = f"checkpoint {self._begin.recovered}, from which it goes on"
            raise _ApartError(f"the start of life {self._begin.epoch}: {which}, is not the same here as it was.")

    def _expect_end(self, end: End) -> None:
        life, shard = self._life, self._core.shard
        life.live_version, life.live_sha256 = str(end.version), end.sha256
        life.end = "the server stopped."
        if (end.version, end.sha256) != (self._core.version, center_sha256(shard.center) if shard else ""):
            what = "every event led to what it had led to, and yet the center is another one."
            raise _ApartError(f"the end of life {self._begin.epoch}: {what}")


def _named(action: Any) -> str:
    """An action for a person."""
    if isinstance(action, Send):
        return type(decode([bytes(frame) for frame in action.frames])).__name__
    return type(action).__name__
