"""A whole run on this machine: a server, its workers and a lone worker to compare with, each a process of its own.

    plan = local.plan(loaded, task="digits", workers=4, ...)     what to run, checked
    found = local.launch(plan, console, say)                     runs it; returns what report.json holds

    DIRECTORY/                      checkpoints and run log of the server; report.json, report.html
    DIRECTORY/logs/NAME.log         all that the process NAME wrote

Laws
* However a run ends, no process of it is left: the launcher ends its children, each with its process group, and the
  kernel ends them where the launcher is killed. Ctrl-C reaches the launcher alone, for each child has its own session.
* A worker that dies is reported at once, and the others go on. Without a server or any worker the run is over. Nothing
  is started a second time.
* Every wait has an end, and one that lasts says for whom.
* What is wrong with settings or task is said before anything is started.
* The lone worker trains when the others have left, with as many steps and threads as one of them had.

Left out: other machines (`paramserver worker` joins from there), and what the figures look like (`deploy.report`).
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column, Table

from common import config, query
from common.config import Loaded, ServerSettings
from common.errors import (
    ConfigError,
    KernelError,
    LockedError,
    NetworkError,
    ParamserverError,
    Refused,
    StateError,
)
from deploy import report
from paramserver.checkpoint import Directory
from worker import loop, observer, tasks
from worker.tasks import Context, Task

ROOT = Path(__file__).resolve().parents[1]
"""Where children find this program."""
UPDATES_PER_WORKER = 150
"""Budget where none is given."""
POLL_S, LOOK_S, LINE_S, PATIENCE_S = 0.2, 0.5, 2.0, 10.0
"""Between two looks at the processes, at the center, between two plain lines; and a wait that is spoken of."""
LOOK_SHARE = 0.2
"""Looking at the center may take this share of one core."""
START_S, LEAVE_S, WRITE_S = 300.0, 20.0, 120.0
"""The longest wait for the server to be ready, for workers to leave after the end, for the last checkpoint."""
GOODBYE_S, STOP_S = 2.0, 5.0
"""When a run is broken off: for workers to say goodbye; from SIGTERM to SIGKILL."""
SOLO_START_S, SOLO_SHARE = 60.0, 3.0
"""The lone worker may take so long, and so many times as long as the workers did."""
ANSWER_S = 5.0
LAST_LINES, TAIL_BYTES = 12, 8192
GONE = "gone"
"""State of a worker that left, in the server's words."""
SOLO_POINTS = 25
"""Evaluations of the lone worker."""
BY_EXIT_CODE = {kind.exit_code: kind for kind in (ConfigError, StateError, LockedError, KernelError, NetworkError)}
"""A child's error is the launcher's."""

Say = Callable[[str, str], None]
"""say(level, sentence)"""


# What to run


@dataclass(frozen=True, slots=True)
class Plan:
    """One run, checked. `devices`: torch's name of one for each worker."""

    server: Loaded[ServerSettings]
    task: str
    devices: tuple[str, ...]
    threads: int
    """Of each worker."""
    directory: Path
    data: Path | None
    solo: bool
    center: Task
    """To look at the center with."""

    @property
    def where(self) -> str:
        """The devices, each once."""
        return ", ".join(sorted(set(self.devices)))

    @property
    def seed(self) -> int:
        """Start of the initial weights, and of the first worker; the others count on from it."""
        return self.server.settings.seed

    def seed_of(self, number: int) -> int:
        """Of the worker with that number."""
        return (self.seed + number) % 2**32

    def task_words(self, number: int) -> list[str]:
        """Flags of the worker with that number, and of a lone one in its place."""
        return [
            f"--task={self.task}",
            f"--device={self.devices[number]}",
            f"--seed={self.seed_of(number)}",
            f"--model-seed={self.seed}",
            f"--threads={self.threads}",
            *([f"--data={self.data}"] if self.data else []),
        ]


def plan(
    loaded: Loaded[ServerSettings],
    *,
    task: str,
    workers: int | None = None,
    per_gpu: int | None = None,
    data: Path | None = None,
    solo: bool = True,
) -> Plan:
    """Fill in what was not given; raises ConfigError where the task, a device or a setting is not there."""
    devices = _devices(workers, per_gpu)
    threads = max(1, len(os.sched_getaffinity(0)) // len(devices))
    torch.set_num_threads(1)
    context = Context(0, loaded.settings.seed, "launcher", torch.device(devices[0]), data)
    center = tasks.load(task).make(context)
    settings, chosen = loaded.settings, dict[str, Any]()
    if loaded.origins["bind"] == "default":
        chosen["bind"] = ("tcp://127.0.0.1:0",)
    if settings.budget_updates is settings.budget_samples is settings.budget_s is None:
        chosen["budget_updates"] = UPDATES_PER_WORKER * len(devices)
    if settings.directory is None:
        chosen["directory"] = _fresh_directory(f"{settings.rule}-{Path(task.partition('.py')[0]).name}")
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    settings = ServerSettings.model_validate(given | chosen)
    assert settings.directory is not None
    server = Loaded(settings, {**loaded.origins, **dict.fromkeys(chosen, "launch")})
    return Plan(server, task, devices, threads, settings.directory, data, solo, center)


def _devices(workers: int | None, per_gpu: int | None) -> tuple[str, ...]:
    if per_gpu is None:
        return ("cpu",) * (4 if workers is None else workers)
    gpus = torch.cuda.device_count()
    if not gpus:
        raise ConfigError(
            "--per-gpu needs a CUDA device, and none is visible.",
            fix="Look at nvidia-smi, CUDA_VISIBLE_DEVICES and torch.version.cuda, or leave --per-gpu out.",
        )
    if workers not in (None, per_gpu * gpus):
        raise ConfigError(
            f"--per-gpu {per_gpu} makes {per_gpu * gpus} workers on {gpus} devices, not {workers}.",
            fix="Leave --workers out.",
        )
    return tuple(f"cuda:{number % gpus}" for number in range(per_gpu * gpus))


def _fresh_directory(name: str) -> Path:
    first = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    path, count = first, 1
    while path.exists():
        count += 1
        path = first.with_name(f"{first.name}-{count}")
    return path


def words_of(settings: ServerSettings) -> list[str]:
    """The flags that give a server these settings."""
    words = []
    for name, value in settings.model_dump(mode="json", exclude_unset=True).items():
        flag = config.flag(name)
        match value:
            case bool():
                words.append(flag if value else f"--no-{flag[2:]}")
            case list():
                words += [f"{flag}={item}" for item in value]
            case dict():
                words += [f"{flag}={key}={item}" for key, item in value.items()]
            case None:
                pass
            case _:
                words.append(f"{flag}={value}")
    return words


# The parts of a run


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


class Center:
    """The server's center, looked at again and again: how good it is on data that nobody trains on."""

    def __init__(self, task: Task, say: Say) -> None:
        self._task = task
        self._say = say
        self._observer: observer.Observer | None = None
        self._due_s = 0.0
        self.evaluates = True
        self.curve: list[dict[str, Any]] = []

    def look_if_due(self, address: str, status: dict[str, Any], time_s: float) -> None:
        """A new point of the curve, about every LOOK_S."""
        if self.evaluates and time.monotonic() >= self._due_s:
            self.look(address, status, time_s)

    def look(self, address: str, status: dict[str, Any], time_s: float) -> None:
        """A new point of the curve; none where the task evaluates nothing or the server does not answer."""
        used_s = time.thread_time()
        try:
            if self._observer is None:
                self._observer = observer.Observer(address, self._task.model, name="launcher")
            self._observer.fetch(ANSWER_S)
            found = self._task.evaluate(self._task.model)
        except NetworkError:
            return
        except Refused as error:
            self._say("warning", f"The center cannot be evaluated: {error}")
            found = None
        self.evaluates = found is not None
        if found is not None:
            point = {"time_s": round(time_s, 3), "updates": status["updates"], "samples": status["samples"]}
            self.curve.append(point | {"loss": found.loss, "accuracy": _known(found.accuracy)})
        used_s = time.thread_time() - used_s
        self._due_s = time.monotonic() + max(LOOK_S, used_s / LOOK_SHARE)

    def close(self) -> None:
        """Say goodbye to the server."""
        if self._observer is not None:
            self._observer.close()
            self._observer = None


class Screen(Protocol):
    """Where progress is shown."""

    def show(self, status: dict[str, Any], curve: Sequence[dict[str, Any]]) -> None:
        """The run as it is now."""
        ...


class Lines:
    """A line every LINE_S, for logs and pipes."""

    def __init__(self, say: Say, budget: str) -> None:
        self._say, self._budget = say, budget
        self._due_s, self._shown = 0.0, 0

    def show(self, status: dict[str, Any], curve: Sequence[dict[str, Any]]) -> None:
        """A line, if it is time for one and something was done."""
        if time.monotonic() >= self._due_s and status["updates"] != self._shown:
            self._due_s, self._shown = time.monotonic() + LINE_S, status["updates"]
            self._say("info", _progress(status, curve, self._budget))


class Bar:
    """A bar that grows, in a terminal."""

    def __init__(self, progress: Progress, budget: str) -> None:
        self._progress, self._budget = progress, budget
        self._task = progress.add_task("starting", total=1.0)

    def show(self, status: dict[str, Any], curve: Sequence[dict[str, Any]]) -> None:
        """The bar, as long as the budget that is used up."""
        words = _progress(status, curve, self._budget) if status["updates"] else status["phase"]
        self._progress.update(self._task, completed=status["budget_used"], description=words)


@contextmanager
def _screen(console: Console, say: Say, budget_updates: int | None) -> Iterator[Screen]:
    budget = f"/{budget_updates:,}" if budget_updates else ""
    if not console.is_terminal:
        yield Lines(say, budget)
        return
    words = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    columns = (BarColumn(bar_width=12), TaskProgressColumn(), words)
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress, budget)


def _progress(status: dict[str, Any], curve: Sequence[dict[str, Any]], budget: str) -> str:
    words = [f"{status['updates']:,}{budget} updates"]
    if curve:
        words.append(f"loss {curve[-1]['loss']:.3f}")
    elif (loss := _mean(row["loss"] for row in _live(status))) is not None:
        words.append(f"training loss {loss:.3f}")
    if curve and curve[-1]["accuracy"] is not None:
        words.append(f"accuracy {_percent(curve[-1]['accuracy'])}")
    words.append(f"{status['samples_per_s']:,.0f} samples/s")
    words.append(f"lag {max((row['lag'] for row in _live(status)), default=0)}")
    return " · ".join(words)


class Patience:
    """Says who is waited for whenever nothing has changed for PATIENCE_S."""

    def __init__(self, say: Say) -> None:
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
            self._end(others, GOODBYE_S)
            self._end(server, STOP_S)
        finally:
            for child in (*others, *server):
                child.kill()
            if self._server is not None:
                self._ready_file.unlink(missing_ok=True)
        saved = self._server is not None and self._server.code == 0 and self.status.get("updates")
        if saved and isinstance(error, (KeyboardInterrupt, SystemExit)):
            self._say("info", f"What was trained is saved; go on with --directory {self._plan.directory}")

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
            time.sleep(POLL_S / 4)
        self.address = self._ready_file.read_text(encoding="utf-8").strip()
        self._say("info", f"The server listens on {self.address}; all goes to {directory}.")

    def stop_server(self) -> None:
        """Ask it to end, and wait for its last checkpoint."""
        assert self._server is not None
        self.center.close()
        self._end([self._server], WRITE_S)
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
                if _live(status) and not joined:
                    joined = True
                    self.started = time.time() - max(row["joined_s"] for row in _live(status))
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
            here = {row["name"] for row in _live(self.status)} - ended
            if not here or time.monotonic() > deadline:
                break
            self._patience.wait(here, f"{', '.join(sorted(here))} to leave")
            time.sleep(POLL_S / 4)
        if self.status["version"] and self.center.evaluates:
            self.center.look(self.address, self.status, self.elapsed_s)

    def stop_workers(self) -> None:
        """They have said goodbye; wait for the processes to end."""
        self._wait(self._workers, LEAVE_S)
        self._end(self._workers, STOP_S)
        self._watch_workers()

    def rows(self) -> list[dict[str, Any]]:
        """What each worker did: what it said at its end, and what the server counted."""
        counted = self._counted()
        rows = []
        for number, worker in enumerate(self._workers):
            own = _read(self._report_of(worker.name))
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
            time.sleep(POLL_S / 4)
        if child.code == 0:
            return _read(self._report_of("solo"))
        why = f"failed ({child.ended()}). Its last lines:\n{child.last_lines()}" if child.ended() else "is too slow."
        self._say("warning", f"There is nothing to compare with: the lone worker {why}")
        self._end([child], STOP_S)
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
        here = {row["name"] for row in _live(self.status)}
        missing = [worker.name for worker in self._workers if worker.code is None and worker.name not in here]
        waits = waits + ([f"{', '.join(missing)} to join"] if missing else [])
        return "; ".join(waits) or "the next update"

    def _end(self, children: Collection[Child], patience_s: float) -> None:
        """SIGTERM, and after a while SIGKILL."""
        for child in children:
            if child.code is None:
                child.terminate()
        self._wait(children, patience_s)
        for child in children:
            child.kill()

    def _wait(self, children: Collection[Child], patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while (left := [child.name for child in children if child.code is None]) and time.monotonic() < deadline:
            self._patience.wait(left, f"{', '.join(left)} to end")
            time.sleep(POLL_S / 4)


# From start to end


def launch(plan: Plan, console: Console, say: Say) -> dict[str, Any]:
    """Run it all and write the report; returns what report.json holds, and its path as `report`.

    Raises ParamserverError where the server or every worker died, or training diverged.
    """
    run, solo = Run(plan, say), dict[str, Any]()
    try:
        with run:
            run.start_server()
            run.start_workers()
            say("info", f"{len(plan.devices)} workers, {plan.threads} threads each, on {plan.where}.")
            with _screen(console, say, plan.server.settings.budget_updates) as screen:
                run.train(screen)
            run.finish()
            say("info", _sentence(run.status["finished"] or "all workers left"))
            steps = run.start_solo() if plan.solo else 0
            run.stop_server()
            if steps:
                say("info", f"One worker alone trains for {steps:,} steps, to compare.")
            solo = run.solo()
            run.stop_workers()
    except ParamserverError as error:
        if run.status.get("updates"):
            _, page = report.write(plan.directory, _summary(plan, run, solo, error.sentence))
            say("info", f"What was done until then: {page}")
        raise
    path, page = report.write(plan.directory, _summary(plan, run, solo, 0))
    return _read(path) | {"report": str(page)}


def _summary(plan: Plan, run: Run, solo: dict[str, Any], end: int | str) -> dict[str, Any]:
    settings, status, curve, rows = plan.server.settings, run.status, run.center.curve, run.rows()
    last = curve[-1] if curve else {"loss": None, "accuracy": None}
    return {
        "task": plan.task,
        "rule": settings.rule,
        "settings": [row._asdict() for row in config.describe(plan.server)],
        "seeds": {"server": plan.seed, "weights": plan.seed}
        | {row["name"]: plan.seed_of(number) for number, row in enumerate(rows)},
        "versions": _versions(),
        "started": run.started,
        "seconds": status["elapsed_s"],
        "updates": status["updates"],
        "samples": status["samples"],
        "samples_per_s": status["samples"] / status["elapsed_s"] if status["elapsed_s"] else None,
        "workers": rows,
        "center_accuracy": last["accuracy"],
        "center_loss": last["loss"],
        "curve": curve,
        "solo_accuracy": solo.get("accuracy"),
        "solo_loss": solo.get("loss"),
        "solo_curve": solo.get("curve", []),
        "solo": {name: value for name, value in solo.items() if name != "curve"},
        "exit": end,
    }


def _versions() -> dict[str, str]:
    from importlib import metadata

    names = ("paramserver", "torch", "numpy", "numba", "pyzmq")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def closing_table(found: dict[str, Any]) -> Table:
    """What a run came to, the center beside the lone worker."""
    solo, rows, lag = found.get("solo", {}), found["workers"], found["lag"]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("", f"{len(rows)} workers", "one worker alone"):
        table.add_column(column, justify="right" if column else "left")
    steps, loss = sum(row["steps"] for row in rows), _mean(row.get("loss") for row in rows)
    if found["center_accuracy"] is not None:
        table.add_row("accuracy", _percent(found["center_accuracy"]), _percent(found["solo_accuracy"]), style="bold")
    if found["center_loss"] is not None:
        table.add_row("test loss", _number(found["center_loss"], ".4f"), _number(found["solo_loss"], ".4f"))
    table.add_row("last training loss", _number(loss, ".4f"), _number(solo.get("last_loss"), ".4f"))
    table.add_row("steps", _number(steps), _number(solo.get("steps")))
    table.add_row("samples/s", _number(found["samples_per_s"]), _number(solo.get("samples_per_s")))
    table.add_row("seconds", _number(found["seconds"], ".1f"), _number(solo.get("seconds"), ".1f"))
    table.add_row("lag, median and most", f"{_number(lag['median'], 'g')} and {_number(lag['max'])}", "")
    table.add_row("sent up and down", f"{_mib(found['bytes_up'])} and {_mib(found['bytes_down'])}", "")
    table.add_row("refused updates", _number(found["rejected"]), "")
    return table


# The lone worker, in its own process


def train_alone(
    task: str, steps: int, *, device: str, seed: int, model_seed: int, data: Path | None, threads: int
) -> dict[str, Any]:
    """Train `task` for `steps` optimizer steps; returns its figures, the time of its evaluations not counted."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    made = tasks.load(task).make(Context(seed, model_seed, "alone", torch.device(device), data))
    curve: list[dict[str, Any]] = []
    samples, evaluating_s, started = 0, 0.0, time.monotonic()

    def look(step: int, loss: object, samples_per_s: float, session: object) -> None:
        nonlocal evaluating_s, samples
        if step % max(1, steps // SOLO_POINTS) and step != steps:
            return
        before = time.monotonic()
        samples = round(samples_per_s * (before - started))
        found = made.evaluate(made.model)
        if found is not None:
            point = {"time_s": round(before - started - evaluating_s, 3), "updates": step, "samples": samples}
            curve.append(point | {"loss": found.loss, "accuracy": _known(found.accuracy)})
        evaluating_s += time.monotonic() - before

    done = loop.train_alone(made, steps, on_step=look)
    seconds = max(done.seconds - evaluating_s, 1e-9)
    last = curve[-1] if curve else {"loss": None, "accuracy": None}
    return {
        "steps": done.steps,
        "samples": done.samples,
        "seconds": seconds,
        "samples_per_s": done.samples / seconds,
        "last_loss": _known(done.last_loss),
        "loss": last["loss"],
        "accuracy": last["accuracy"],
        "curve": curve,
    }


# Words


def _live(status: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the workers that are there."""
    return [row for row in status.get("workers", []) if row["state"] != GONE]


def _read(path: Path) -> dict[str, Any]:
    """The JSON of a child that had the time to write it."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, form: str = ",.0f") -> str:
    return "-" if value is None else format(value, form)


def _mib(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
