"""Child processes: started with all their words in one file, told apart by how they end, and never left behind.

    child = Child("worker-0", ["worker", address], directory)       in the parent
    die_with(parent, SIGKILL); exit_on_signals()                     in the child, before it does anything else

Laws
* A child has its own session, so Ctrl-C reaches its parent alone; the parent ends it together with its process group,
  and the kernel ends it where the parent is killed.
* A group is killed only while its leader is not waited for: until then nobody else can have the number.
* Every wait has an end, and one that lasts says for whom.
* The error that ended a child is its parent's, by its exit code, with the child's last lines.

Left out: what the children do (`deploy.cli`), and who is started when (`deploy.run`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import ConfigError, KernelError, LockedError, NetworkError, ParamserverError, StateError

ROOT = Path(__file__).resolve().parents[1]
"""Where children find this program."""
POLL_S, PATIENCE_S = 0.05, 10.0
"""Between two looks at the children; and a wait that is spoken of."""
LAST_LINES, TAIL_BYTES = 12, 8192
BY_EXIT_CODE = {kind.exit_code: kind for kind in (ConfigError, StateError, LockedError, KernelError, NetworkError)}
"""A child's error is the launcher's."""
PR_SET_PDEATHSIG = 1
"""Of Linux' prctl: the signal this process gets when its parent dies."""


# In the parent


class Child:
    """A process of the run: a session of its own, all its words in one file, gone when the launcher is."""

    def __init__(self, name: str, words: Sequence[str], directory: Path, *, threads: int | None = None) -> None:
        self.name = name
        self.log = directory / "logs" / f"{name}.log"
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environ = dict(os.environ) | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        if threads is not None:
            environ["OMP_NUM_THREADS"] = str(threads)
        # -P: a folder of the user's that is called `worker` or `common` must not be taken for ours
        command = [sys.executable, "-P", "-m", "deploy", *words, f"--die-with-parent={os.getpid()}"]
        with self.log.open("ab") as log:
            self._said = log.tell()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, start_new_session=True
            )

    def __repr__(self) -> str:
        return f"<Child {self.name}, process {self._process.pid}, {self.ended() or 'running'}>"

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs. What it started and left behind ends with it."""
        process = self._process
        if process.returncode is None and os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self._kill_group()
        return process.poll()

    def ended(self) -> str:
        """How it ended, in words; '' while it runs."""
        if self.code is None:
            return ""
        return f"killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"

    def last_lines(self) -> str:
        """What it said last, indented: the error that ended it, if it named one."""
        with self.log.open("rb") as log:
            log.seek(max(self._said, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()[-LAST_LINES:]
        errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
        return "\n".join(f"    {line}" for line in lines[errors[-1] if errors else 0 :]) or "    (nothing)"

    def failure(self, what: str) -> ParamserverError:
        """Its end as the error of the whole run."""
        kind = BY_EXIT_CODE.get(self.code or 0, ParamserverError)
        return kind(f"{what} ({self.ended()}). Its last lines:\n{self.last_lines()}", fix=f"All it said: {self.log}")

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def kill(self) -> None:
        """End it and whatever it started."""
        if self.code is None:
            self._kill_group()
            self._process.wait()

    def _kill_group(self) -> None:
        """Only before the child is waited for: until then nobody else can have its number."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


class Patience:
    """Says who is waited for whenever nothing has changed for PATIENCE_S."""

    def __init__(self, say: Callable[[str, str], None]) -> None:
        self._say = say
        self._state: Any = None
        self._due_s = 0.0

    def wait(self, state: Any, whom: str) -> None:
        """`state`: whatever changes when things go on."""
        now = time.monotonic()
        if state != self._state:
            self._state, self._due_s = state, now + PATIENCE_S
        elif now >= self._due_s:
            self._due_s = now + PATIENCE_S
            self._say("info", f"Still waiting for {whom}.")


def end(children: Collection[Child], patience_s: float, patience: Patience) -> None:
    """SIGTERM, and after a while SIGKILL."""
    for child in children:
        if child.code is None:
            child.terminate()
    wait(children, patience_s, patience)
    for child in children:
        child.kill()


def wait(children: Collection[Child], patience_s: float, patience: Patience) -> None:
    """Until all have ended, but no longer than that."""
    deadline = time.monotonic() + patience_s
    while (left := [child.name for child in children if child.code is None]) and time.monotonic() < deadline:
        patience.wait(left, f"{', '.join(left)} to end")
        time.sleep(POLL_S)


# In the child


def die_with(parent: int | None, number: signal.Signals) -> None:
    """Have the kernel send this process `number` when `parent` dies; end at once where it is dead already."""
    if parent is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        raise SystemExit(1)


def exit_on_signals() -> None:
    """SIGTERM and a closed terminal end the process as Ctrl-C does: blocks are left, peers are told."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, leave)
