"""How good a model becomes, over time: the center of a server, and what one worker without a server comes to.

    center.look(address, status, time_s)      a point of the center's curve
    train_alone("digits", 600, ...)           the figures of a lone worker, in its own process

Laws
* Both are measured on data that nobody trains on, by the task's own `evaluate`, and give points of the same kind:
  `time_s`, `updates`, `samples`, `loss`, `accuracy`.
* Looking takes no more than LOOK_SHARE of one core from those who train; the lone worker's time for it is not counted.
* What is not a number is None.

Left out: when to look and whom to compare (`deploy.run`), and showing it (`deploy.screens`, `deploy.report`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.errors import NetworkError, Refused
from worker import loop, mechanisms, observer, tasks
from worker.driver import Machine
from worker.tasks import Context, Task

LOOK_S, ANSWER_S = 0.5, 5.0
"""Between two looks at the center; and the longest wait for it."""
LOOK_SHARE = 0.2
"""Looking at the center may take this share of one core."""
SOLO_POINTS = 25
"""Evaluations of the lone worker."""


class Center:
    """The server's center, looked at again and again: how good it is on data that nobody trains on."""

    def __init__(self, task: Task, say: Callable[[str, str], None], *, machine: Machine | None = None) -> None:
        self._task = task
        self._say = say
        self._machine = machine or Machine.this()
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
                self._observer = observer.Observer(address, self._task.model, name="launcher", machine=self._machine)
            self._observer.fetch(ANSWER_S)
            found = self._machine.compute(lambda: self._task.evaluate(self._task.model), 0)
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


def train_alone(
    task: str,
    steps: int,
    *,
    device: str,
    seed: int,
    model_seed: int,
    data: Path | None,
    threads: int,
    optimizer: str = "",
    mechanism: str = "",
) -> dict[str, Any]:
    """Train `task` for `steps` optimizer steps; returns its figures, the time of its evaluations not counted."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    made = tasks.load(task).make(Context(seed, model_seed, "alone", torch.device(device), data, optimizer))
    made = replace(made, mechanism=mechanisms.parse(mechanism))
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


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
