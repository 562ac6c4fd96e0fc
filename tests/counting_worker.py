"""A worker of the counting model, through the SDK: python counting_worker.py ADDRESS NAME INDEX STEPS OUTPUT.

Step s of worker w adds 1 to slot (w, s) and 1 to every element of a guard tensor. At the end it writes which steps each
of its pushes held, and which pushes a crash undid.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

import torch

from worker import events, join

WORKERS, STEPS_LIMIT, GUARD = 4, 4000, 1000
STEP_S = 0.003


class Counting(torch.nn.Module):
    """slots: (workers, steps); guard: (n,)."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = torch.nn.Parameter(torch.zeros(WORKERS, STEPS_LIMIT))
        self.guard = torch.nn.Parameter(torch.zeros(GUARD))


def main(address: str, name: str, index: int, steps: int, output: Path) -> None:
    """Count to `steps`."""
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    model = Counting()
    pushes: list[int] = []
    undone: list[tuple[int, int]] = []
    with join(address, model, torch.optim.SGD(model.parameters(), lr=0.1), name=name) as session:
        post, take = session._driver.post, session._take

        def spy_post(event: object) -> None:
            if isinstance(event, events.PushWanted):
                pushes.append(event.scalars.steps)
            post(event)

        def spy_take(news: object) -> None:
            if isinstance(news, events.Undone):
                undone.append((news.first, news.last))
            take(news)

        session._driver.post, session._take = spy_post, spy_take  # type: ignore[method-assign]
        for step in range(steps):
            with torch.no_grad():
                model.slots[index, step] += 1
                model.guard += 1
            session.step(0.0, samples=1)
            time.sleep(STEP_S)
        flushed = session.flush(timeout_s=30.0)
        away = session.exchanges.away
    output.write_text(json.dumps({"pushes": pushes, "undone": undone, "flushed": flushed, "away": away}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
