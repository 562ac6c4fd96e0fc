"""What a task is: a model, its optimizer, its data, and how good it is.

Laws
* A task is made from a `Context` alone. The same context makes the same task, bit for bit.
* `model_seed` is the same for all workers of a run and decides the initial weights and any split of the data; `seed`
  is each worker's own and decides the order of its batches.
* The loop asks for nothing but what stands in `Task`: it never looks into a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Context(NamedTuple):
    """For whom a task is made."""

    seed: int = 0
    """Start of this worker's own random choices: the order of its data."""
    model_seed: int = 0
    """Start of the random choices that all workers share: the initial weights."""
    worker: str = "alone"
    """This worker's name."""
    device: torch.device = torch.device("cpu")
    """Where the model belongs."""
    data: Path | None = None
    """Folder of data sets, for tasks that read one."""
    optimizer: str = ""
    """Inner optimizer that was asked for, a name in `OPTIMIZERS`; "": the task's own choice."""


OPTIMIZERS: Mapping[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "nesterov": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr / 10, momentum=0.9, nesterov=True),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr / 50),
}
"""Inner optimizers of the built-in tasks, from parameters and the learning rate that suits plain SGD: momentum .9 moves
ten times as far, and Adam's steps do not shrink with the gradient."""


class Evaluation(NamedTuple):
    """How good a model is on data it was not trained on."""

    loss: float
    """Mean over the samples."""
    accuracy: float
    """Share of right answers, 0 to 1; NaN where a task has no such thing."""
    samples: int


def first_length(batch: Any) -> int:
    """Samples in a batch: the length of its first element, or of the batch itself if it is one tensor."""
    if isinstance(batch, Mapping):
        batch = next(iter(batch.values()))
    elif isinstance(batch, (tuple, list)):
        batch = batch[0]
    return len(batch)


def no_evaluation(model: torch.nn.Module) -> Evaluation | None:
    """For tasks that hold nothing back to evaluate on."""
    return None


@dataclass(frozen=True, slots=True)
class Task:
    """All that the training loop needs of one task on one worker."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    batches: Iterable[Any]
    """Batches of any kind; iterated again whenever it ends, for as long as the training lasts."""
    loss: Callable[[torch.nn.Module, Any], torch.Tensor]
    """loss(model, batch): the mean loss of the batch, a scalar tensor with its graph."""
    samples: Callable[[Any], int] = first_length
    """samples(batch): how many samples it holds."""
    evaluate: Callable[[torch.nn.Module], Evaluation | None] = no_evaluation
    """evaluate(model): how good any model of this kind is, such as the server's center; leaves its mode as it was."""


class TaskFamily(NamedTuple):
    """A task before it is known for which worker."""

    name: str
    summary: str
    make: Callable[[Context], Task]
    """Raises ConfigError where something that the task needs is missing."""
