"""The processes of one run, from the first to the last: a server, its workers, and a lone worker to compare with.

    with Run(plan, say) as run:        start_server, start_workers, train, finish, start_solo, stop_server, solo, ...
    run.status, run.rows(), run.center.curve

Laws
* However the block is left, no process of the run is left: workers may say goodbye, the server may save, then SIGKILL.
* A worker that dies is reported at once, and the others go on. Without a server or any worker the run is over. Nothing
  is started a second time.
* Every wait has an end, and one that lasts says for whom.
* The lone worker trains when the others have left, with as many steps and threads as one of them had.

Left out: in which order all this happens, and what is reported (`deploy.local`).
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from common import query
from common.errors import NetworkError, ParamserverError
from deploy import children
from deploy.children import Child, Patience
from deploy.measure import Center
from deploy.plan import Plan, words_of
from deploy.screens import Say, Screen, live
from paramserver.checkpoint import Directory

POLL_S = 0.2
"""Between two looks at a run that trains."""
START_S, LEAVE_S, WRITE_S = 300.0, 20.0, 120.0
"""The longest wait for the server to be ready, for workers to leave after the end, for the last checkpoint."""
GOODBYE_S, STOP_S = 2.0, 5.0
"""When a run is broken off: for workers to say goodbye; from SIGTERM to SIGKILL."""
SOLO_START_S, SOLO_SHARE = 60.0, 3.0
"""The lone worker may take so long, and so many times as long as the workers did."""
ANSWER_S = 5.0
"""The longest wait for the server's status."""


class Run:
    """The processes of one run, from the first to the last; a context manager that leaves none."""

    def __init__(self, plan: Plan, say: Say) -> None:
        self._plan = plan
        self._say = say
        self._server: Child | None = None
        self._workers: list[Child] = []
        self._solo: Child | None = None
        self._gone: set[str] = set()
        self._told: set[str] = set()
        self._patience = Patience(say)
        self.center = Center(plan.center, say)
        self.address = ""
        self.status: dict[str, Any] = {}
        self.started = time.time()
        """When the first worker joined, seconds since 1970."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        server, others = [*filter(None, [self._server])], [*self._workers, *filter(None, [self._solo])]
        running = [child.name for child in (*server, *others) if child.code is None]
        try:
            if running:
                self._say("info", f"Stopping {', '.join(running)}.")
            children.end(others, GOODBYE_S, self._patience)
            children.end(server, STOP_S, self._patience)
        finally:
            for child in (*others, *server):
                child.kill()
            if self._server is not None:
                self._ready_file.unlink(missing_ok=True)
        saved = self._server is not None and self._server.code == 0 and self.status.get("updates")
        if saved and isinstance(error, (KeyboardInterrupt, SystemExit)):
            self._say("info", f"What was trained is saved; go on with: paramserver launch {self._plan.again}")

    @property
    def _ready_file(self) -> Path:
        return self._plan.directory / "address"

    # The server

    def start_server(self) -> None:
        """Start it and learn where it listens; raises what ended it, and StateError for a directory it cannot have."""
        directory = self._plan.directory
        Directory.open(directory).close()  # is it ours to use?
        (directory / "logs").mkdir(exist_ok=True)
        self._ready_file.unlink(missing_ok=True)
        words = ["serve", f"--ready-file={self._ready_file}", *words_of(self._plan.server.settings)]
        self._server = server = Child("server", words, directory)
        deadline = time.monotonic() + START_S
        while not self._ready_file.exists():
            if server.code is not None:
                raise server.failure("The server did not start")
            if time.monotonic() > deadline:
                raise NetworkError(f"The server was not ready within {START_S:g} s.", fix=f"Look into {server.log}.")
            self._patience.wait("server", "the server to be ready")
            time.sleep(children.POLL_S)
        self.address = self._ready_file.read_text(encoding="utf-8").strip()
        self._say("info", f"The server listens on {self.address}; all goes to {directory}.")

    def stop_server(self) -> None:
        """Ask it to end, and wait for its last checkpoint."""
        assert self._server is not None
        self.center.close()
        children.end([self._server], WRITE_S, self._patience)
        if self._server.code != 0:
            raise self._server.failure("The server did not stop as it should")

    # The workers

    def start_workers(self) -> None:
        """Start them all; they join by themselves."""
        plan = self._plan
        for number in range(len(plan.devices)):
            name = f"worker-{number}"
            words = ["worker", self.address, f"--name={name}", f"--report={self._report_of(name)}"]
            words += plan.task_words(number)
            self._report_of(name).unlink(missing_ok=True)
            self._workers.append(Child(name, words, plan.directory, threads=plan.threads))

    def train(self, screen: Screen) -> None:
        """Until the budget is used up; raises what ends it early."""
        joined = False
        while not (self.status.get("finished") or self._gone == {worker.name for worker in self._workers}):
            self._watch()
            with suppress(NetworkError):
                self.status = status = query.status(self.address, ANSWER_S)
                if live(status) and not joined:
                    joined = True
                    self.started = time.time() - max(row["joined_s"] for row in live(status))
                if status["phase"] == "diverged":
                    raise ParamserverError(
                        "Training diverged: the center is no longer finite.",
                        fix="Lower the learning rate, or choose a rule that scales updates, such as gem.",
                    )
                if status["phase"] == "training" and not status["finished"]:
                    self.center.look_if_due(self.address, status, self.elapsed_s)
                screen.show(status, self.center.curve)
            self._patience.wait(self.status.get("updates"), self._whom())
            time.sleep(POLL_S)

    @property
    def elapsed_s(self) -> float:
        """Since the first worker joined."""
        return time.time() - self.started

    def finish(self) -> None:
        """Let the workers say goodbye, and look at the center for the last time."""
        trained_s = self.status.get("elapsed_s", 0.0)
        deadline = time.monotonic() + LEAVE_S
        while True:
            self._expect_server()
            self.status = query.status(self.address, ANSWER_S) | {"elapsed_s": trained_s}
            ended = {worker.name for worker in self._workers if worker.code is not None}
            here = {row["name"] for row in live(self.status)} - ended
            if not here or time.monotonic() > deadline:
                break
            self._patience.wait(here, f"{', '.join(sorted(here))} to leave")
            time.sleep(children.POLL_S)
        if self.status["version"] and self.center.evaluates:
            self.center.look(self.address, self.status, self.elapsed_s)

    def stop_workers(self) -> None:
        """They have said goodbye; wait for the processes to end."""
        children.wait(self._workers, LEAVE_S, self._patience)
        children.end(self._workers, STOP_S, self._patience)
        self._watch_workers()

    def rows(self) -> list[dict[str, Any]]:
        """What each worker did: what it said at its end, and what the server counted."""
        counted = self._counted()
        rows = []
        for number, worker in enumerate(self._workers):
            own = read(self._report_of(worker.name))
            row = {"device": self._plan.devices[number], "exit": worker.code} | own | counted.get(worker.name, {})
            rows.append(row | {"name": worker.name})
        return rows

    # The lone worker

    def start_solo(self) -> int:
        """Start it, with as many steps as a worker made on average, which it returns."""
        rows = self._counted().values()
        steps: int = round(sum(row["steps"] for row in rows) / max(len(rows), 1))
        if steps:
            words = ["alone", f"--steps={steps}", f"--report={self._report_of('solo')}", *self._plan.task_words(0)]
            self._solo = Child("solo", words, self._plan.directory, threads=self._plan.threads)
        return steps

    def solo(self) -> dict[str, Any]:
        """The lone worker's figures; empty where it failed, which is no reason to fail for all."""
        child = self._solo
        if child is None:
            return {}
        deadline = time.monotonic() + SOLO_START_S + SOLO_SHARE * self.status["elapsed_s"]
        while child.code is None and time.monotonic() < deadline:
            self._patience.wait("solo", "the lone worker")
            time.sleep(children.POLL_S)
        if child.code == 0:
            return read(self._report_of("solo"))
        why = f"failed ({child.ended()}). Its last lines:\n{child.last_lines()}" if child.ended() else "is too slow."
        self._say("warning", f"There is nothing to compare with: the lone worker {why}")
        children.end([child], STOP_S, self._patience)
        return {}

    def _counted(self) -> dict[str, dict[str, Any]]:
        """What the server counted for each worker; of one that an earlier run of the directory knew, the latest."""
        rows = sorted(self.status["workers"], key=lambda row: -float(row["joined_s"]))
        return {row["name"]: row for row in rows if row["name"] in {worker.name for worker in self._workers}}

    def _report_of(self, name: str) -> Path:
        return self._plan.directory / "logs" / f"{name}.json"

    # Watching

    def _watch(self) -> None:
        """Tell who died; raises where nobody is left to go on."""
        self._expect_server()
        self._watch_workers()
        if all(worker.code for worker in self._workers):
            raise self._workers[-1].failure("Every worker died")

    def _expect_server(self) -> None:
        assert self._server is not None
        if self._server.code is not None:
            raise self._server.failure("The server died")

    def _watch_workers(self) -> None:
        ended = [worker for worker in self._workers if worker.code is not None]
        for worker in ended:
            if worker.name not in self._gone:
                self._gone.add(worker.name)
                if worker.code:
                    self._tell_death(worker, len(self._workers) - len(ended))

    def _tell_death(self, worker: Child, left: int) -> None:
        lines = worker.last_lines()
        said = "It said the same." if lines in self._told else f"Its last lines:\n{lines}"
        self._told.add(lines)
        self._say(
            "warning", f"{worker.name} died ({worker.ended()}); {left or 'none'} of {len(self._workers)} left. {said}"
        )

    def _whom(self) -> str:
        waits: list[str] = self.status.get("waiting_for", [])
        here = {row["name"] for row in live(self.status)}
        missing = [worker.name for worker in self._workers if worker.code is None and worker.name not in here]
        waits = waits + ([f"{', '.join(missing)} to join"] if missing else [])
        return "; ".join(waits) or "the next update"


def read(path: Path) -> dict[str, Any]:
    """The JSON of a child that had the time to write it."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
