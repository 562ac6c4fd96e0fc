"""A server in virtual time: the lives of one `ServerCore`, its jobs, its checkpoints and its run log.

Laws
* The core is that of the daemon; its checkpoints go to the disk and come back from there, in real files.
* What a crashed server had begun comes to nothing.
* A job takes virtual time by its elements; so does nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from common.codecs.base import BLOCK_ELEMENTS
from common.config import ServerSettings
from common.errors import StateError
from common.node import JobDone, Record, Run, Say, Send, Tick
from common.simulator import Host, Link, World, unsent
from paramserver.checkpoint import Directory
from paramserver.core import Exit, Recovered, Save, Saved, SaveFailed, ServerCore, Stop
from paramserver.telemetry import RunLog

ELEMENTS_PER_S = 1e9
"""What the kernels of a server work off: about one core's worth."""
SAVE_S = 0.05
"""A checkpoint is on the disk after so long."""


class Server:
    """One server: `core` while it is up, None while it is down."""

    def __init__(
        self,
        world: World,
        settings: ServerSettings,
        links: dict[bytes, Link],
        say: Callable[[str, str], None],
        *,
        check: bool,
    ) -> None:
        assert settings.directory is not None
        self._world, self._settings, self._links, self._say, self._check = world, settings, links, say, check
        self._tokens = itertools.count(1)
        self._scratch = np.zeros(BLOCK_ELEMENTS, np.float32)
        self._directory: Directory | None = Directory.open(settings.directory)
        self._log = RunLog(settings.directory, settings.max_log_mib << 20, clock=lambda: world.now)
        self.core: ServerCore | None = None
        self.host: Host | None = None
        self.exited = False
        self.lives = 0

    def start(self) -> None:
        """A life of it, from what the directory holds."""
        assert self._settings.directory is not None
        self._directory = directory = self._directory or Directory.open(self._settings.directory)
        loaded = directory.load()
        epoch = directory.next_epoch()
        recovered = Recovered(dict(loaded.arrays), dict(loaded.record)) if loaded else None
        tokens = self._tokens
        core = ServerCore(
            self._settings, epoch=epoch, token=lambda: f"session-{epoch}-{next(tokens)}", recovered=recovered
        )
        self.core = core
        self.host = host = Host(self._world, core, lambda action: self._do(host, action), check=self._check)
        self.lives += 1
        host.carry_out(core.start(self._world.now))
        host.handle(Tick())

    def crash(self) -> None:
        """kill -9."""
        if self.host is not None:
            self.host.die()
            self._close()

    def stop(self, reason: str) -> None:
        """Finish what is committed, save, exit."""
        if self.host is not None:
            self.host.handle(Stop(reason))

    def close(self) -> None:
        """Give the directory back and close the log."""
        self._close()
        self._log.close()

    def _close(self) -> None:
        self.host = self.core = None
        if self._directory is not None:
            self._directory.close()
            self._directory = None

    def _do(self, host: Host, action: Any) -> None:
        match action:
            case Send(peer, frames, hold):
                if link := self._links.get(peer):
                    link.down(host, frames, hold)
                else:
                    unsent(host, peer, hold)
            case Run():
                self._world.after(action.elements / ELEMENTS_PER_S, partial(self._work, host, action))
            case Record(kind, values):
                self._log.write(kind, values)
            case Say(level, sentence):
                self._say(level, sentence)
            case Save():
                self._world.after(SAVE_S, partial(self._save, host, action))
            case Exit():
                self.exited = True
                host.die()

    def _work(self, host: Host, job: Run) -> None:
        if not host.dead:
            host.handle(JobDone(job.job, [job.work(0, job.parts, self._scratch)]))

    def _save(self, host: Host, save: Save) -> None:
        if host.dead:
            return
        assert self._directory is not None
        try:
            self._directory.save(save.version, save.arrays, save.record, keep=self._settings.keep_checkpoints)
        except StateError as error:
            host.handle(SaveFailed(str(error)))
        else:
            host.handle(Saved(save.version, SAVE_S))
