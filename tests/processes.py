"""Real servers and workers for the integration tests: started, killed, and always cleaned up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.query import status

ROOT = Path(__file__).parent.parent
PATIENCE_S = 60.0
"""A test machine may be slow; nothing here waits for less when something must come, or sleeps when it need not."""


def until(done: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """Poll until `done()` is true and return it; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := done():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {timeout_s:g} s for {what}")


class Process:
    """A Python process of ours, its output in a file."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *arguments], stdout=output, stderr=output, cwd=ROOT, env=environment
            )

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self._process.kill()
        self._process.wait()

    def stop(self, timeout_s: float = 20.0) -> int:
        """SIGTERM, and wait; the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """The exit code, once it has ended."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:g} s; its output:\n{self.text}") from None


class Server(Process):
    """`paramserver serve` on a free port, or where an earlier one was."""

    def __init__(self, folder: Path, *flags: str, address: str = "tcp://127.0.0.1:0") -> None:
        ready = folder / "address"
        ready.unlink(missing_ok=True)
        super().__init__(
            ["-m", "deploy", "serve", "--bind", address, "--ready-file", str(ready), *flags], folder / "server.log"
        )
        until(lambda: ready.exists() or not self.running, "the server")
        assert self.running, self.text
        self.address = ready.read_text().strip()

    def status(self) -> dict[str, Any]:
        """What the server says of itself."""
        return status(self.address, timeout_s=20.0)


@contextmanager
def cleaned_up() -> Iterator[list[Process]]:
    """Whatever is put into the list is killed at the end."""
    processes: list[Process] = []
    try:
        yield processes
    finally:
        for process in processes:
            if process.running:
                process.kill()
