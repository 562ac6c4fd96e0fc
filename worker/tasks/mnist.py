"""`mnist`: 70,000 handwritten digits of 28 x 28 pixels, the network and the settings of the GEM paper.

    conv 5x5, 1 -> 10, pool 2, relu;  conv 5x5, 10 -> 20, dropout of channels .5, pool 2, relu
    linear 320 -> 300, relu;  linear 300 -> 200, relu;  linear 200 -> 10                        163,790 parameters

Plain SGD on batches of 64 of the 60,000 to train on, 937 whole ones a pass; tested on the 10,000. Every worker goes
through the whole training set, in an order of its own. One pass alone reaches 97 %. Left out: augmentation, which the
paper does without.

It reads the four files of the data set, packed or not, from the folder of data sets or its subfolder `mnist`. What was
read stays in memory, once for all workers of a process.
Source: Hermans & Louppe, Gradient Energy Matching for Distributed Asynchronous Gradient Descent, 2018, section 4.
Data: LeCun, Cortes & Burges, The MNIST database of handwritten digits, 1998.
"""

from __future__ import annotations

import gzip
import zlib
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import ConfigError
from worker.tasks import labelled
from worker.tasks.base import OPTIMIZERS, Context, Task, TaskFamily
from worker.tasks.pooled import conv_pool_relu

BATCH_SAMPLES = 64
LR = 0.05
MEAN, STD = 0.1307, 0.3081
"""Of the training pixels, 0 to 1."""
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
FOLDERS_LIMIT = 2
"""Data sets, each on one device, that stay in memory: 220 MB each."""


class Network(nn.Module):
    """(n, 1, 28, 28) float32 normalised pixels -> (n, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.drop = nn.Dropout2d(0.5)
        self.linear1 = nn.Linear(320, 300)
        self.linear2 = nn.Linear(300, 200)
        self.linear3 = nn.Linear(200, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = conv_pool_relu(x, self.conv1)
        # Dropping a channel before or after its pool is the same.
        x = self.drop(conv_pool_relu(x, self.conv2))
        x = functional.relu(self.linear1(x.flatten(1)))
        x = functional.relu(self.linear2(x))
        logits: Tensor = self.linear3(x)
        return logits


class Data(NamedTuple):
    """Normalised pixels and labels."""

    train_x: Tensor
    """(60000, 1, 28, 28) float32."""
    train_y: Tensor
    """(60000,) int64."""
    test_x: Tensor
    """(10000, 1, 28, 28) float32."""
    test_y: Tensor
    """(10000,) int64."""


def make(context: Context) -> Task:
    """MNIST for one worker; raises ConfigError where its files are missing or broken."""
    data = _data(_folder(context.data), context.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.model_seed)
        model = Network().to(context.device)
    return Task(
        model=model,
        optimizer=OPTIMIZERS[context.optimizer or "sgd"](model.parameters(), LR),
        batches=labelled.Shuffled(data.train_x, data.train_y, BATCH_SAMPLES, seed=context.seed, whole=True),
        loss=labelled.loss,
        evaluate=partial(labelled.evaluate, x=data.test_x, y=data.test_y),
    )


@lru_cache(FOLDERS_LIMIT)
def _data(folder: Path, device: torch.device) -> Data:
    train_x, train_y, test_x, test_y = (read_idx(_file(folder, name)) for name in FILES)
    for name, x, y in ((FILES[0], train_x, train_y), (FILES[2], test_x, test_y)):
        if x.shape != (len(y), 28, 28) or y.ndim != 1:
            raise ConfigError(
                f"{folder / name} holds {tuple(x.shape)} and its labels {tuple(y.shape)}, not n images of 28 x 28.",
                fix="Take the four files from one copy of MNIST.",
            )
    return Data(_pixels(train_x, device), _labels(train_y, device), _pixels(test_x, device), _labels(test_y, device))


def _pixels(x: Tensor, device: torch.device) -> Tensor:
    return x.float().div_(255).sub_(MEAN).div_(STD).unsqueeze(1).to(device)


def _labels(y: Tensor, device: torch.device) -> Tensor:
    return y.long().to(device)


def _folder(data: Path | None) -> Path:
    """The folder that holds the four files."""
    wanted = f"Give --data a folder with {', '.join(FILES)}, each packed as .gz or not, or with them in its `mnist`."
    if data is None:
        raise ConfigError("Task 'mnist' reads a data set, and no folder of data sets was given.", fix=wanted)
    for folder in (data, data / "mnist"):
        if all(_paths(folder, name) for name in FILES):
            return folder.resolve()
    folder = data / "mnist" if (data / "mnist").is_dir() else data
    missing = [name for name in FILES if not _paths(folder, name)]
    raise ConfigError(f"Task 'mnist' does not find {', '.join(missing)} in {folder}.", fix=wanted)


def _file(folder: Path, name: str) -> Path:
    return _paths(folder, name)[0]


def _paths(folder: Path, name: str) -> list[Path]:
    return [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]


def read_idx(path: Path) -> Tensor:
    """uint8 tensor in an IDX file, packed if its name ends in .gz: 0, 0, 8, dimensions, their lengths, the values.

    Raises ConfigError where it is another kind of file or cut off.
    """
    again = "Fetch the file again."
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", fix=again) from None
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ConfigError(
            f"{path} is no IDX file of bytes: it starts with {content[:4].hex() or 'nothing'}.", fix=again
        )
    head = 4 + 4 * content[3]
    shape = np.frombuffer(content[:head], ">u4", offset=4).tolist() if len(content) >= head else None
    if shape is None or len(content) - head != prod(shape):
        wanted = f"{head + prod(shape)} bytes" if shape else "its head"
        raise ConfigError(f"{path} is cut off or too long: {len(content)} bytes, not {wanted}.", fix=again)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=head).reshape(shape).copy())


TASK = TaskFamily("mnist", "handwritten digits, 28 x 28 pixels, by the network of the GEM paper", make)
