"""`digits`: 1797 handwritten digits of 8 x 8 pixels, for a first look. They ship with scikit-learn.

    conv 3x3, 1 -> 32, relu, pool 2;  conv 3x3, 32 -> 64, relu, pool 2;  linear 256 -> 10       21,386 parameters

Plain SGD on batches of 32 of the 1438 to train on; 359, a fifth of each class, are kept to test on. Every worker goes
through the whole training set, in an order of its own.

300 steps alone reach 95 to 98 % of the test digits. Four workers under `gem`, 300 steps each, reach 99 %; alone that
takes four times the steps. Left out: momentum and weight decay (GEM brings the momentum), augmentation.
Data: Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI 1998, of it the test set.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from worker.tasks import labelled
from worker.tasks.base import OPTIMIZERS, Context, Task, TaskFamily

CLASSES = 10
BATCH_SAMPLES = 32
LR = 0.05
"""Step size of plain SGD. Alone it could be four times that; under GEM the momentum of the proxy comes on top."""
TEST_SHARE = 0.2
SPLIT_SEED = 0
"""The split is part of the task: every run is measured on the same digits."""


def network() -> nn.Sequential:
    """(n, 1, 8, 8) float32 pixels, mean 0 and variance 1 -> (n, 10) logits."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, CLASSES),
    )


def split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """labels: (n,) -> positions to train on and to test on; of each class the same share."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    train, test = [], []
    for label in range(CLASSES):
        positions = (labels == label).nonzero().squeeze(1)
        positions = positions[torch.randperm(len(positions), generator=generator)]
        cut = round(TEST_SHARE * len(positions))
        test.append(positions[:cut])
        train.append(positions[cut:])
    return torch.cat(train), torch.cat(test)


def make(context: Context) -> Task:
    """The digits for one worker; raises ConfigError where scikit-learn is missing."""
    pixels, labels = _digits()
    train, test = split(labels)
    mean, std = pixels[train].mean(), pixels[train].std()
    x, y = ((pixels - mean) / std).to(context.device), labels.to(context.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.model_seed)
        model = network().to(context.device)
    return Task(
        model=model,
        optimizer=OPTIMIZERS[context.optimizer or "sgd"](model.parameters(), LR),
        batches=labelled.Shuffled(x[train], y[train], BATCH_SAMPLES, seed=context.seed),
        loss=labelled.loss,
        evaluate=partial(labelled.evaluate, x=x[test], y=y[test]),
    )


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """(1797, 1, 8, 8) float32 pixels from 0 to 16, (1797,) int64 labels; read once, and not to be changed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "Task 'digits' takes its data from scikit-learn, which is not installed.",
            fix="Run: pip install 'paramserver[demo]'",
        ) from None
    found: Any = load_digits()
    pixels = torch.from_numpy(found.images).float().unsqueeze(1)
    return pixels, torch.from_numpy(found.target).long()


TASK = TaskFamily("digits", "handwritten digits, 8 x 8 pixels, by a small convolutional network", make)
