"""What the SDK adds to a training step: ResNet-20 on synthetic images, in a plain loop and with `session.step`.

    batch, zero_grad, loss, backward, optimizer step [, session.step], so many times                       (a round)

One worker, so that nothing but its own exchanges can cost it anything; its server is a process of its own. By default
torch has one thread: the server then has a core, as it has where it runs on another machine. `over plain` is the
median, over the rounds, of a round against the plain one of the same turn, minus one, in percent; `over plain cpu` the
same of the CPU time of the training process with all its threads. `stalled` is what `session.step` waited.

Checked: every step was pushed, and the center that one worker alone trained is that worker's model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import nn

from benchmarks import harness, players
from benchmarks.harness import Benchmark, BenchmarkError, Case, Competitor, Link, child
from benchmarks.players import Way
from worker import Session, join
from worker.tasks import cifar10, labelled

WARMUP = 1
BATCHES = 4
PLAIN = "plain loop"
TOLERANCE = 1e-4
"""Of the largest parameter: sums in another order, exchange after exchange."""
STEP_LIMIT_S = 20.0

Steps = Annotated[int, typer.Option("--steps", min=1, help="Of a round; a multiple of --local-steps.")]
LocalSteps = Annotated[int, typer.Option("--local-steps", min=2, help="H of the hidden exchanges.")]
BatchSamples = Annotated[int, typer.Option("--batch", min=2, help="Images in a batch.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Of torch, in the training process.")]
WayName = Annotated[str, typer.Option("--way", help="shm, ipc or tcp; without, the fastest there is.")]


class Training(NamedTuple):
    """How a case trains."""

    steps: int
    batch: int
    threads: int


@dataclass
class Seen:
    """Of each round: seconds, seconds of CPU, seconds that were waited for the server."""

    rounds: list[tuple[float, float, float]] = field(default_factory=list)

    def column(self, index: int) -> list[float]:
        """One of the three, of the measured rounds."""
        return [one[index] for one in self.rounds[WARMUP:]]


def run(
    steps: Steps = 16,
    local_steps: LocalSteps = 8,
    batch: BatchSamples = cifar10.BATCH_SAMPLES,
    threads: Threads = 1,
    way: WayName = "",
    rounds: harness.Rounds = 9,
    json_file: harness.JsonFile = None,
) -> None:
    """Measure, print, write."""
    console = Console()
    chosen = players.ways(lambda sentence: console.print(sentence, style="dim", highlight=False), [way] if way else [])
    if not chosen:
        raise BenchmarkError(f"There is no way '{way}' to reach a server here.")
    if steps % local_steps:
        raise BenchmarkError(f"{steps} steps of a round hold no whole number of exchanges after {local_steps}.")
    size = 4 * sum(parameter.numel() for parameter in cifar10.Network().parameters())
    training = Training(steps, batch, threads)
    seen: dict[str, Seen] = {}
    cases = [_case(PLAIN, size, seen, partial(_plain, training))]
    for settings in ({"local_steps": 1}, {"local_steps": local_steps, "overlap": True}):
        name = f"SDK, H = {settings['local_steps']}{', overlap' * (len(settings) - 1)}, {chosen[0].name}"
        cases.append(_case(name, size, seen, partial(_with_sdk, chosen[0], settings, training)))
    results = harness.measure(cases, rounds, warmup=WARMUP)
    rows = harness.rows(BENCHMARK.name, results)
    for row in rows:
        row["also"] = figures(seen[row["case"]], seen[PLAIN], steps)
    about = {"steps": steps, "batch": batch, "threads": threads, "rounds": rounds}
    harness.report(BENCHMARK.name, results, about, json_file, rows)


def figures(seen: Seen, plain: Seen, steps: int) -> dict[str, float]:
    """What a step takes, and how much more than that of the plain loop in the same turn."""
    wall, cpu = (over(seen.column(index), plain.column(index)) for index in (0, 1))
    return {
        "step_ms": 1e3 * median(seen.column(0)) / steps,
        "cpu_ms": 1e3 * median(seen.column(1)) / steps,
        "stalled_ms": 1e3 * median(seen.column(2)) / steps,
        "over_plain_percent": wall,
        "over_plain_cpu_percent": cpu,
    }


def over(ours: Sequence[float], plain: Sequence[float]) -> float:
    """By how many percent a round took longer, by the median of the turns."""
    return 100 * (median(one / other for one, other in zip(ours, plain, strict=True)) - 1)


# Competitors


def _case(name: str, size: int, seen: dict[str, Seen], open_with: Callable[[Seen], Any]) -> Case:
    seen[name] = Seen()
    return Case(name, size, size, name == PLAIN, partial(open_with, seen[name]))


@contextmanager
def _plain(training: Training, seen: Seen) -> Iterator[Competitor]:
    with child(PLAIN, _train_alone, training) as trainer:
        yield _competitor(trainer, seen, training, (trainer,), lambda: None)


@contextmanager
def _with_sdk(way: Way, settings: Mapping[str, Any], training: Training, seen: Seen) -> Iterator[Competitor]:
    with players.served(way, settings) as server, child("trainer", _train, training) as trainer:

        def first() -> None:
            trainer.tell(server.ready())

        yield server.checked(_competitor(trainer, seen, training, (server.process, trainer), first))


def _competitor(
    trainer: harness.Child,
    seen: Seen,
    training: Training,
    processes: tuple[harness.Child, ...],
    first: Callable[[], None],
) -> Competitor:
    def ready() -> None:
        first()
        trainer.hear(harness.START_LIMIT_S)

    def one_round() -> float:
        seen.rounds.append(trainer.ask("round", STEP_LIMIT_S * training.steps))
        return seen.rounds[-1][0]

    return Competitor(ready, one_round, lambda: trainer.ask("verify", harness.ROUND_LIMIT_S), processes)


class Loop:
    """A user's own loop. `done` is called after each step with its loss."""

    def __init__(self, training: Training) -> None:
        torch.set_num_threads(training.threads)
        torch.manual_seed(0)
        self._training = training
        self.model = cifar10.Network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), cifar10.LR)
        shape = (BATCHES, training.batch, 3, cifar10.SIDE, cifar10.SIDE)
        self._x = torch.randint(0, 256, shape, dtype=torch.uint8)
        self._y = torch.randint(0, cifar10.CLASSES, shape[:2])
        self.steps = 0
        self.loss = torch.zeros(())

    def answer(self, link: Link, step: Callable[[torch.Tensor], None], stalled: Callable[[], float]) -> Iterator[None]:
        """Answer rounds; goes on where the benchmark wants to see that all is right."""
        link.answer("ready")
        for request in link.requests():
            if request == "verify":
                yield
                link.answer("right")
                continue
            started, used, waited = time.perf_counter(), time.process_time(), stalled()
            for _ in range(self._training.steps):
                self._step(step)
            link.answer((time.perf_counter() - started, time.process_time() - used, stalled() - waited))

    def _step(self, done: Callable[[torch.Tensor], None]) -> None:
        x, y = self._x[self.steps % BATCHES], self._y[self.steps % BATCHES]
        self.optimizer.zero_grad()
        self.loss = labelled.loss(self.model, (x, y))
        self.loss.backward()
        self.optimizer.step()
        self.steps += 1
        done(self.loss)


def _train_alone(link: Link, training: Training) -> None:
    loop = Loop(training)
    for _ in loop.answer(link, lambda loss: None, lambda: 0.0):
        _check_loss(loop)


def _train(link: Link, training: Training) -> None:
    address = next(link.requests(), None)
    if address is None:  # the benchmark is gone before it began
        return
    loop = Loop(training)
    with join(address, loop.model, loop.optimizer, name="trainer") as session:

        def step(loss: torch.Tensor) -> None:
            session.step(loss, training.batch)

        for _ in loop.answer(link, step, lambda: session.exchanges.stalled_s):
            _check_loss(loop)
            _check(loop, session)


def _check_loss(loop: Loop) -> None:
    if not torch.isfinite(loop.loss):
        raise BenchmarkError(f"The loss is {loop.loss} after {loop.steps} steps.")


def _check(loop: Loop, session: Session) -> None:
    """Raise BenchmarkError unless all steps were pushed, and the center is the model that was trained."""
    if not session.flush():
        raise BenchmarkError("The last push was not settled.")
    exchanges, local_steps = session.exchanges, int(session.settings["local_steps"])
    if exchanges.rejected or exchanges.pushed * local_steps != loop.steps:
        raise BenchmarkError(
            f"{exchanges.pushed} pushes of {local_steps} steps, and {exchanges.rejected} rejected, "
            f"are not the {loop.steps} steps that were made."
        )
    wrong = farthest(loop.model, session.global_model())
    if not wrong <= TOLERANCE:
        raise BenchmarkError(
            f"The center is not the model that was trained: wrong by {wrong:.1e} of its largest value."
        )


def farthest(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of two parameters, as a share of the largest parameter."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    largest = max(float(a.detach().abs().max()) for a, _ in pairs)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs) / largest


BENCHMARK = Benchmark("overhead", "what does the SDK add to a training step of ResNet-20?", run)
