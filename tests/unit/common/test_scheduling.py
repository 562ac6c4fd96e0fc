"""Who waits its turn, and who stays as it is."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from common import scheduling
from common.scheduling import BATCH, USUAL

ZEROMQ = """
import os
from common import transports
end = transports.listen(["tcp://127.0.0.1:0"])
found = set()
while not found:  # it gives itself a name
    names = {thread: open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")}
    found = {os.sched_getscheduler(int(thread)) for thread, name in names.items() if name.startswith("ZMQbg/IO")}
print(found)
print(os.sched_getscheduler(0))
end.close()
"""


def on_a_thread(work: Callable[[], Any]) -> Any:
    """What it returns on a thread of its own, which ends with it."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_waits_its_turn_until_the_last_who_wanted_it_ends() -> None:
    def work() -> list[int]:
        scheduling.be_usual()
        seen = []
        for step in (scheduling.wait_turn, scheduling.wait_turn, scheduling.end, scheduling.end):
            step()
            seen.append(os.sched_getscheduler(0))
        return seen

    assert on_a_thread(work) == [BATCH, BATCH, BATCH, USUAL]


def test_a_special_thread_stays_what_it_is() -> None:
    def work() -> list[int]:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        seen = [int(scheduling.is_free())]
        for step in (scheduling.wait_turn, scheduling.end, scheduling.be_usual):
            step()
            seen.append(os.sched_getscheduler(0))
        return seen

    assert on_a_thread(work) == [0, os.SCHED_IDLE, os.SCHED_IDLE, os.SCHED_IDLE]


def test_a_thread_is_not_what_the_one_that_started_it_is() -> None:
    def work() -> int:
        scheduling.wait_turn()
        return int(on_a_thread(lambda: (scheduling.be_usual(), os.sched_getscheduler(0))[1]))

    assert on_a_thread(work) == USUAL


def test_where_the_system_refuses_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    def work() -> bool:
        before = os.sched_getscheduler(0)
        monkeypatch.setattr(os, "sched_setscheduler", refuse)
        for step in (scheduling.wait_turn, scheduling.end, scheduling.be_usual):
            step()
        return not scheduling.is_free() and os.sched_getscheduler(0) == before

    assert on_a_thread(work)


def test_threads_of_zeromq_wait_their_turn() -> None:
    done = subprocess.run([sys.executable, "-c", ZEROMQ], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split("\n")[:2] == [str({BATCH}), str(os.sched_getscheduler(0))]
