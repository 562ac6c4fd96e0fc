"""As people use it: a server in one terminal, workers in two others, `status` in a fourth.

Each program runs on a pseudo-terminal of its own, so that Ctrl-C and the live screens are the real ones.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import Any

import pytest

from common import query
from tests.processes import ROOT, until

COLUMNS, ROWS = 120, 40


class Terminal:
    """A program on a pseudo-terminal: what it shows, and keys to press."""

    def __init__(self, *arguments: str) -> None:
        self._screen, program = pty.openpty()
        fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy", *arguments],
            stdin=program,
            stdout=program,
            stderr=program,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(program)
        self._shown = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        """Everything it showed so far."""
        return self._shown.decode(errors="replace")

    def press(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def wait(self, timeout_s: float = 30.0) -> int:
        """The exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join(5.0)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(5.0)
        os.close(self._screen)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._screen, 65_536)
            except OSError:
                return  # the program has closed its end
            if not data:
                return
            self._shown += data


def status(address: str) -> dict[str, Any]:
    """`paramserver status --json`, as a script would read it."""
    shown = subprocess.run(
        [sys.executable, "-m", "deploy", "status", address, "--json"],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=True,
    )
    found: dict[str, Any] = json.loads(shown.stdout)
    return found


def worker_row(address: str, name: str) -> dict[str, Any]:
    """The row of one worker, or nothing."""
    return next((row for row in query.status(address, 20.0)["workers"] if row["name"] == name), {})


@pytest.mark.timeout(240)
def test_server_and_two_workers_in_three_terminals(tmp_path: Path) -> None:
    ready = tmp_path / "address"
    terminals = []
    try:
        server = Terminal(
            "serve", "--bind", "tcp://127.0.0.1:0", "--ready-file", str(ready), "--rule", "gem", "--lease-s", "4"
        )
        terminals.append(server)
        until(ready.exists, "the server")
        address = ready.read_text().strip()
        until(lambda: f"paramserver worker {address}" in server.text, "the join line")
        assert "Memory" in server.text
        assert status(address)["phase"] == "waiting for the first worker"

        early = Terminal("worker", address, "--task", "digits", "--name", "early")
        terminals.append(early)
        until(lambda: worker_row(address, "early").get("updates", 0) > 300, "300 updates of the first worker")
        assert status(address)["phase"] == "training"

        late = Terminal("worker", address, "--task", "digits", "--name", "late", "--seed", "1")
        terminals.append(late)
        row = until(lambda: (found := worker_row(address, "late")).get("updates", 0) and found, "the late worker")
        # it started from the center that 300 updates have made, not from its own random weights (loss ln 10)
        assert row["loss"] < 1.2, row
        assert row["state"] in ("training", "pushing", "queued"), row
        until(lambda: "late" in server.text, "the server to name the late worker")

        os.kill(early.process.pid, signal.SIGKILL)
        until(lambda: "early" in " ".join(query.status(address, 20.0)["waiting_for"]), "the killed one to be missed")
        until(lambda: worker_row(address, "early")["state"] == "gone", "the killed worker to be given up")
        assert status(address)["phase"] == "training"
        before = worker_row(address, "late")["updates"]
        until(lambda: worker_row(address, "late")["updates"] > before, "the other worker to go on")

        late.press("\x03")
        assert late.wait() == 130, late.text
        assert "Traceback" not in late.text
        until(lambda: worker_row(address, "late")["state"] == "gone", "the goodbye")
        assert status(address)["phase"] == "waiting for workers"

        server.press("\x03")
        assert server.wait(10.0) == 0, server.text
        assert "Traceback" not in server.text
    finally:
        for terminal in terminals:
            terminal.close()
