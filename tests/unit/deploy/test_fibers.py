"""Programs in virtual time: they wait, fail, are killed and interrupted, and leave nothing on the agenda."""

from __future__ import annotations

from typing import Any

import pytest

from common.simulator import World
from deploy.simulation.fibers import Fiber


class Program:
    """A fiber, and what became of it."""

    def __init__(self, world: World, run: Any) -> None:
        self.world = world
        self.seen: list[Any] = []
        self.ended: list[Exception | None] = []
        self.fiber = Fiber(world, lambda: run(self), self.ended.append)

    def note(self, what: Any) -> None:
        self.seen.append((what, round(self.world.now, 9)))


def end(world: World) -> None:
    while world.step():
        pass
    assert not world._acts


def test_programs_take_turns_in_virtual_time() -> None:
    world, order = World(), []

    def run(name: str, step_s: float) -> Any:
        def program(self: Program) -> None:
            for _ in range(3):
                order.append((name, world.now))
                self.fiber.sleep(step_s)

        return program

    programs = [Program(world, run("a", 1.0)), Program(world, run("b", 2.0))]
    end(world)
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 2), ("a", 2), ("b", 4)]
    assert all(program.fiber.over and program.ended == [None] for program in programs)


def test_a_wait_ends_with_a_wake_or_with_its_time_and_an_old_one_ends_no_new_one() -> None:
    world = World()

    def run(self: Program) -> None:
        for timeout_s in (5.0, 5.0, None, 1.0):
            self.fiber.wait(timeout_s)
            self.note(timeout_s)
        self.fiber.sleep(10.0)
        self.note("slept")

    program = Program(world, run)
    for at_s in (2.0, 2.0, 3.0, 4.0, 9.0):
        world.at(at_s, program.fiber.wake)
    end(world)
    assert program.seen == [(5.0, 2.0), (5.0, 3.0), (None, 4.0), (1.0, 5.0), ("slept", 15.0)]


def test_waits_that_were_ended_leave_nothing_on_the_agenda() -> None:
    world = World()

    def run(self: Program) -> None:
        for _ in range(1000):
            self.fiber.wait(86_400.0)

    program = Program(world, run)
    for i in range(1000):
        world.at(1 + i / 100, program.fiber.wake)
    world.run_for(12.0)
    assert program.fiber.over
    assert not world._acts
    assert len(world._agenda) < 200


def test_what_a_program_raises_is_told_once() -> None:
    world = World()

    def run(self: Program) -> None:
        self.fiber.sleep(1.0)
        raise ValueError("no such loss")

    program = Program(world, run)
    end(world)
    [error] = program.ended
    assert isinstance(error, ValueError)
    program.fiber.kill()


def test_a_killed_program_passes_its_finally_blocks_and_they_cannot_wait() -> None:
    world = World()

    def run(self: Program) -> None:
        try:
            self.fiber.wait(86_400.0)
        except Exception:
            self.note("caught")
        finally:
            self.note("finally")
            self.fiber.sleep(1.0)
            self.note("never")

    program, unborn = Program(world, run), None
    world.run_for(1.0)
    unborn = Program(world, run)
    for one in (program, unborn):
        one.fiber.kill()
        one.fiber.wake()
        one.fiber.kill()
    end(world)
    assert (program.seen, program.ended) == ([("finally", 1.0)], [])
    assert (unborn.seen, unborn.ended) == ([], [])


def test_whoever_stops_the_run_is_not_kept_waiting() -> None:
    world = World()

    def run(self: Program) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            self.note("finally")
            self.fiber.wait(5.0)
            self.note("never")

    program = Program(world, run)
    with pytest.raises(KeyboardInterrupt):
        end(world)
    assert [what for what, _ in program.seen] == ["finally"]
    assert program.fiber.over
    assert program.ended == []
    end(world)
