"""`charlm`: the next character of a text, by a small transformer.

    x = E[text] + P;   3 times:  x += attention(norm(x)),  x += mlp(norm(x));  logits = norm(x) E^T   366,432 parameters

A character is a byte, of 64 at most the next one is told from those before. AdamW with learning rate .001 on batches of
16 such windows. The last tenth of the text is kept to test on. Every worker goes through the whole rest, cut into
windows anew and in an order of its own each pass. Loss is in nats per character, accuracy the share of characters that
were thought the likeliest. 1000 steps alone reach 1.85 and 45 %.

The text is a file of yours, or Pride and Prejudice, which comes along. Left out: dropout, schedules, writing text.
Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019; its block, smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import ConfigError
from worker.tasks import labelled
from worker.tasks.base import OPTIMIZERS, Context, Task, TaskFamily

CHARACTERS = 256
CONTEXT = 64
WIDTH = 96
HEADS = 4
BLOCKS = 3
INITIAL_STD = 0.02
BATCH_SAMPLES = 16
LR = 0.05
"""Of plain SGD; a fiftieth of it is AdamW's."""
TEST_SHARE = 0.1
TEST_CHARACTERS_LIMIT = 131_072
TEXT_CHARACTERS_MIN = 2_000
TEXT = Path(__file__).with_name("text") / "pride_and_prejudice.txt"


class Block(nn.Module):
    """(n, length, WIDTH) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.attend(self.norm1(x)).view(n, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(y.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm2(x))
        return x


class Network(nn.Module):
    """(n, length up to CONTEXT) int64 characters -> (n, length, CHARACTERS) logits of those that follow."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                last = name.endswith(("project.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=INITIAL_STD / (2 * BLOCKS if last else 1) ** 0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.characters(x) + self.positions.weight[: x.shape[1]]
        logits: Tensor = functional.linear(self.norm(self.blocks(x)), self.characters.weight)
        return logits


class Windows:
    """Batches of (characters, those that follow them), both (n, CONTEXT) int64, n up to BATCH_SAMPLES.

    text: (length,) uint8. Each pass cuts it elsewhere and goes through all windows in a new order; two with one seed
    give the same batches for ever.
    """

    def __init__(self, text: Tensor, *, seed: int) -> None:
        self._text = text
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start = int(torch.randint(0, CONTEXT, (), generator=self._generator))
        x, y = windows(self._text[start:])
        for chosen in torch.randperm(len(x), generator=self._generator).to(x.device).split(BATCH_SAMPLES):
            yield x[chosen].long(), y[chosen].long()


def windows(text: Tensor) -> tuple[Tensor, Tensor]:
    """(length,) -> ((length - 1) // CONTEXT, CONTEXT) characters, and those that follow them."""
    end = (len(text) - 1) // CONTEXT * CONTEXT
    return text[:end].view(-1, CONTEXT), text[1 : end + 1].view(-1, CONTEXT)


def make(context: Context) -> Task:
    """The text for one worker; raises ConfigError where it is missing or too short."""
    text = _text(context.data).to(context.device)
    cut = len(text) - round(TEST_SHARE * len(text))
    x, y = (part.long() for part in windows(text[cut:][: TEST_CHARACTERS_LIMIT + 1]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.model_seed)
        model = Network().to(context.device)
    return Task(
        model=model,
        optimizer=OPTIMIZERS[context.optimizer or "adamw"](model.parameters(), LR),
        batches=Windows(text[:cut], seed=context.seed),
        loss=labelled.loss,
        evaluate=partial(labelled.evaluate, x=x, y=y),
    )


def _text(data: Path | None) -> Tensor:
    """(length,) uint8."""
    file = TEXT if data is None else data
    if file.is_dir():
        found = sorted(file.glob("*.txt"))
        if len(found) != 1:
            raise ConfigError(
                f"Task 'charlm' reads one text, and {file} holds {len(found)} files that end in .txt.",
                fix="Give --data the file itself, or leave it out for the text that comes along.",
            )
        file = found[0]
    try:
        text = np.fromfile(file, np.uint8)
    except OSError as error:
        raise ConfigError(
            f"The text {file} cannot be read: {error.strerror}.", fix="Give --data a text file."
        ) from None
    if len(text) < TEXT_CHARACTERS_MIN:
        raise ConfigError(f"The text {file} has {len(text)} characters, fewer than {TEXT_CHARACTERS_MIN}.")
    return torch.from_numpy(text)


TASK = TaskFamily("charlm", "the next character of a text, by a small transformer", make)
