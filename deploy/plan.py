"""What a run on this machine is to be, checked: its settings, task, devices and directory. Nothing is started here.

Laws
* What is wrong with settings or task is said before anything is started, and nothing is written until then: the
  directory that nobody chose is made last, so that it is this run's alone.
* What was not given is filled in, and its origin says so.
* `words_of` gives a server the very settings of the plan.

Left out: running it (`deploy.local`).
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from common import config, discovery
from common.config import Loaded, ServerSettings
from common.errors import ConfigError, StateError
from worker import mechanisms, tasks
from worker.tasks import OPTIMIZERS, Context, Task

UPDATES_PER_WORKER = 150
"""Budget where none is given."""


SPARE_SESSIONS = 8
"""For those who look, and those who come back under another name."""
LEASE_S = 8.0
"""On one machine a worker that says nothing for so long is dead or stopped: rounds need not wait longer."""


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
    optimizer: str
    """Inner optimizer of the task; "": its own choice."""
    mechanism: str
    """What is done to the gradient of each sample; "": nothing."""
    solo: bool
    center: Task
    """To look at the center with."""

    @property
    def again(self) -> str:
        """Flags with which another launch goes on from this run's directory."""
        settings = self.server.settings
        rule = [f"--set {name}={value}" for name, value in settings.rule_settings.items()]
        return " ".join([f"--directory {self.directory}", f"--rule {settings.rule}", *rule, f"--task {self.task}"])

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
            *([f"--optimizer={self.optimizer}"] if self.optimizer else []),
            *([f"--mechanism={self.mechanism}"] if self.mechanism else []),
        ]


def make(
    loaded: Loaded[ServerSettings],
    *,
    task: str,
    workers: int | None = None,
    per_gpu: int | None = None,
    data: Path | None = None,
    optimizer: str = "",
    mechanism: str = "",
    solo: bool = True,
    threads: int | None = None,
) -> Plan:
    """Fill in what was not given; raises ConfigError where the task, a device or a setting is not there."""
    devices = _devices(workers, per_gpu)
    if optimizer and optimizer not in OPTIMIZERS:
        raise ConfigError(
            f"There is no inner optimizer '{optimizer}'{discovery.nearest(optimizer, OPTIMIZERS)}.",
            fix=f"There are: {', '.join(OPTIMIZERS)}.",
        )
    threads = threads or max(1, len(os.sched_getaffinity(0)) // len(devices))
    torch.set_num_threads(1)
    context = Context(0, loaded.settings.seed, "launcher", torch.device(devices[0]), data, optimizer)
    changes = mechanisms.parse(mechanism)
    center = tasks.load(task).make(context)
    if changes is not None:
        center.model.train()
        mechanisms.per_example(center.model, center.loss, next(iter(center.batches)))
    settings, chosen = loaded.settings, dict[str, Any]()
    if loaded.origins["bind"] == "default":
        chosen["bind"] = ("tcp://127.0.0.1:0",)
    if settings.budget_updates is settings.budget_samples is settings.budget_s is None:
        chosen["budget_updates"] = UPDATES_PER_WORKER * len(devices)
    chosen["workers"] = len(devices)
    if loaded.origins["max_sessions"] == "default" and len(devices) >= settings.max_sessions:
        chosen["max_sessions"] = len(devices) + SPARE_SESSIONS
    if loaded.origins["lease_s"] == "default":
        chosen["lease_s"] = LEASE_S
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    settings = ServerSettings.model_validate(given | chosen)
    if settings.directory is None:
        directory = _fresh_directory(f"{settings.rule}-{Path(task.partition('.py')[0]).name}")
        chosen["directory"] = directory
        settings = ServerSettings.model_validate(given | chosen)
    else:
        directory = settings.directory
    server = Loaded(settings, {**loaded.origins, **dict.fromkeys(chosen, "launch")})
    return Plan(server, task, devices, threads, directory, data, optimizer, mechanism, solo, center)


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
    """A new directory, made here and now: of two runs that start in the same second, each gets its own."""
    first = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    for count in itertools.count(1):
        path = first if count == 1 else first.with_name(f"{first.name}-{count}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise StateError(
                f"No directory can be made for this run: {error}.", fix="Choose a place with --directory."
            ) from None
        return path
    raise AssertionError
