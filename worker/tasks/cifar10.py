"""`cifar10`: 60,000 photographs of ten kinds of things, 32 x 32 pixels, by a residual network of 20 layers.

    conv 3x3, 3 -> 16;  3 blocks of 16 channels, 3 of 32, 3 of 64, the first of the last two with stride 2;  mean;
    linear 64 -> 10                                                                             269,722 parameters
    block:  y = relu(x' + norm(conv(relu(norm(conv(x))))))     x': x, or every second pixel of it and zero channels

Plain SGD on batches of 128 of the 50,000 to train on, each shifted by up to 4 pixels and mirrored or not; tested on the
10,000. Every worker goes through the whole training set, in an order of its own. A step takes 0.4 s on one core: this
task wants a GPU. Left out: weight decay, momentum and the schedule of the paper, which reaches 91 %.

Data: train/CLASS/NAME.jpg and test/CLASS/NAME.jpg, or a tar file of them, see images.py.
Source: He, Zhang, Ren & Sun, Deep Residual Learning for Image Recognition, 2016, section 4.2, shortcuts A.
Data: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import ConfigError
from worker.tasks import images, labelled
from worker.tasks.base import OPTIMIZERS, Context, Task, TaskFamily

CLASSES = 10
SIDE = 32
BATCH_SAMPLES = 128
LR = 0.1
SHIFT_PIXELS = 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of red, green and blue in the training set, 0 to 1."""
CHANNELS = (16, 32, 64)
BLOCKS = 3
FOLDERS_LIMIT = 2
"""Data sets, each on one device, that stay in memory: 184 MB each."""


class Block(nn.Module):
    """(n, before, h, w) -> (n, after, h / stride, w / stride)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.stride, self.added = stride, (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.added:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return functional.relu(x + y)


class Network(nn.Module):
    """(n, 3, 32, 32) uint8 pixels -> (n, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS[0])
        before = (CHANNELS[0], *(channels for channels in CHANNELS for _ in range(BLOCKS)))
        self.blocks = nn.Sequential(*(Block(a, b, 1 if a == b else 2) for a, b in pairwise(before)))
        self.linear = nn.Linear(CHANNELS[-1], CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(of, device=x.device).view(3, 1, 1) for of in (MEAN, STD))
        x = ((x / 255 - mean) / std).to(memory_format=torch.channels_last)
        x = self.blocks(functional.relu(self.norm(self.conv(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def shifted_and_mirrored(x: Tensor, generator: torch.Generator) -> Tensor:
    """(n, c, side, side) -> the same: each shifted by up to SHIFT_PIXELS, black moving in, and mirrored or not."""
    n, c, side, _ = x.shape
    top, left = torch.randint(0, 2 * SHIFT_PIXELS + 1, (2, n, 1), generator=generator).to(x.device)
    mirrored = torch.rand(n, 1, generator=generator).to(x.device) < 0.5
    pixels = torch.arange(side, device=x.device)
    rows, columns = top + pixels, left + torch.where(mirrored, pixels.flip(0), pixels)
    sample, channel = (torch.arange(size, device=x.device) for size in (n, c))
    padded = functional.pad(x, 4 * (SHIFT_PIXELS,))
    return padded[sample.view(n, 1, 1, 1), channel.view(c, 1, 1), rows.view(n, 1, side, 1), columns.view(n, 1, 1, side)]


def make(context: Context) -> Task:
    """CIFAR-10 for one worker; raises ConfigError where its images are missing or broken."""
    data = _data(_source(context.data), context.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.model_seed)
        model = Network().to(context.device)
    return Task(
        model=model,
        optimizer=OPTIMIZERS[context.optimizer or "sgd"](model.parameters(), LR),
        batches=labelled.Shuffled(
            data.train_x, data.train_y, BATCH_SAMPLES, seed=context.seed, whole=True, change=shifted_and_mirrored
        ),
        loss=labelled.loss,
        evaluate=partial(labelled.evaluate, x=data.test_x, y=data.test_y),
    )


@lru_cache(FOLDERS_LIMIT)
def _data(source: Path, device: torch.device) -> images.Images:
    data = images.load(source, side=SIDE)
    classes = int(data.train_y.max()) + 1
    if classes != CLASSES:
        raise ConfigError(f"{source} holds {classes} classes, not {CLASSES}.", fix="Is it CIFAR-10?")
    return images.Images(*(part.to(device) for part in data))


def _source(data: Path | None) -> Path:
    """The tar file, or the folder that holds `train` and `test`."""
    wanted = (
        "Give --data such a tar file, or a folder with it as cifar10.tar.xz, or one with the folders train and test."
    )
    if data is None:
        raise ConfigError(
            "Task 'cifar10' reads train/CLASS/NAME.jpg and test/CLASS/NAME.jpg; none were given.", fix=wanted
        )
    for source in (data, data / "cifar10", *sorted(data.glob("cifar10.tar*"))):
        if source.is_file() or all((source / split).is_dir() for split in images.SPLITS):
            return source.resolve()
    raise ConfigError(f"Task 'cifar10' finds neither train and test nor cifar10.tar.xz in {data}.", fix=wanted)


TASK = TaskFamily("cifar10", "photographs, 32 x 32 pixels, by a residual network of 20 layers", make)
