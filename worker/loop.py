"""The reference training process: join, train until the server's budget is used up, say what it came to.

    report = run(settings)                     one worker, as `paramserver worker` runs it
    trained = train_alone(task, steps=300)     the very same loop without a server, to compare with

Laws
* A step in which gradient diversity is measured is the step that it would have been, bit for bit: both halves of its
  batch go through the model in passes of their own, after which torch's random numbers and the model's buffers are as
  they were.
* The loop logs and writes nothing, and waits for the device only where `session.step` does. What a progress display
  costs is up to `on_step`. Ctrl-C is left to the caller; on its way out the server is told.

Left out: mixed precision, gradient accumulation, schedules. `worker.join` in your own loop takes them all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from common.config import WorkerSettings
from common.errors import ConfigError
from worker import mechanisms, tasks, trainer
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
    those of torch's kernels; machine: where this runs, for simulators. Raises ConfigError for a task or device that is
    not there, and what `worker.join` raises.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    optimizer = "" if settings.optimizer == "task" else settings.optimizer
    context = Context(settings.seed, model_seed, settings.name or "worker", _device(settings.device), data, optimizer)
    mechanism = mechanisms.parse(settings.mechanism or "")
    machine = machine or Machine.this()

    def make() -> Task:
        made = replace(tasks.load(settings.task).make(context), mechanism=mechanism)
        _seed(settings.seed)
        return made

    task = machine.compute(make, 0)
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
        trained = train(task, session, on_step=on_step, machine=machine)
    return WorkerReport(**asdict(trained), name=session.name, exchanges=session.exchanges)


def train(
    task: Task, session: Session | Alone, *, on_step: OnStep | None = None, machine: Machine | None = None
) -> Trained:
    """Train until the session is finished; raises ConfigError where the task has no data."""
    task.model.train()
    batches = forever(task.batches)
    machine = machine or Machine.this()
    steps = samples = 0
    loss = torch.tensor(float("nan"))

    def step() -> tuple[torch.Tensor, int]:
        batch = next(batches)
        task.optimizer.zero_grad()
        found = _backward(task, session, batch), task.samples(batch)
        task.optimizer.step()
        return found

    started = machine.now()
    while not session.finished:
        loss, size = machine.compute(step, 1)
        session.step(loss, size)
        steps, samples = steps + 1, samples + size
        if on_step is not None:
            on_step(steps, loss, samples / max(machine.now() - started, 1e-9), session)
    seconds = max(machine.now() - started, 1e-9)
    return Trained(steps, samples, seconds, samples / seconds if steps else 0.0, float(loss))


def _backward(task: Task, session: Session | Alone, batch: Any) -> torch.Tensor:
    """Put the batch's gradient into `.grad`; returns its mean loss, () without graph."""
    measuring = session if not isinstance(session, Alone) and session.measures else None
    if task.mechanism is not None:
        feed = measuring.measure_gradients if measuring is not None else None
        return mechanisms.backward(task.model, task.loss, batch, task.mechanism, feed)
    if measuring is not None:
        _measure(task, measuring, batch)
    loss = task.loss(task.model, batch)
    loss.backward()
    return loss.detach()


def _measure(task: Task, session: Session, batch: Any) -> None:
    """Let the session measure with both halves of the batch, where it has halves, and leave everything as it was."""
    if (halves := task.halves(batch)) is None:
        return
    buffers = [(buffer, buffer.clone()) for buffer in task.model.buffers()]
    cuda = {parameter.device for parameter in task.model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(cuda)):
        loss_a, loss_b = (task.loss(task.model, half) for half in halves)
        session.measure(loss_a, loss_b, (task.samples(halves[0]), task.samples(halves[1])))
    for buffer, before in buffers:
        buffer.copy_(before)


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
