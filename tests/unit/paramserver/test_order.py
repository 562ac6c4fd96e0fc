"""One job at a time; pushes in the order they came, pulls before pushes that wait, nothing twice."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramserver.order import Job, WorkOrder
from paramserver.shard import Work

WORK = Work(4, 100, lambda first, last, scratch: True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["push", "pull", "empty", "next", "done"]), max_size=60))
def test_order_of_work(steps: list[str]) -> None:
    order = WorkOrder()
    pulls: list[str] = []
    pushes: list[str] = []
    pulled = False
    started: list[str] = []
    finished: list[str] = []
    running: Any = None
    count = 0

    def job(name: str) -> Job:
        def start() -> Any:
            started.append(name)
            return None if name.startswith("empty") else WORK

        return Job(name, start, lambda results: finished.append(name))

    for step in steps:
        match step:
            case "push" | "empty" | "pull":
                count += 1
                name = f"{step} {count}"
                order.add(job(name), pull=step == "pull")
                (pulls if step == "pull" else pushes).append(name)
            case "next":
                run = order.next()
                if running is not None:
                    assert run is None, "never two jobs at once"
                    continue
                while pulls or pushes:
                    # a pull goes first, but of two jobs in a row one is a push where one waits
                    pulled = bool(pulls) and not (pulled and pushes)
                    expected = (pulls if pulled else pushes).pop(0)
                    assert started.count(expected) == 1
                    if not expected.startswith("empty"):
                        break
                else:
                    assert run is None
                    continue
                if run is not None:
                    running = expected, run
                    assert (run.parts, run.elements) == (4, 100)
                    assert started[-1] == running[0]
            case "done" if running is not None:
                order.finish(running[1].job, [True])
                assert finished[-1] == running[0]
                running = None
        assert len(order) == len(pulls) + len(pushes) + (running is not None)
        assert len(set(started)) == len(started)
    assert [name for name in started if name.startswith("push")] == sorted(
        (name for name in started if name.startswith("push")), key=lambda name: int(name.split()[1])
    )


def test_finishing_what_does_not_run_is_a_defect() -> None:
    order = WorkOrder()
    with pytest.raises(AssertionError):
        order.finish(1, [])
    order.add(Job("a", lambda: WORK, lambda results: None))
    run = order.next()
    assert run is not None
    assert "running a" in repr(order)
    with pytest.raises(AssertionError):
        order.finish(run.job + 1, [])
    order.finish(run.job, [True])


def test_a_job_may_add_another_when_it_is_done() -> None:
    order = WorkOrder()
    done: list[str] = []
    second = Job("b", lambda: WORK, lambda results: done.append("b"))
    order.add(Job("a", lambda: WORK, lambda results: order.add(second)))
    for _ in range(2):
        run = order.next()
        assert run is not None
        order.finish(run.job, [True])
    assert done == ["b"]
