"""How eagerly the system lets a thread run: once woken, it pushes aside whoever runs, or it waits its turn.

    wait_turn() ... end()       the calling thread waits its turn in between
    be_usual()                  it does not, whoever started it
    is_free()                   whether it may choose

Most threads here are woken by a message which can wait until the one who sent it, or somebody else's exchange, is done:
to be pushed aside costs that one its caches. Linux calls threads that wait SCHED_BATCH. They have their share of the
cores as ever, and start at once where a core idles.

Left out: the server's loop, and whoever carries a connection while training goes on. Others wait for these.
"""

from __future__ import annotations

import contextlib
import os
import threading

USUAL, BATCH, NEITHER = os.SCHED_OTHER, os.SCHED_BATCH, -1


class _Thread(threading.local):
    """What is known of one thread."""

    waiting = 0
    """How often `wait_turn` was said and not ended."""
    before = NEITHER


_this = _Thread()


def is_free() -> bool:
    """Whether the calling thread is of the usual kind, or waits its turn already, and the system lets it choose."""
    with contextlib.suppress(OSError):  # a sandbox
        if (policy := os.sched_getscheduler(0)) in (USUAL, BATCH):
            os.sched_setscheduler(0, policy, os.sched_param(0))
            return True
    return False


def wait_turn() -> None:
    """Have the calling thread wait its turn, where it is free to, until each of these calls was ended on it."""
    if _this.waiting == 0:
        _this.before = os.sched_getscheduler(0) if is_free() else NEITHER
        _be(BATCH)
    _this.waiting += 1


def end() -> None:
    """End one `wait_turn` of this thread."""
    _this.waiting -= 1
    if _this.waiting == 0:
        _be(_this.before)


def be_usual() -> None:
    """Have the calling thread, which may be a child of one that waits, be of the usual kind, where it is free to."""
    _be(USUAL)


def _be(policy: int) -> None:
    if policy != NEITHER and is_free():
        os.sched_setscheduler(0, policy, os.sched_param(0))
