"""Many exchanges of small models: how many a second, how long each, and who gets how many. Then big ones, and a pull.

    each of N workers, for so long: push -> apply -> reply, again and again                                (a round)

N workers on one server, at saturation; a model of 100 k parameters, float32 both ways. Up to 16 workers each is a
process, the crowd of 100 shares a few. `median ms` is of the time between two exchanges of all workers together;
p50 and p99 are of single exchanges as a worker sees them; `jain` is the index of fairness of the workers' rates, the
median round and the worst.

Peers: `torch.distributed.rpc`: `rpc_sync` of a function that takes a lock, adds in place and returns a copy. `Ray
actor`, where it is installed: an actor that adds and returns the center, workers that are actors too. Both have their
defaults; Ray's processes cannot be stopped while others have their turn, and idle then.

`--load`: 32 workers push 100 MB each, timed to half of what they reach together at saturation, and somebody pulls the
center now and then: how long against the same pull while nobody pushes?

Checked: after the last round, the center is exactly start + all pushes of all workers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch.distributed import rpc

from benchmarks import harness, players
from benchmarks.harness import (
    Benchmark,
    BenchmarkError,
    Case,
    Child,
    Competitor,
    Link,
    Result,
    Row,
    child,
    children,
    jain,
)
from benchmarks.players import MB, RAY, RPC, START, STEP, Client, Way

CODEC = "fp32"
CROWD_PROCESSES = 4
WARMUP = 1
LOAD_WORKERS, LOAD_PROCESSES, LOAD_SHARE = 32, 4, 0.5
PULL_PERIOD_S = 0.5
ROOM = 0.7
"""Of the free memory."""

Workers = Annotated[list[int], typer.Option("--workers", min=1, help="Workers, a process each; repeat for more.")]
Parameters = Annotated[int, typer.Option("--parameters", min=1, help="Of the small model.")]
WindowS = Annotated[float, typer.Option("--window-s", min=0.01, help="Length of a round.")]
Crowd = Annotated[int, typer.Option("--crowd", min=0, help="Workers of the crowd; 0: none.")]
LoadMb = Annotated[int, typer.Option("--load-mb", min=0, help="Model of the 32 pushers, 10^6 bytes; 0: none.")]
Pulls = Annotated[int, typer.Option("--pulls", min=1, help="Of each kind, beside the pushers.")]
Only = Annotated[list[str] | None, typer.Option("--only", help="Only cases with this in their name; repeat for more.")]


@dataclass
class Seen:
    """What the rounds of one case showed. rounds[i][w]: the seconds of each exchange of worker w."""

    rounds: list[list[list[float]]] = field(default_factory=list)

    @property
    def pushes(self) -> int:
        """Of all workers, the warm-up included."""
        return sum(len(one) for taken in self.rounds for one in taken)

    def also(self) -> dict[str, float]:
        """The figures of the measured rounds."""
        measured = self.rounds[WARMUP:]
        single = [seconds for taken in measured for one in taken for seconds in one]
        fair = [jain([rate(one) for one in taken]) for taken in measured]
        return {
            "exchanges_per_s": 1 / median(per_exchange(taken) for taken in measured),
            "p50_ms": 1e3 * harness.percentile(single, 0.50),
            "p99_ms": 1e3 * harness.percentile(single, 0.99),
            "jain": median(fair),
            "jain_min": min(fair),
        }


def rate(taken: Sequence[float]) -> float:
    """Exchanges per second of one worker."""
    return len(taken) / sum(taken) if taken else 0.0


def per_exchange(taken: Sequence[Sequence[float]]) -> float:
    """Seconds between two exchanges of all workers together."""
    total = sum(map(rate, taken))
    if not total:
        raise BenchmarkError("No exchange ended in its time.")
    return 1 / total


def run(
    workers: Workers = [1, 4, 16],  # noqa: B006 (typer's way to say it)
    parameters: Parameters = 100_000,
    window_s: WindowS = 1.0,
    rounds: harness.Rounds = 7,
    crowd: Crowd = 100,
    load_mb: LoadMb = 100,
    pulls: Pulls = 60,
    only: Only = None,
    json_file: harness.JsonFile = None,
) -> None:
    """Measure, print, write."""
    console = Console()

    def say(sentence: str) -> None:
        console.print(sentence, style="dim", highlight=False)

    def chosen(case: Case) -> bool:
        return not only or any(part in case.name for part in only)

    if not players.has_ray():
        say("Ray is left out: it is not installed.")
    ways = players.ways(say)
    seen: dict[str, Seen] = {}
    results: list[Result] = []
    found: list[Row] = []
    groups = [cases(ways, count, parameters, window_s, seen) for count in workers]
    groups += [crowds(ways, crowd, parameters, window_s, seen)] if crowd else []
    for group in groups:
        if taken := [case for case in group if chosen(case)]:
            say(f"Measuring {', '.join(case.name for case in taken)}.")
            measured = harness.measure(taken, rounds, warmup=WARMUP)
            results += measured
            found += [Row(**row, also=seen[row["case"]].also()) for row in harness.rows(BENCHMARK.name, measured)]
    for way in ways if load_mb else ():
        names = [f"{kind} pull, paramserver {way.name} {CODEC}" for kind in ("idle", "loaded")]
        if not only or any(part in name for part in only for name in names):
            needed, room = load_bytes(way, load_mb * MB), ROOM * harness.free_bytes()
            if needed > room:
                say(f"{', '.join(names)} are left out: they want {needed / 1e9:.0f} GB.")
                continue
            say(f"Measuring {', '.join(names)}.")
            done, rows = load(way, names, load_mb * MB // 4, pulls, window_s)
            results += done
            found += rows
    if not results:
        raise BenchmarkError(f"No case has {only} in its name.")
    settings = {"rule": players.RULE, "rounds": rounds, "window_s": window_s, "parameters": f"{parameters:,}"}
    harness.report(BENCHMARK.name, results, settings, json_file, found)


# Cases


def cases(ways: Sequence[Way], count: int, parameters: int, window_s: float, seen: dict[str, Seen]) -> list[Case]:
    """So many workers, a process each: ours and the peers."""
    found = [_ours(way, count, count, parameters, window_s, seen) for way in ways]
    found.append(_case(RPC, count, parameters, seen, True, partial(_rpc, count, parameters, window_s)))
    if players.has_ray():
        found.append(_case(RAY, count, parameters, seen, True, partial(_ray, count, parameters, window_s)))
    return found


def crowds(ways: Sequence[Way], count: int, parameters: int, window_s: float, seen: dict[str, Seen]) -> list[Case]:
    """So many workers in a few processes."""
    return [_ours(way, count, min(CROWD_PROCESSES, count), parameters, window_s, seen) for way in ways]


def _ours(way: Way, count: int, processes: int, parameters: int, window_s: float, seen: dict[str, Seen]) -> Case:
    name = f"paramserver {way.name} {CODEC}"
    return _case(
        name, count, parameters, seen, False, partial(_paramserver, way, count, processes, parameters, window_s)
    )


def _case(name: str, count: int, parameters: int, seen: dict[str, Seen], peer: bool, open_with: Any) -> Case:
    full = f"{name} ({count} worker{'s' * (count > 1)})"
    seen[full] = Seen()
    return Case(full, 4 * parameters, 8 * parameters, peer, partial(open_with, seen[full]))


def shares(count: int, processes: int) -> list[int]:
    """So many workers over so many processes."""
    return [count // processes + (number < count % processes) for number in range(processes)]


# paramserver


@contextmanager
def _paramserver(
    way: Way, count: int, processes: int, parameters: int, window_s: float, seen: Seen
) -> Iterator[Competitor]:
    made = (
        child(f"worker {number}", players.work, way, parameters, CODEC, share, number)
        for number, share in enumerate(shares(count, processes))
    )
    with players.served(way, {"max_sessions": count + 1}) as server, children(made) as workers:

        def first() -> None:
            address = server.ready()
            for worker in workers:
                worker.tell(address)

        yield server.checked(_crowd(seen, window_s, workers, (server.process,), first))


# Peers


@contextmanager
def _rpc(count: int, parameters: int, window_s: float, seen: Seen) -> Iterator[Competitor]:
    world = count + 1
    with (
        players.meeting() as meeting,
        child(f"{RPC} server", players.rpc_serve, meeting, parameters, world) as server,
        children(
            child(f"{RPC} {rank}", _rpc_work, meeting, parameters, rank, world) for rank in range(1, world)
        ) as workers,
    ):
        yield _crowd(seen, window_s, workers, (server,))


def _rpc_work(link: Link, meeting: str, parameters: int, rank: int, world: int) -> None:
    players.rpc_join(f"worker{rank}", rank, world, meeting)
    delta, reply = torch.full((parameters,), STEP), torch.zeros(parameters)

    def exchange() -> None:
        nonlocal reply
        reply = rpc.rpc_sync("server", players.push_in_turn, args=(delta,))

    def verify(expected: float) -> None:
        exchange()
        players.check(reply.numpy(), expected)

    players.answer_windows(link, [exchange], verify)
    os._exit(0)  # the server is told by the benchmark; a shutdown in step with it could only wait


@contextmanager
def _ray(count: int, parameters: int, window_s: float, seen: Seen) -> Iterator[Competitor]:
    with child(RAY, _ray_drive, count, parameters) as driver:
        yield _crowd(seen, window_s, [driver], ())


def _ray_drive(link: Link, count: int, parameters: int) -> None:
    crowd = players.RayCrowd(parameters, count)
    try:
        players.answer(link, crowd.windows, crowd.verify)
    finally:
        crowd.close()


# Rounds of many workers


def _crowd(
    seen: Seen,
    window_s: float,
    workers: Sequence[Child],
    others: Sequence[Child],
    first: Callable[[], None] = lambda: None,
) -> Competitor:
    """A Competitor of several children, each of which answers with the windows of its workers."""

    def ready() -> None:
        first()
        for worker in workers:
            worker.hear(harness.START_LIMIT_S)

    def ask(request: str, whom: Sequence[Child]) -> list[list[float]]:
        for worker in whom:
            worker.tell(request)
        return [one for worker in whom for one in worker.hear(harness.ROUND_LIMIT_S)]

    def one_round() -> float:
        seen.rounds.append(ask(f"window {window_s}", workers))
        return per_exchange(seen.rounds[-1])

    def verify() -> None:
        ask(f"verify {START + STEP * (seen.pushes + 1)}", workers[:1])

    return Competitor(ready, one_round, verify, (*others, *workers))


# A pull beside many pushers


def load_bytes(way: Way, size: int) -> int:
    """Memory of it all, about: replies, updates (in shared memory each has its own, and the server its replies)."""
    return size * (LOAD_WORKERS * (3 if way.shared_memory else 1) + 2 * LOAD_PROCESSES + 8)


def load(way: Way, names: Sequence[str], elements: int, pulls: int, window_s: float) -> tuple[list[Result], list[Row]]:
    """Pulls while nobody pushes, while 32 push at half of what they can, and while nobody pushes again."""
    seen = Seen()
    per_process = LOAD_WORKERS // LOAD_PROCESSES
    made = (
        child(f"pusher {number}", _push_paced, way, elements, per_process, number) for number in range(LOAD_PROCESSES)
    )
    with (
        players.served(way, {}) as server,
        children(made) as pushers,
        child("puller", _pull_now_and_then, way, elements) as puller,
    ):
        address = server.ready()
        for one in (*pushers, puller):
            one.tell(address)
            one.hear(harness.START_LIMIT_S)

        def push(window_s: float, period_s: float, meanwhile: Callable[[], Any]) -> Any:
            for pusher in pushers:
                pusher.tell(f"{window_s} {period_s}")
            found = meanwhile()
            seen.rounds.append([one for pusher in pushers for one in pusher.hear(2 * harness.ROUND_LIMIT_S)])
            return found

        def pull() -> list[float]:
            found: list[float] = puller.ask(f"pull {pulls}", 2 * harness.ROUND_LIMIT_S + pulls * PULL_PERIOD_S)
            return found

        idle = pull()
        push(5 * window_s, 0.0, lambda: None)
        capacity = 1 / per_exchange(seen.rounds[-1])
        period_s = LOAD_WORKERS / (LOAD_SHARE * capacity)
        loaded = push(pulls * PULL_PERIOD_S, period_s, pull)
        reached = sum(map(len, seen.rounds[-1])) / (pulls * PULL_PERIOD_S)
        idle += pull()
        puller.ask(f"verify {START + STEP * seen.pushes}", harness.ROUND_LIMIT_S)
    size = 4 * elements
    results = [
        Result(Case(name, size, size, name.startswith("idle"), _unopened), tuple(taken))
        for name, taken in zip(names, (idle, loaded), strict=True)
    ]
    rows = harness.rows(BENCHMARK.name, results)
    idle_p99, loaded_p99 = (harness.percentile(taken, 0.99) for taken in (idle, loaded))
    rows[0]["also"] = {"p50_ms": 1e3 * median(idle), "p99_ms": 1e3 * idle_p99}
    rows[1]["also"] = {
        "p50_ms": 1e3 * median(loaded),
        "p99_ms": 1e3 * loaded_p99,
        "p99_times_idle": loaded_p99 / idle_p99,
        "pushes_per_s": reached,
        "capacity_per_s": capacity,
    }
    return results, rows


def _unopened() -> Any:
    raise BenchmarkError("This case was measured with others.")


def _push_paced(link: Link, way: Way, elements: int, sessions: int, number: int) -> None:
    address = next(link.requests(), None)
    if address is None:
        return
    update = players.payload(elements, CODEC)
    clients = [Client(address, way, update, f"pusher-{number}-{index}") for index in range(sessions)]
    link.answer("ready")
    with ThreadPoolExecutor(sessions) as pool:
        for request in link.requests():
            window_s, period_s = map(float, request.split())
            offsets = [(number * sessions + index) / LOAD_WORKERS * period_s for index in range(sessions)]
            taken = pool.map(partial(paced, window_s, period_s), [client.exchange for client in clients], offsets)
            link.answer(list(taken))
    for client in clients:
        client.close()


def paced(window_s: float, period_s: float, exchange: Callable[[], None], offset_s: float) -> list[float]:
    """The seconds of each exchange, one begun in every period, or as soon as the one before is over."""
    taken, started = [], time.perf_counter()
    due = started + offset_s
    while (now := max(time.perf_counter(), due)) < started + window_s:
        time.sleep(max(due - time.perf_counter(), 0.0))
        begun = time.perf_counter()
        exchange()
        taken.append(time.perf_counter() - begun)
        due = max(due + period_s, now)
    return taken


def _pull_now_and_then(link: Link, way: Way, elements: int) -> None:
    address = next(link.requests(), None)
    if address is None:
        return
    client = Client(address, way, players.payload(elements, CODEC), "puller")
    client.pull()
    link.answer("ready")
    for request in link.requests():
        word, _, figure = request.partition(" ")
        if word == "verify":
            client.pull()
            players.check(client.reply, float(figure))
            link.answer("right")
            continue
        taken = []
        for _ in range(int(figure)):
            started = time.perf_counter()
            client.pull()
            taken.append(time.perf_counter() - started)
            time.sleep(max(PULL_PERIOD_S - taken[-1], 0.0))
        link.answer(taken)
    client.close()


BENCHMARK = Benchmark("exchanges", "how many exchanges of small models a second, how fairly, how late at worst?", run)
