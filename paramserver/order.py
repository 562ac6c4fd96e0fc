"""The order in which the center is changed and read: one job at a time, first come, first served.

Laws
* A push enters when it is committed; pushes leave in the order they entered.
* A pull goes before waiting pushes, never into one that runs; but of two jobs in a row one is a push, where one waits.
* A job that started is finished: `current` is None again only through `finish`. Nothing comes between its parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common.node import Run
from paramserver.shard import Work


@dataclass(slots=True)
class Job:
    """Work over blocks, made when its turn comes (`start`), and what to do when it is done (`finish(results)`)."""

    name: str
    start: Callable[[], Work | None]
    """None: there is nothing to do any more; the job is skipped."""
    finish: Callable[[Sequence[Any]], Work | None]
    """More work, which then runs first."""
    of_push: bool = False


class WorkOrder:
    """Jobs waiting for the shard, and the one that runs."""

    def __init__(self) -> None:
        self._pulls: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._pulled = False
        """Whether the last job was a pull."""
        self._last_id = 0
        self.current: Job | None = None

    def __len__(self) -> int:
        return len(self._waiting) + len(self._pulls) + (self.current is not None)

    def __repr__(self) -> str:
        running = self.current.name if self.current else "nothing"
        return f"<WorkOrder running {running}, {len(self._waiting) + len(self._pulls)} waiting>"

    @property
    def ready(self) -> bool:
        """Whether a job waits, and none runs."""
        return self.current is None and bool(self._waiting or self._pulls)

    @property
    def runs_push(self) -> bool:
        """Whether the job that runs applies a push."""
        return self.current is not None and self.current.of_push

    def add(self, job: Job, *, pull: bool = False) -> None:
        """Put `job` at the end of its queue."""
        (self._pulls if pull else self._waiting).append(job)

    def next(self) -> Run | None:
        """Start the next job, if none runs."""
        while self.current is None and (self._waiting or self._pulls):
            self._pulled = bool(self._pulls) and not (self._pulled and self._waiting)
            job = (self._pulls if self._pulled else self._waiting).popleft()
            if (work := job.start()) is not None:
                self.current = job
                return self._run(work)
        return None

    def finish(self, job_id: int, results: Sequence[Any]) -> Run | None:
        """The work that runs is done; what the same job does next."""
        assert self.current is not None and job_id == self._last_id, f"job {job_id} is not the one that runs: {self!r}"
        job, self.current = self.current, None
        if (work := job.finish(results)) is None:
            return None
        self.current = job
        return self._run(work)

    def _run(self, work: Work) -> Run:
        self._last_id += 1
        return Run(self._last_id, *work)
