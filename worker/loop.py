"""The reference training process: join, train until the server's budget is used up, say what it came to.

    report = run(settings)                     one worker, as `paramserver worker` runs it
    trained = train_alone(task, steps=300)     the very same loop without a server, to compare with

Laws
* The loop logs and writes nothing, and waits for the device only where `session.step` does. What a progress display
  costs is up to `on_step`. Ctrl-C is left to the caller; on its way out the server is told.

Left out: mixed precision, gradient accumulation, schedules. `worker.join` in your own loop takes them all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from common.config import WorkerSettings
from common.errors import ConfigError
from worker import tasks, trainer
from worker.driver import Machine
from worker.tasks import Context, Task
from worker.trainer import Exchanges, Session

OnStep: TypeAlias = Callable[[int, torch.Tensor, float, Any], None]
"""on_step(step, loss, samples_per_s, session) after each step. loss: () without graph, on the model's device;
samples_per_s: the mean so far; session: the Session, or Alone."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What a loop did."""

    steps: int
    samples: int
    seconds: float
    samples_per_s: float
    last_loss: float
    """Of the last batch, before its step; NaN where there was none."""


@dataclass(frozen=True, slots=True)
class WorkerReport(Trained):
    """What one worker did, and what its exchanges cost."""

    name: str
    exchanges: Exchanges


def run(
    settings: WorkerSettings,
    *,
    model_seed: int = 0,
    data: Path | None = None,
    threads: int | None = None,
    on_step: OnStep | None = None,
    machine: Machine | None = None,
) -> WorkerReport:
    """Train `settings.task` at `settings.address` until the server's budget is used up.

    model_seed: start of the initial weights, the same for all workers of a run; data: folder of data sets; threads:
    those of torch's kernels; machine: where this runs, for simulators. Raises ConfigError for a task or device that is not there, and what `worker.join` raises.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    optimizer = "" if settings.optimizer == "task" else settings.optimizer
    context = Context(settings.seed, model_seed, settings.name or "worker", _device(settings.device), data, optimizer)
    task = tasks.load(settings.task).make(context)
    machine = machine or Machine.this()
    machine.prepare(task)
    _seed(settings.seed)
    name, timeout_s = settings.name, settings.connect_timeout_s
    with trainer.join(
        settings.address,
        task.model,
        task.optimizer,
        name=name,
        group=settings.group,
        connect_timeout_s=timeout_s,
        machine=machine,
    ) as session:
        trained = train(task, session, on_step=on_step, now=machine.now)
    return WorkerReport(**asdict(trained), name=session.name, exchanges=session.exchanges)


def train(
    task: Task, session: Session | Alone, *, on_step: OnStep | None = None, now: Callable[[], float] = time.monotonic
) -> Trained:
    """Train until the session is finished; raises ConfigError where the task has no data. now(): seconds."""
    task.model.train()
    batches = forever(task.batches)
    steps = samples = 0
    loss = torch.tensor(float("nan"))
    started = now()
    while not session.finished:
        batch = next(batches)
        task.optimizer.zero_grad()
        loss = task.loss(task.model, batch)
        loss.backward()
        task.optimizer.step()
        loss, size = loss.detach(), task.samples(batch)
        session.step(loss, size)
        steps, samples = steps + 1, samples + size
        if on_step is not None:
            on_step(steps, loss, samples / max(now() - started, 1e-9), session)
    seconds = max(now() - started, 1e-9)
    return Trained(steps, samples, seconds, samples / seconds if steps else 0.0, float(loss))


def train_alone(task: Task, steps: int, *, on_step: OnStep | None = None) -> Trained:
    """The same loop with no server, for `steps` optimizer steps."""
    return train(task, Alone(steps), on_step=on_step)


class Alone:
    """In place of a session: counts the steps and exchanges nothing."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    @property
    def finished(self) -> bool:
        """Whether all steps are made."""
        return self._left <= 0

    def step(self, loss: torch.Tensor, samples: int) -> None:
        """One step less to go."""
        self._left -= 1


def forever(batches: Iterable[Any]) -> Iterator[Any]:
    """Pass after pass over the batches; raises ConfigError where a pass holds none."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ConfigError(
                "The task's data holds no batch, or is an iterator that one pass used up.",
                fix="Return what can be iterated again, such as a DataLoader or a list.",
            )


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(f"Setting 'device' cannot be '{name}': {reason}.", fix="Such as cpu or cuda:0.") from None


def _seed(seed: int) -> None:
    """Start what models and data sets may draw from while training, such as dropout."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
