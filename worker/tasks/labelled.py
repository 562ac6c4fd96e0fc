"""What tasks of samples with right labels share: batches in a new order each pass, the loss, the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.tasks.base import Evaluation

EVALUATION_SAMPLES = 250
"""How many are evaluated at a time: a bound on the memory, which the result does not depend on but for rounding."""


class Shuffled:
    """Batches of (x, y), each pass in a new order; two with one seed give the same batches for ever.

    x: (n, ...); y: (n, ...), on the same device. whole: leave out what is left at the end of a pass and fills no
    batch; another part of the samples each time. change: what is done to each x, with the generator of the order.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_samples: int,
        *,
        seed: int,
        whole: bool = False,
        change: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:
        self._x, self._y, self._size = x, y, batch_samples
        self._end = len(x) // batch_samples * batch_samples if whole else len(x)
        self._change = change
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._x), generator=self._generator)[: self._end].to(self._x.device)
        for chosen in order.split(self._size):
            x = self._x[chosen]
            yield x if self._change is None else self._change(x, self._generator), self._y[chosen]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of the model's (n, ..., classes) logits; y: (n, ...)."""
    x, y = batch
    return functional.cross_entropy(model(x).flatten(0, -2), y.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> Evaluation:
    """Mean over all labels; x: (n, ...); y: (n, ...) int64. Leaves the model in the mode that it found."""
    training = model.training
    model.eval()
    total, right = 0.0, 0
    for part, labels in zip(x.split(EVALUATION_SAMPLES), y.split(EVALUATION_SAMPLES), strict=True):
        logits, labels = model(part).flatten(0, -2), labels.flatten()
        total += float(functional.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(1) == labels).sum())
    model.train(training)
    return Evaluation(total / y.numel(), right / y.numel(), y.numel())
