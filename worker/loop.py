"""The reference training process: join, train until the server's budget is used up, say what it came to.

    report = run(settings)                     one worker, as `paramserver worker` runs it
    trained = train_alone(task, steps=300)     the very same loop without a server, to compare with

Laws
* The loop adds nothing to a step but the two calls that every user's own loop has: no logging, no waiting for the
  device beyond the one in `session.step`. What a progress display costs is up to `on_step`.
* Nothing is written; Ctrl-C leaves the loop as it does any other, and the server is told.

Left out: mixed precision, gradient accumulation, schedules. `worker.join` in your own loop takes them all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from common.config import WorkerSettings
from common.errors import ConfigError
from worker import tasks, trainer
from worker.tasks import Context, Task
from worker.trainer import Exchanges


class Stepped(Protocol):
    """Where the steps of a loop go: a `Session`, or `Alone`."""

    finished: bool

    def step(self, loss: torch.Tensor, samples: int) -> None:
        """One optimizer step was made."""
        ...


OnStep: TypeAlias = Callable[[int, torch.Tensor, float, Any], None]
"""on_step(step, loss, samples_per_s, session) after each step; loss: a scalar without graph, on the model's device;
samples_per_s: the mean so far."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What a loop did."""

    steps: int
    samples: int
    seconds: float
    last_loss: float
    """Of the last batch, before its step; NaN where there was none."""

    @property
    def samples_per_s(self) -> float:
        """Mean over the whole loop."""
        return self.samples / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What one worker did, and what its exchanges cost."""

    name: str
    steps: int
    samples: int
    seconds: float
    samples_per_s: float
    last_loss: float
    exchanges: Exchanges


def run(
    settings: WorkerSettings,
    *,
    model_seed: int = 0,
    data: Path | None = None,
    threads: int | None = None,
    on_step: OnStep | None = None,
) -> WorkerReport:
    """Train `settings.task` at `settings.address` until the server's budget is used up.

    model_seed: start of the initial weights, the same for all workers of a run; threads: of torch, for its kernels.
    Raises ConfigError for a task or device that is not there, and what `worker.join` raises.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device = _device(settings.device)
    context = Context(settings.seed, model_seed, settings.name or "worker", device, data)
    task = tasks.load(settings.task).make(context)
    _seed(settings.seed)
    with trainer.join(
        settings.address,
        task.model,
        task.optimizer,
        name=settings.name,
        connect_timeout_s=settings.connect_timeout_s,
    ) as session:
        done = train(task, session, on_step=on_step)
    return WorkerReport(
        session.name, done.steps, done.samples, done.seconds, done.samples_per_s, done.last_loss, session.exchanges
    )


def train(task: Task, session: Stepped, *, on_step: OnStep | None = None) -> Trained:
    """Train until the session is finished; raises ConfigError where the task has no data."""
    model, optimizer = task.model, task.optimizer
    model.train()
    steps = samples = 0
    loss = torch.tensor(float("nan"))
    started = time.monotonic()
    batches = forever(task.batches)
    while not session.finished:
        batch = next(batches)
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        size = task.samples(batch)
        session.step(loss, size)
        steps += 1
        samples += size
        if on_step is not None:
            on_step(steps, loss, samples / (time.monotonic() - started), session)
    return Trained(steps, samples, time.monotonic() - started, float(loss))


def train_alone(task: Task, steps: int, *, on_step: OnStep | None = None) -> Trained:
    """The same loop with no server, for `steps` optimizer steps."""
    return train(task, Alone(steps), on_step=on_step)


class Alone:
    """In place of a session: counts the steps, exchanges nothing."""

    def __init__(self, steps: int) -> None:
        self._left = steps
        self.finished = steps <= 0

    def step(self, loss: torch.Tensor, samples: int) -> None:
        """One step less to go."""
        self._left -= 1
        self.finished = self._left <= 0


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
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(f"Setting 'device' cannot be '{name}': {reason}.", fix="Such as cpu or cuda:0.") from error
    return device


def _seed(seed: int) -> None:
    """Start all that a model or data set may draw from while it trains, such as dropout."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
