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

from worker.mechanisms import Mechanism

HALVES_SAMPLES = 4
"""A batch of fewer is not halved: batch norm needs two samples in each half."""


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


def first_halves(batch: Any) -> tuple[Any, Any] | None:
    """Both halves of a batch along the first dimension of its tensors, which may stand in tuples, lists or mappings.

    None where that cannot be: something is no tensor, they differ in length, or the batch is smaller than
    HALVES_SAMPLES.
    """
    sizes = {len(leaf) if isinstance(leaf, torch.Tensor) and leaf.dim() else 0 for leaf in _leaves(batch)}
    if len(sizes) != 1 or (n := sizes.pop()) < HALVES_SAMPLES:
        return None
    return _cut(batch, slice(n // 2)), _cut(batch, slice(n // 2, n))


def _leaves(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    return [leaf for one in batch for leaf in _leaves(one)] if isinstance(batch, (tuple, list)) else [batch]


def _cut(batch: Any, part: slice) -> Any:
    if isinstance(batch, Mapping):
        return {key: _cut(one, part) for key, one in batch.items()}
    if isinstance(batch, (tuple, list)):
        cut = [_cut(one, part) for one in batch]
        return type(batch)(*cut) if hasattr(batch, "_fields") else type(batch)(cut)
    return batch[part]


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
    halves: Callable[[Any], tuple[Any, Any] | None] = first_halves
    """halves(batch): two batches that hold half of the samples each, to measure gradient diversity with; None where
    there are none."""
    mechanism: Mechanism | None = None
    """What is done to the gradient of each sample, if anything."""


class TaskFamily(NamedTuple):
    """A task before it is known for which worker."""

    name: str
    summary: str
    make: Callable[[Context], Task]
    """Raises ConfigError where something that the task needs is missing."""
