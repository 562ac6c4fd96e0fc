"""How eagerly the system lets a thread run: once woken, it pushes aside whoever runs, or it waits its turn.

    before = take(BATCH)        the calling thread waits its turn from now on
    take(before)                as it was
    is_free()                   whether it may choose

Most threads here are woken by a message which can wait until the one who sent it, or somebody else's exchange, is done:
to be pushed aside costs that one its caches. Linux calls threads that wait SCHED_BATCH. They have their share of the
cores as ever, and start at once where a core idles.

Left out: the server's loop, and whoever carries a connection while training goes on. Others wait for these.
"""

from __future__ import annotations

import contextlib
import os

USUAL, BATCH = os.SCHED_OTHER, os.SCHED_BATCH


def is_free() -> bool:
    """Whether the calling thread is of the usual kind, or waits its turn already, and the system lets it choose."""
    with contextlib.suppress(OSError):  # a sandbox
        if (policy := os.sched_getscheduler(0)) in (USUAL, BATCH):
            os.sched_setscheduler(0, policy, os.sched_param(0))
            return True
    return False


def take(policy: int) -> int:
    """Have the calling thread be `policy`, where it is free to; returns what it was."""
    if not is_free():
        return policy
    before = os.sched_getscheduler(0)
    os.sched_setscheduler(0, policy, os.sched_param(0))
    return before
