"""A cluster in virtual time whose server records what arrives, life after life, as the daemon does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import LIBRARY
from common.codecs.base import F32
from common.layout import center_sha256
from common.messages import Version, Welcome
from paramserver.arrivals import Begin, End, Started
from paramserver.checkpoint import as_read, fingerprint
from paramserver.core import Recovered, ServerCore
from paramserver.recorder import Recorder
from tests.cluster import Cluster, Trainer
from worker import events

LIMIT_BYTES = 64 << 20


class Listener(Trainer):
    """Pushes, and takes what it is given, under any rule that applies or averages updates."""

    def train(self) -> None:
        super().train()
        if self.done and not self.dead and not self.away and self.core.phase == "joined":
            self.cluster.work(self, events.Leave("done"))

    def merge(self, base: Version, center: F32 | None) -> None:
        """Any center will do."""
        self.seen = base

    def welcomed(self, welcome: Welcome) -> None:
        """What was undone is the business of other tests."""


class Recorded:
    """A server's core whose events are written down."""

    def __init__(self, core: ServerCore, recorder: Recorder) -> None:
        self.core, self.recorder = core, recorder
        self.deadline, self.validate = core.deadline, core.validate

    def handle(self, event: Any, now: float) -> list[Any]:
        """Into the core and into the log."""
        return self.recorder.enter(self.core, event, now)


class RecordedCluster(Cluster):
    """Each life of its server leaves a log in `directory`; a crash leaves one without an end."""

    def __init__(self, seed: int, directory: Path, **changes: Any) -> None:
        self.directory = directory
        self.recorder: Recorder | None = None
        self.warnings: list[str] = []
        super().__init__(seed, **({"trainer": Listener} | changes))

    def start_server(self, epoch: int) -> None:
        recovered, version, mark = None, None, ""
        if self.disk is not None:
            copies = {name: array.copy() for name, array in self.disk.arrays.items()}
            recovered = Recovered(copies, as_read(self.disk.record))
            version, mark = self.disk.version, fingerprint(copies, recovered.record)
            self.recoveries[epoch] = version
        begin = Begin(LIBRARY, epoch, self.settings.model_dump(mode="json"), version, mark)
        recorder = Recorder.open(self.directory, begin, LIMIT_BYTES, lambda _, line: self.warnings.append(line))
        assert isinstance(recorder, Recorder), self.warnings
        self.recorder = recorder
        core = ServerCore(
            self.settings,
            epoch=epoch,
            token=lambda: recorder.drew(f"t{epoch}-{next(self._count)}"),
            recovered=recovered,
        )
        self.live(core, Recorded(core, recorder), recorder.enter(core, Started(), self.now))

    def crash_server(self, away_s: float | None = None) -> None:
        server = self.server
        super().crash_server(away_s)
        if server is not self.server:
            self._close(killed=True)

    def end(self) -> str:
        """Stop in order; the SHA-256 of the center."""
        self.stop()
        self.run_for(5.0)
        assert self.exited
        return self._close(killed=False)

    def _close(self, *, killed: bool) -> str:
        recorder, self.recorder = self.recorder, None
        assert recorder is not None
        sha256 = ""
        if self.server is not None and self.server.shard is not None:
            sha256 = center_sha256(self.server.shard.center)
        if killed:
            recorder.flush()
            recorder.stopped = "killed"  # so that no last record is written
        recorder.close(lambda: End(self.server.version, sha256) if self.server else End(Version(0, 0), ""))
        return sha256
