"""Runs block work on threads; each job's results come back to the core as one event.

Laws
* A job is cut into contiguous ranges, one per thread; ranges share nothing, so their order does not matter.
* A thread owns one scratch block for its life: nothing is allocated per job.
* Work that raises ends the process: state may be half changed, and a supervisor restarts it from the checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np

from common.codecs.base import BLOCK_ELEMENTS
from common.node import SMALL_ELEMENTS, JobDone, Run

RANGES_PER_THREAD = 2
"""Ranges are handed out this fine, so that one slow thread does not hold up the job."""


class KernelPool:
    """`threads` threads; `done` is called on one of them (or at once, for small jobs) with the finished job."""

    def __init__(self, threads: int, done: Callable[[JobDone], None], failed: Callable[[BaseException], None]) -> None:
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="kernel")
        self._local = threading.local()
        self._done = done
        self._failed = failed

    def run(self, job: Run) -> JobDone | None:
        """Start `job`. A small one is done on return and its result returned; a large one reports through `done`."""
        if job.elements <= SMALL_ELEMENTS:
            return JobDone(job.job, [job.work(0, job.parts, self._scratch())])
        ranges = min(self._threads * RANGES_PER_THREAD, job.parts)
        _Pending(job.job, ranges, self._done, self._failed).watch(
            [self._executor.submit(self._work, job, first, last) for first, last in cut(job.parts, ranges)]
        )
        return None

    def close(self) -> None:
        """Wait for what runs, and end the threads."""
        self._executor.shutdown(wait=True)

    def _work(self, job: Run, first: int, last: int) -> Any:
        return job.work(first, last, self._scratch())

    def _scratch(self) -> Any:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = np.zeros(BLOCK_ELEMENTS, np.float32)
        return self._local.scratch


def cut(parts: int, ranges: int) -> list[tuple[int, int]]:
    """[0, parts) in so many contiguous ranges of nearly the same length: (first, last) each."""
    return list(pairwise(parts * i // ranges for i in range(ranges + 1)))


class _Pending:
    """Counts the ranges of one job down."""

    def __init__(
        self, job: int, ranges: int, done: Callable[[JobDone], None], failed: Callable[[BaseException], None]
    ) -> None:
        self._job, self._left, self._done, self._failed = job, ranges, done, failed
        self._lock = threading.Lock()
        self._futures: list[Future[Any]] = []

    def watch(self, futures: list[Future[Any]]) -> None:
        self._futures = futures
        for future in futures:
            future.add_done_callback(self._one_done)

    def _one_done(self, future: Future[Any]) -> None:
        if error := future.exception():
            self._failed(error)
            return
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._done(JobDone(self._job, [future.result() for future in self._futures]))
