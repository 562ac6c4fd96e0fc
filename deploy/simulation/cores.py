"""Who computes when, in real time: the processes of simulated workers, and the few cores that they share.

    cores = Cores(family, at_once)
    process = cores.start(Life(...))       it runs until its first wish
    said = process.hear()                  what it wishes; meanwhile the others compute
    process.compute(due_s)                 let it compute, before all that are due later
    process.tell(Told(...))                its wish is fulfilled
    cores.turn()                           now and then: whoever has computed makes room for the next

Laws
* At most so many compute at one time. Whose result is due first in virtual time goes first; and whoever everything
  waits for goes at once.
* None of it shows in virtual time: a result is the same whenever it was computed.
* A process that ends by itself is a `WorkerEnded`, which says how; that is its worker's error and nobody else's.

Left out: what a wish means (`deploy.simulation.workers`).
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import os
import resource
import select
import socket
from contextlib import suppress

from common.errors import ParamserverError
from deploy.nursery import Family
from deploy.simulation.pipe import Go, Life, Pipe, Said, Told

DESCRIPTORS_EACH = 6
"""Open ones of this process, for each worker."""
DESCRIPTORS_OTHER = 256


class WorkerEnded(ParamserverError):
    """The process of a worker is gone; the sentence says how."""


class Process:
    """The process of one worker. `over`: it was ended, or ended by itself."""

    def __init__(self, cores: Cores, life: Life) -> None:
        self.name = life.settings.name or "worker"
        self.over = False
        self._cores = cores
        self._said: Said | Exception | None = None
        """What it said, and nobody has heard yet."""
        line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        up, down = _shelf("up"), _shelf("down")
        with theirs:
            self.number = cores.family.fork(theirs.fileno(), up, down)
        self._pipe = Pipe(line, down, up)
        self.used_s = 0.0
        """CPU time, as it said last."""
        with suppress(OSError):  # what is wrong with it, its end of the pipe says
            self._pipe.send(life)

    def __repr__(self) -> str:
        return f"<Process of {self.name}, {'over' if self.over else 'alive'}>"

    def fileno(self) -> int:
        """To wait for."""
        return self._pipe.fileno()

    def hear(self) -> Said:
        """What it wishes next; raises WorkerEnded where it does not live any more."""
        self._cores.go_at_once(self)
        while self._said is None:
            self._cores.turn(None)
        said, self._said = self._said, None
        if isinstance(said, Exception):
            raise said
        return said

    def tell(self, told: Told) -> None:
        """What it wished has happened."""
        with suppress(OSError):  # its end of the pipe says so
            self._pipe.send(told)

    def compute(self, due_s: float) -> None:
        """Let it compute; the result is due then, in virtual time."""
        self._cores.wanted(self, due_s)

    def end(self) -> None:
        """As with kill -9."""
        if not self.over:
            self._cores.family.kill(self.number)
            self._close()

    # Called by the cores

    def go(self) -> None:
        """It has a core."""
        with suppress(OSError):
            self._pipe.send(Go())

    def listen(self) -> None:
        """It has said something, or ended."""
        try:
            self._said = said = self._pipe.receive()
            self._cores.used_s += said.used_s - self.used_s
            self.used_s = said.used_s
        except (EOFError, OSError):
            words = self._cores.family.reap(self.number)
            self._said = WorkerEnded(f"{self.name} {words}, before its training was over.")
            self._close()
        except Exception as error:
            self._said = WorkerEnded(f"{self.name} said what cannot be read: {error!r}.")
            self.end()

    def _close(self) -> None:
        self.over = True
        self._cores.left(self)
        self._pipe.close()


class Cores:
    """The processes of `family`, of which so many compute `at_once`."""

    def __init__(self, family: Family, at_once: int, workers: int) -> None:
        self.family = family
        self.used_s = 0.0
        """CPU time of all processes that ever were, as they said last."""
        self._at_once = at_once
        self._poll = select.epoll()
        self._processes: dict[int, Process] = {}
        self._wanted: list[tuple[float, int, Process]] = []
        """A heap of those who want to compute, by when the result is due."""
        self._waiting: set[Process] = set()
        self._computing: set[Process] = set()
        self._count = itertools.count()
        _allow_descriptors(DESCRIPTORS_EACH * workers + DESCRIPTORS_OTHER)

    def start(self, life: Life) -> Process:
        """The process of a worker."""
        process = Process(self, life)
        self._processes[process.fileno()] = process
        self._poll.register(process, select.EPOLLIN)
        return process

    def turn(self, timeout_s: float | None = 0.0) -> None:
        """Take in what was said, waiting for it up to `timeout_s` (None: for ever); let the next ones compute."""
        for descriptor, _ in self._poll.poll(timeout_s):
            process = self._processes[descriptor]
            self._computing.discard(process)
            process.listen()
        self._fill()

    def wanted(self, process: Process, due_s: float) -> None:
        """It wants to compute."""
        heapq.heappush(self._wanted, (due_s, next(self._count), process))
        self._waiting.add(process)
        self._fill()

    def go_at_once(self, process: Process) -> None:
        """Everything waits for this one: where it waits for a core, it waits no longer."""
        if process in self._waiting:
            self._go(process)

    def left(self, process: Process) -> None:
        """It is there no more."""
        self._computing.discard(process)
        self._waiting.discard(process)
        self._poll.unregister(process)
        del self._processes[process.fileno()]

    def close(self) -> None:
        """No process is left."""
        for process in list(self._processes.values()):
            process.end()
        self._poll.close()
        self.family.close()

    def _fill(self) -> None:
        while self._wanted and len(self._computing) < self._at_once:
            _, _, process = heapq.heappop(self._wanted)
            if process in self._waiting:
                self._go(process)

    def _go(self, process: Process) -> None:
        self._waiting.discard(process)
        self._computing.add(process)
        process.go()


def _shelf(name: str) -> int:
    """A file in memory that may grow, and never shrinks under those who see it."""
    file = os.memfd_create(f"paramserver-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return file


def _allow_descriptors(wanted: int) -> None:
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if wanted > most != resource.RLIM_INFINITY:
        raise ParamserverError(
            f"So many workers take {wanted:,} open files, and this process may have {most:,}.",
            fix="Simulate fewer workers, or raise the limit: ulimit -Hn.",
        )
    if wanted > least:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
