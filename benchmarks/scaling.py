"""More workers, one of them slow: does everybody keep the speed that it has alone?

    each of N workers, for so long: wait (its step), exchange, wait, exchange ...                          (a round)

A step is a timed wait, so that what is shared is the server, not the cores. Workers are real: `worker.join` with a
model, a process each, one exchange after every step, nothing overlapped. `alone` is one of the very same workers while
the others idle; with `one 4x slower` the first one waits four times as long. `of solo` is the sum of the speeds
over the sum of what each would have alone, `others of solo` the same of those that are not slow.

Peer: synchronous averaging, an all-reduce (gloo) of the same vector after every step.

Simulated, up to 1,000 workers: `paramserver simulate`, steps of 100 ms, messages of about 1 ms; rule downpour, and
local_sgd as the synchronous one. A worker's speed is steps over the time they took with their waits for the server.

Checked: each step adds 1 to all of a worker's parameters; the center comes to start + all steps of all workers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import distributed, nn

from benchmarks import harness, players, simulated
from benchmarks.harness import Benchmark, BenchmarkError, Case, Child, Competitor, Link, Result, Row, child, children
from benchmarks.players import START, STEP, Way
from worker import join

SLOW = 4.0
WARMUP = 1
SYNCHRONOUS = "gloo all-reduce"
COMPUTE_S, NETWORK = 0.1, "lognormal:1ms,0.5"
"""Of simulated workers."""
RULES = {"downpour": False, "local_sgd": True}
"""Those simulated, and whether they wait for all."""
SYNCHRONOUS_LIMIT = 100
"""Of simulated workers that wait for all: what becomes of them shows long before, and more take minutes."""

Workers = Annotated[list[int], typer.Option("--workers", min=2, help="Real workers; repeat for more.")]
Parameters = Annotated[int, typer.Option("--parameters", min=1, help="Of the model.")]
StepS = Annotated[float, typer.Option("--step-s", min=0.001, help="The timed wait that stands for a step.")]
WindowS = Annotated[float, typer.Option("--window-s", min=0.01, help="Length of a round.")]
WayName = Annotated[str, typer.Option("--way", help="shm, ipc or tcp; without, the fastest there is.")]
Simulated = Annotated[list[int], typer.Option("--simulated", min=0, help="Simulated workers; repeat; 0: none.")]
SimulatedSteps = Annotated[int, typer.Option("--simulated-steps", min=1, help="Of each simulated worker.")]


@dataclass
class Seen:
    """What the rounds of one case showed. rounds[i][w]: steps per second of worker w, of those that take part."""

    slow: float = 1.0
    """How many times as long the first worker waits."""
    rounds: list[list[float]] = field(default_factory=list)

    def rates(self) -> list[float]:
        """Of each worker, the median of the measured rounds."""
        return [median(one) for one in zip(*self.rounds[WARMUP:], strict=True)]


def run(
    workers: Workers = [4, 16],  # noqa: B006 (typer's way to say it)
    parameters: Parameters = 100_000,
    step_s: StepS = 0.1,
    window_s: WindowS = 2.0,
    rounds: harness.Rounds = 7,
    way: WayName = "",
    simulated_workers: Simulated = [1, 10, 100, 1000],  # noqa: B006
    simulated_steps: SimulatedSteps = 10,
    json_file: harness.JsonFile = None,
) -> None:
    """Measure, print, write."""
    console = Console()
    chosen = players.ways(lambda sentence: console.print(sentence, style="dim", highlight=False), [way] if way else [])
    if not chosen:
        raise BenchmarkError(f"There is no way '{way}' to reach a server here.")
    results: list[Result] = []
    found: list[Row] = []
    for count in workers:
        console.print(f"Measuring {count} workers, {chosen[0].name}.", style="dim", highlight=False)
        done, rows = real(chosen[0], count, parameters, step_s, window_s, rounds)
        results += done
        found += rows
    done, rows = _simulated([count for count in simulated_workers if count], simulated_steps)
    settings = {"step_s": step_s, "window_s": window_s, "rounds": rounds, "parameters": f"{parameters:,}"}
    harness.report(BENCHMARK.name, results + done, settings, json_file, found + rows)


def shares(rates: Sequence[float], slow: float, solo: float, step_s: float) -> dict[str, float]:
    """What became of the workers' speeds, the first of them being `slow` times slower. solo: of one alone, steps/s."""
    slowly = 1 / (slow * step_s + max(1 / solo - step_s, 0.0))
    others = len(rates) - (slow > 1)
    return {
        "steps_per_s": sum(rates),
        "of_solo": sum(rates) / (others * solo + (slow > 1) * slowly),
        "others_of_solo": sum(rates[len(rates) - others :]) / (others * solo),
    }


# Real workers


def real(
    way: Way, count: int, parameters: int, step_s: float, window_s: float, rounds: int
) -> tuple[list[Result], list[Row]]:
    """So many, alone, together, with a slow one; and those that wait for each other."""
    of, ours = f" ({count} workers)", f"paramserver {way.name}"
    slower = f"one {SLOW:g}x slower"
    names = [
        f"{ours}, alone{of}",
        f"{ours}{of}",
        f"{ours}, {slower}{of}",
        f"{SYNCHRONOUS}{of}",
        f"{SYNCHRONOUS}, {slower}{of}",
    ]
    seen = [Seen(), Seen(), Seen(SLOW), Seen(), Seen(SLOW)]
    everybody = range(count)
    with _asynchronous(way, count, parameters) as free, _synchronous(count, parameters) as bound:
        opened = [
            free.case(seen[0], everybody[-1:], step_s, window_s),
            free.case(seen[1], everybody, step_s, window_s),
            free.case(seen[2], everybody, step_s, window_s),
            bound.case(seen[3], everybody, step_s, window_s),
            bound.case(seen[4], everybody, step_s, window_s),
        ]
        cases = [
            Case(name, 4 * parameters, 8 * parameters, name.startswith(SYNCHRONOUS), partial(_opened, one))
            for name, one in zip(names, opened, strict=True)
        ]
        results = harness.measure(cases, rounds, warmup=WARMUP)
    rows = harness.rows(BENCHMARK.name, results)
    [solo] = seen[0].rates()
    for row, one in zip(rows, seen, strict=True):
        row["also"] = shares(one.rates(), one.slow, solo, step_s)
    return results, rows


@dataclass
class Cohort:
    """Workers that several cases share. `bound`: they take every step together."""

    workers: Sequence[Child]
    others: Sequence[Child]
    first: Callable[[], None]
    checked: Callable[[Competitor], Competitor]
    bound: bool
    ready: bool = False
    steps: int = 0

    def case(self, seen: Seen, who: Sequence[int], step_s: float, window_s: float) -> Competitor:
        """A Competitor of those workers, the first `seen.slow` times slower."""

        def get_ready() -> None:
            if not self.ready:
                self.first()
                for worker in self.workers:
                    worker.hear(harness.START_LIMIT_S)
                self.ready = True

        def one_round() -> float:
            steps = max(round(window_s / step_s / seen.slow), 1) if self.bound else 0
            for number in who:
                factor = seen.slow if number == 0 else 1.0
                self.workers[number].tell(f"train {factor * step_s} {window_s} {steps}")
            taken = [self.workers[number].hear(harness.ROUND_LIMIT_S) for number in who]
            self.steps += taken[0][0] if self.bound else sum(done for done, _ in taken)
            seen.rounds.append([done / spent for done, spent in taken])
            return 1 / sum(seen.rounds[-1])

        def verify() -> None:
            for worker in self.workers if self.bound else self.workers[:1]:
                worker.ask(f"verify {START + STEP * self.steps}", harness.ROUND_LIMIT_S)

        return self.checked(Competitor(get_ready, one_round, verify, (*self.others, *self.workers)))


def _opened(one: Competitor) -> AbstractContextManager[Competitor]:
    """Its processes belong to several cases, and are open already."""
    return nullcontext(one)


def _model(parameters: int) -> nn.Module:
    model = nn.Linear(parameters, 1, bias=False)
    nn.init.constant_(model.weight, START)
    return model


@contextmanager
def _asynchronous(way: Way, count: int, parameters: int) -> Iterator[Cohort]:
    made = (child(f"worker {number}", _train, parameters, number) for number in range(count))
    with players.served(way, {"max_sessions": count + 1}) as server, children(made) as workers:

        def first() -> None:
            address = server.ready()
            for worker in workers:
                worker.tell(address)

        yield Cohort(workers, (server.process,), first, server.checked, bound=False)


def _train(link: Link, parameters: int, number: int) -> None:
    address = next(link.requests(), None)
    if address is None:  # the benchmark is gone before it began
        return
    torch.set_num_threads(1)
    model = _model(parameters)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with join(address, model, optimizer, name=f"worker-{number}") as session:

        def verify(expected: float) -> None:
            _check(session.global_model(), expected)

        _answer(link, model, lambda: session.step(1.0, 1), verify)


@contextmanager
def _synchronous(count: int, parameters: int) -> Iterator[Cohort]:
    with players.meeting() as meeting:
        made = (child(f"{SYNCHRONOUS} {rank}", _average, meeting, parameters, rank, count) for rank in range(count))
        with children(made) as workers:
            yield Cohort(workers, (), lambda: None, lambda competitor: competitor, bound=True)


def _average(link: Link, meeting: str, parameters: int, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=harness.START_LIMIT_S)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=limit)
    model = _model(parameters)
    [weight] = model.parameters()

    def average() -> None:
        distributed.all_reduce(weight.data)
        weight.data /= world

    _answer(link, model, average, partial(_check, model))
    os._exit(0)


def _answer(link: Link, model: nn.Module, exchange: Callable[[], None], verify: Callable[[float], None]) -> None:
    """The loop of a worker's process. A step waits, and adds STEP to every parameter."""
    [weight] = model.parameters()

    def step(step_s: float) -> None:
        time.sleep(step_s)
        weight.data += STEP
        exchange()

    link.answer("ready")
    for request in link.requests():
        word, *figures = request.split()
        if word == "verify":
            verify(float(figures[0]))
            link.answer("right")
            continue
        step_s, window_s, steps = float(figures[0]), float(figures[1]), int(figures[2])
        started = time.perf_counter()
        if steps:
            for _ in range(steps):
                step(step_s)
            done = steps
        else:
            done = len(harness.window(partial(step, step_s), window_s))
        link.answer((done, time.perf_counter() - started))


def _check(model: nn.Module, expected: float) -> None:
    [weight] = model.parameters()
    players.check(weight.detach().numpy(), expected)


# Simulated workers


def _simulated(counts: Sequence[int], steps: int) -> tuple[list[Result], list[Row]]:
    runs = [
        simulated.Run(name, words, {"rule": rule, "workers": count, "slow": slow})
        for rule in RULES
        for count in counts
        for slow in (1.0, SLOW)
        if (count > 1 or slow == 1) and (count <= SYNCHRONOUS_LIMIT or not RULES[rule])
        for name, words in [_run_of(rule, count, slow, steps)]
    ]
    if not runs:
        return [], []
    done = simulated.run_all(runs, processes=1, keep=None)
    results: list[Result] = []
    found: list[Row] = []
    solos = {one.run.about["rule"]: _speeds(one.report)[0] for one in done if one.run.about["workers"] == 1}
    for one in done:
        about, rates = one.run.about, _speeds(one.report)
        size = one.report["bytes_up"] // (one.report["updates"] + 1)  # the initial weights were sent, too
        synchronous = RULES[about["rule"]]
        result = Result(Case(one.run.name, size, 2 * size, synchronous, _unopened), (1 / sum(rates),))
        [row] = harness.rows(BENCHMARK.name, [result])
        solo = solos.get(about["rule"], 1 / COMPUTE_S)
        found.append(Row(**row, also=shares(rates, about["slow"], solo, COMPUTE_S)))
        results.append(result)
    return results, found


def _run_of(rule: str, count: int, slow: float, steps: int) -> tuple[str, tuple[str, ...]]:
    name = f"simulated {rule}{f', one {slow:g}x slower' * (slow > 1)} ({count} worker{'s' * (count > 1)})"
    words = ("--rule", rule, "--workers", str(count), "--budget-updates", str(steps * count), "--evaluations", "1")
    made_up = ("--compute", f"{COMPUTE_S}s", "--network", NETWORK, "--diversity-every-steps", "0")
    return name, (*words, *made_up, *(("--stragglers", f"1:{slow:g}") if slow > 1 else ()))


def _speeds(report: Mapping[str, Any]) -> list[float]:
    """Steps per second of each worker, the straggler first: over the time of its steps and its waits."""
    found: list[float] = []
    for worker in report["workers"]:
        slow = SLOW if not found and report["simulated"]["stragglers"] != "none" else 1.0
        if worker["steps"]:
            found.append(worker["steps"] / (worker["steps"] * slow * COMPUTE_S + worker["exchanges"]["stalled_s"]))
    return found


def _unopened() -> AbstractContextManager[Competitor]:
    raise BenchmarkError("This case was simulated.")


BENCHMARK = Benchmark("scaling", "does every worker keep the speed that it has alone, whoever else is slow?", run)
