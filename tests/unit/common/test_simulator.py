"""Virtual time, hosts and links: order, deadlines, what becomes of messages, and that nothing is left behind."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import distributions, simulator
from common.node import Received, Released, Tick, Unsendable
from common.simulator import LATE_S, Conditions, Host, Link, Pipe, World, unsent

DELAYS = st.lists(st.floats(-1, 3) | st.sampled_from([0.0, 1.0, 2.0]), max_size=30)
LOST = "the connection is lost"


class Scripted:
    """A node that notes what it is told, and asks for Ticks as the test wants."""

    def __init__(self) -> None:
        self.heard: list[tuple[float, Any]] = []
        self.wanted: float | None = None
        self.every_s: float | None = None
        """After a Tick, the next one is wanted so much later."""
        self.actions: list[Any] = []
        self.validated = 0

    def handle(self, event: Any, now: float) -> list[Any]:
        self.heard.append((now, event))
        if isinstance(event, Tick):
            self.wanted = None if self.every_s is None else now + self.every_s
        return self.actions

    def deadline(self) -> float | None:
        return self.wanted

    def validate(self) -> None:
        self.validated += 1

    def of(self, kind: Any) -> list[Any]:
        return [event for _, event in self.heard if isinstance(event, kind)]


class Ends:
    """Two hosts, and links between them."""

    def __init__(self, seed: int = 0, latency: str = "0", own: float = 0.0, shared: float = 0.0, **faults: Any) -> None:
        self.world, self.chance = World(), random.Random(seed)
        self.conditions = Conditions(distributions.parse(latency, "it"), own, **faults)
        self.shared = Pipe(shared), Pipe(shared)
        self.near, self.far = Scripted(), Scripted()
        self.worker = Host(self.world, self.near, lambda action: None)
        self.server: Host | None = Host(self.world, self.far, lambda action: None)
        self.link = self.dial()

    def dial(self, worker: Host | None = None) -> Link:
        return Link(
            self.world, self.conditions, self.chance, worker or self.worker, lambda: self.server, b"w", self.shared
        )

    def down(self, *frames: Any, hold: int = 0) -> None:
        assert self.server is not None
        self.link.down(self.server, frames, hold)

    def end(self) -> None:
        while self.world.step():
            pass


def numbers(node: Scripted) -> list[int]:
    return [int(bytes(event.frames[0])) for event in node.of(Received)]


# --- the world ---


@given(DELAYS)
def test_things_happen_in_the_order_of_their_times_and_at_one_time_as_arranged(delays: list[float]) -> None:
    world, happened = World(), list[tuple[float, int]]()
    world.now = 5.0
    for i, delay in enumerate(delays):
        world.after(delay, lambda i=i: happened.append((world.now, i)))
    while world.step():
        pass
    assert happened == sorted((max(5.0 + delay, 5.0), i) for i, delay in enumerate(delays))
    assert world.events == len(delays)


@given(DELAYS, st.data())
def test_what_is_called_off_does_not_happen_and_all_else_does(delays: list[float], data: st.DataObject) -> None:
    world, happened = World(), list[int]()
    arranged = [world.after(delay, partial(happened.append, i)) for i, delay in enumerate(delays)]
    off = data.draw(st.sets(st.sampled_from(range(len(delays))))) if delays else set()
    for i in off:
        world.call_off(arranged[i])
        world.call_off(arranged[i])
    world.run_for(1.0)
    assert world.now == 1.0
    assert set(happened) == {i for i, delay in enumerate(delays) if delay <= 1 and i not in off}
    for number in arranged:
        world.call_off(number)
    assert not world.step()


def test_an_agenda_does_not_grow_with_what_is_called_off() -> None:
    world = World()
    kept = [world.after(2e6, lambda: None) for _ in range(100)]
    for _ in range(10_000):
        world.call_off(world.after(1e6, lambda: None))
        assert len(world._agenda) <= 2 * len(kept) + simulator.CALLED_OFF + 1
    assert "100 to come" in repr(world)


def test_a_world_that_stands_still_is_an_error() -> None:
    world = World()

    def again() -> None:
        world.after(0.0, again)

    again()
    with pytest.raises(RuntimeError, match="it is still 0 s"):
        world.run_for(1.0)


# --- hosts ---


@given(st.lists(st.tuples(st.floats(0, 1), st.none() | st.floats(-1, 5)), min_size=1, max_size=30))
def test_a_tick_comes_at_the_deadline_never_early_and_once(changes: list[tuple[float, float | None]]) -> None:
    """However often, and wherever to, the deadline moves."""
    world, node = World(), Scripted()
    host = Host(world, node, lambda action: None)
    for gap_s, ahead_s in changes:
        world.run_for(gap_s)
        node.wanted = None if ahead_s is None else world.now + ahead_s
        wanted, before = node.wanted, len(node.of(Tick))
        host.handle("news")
        assert len(world._acts) <= 1, "one timer is enough"
        world.run_for(0.1)
        if wanted is not None and wanted + 2 * LATE_S < world.now:
            [(at, _)] = [heard for heard in node.heard if isinstance(heard[1], Tick)][before:]
            assert 0 < at - max(wanted, world.now - 0.1) <= 2 * LATE_S
        elif wanted is None or wanted > world.now:
            assert len(node.of(Tick)) == before


@pytest.mark.parametrize("every_s", [-1.0, 0.0, 1e-9])
def test_a_node_that_wants_ticks_without_end_is_an_error(every_s: float) -> None:
    world, node = World(), Scripted()
    node.wanted, node.every_s = 0.1, every_s
    Host(world, node, lambda action: None).handle("news")
    with pytest.raises(RuntimeError, match="wants Ticks without end"):
        world.run_for(1.0)


def test_many_ticks_in_time_are_none() -> None:
    world, node = World(), Scripted()
    node.wanted, node.every_s = 0.0, 1e-3
    Host(world, node, lambda action: None).handle("news")
    world.run_for(5.0)
    assert len(node.of(Tick)) == pytest.approx(5000, rel=0.01)


def test_the_dead_take_nothing_and_keep_no_timer() -> None:
    world, node = World(), Scripted()
    host = Host(world, node, lambda action: None)
    node.wanted = 1.0
    host.soon("first")
    world.run_for(0.5)
    host.soon("second")
    host.die()
    host.handle("third")
    world.run_for(2.0)
    assert [event for _, event in node.heard] == ["first"]
    assert not world._acts


def test_a_node_may_die_of_what_it_does() -> None:
    world, node = World(), Scripted()
    done: list[Any] = []
    host = Host(world, node, lambda action: (done.append(action), host.die()))
    node.actions, node.wanted = ["exit", "last words"], 1.0
    host.handle("stop")
    world.run_for(2.0)
    assert done == ["exit", "last words"]
    assert len(node.heard) == 1


def test_a_node_is_validated_after_each_event_and_before_anything_is_done() -> None:
    world, node = World(), Scripted()
    seen: list[int] = []
    host = Host(world, node, lambda action: seen.append(node.validated), check=True)
    node.actions = ["one", "two"]
    for count in (1, 2):
        host.handle("news")
        assert node.validated == count
    assert seen == [1, 1, 2, 2]


# --- links ---


@given(
    st.integers(0, 1000),
    st.sampled_from(["0", "5ms", "lognormal:5ms,1", "exponential:1h"]),
    st.sampled_from([0.0, 1e3]),
    st.sampled_from([0.0, 3e3]),
    st.booleans(),
)
def test_messages_of_one_way_keep_their_order(seed: int, latency: str, own: float, shared: float, cuts: bool) -> None:
    ends = Ends(seed, latency, own, shared, cuts=cuts)
    for i in range(40):
        frames = b"%d" % i, bytes(ends.chance.randrange(100))
        ends.world.after(ends.chance.choice((0.0, 0.001, 0.3)) + i / 1000, lambda: None)
        ends.link.up(frames)
        ends.down(*frames)
        if ends.chance.random() < 0.5:
            ends.world.run_for(ends.chance.random() / 30)
    ends.end()
    assert numbers(ends.near) == numbers(ends.far) == list(range(40))


@pytest.mark.parametrize("latency", ["0", "lognormal:5ms,1"])
def test_messages_are_lost_doubled_and_overtaken_as_often_as_told(latency: str) -> None:
    n = 5000
    ends = Ends(1, latency, loss=0.1, duplicate=0.2, reorder=0.3)
    for i in range(n):
        ends.link.up([b"%d" % i])
        ends.world.run_for(0.001)
    ends.end()
    arrived = numbers(ends.far)
    times = Counter(Counter(arrived)[i] for i in range(n))
    assert times.keys() == {0, 1, 2}
    assert (ends.link.carried, ends.link.lost, ends.link.doubled) == (n, times[0], times[2])
    assert times[0] == pytest.approx(0.1 * n, rel=0.1)
    assert times[2] == pytest.approx(0.2 * n, rel=0.1)
    assert sum(a > b for a, b in pairwise(arrived)) > 0.05 * n


def test_only_what_is_told_goes_wrong() -> None:
    for fault in ("loss", "duplicate", "reorder"):
        ends = Ends(2, "1ms", **{fault: 0.5})
        for i in range(100):
            ends.down(b"%d" % i)
        ends.end()
        arrived = numbers(ends.near)
        assert (len(set(arrived)) < 100) == (fault == "loss")
        assert (len(arrived) > len(set(arrived))) == (fault == "duplicate")
        assert (arrived != sorted(arrived)) == (fault == "reorder")


@given(st.integers(0, 10_000), st.sampled_from([{}, {"cuts": True}, {"loss": 0.5, "duplicate": 0.5, "reorder": 0.5}]))
def test_what_is_held_is_released_once_when_no_copy_is_on_its_way(seed: int, faults: dict[str, Any]) -> None:
    ends = Ends(seed, "exponential:10ms", 1e4, 2e4, **faults)
    for hold in range(1, 11):
        ends.down(b"%d" % hold, bytes(50), hold=hold)
    ends.end()
    released = {event.holds: at for at, event in ends.far.heard if isinstance(event, Released)}
    assert sorted(released) == sorted(event.holds for event in ends.far.of(Released)) == [(i,) for i in range(1, 11)]
    for at, event in ends.near.heard:
        assert at <= released[(int(event.frames[0]),)]


def test_a_faulty_link_carries_copies_and_another_the_buffers_themselves() -> None:
    for faults, heard in (({}, b"2"), ({"loss": 1e-9}, b"1"), ({"cuts": True}, b"1")):
        ends = Ends(0, "1ms", **faults)
        frame = bytearray(b"1")
        ends.link.up([frame])
        frame[:] = b"2"
        ends.end()
        assert bytes(ends.far.of(Received)[0].frames[0]) == heard


def test_a_broken_link_carries_nothing_and_says_so() -> None:
    ends = Ends(0, "1ms", cuts=True)
    ends.link.cut(LOST)
    ends.link.up([b"1"])
    ends.down(b"1", hold=3)
    ends.end()
    assert not ends.near.of(Received)
    assert [type(event) for _, event in ends.far.heard] == [Released, Unsendable]
    assert ends.link.carried == 0
    assert ends.server is not None
    unsent(ends.server, b"w", 0)
    ends.end()
    assert len(ends.far.of(Unsendable)) == 2


def test_of_what_is_under_way_when_a_link_breaks_some_arrives_above_and_nothing_below() -> None:
    heard, arrived = Counter[Any](), 0
    for seed in range(200):
        ends = Ends(seed, "1ms", cuts=True)
        ends.link.up([b"1"])
        ends.down(b"1", hold=1)
        ends.link.cut(LOST)
        ends.link.cut(LOST)
        ends.end()
        assert not ends.near.of(Received)
        assert len(ends.far.of(Released)) == 1
        arrived += len(ends.far.of(Received))
        heard[len(ends.near.of(str))] += 1
    assert 60 < arrived < 140
    assert heard.keys() == {0, 1}
    assert 60 < heard[1] < 140


def test_who_has_left_a_link_does_not_hear_that_it_broke() -> None:
    for seed in range(20):
        ends = Ends(seed, "1ms", cuts=True)
        ends.link.cut(LOST)
        ends.link.close()
        ends.end()
        assert not ends.near.heard


def test_what_was_sent_to_one_life_of_a_server_does_not_reach_the_next() -> None:
    ends, second = Ends(0, "1ms"), Scripted()
    assert ends.server is not None
    ends.link.up([b"1"])
    ends.server.die()
    ends.server = None
    ends.link.up([b"2"])
    ends.server = Host(ends.world, second, lambda action: None)
    ends.link.up([b"3"])
    ends.end()
    assert not ends.far.heard
    assert numbers(second) == [3]


def test_to_a_dead_worker_nothing_arrives_and_its_buffers_are_released() -> None:
    ends = Ends(0, "1ms")
    ends.down(b"1", hold=1)
    ends.worker.die()
    ends.end()
    assert not ends.near.heard
    assert ends.far.of(Released) == [Released((1,))]


def test_bytes_take_their_time_in_each_pipe() -> None:
    for way in ("up", "down"):
        ends = Ends(0, "1s", own=1000.0, shared=500.0)
        for i in range(4):
            ends.link.up([b"%d" % i, bytes(999)]) if way == "up" else ends.down(b"%d" % i, bytes(999))
        ends.end()
        heard = ends.far.heard if way == "up" else ends.near.heard
        assert [at for at, _ in heard] == pytest.approx([1 + 2 + 1, 1 + 4 + 1, 1 + 6 + 1, 1 + 8 + 1])


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_shared_pipe_is_never_idle_while_something_waits_for_it(way: str) -> None:
    """Ten large messages queue in one worker's own pipe; a small one of another worker does not wait for them."""
    ends = Ends(0, "0", own=1000.0, shared=100_000.0)
    other = Scripted()
    second = ends.dial(Host(ends.world, other, lambda action: None))
    assert ends.server is not None
    large = b"1", bytes(9_999)
    for _ in range(10):
        ends.link.up(large) if way == "up" else ends.down(*large)
    ends.world.run_for(1.5)
    second.up([b"2"]) if way == "up" else second.down(ends.server, [b"2"], 0)
    ends.end()
    small = next(at for at, event in (*ends.far.heard, *other.heard) if event.frames[0] == b"2")
    last = max(at for at, _ in (*ends.far.heard, *ends.near.heard))
    assert small == pytest.approx(1.5, abs=0.2)
    assert last == pytest.approx(100, abs=0.2)


def test_workers_behind_one_pipe_share_it() -> None:
    ends = Ends(0, "0", shared=1000.0)
    links = [ends.dial() for _ in range(5)]
    for link in links:
        link.up([bytes(1000)])
    ends.end()
    assert [at for at, _ in ends.far.heard] == pytest.approx([1, 2, 3, 4, 5])


def test_one_seed_is_one_run_and_nothing_is_left() -> None:
    def trace(seed: int) -> list[tuple[float, Any]]:
        ends = Ends(seed, "exponential:5ms", 1e6, 1e6, loss=0.1, duplicate=0.1, reorder=0.1, cuts=True)
        for i in range(300):
            ends.link.up([b"%d" % i])
            ends.down(b"%d" % i, hold=i + 1)
            ends.world.run_for(0.001)
            if i % 50 == 49:
                ends.link.cut(LOST)
                ends.link = ends.dial()
        ends.end()
        assert not ends.world._acts
        assert not ends.world._agenda
        return ends.near.heard + ends.far.heard

    assert trace(1) == trace(1)
    assert trace(1) != trace(2)
