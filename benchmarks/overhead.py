"""What the SDK adds to a training step: ResNet-20 on synthetic images, with `session.step` and without it.

    batch, zero_grad, loss, backward, optimizer step [, session.step], so many times

One process trains with and without in turns, the same model: where the tensors of a process happen to lie makes its
steps 4 % faster or slower than those of the next one, which is more than what is measured. An exchange is under way
when the steps with the SDK begin, as in a run, and everything is settled before the steps without it.

One worker, so that nothing but its own exchanges can cost it anything; its server is a process of its own. By default
torch has one thread: the server then has a core, as it has where it runs on another machine. `over plain` is the
median, over the rounds, of the steps with the SDK against those without it of the same round, minus one, in percent,
and its `quartiles` how far half of the rounds lie apart; `over plain cpu` the same of the CPU time of the training
process with all its threads. `stalled` is what `session.step` waited. What is added to a step, in ms, depends little on
how long that takes: a small `--batch` shows it more sharply, for there are more rounds and each has less noise.

Checked: every step was pushed, and the center that one worker alone trained is that worker's model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median, quantiles
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import nn

from benchmarks import harness, players
from benchmarks.harness import Benchmark, BenchmarkError, Case, Competitor, Link, Result, Row, child
from benchmarks.players import Way
from worker import Session, join
from worker.tasks import cifar10, labelled

WARMUP = 1
BATCHES = 4
TOLERANCE = 1e-4
"""Of the largest parameter: sums in another order, exchange after exchange."""
STEP_LIMIT_S = 20.0

Steps = Annotated[int, typer.Option("--steps", min=1, help="With, and without; a multiple of --local-steps.")]
LocalSteps = Annotated[int, typer.Option("--local-steps", min=2, help="H of the hidden exchanges.")]
BatchSamples = Annotated[int, typer.Option("--batch", min=2, help="Images in a batch.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Of torch, in the training process.")]
WayName = Annotated[str, typer.Option("--way", help="shm, ipc or tcp; without, the fastest there is.")]


class Training(NamedTuple):
    """How a case trains."""

    steps: int
    batch: int
    threads: int


class Spent(NamedTuple):
    """On the steps of a round: seconds, seconds of CPU, seconds that were waited for the server."""

    seconds: float
    cpu_s: float
    stalled_s: float


class Round(NamedTuple):
    """The same number of steps without the SDK and with it."""

    plain: Spent
    ours: Spent


def run(
    steps: Steps = 8,
    local_steps: LocalSteps = 8,
    batch: BatchSamples = cifar10.BATCH_SAMPLES,
    threads: Threads = 1,
    way: WayName = "",
    rounds: harness.Rounds = 15,
    json_file: harness.JsonFile = None,
) -> None:
    """Measure, print, write."""
    console = Console()
    chosen = players.ways(lambda sentence: console.print(sentence, style="dim", highlight=False), [way] if way else [])
    if not chosen:
        raise BenchmarkError(f"There is no way '{way}' to reach a server here.")
    if steps % local_steps:
        raise BenchmarkError(f"{steps} steps of a round hold no whole number of exchanges after {local_steps}.")
    training = Training(steps, batch, threads)
    seen: dict[str, list[Round]] = {}
    cases = [
        _case(name, seen, partial(_with_sdk, chosen[0], settings, training))
        for name, settings in {
            f"SDK, {chosen[0].name} (H = 1)": {"local_steps": 1},
            f"SDK, {chosen[0].name} (H = {local_steps}, overlap)": {"local_steps": local_steps, "overlap": True},
        }.items()
    ]
    results: list[Result] = []
    rows: list[Row] = []
    for result in harness.measure(cases, rounds, warmup=WARMUP):
        measured = seen[result.case.name][WARMUP:]
        pair = [_plain(result.case, measured), result]
        results += pair
        plain_row, row = harness.rows(BENCHMARK.name, pair)
        plain_row["also"] = figures([Round(plain, plain) for plain, _ in measured], steps)
        row["also"] = figures(measured, steps)
        rows += plain_row, row
    about = {"steps": steps, "batch": batch, "threads": threads, "rounds": rounds}
    harness.report(BENCHMARK.name, results, about, json_file, rows)


def figures(measured: Sequence[Round], steps: int) -> dict[str, float]:
    """What a step takes with the SDK, and how much more than without it in the same round."""
    over = [100 * (ours.seconds / plain.seconds - 1) for plain, ours in measured]
    low, _, high = quantiles(over, n=4, method="inclusive") if len(over) > 1 else 3 * over
    return {
        "step_ms": 1e3 * median(ours.seconds for _, ours in measured) / steps,
        "stalled_ms": 1e3 * median(ours.stalled_s for _, ours in measured) / steps,
        "over_plain_ms": 1e3 * median(ours.seconds - plain.seconds for plain, ours in measured) / steps,
        "over_plain_percent": median(over),
        "quartiles_percent": high - low,
        "over_plain_cpu_percent": 100 * (median(ours.cpu_s / plain.cpu_s for plain, ours in measured) - 1),
    }


# Competitors


def _case(name: str, seen: dict[str, list[Round]], open_with: Callable[[list[Round]], Any]) -> Case:
    size = 4 * sum(parameter.numel() for parameter in cifar10.Network().parameters())
    seen[name] = []
    return Case(name, size, size, False, partial(open_with, seen[name]))


def _plain(case: Case, measured: Sequence[Round]) -> Result:
    """The steps without the SDK, as a peer of those with it."""
    name = f"plain loop ({case.name.partition(' (')[2]}"
    return Result(case._replace(name=name, peer=True), tuple(plain.seconds for plain, _ in measured))


@contextmanager
def _with_sdk(way: Way, settings: Mapping[str, Any], training: Training, seen: list[Round]) -> Iterator[Competitor]:
    with players.served(way, settings) as server, child("trainer", _train, training) as trainer:

        def ready() -> None:
            trainer.tell(server.ready())
            trainer.hear(harness.START_LIMIT_S)

        def one_round() -> float:
            seen.append(trainer.ask("round", STEP_LIMIT_S * 3 * training.steps))
            return seen[-1].ours.seconds

        def verify() -> None:
            trainer.ask("verify", harness.ROUND_LIMIT_S)

        yield server.checked(Competitor(ready, one_round, verify, (server.process, trainer)))


class Loop:
    """A user's own loop, with a session that is told of a step, or is not."""

    def __init__(self, training: Training) -> None:
        torch.set_num_threads(training.threads)
        torch.manual_seed(0)
        self.model = cifar10.Network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), cifar10.LR)
        shape = (BATCHES, training.batch, 3, cifar10.SIDE, cifar10.SIDE)
        self._x = torch.randint(0, 256, shape, dtype=torch.uint8)
        self._y = torch.randint(0, cifar10.CLASSES, shape[:2])
        self._batch = training.batch
        self.done = 0
        self.told = 0
        """Of them, those that the session knows of."""

    def plain(self, steps: int) -> Spent:
        """So many steps, alone."""
        started, used = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self._step()
        return Spent(time.perf_counter() - started, time.process_time() - used, 0.0)

    def ours(self, session: Session, steps: int) -> Spent:
        """So many steps with the SDK."""
        started, used, waited = time.perf_counter(), time.process_time(), session.exchanges.stalled_s
        for _ in range(steps):
            session.step(self._step(), self._batch)
        self.told += steps
        stalled_s = session.exchanges.stalled_s - waited
        return Spent(time.perf_counter() - started, time.process_time() - used, stalled_s)

    def _step(self) -> torch.Tensor:
        x, y = self._x[self.done % BATCHES], self._y[self.done % BATCHES]
        self.optimizer.zero_grad()
        loss = labelled.loss(self.model, (x, y))
        if not torch.isfinite(loss):
            raise BenchmarkError(f"The loss is {loss} after {self.done} steps.")
        loss.backward()
        self.optimizer.step()
        self.done += 1
        return loss


def _train(link: Link, training: Training) -> None:
    address = next(link.requests(), None)
    if address is None:  # the benchmark is gone before it began
        return
    loop = Loop(training)
    with join(address, loop.model, loop.optimizer, name="trainer") as session:
        link.answer("ready")
        for turn, request in enumerate(link.requests()):
            if request == "verify":
                _check(loop, session)
                link.answer("right")
            else:
                link.answer(_round(loop, session, training.steps, plain_first=turn % 2 == 0))


def _round(loop: Loop, session: Session, steps: int, *, plain_first: bool) -> Round:
    plain = loop.plain(steps) if plain_first else None
    loop.ours(session, int(session.settings["local_steps"]))  # from here on an exchange is under way
    ours = loop.ours(session, steps)
    _settle(session)
    return Round(plain or loop.plain(steps), ours)


def _settle(session: Session) -> None:
    if not session.flush():
        raise BenchmarkError("The last push was not settled.")


def _check(loop: Loop, session: Session) -> None:
    """Raise BenchmarkError unless all steps were pushed, and the center is the model that was trained."""
    loop.ours(session, int(session.settings["local_steps"]))  # the last steps may have been plain ones
    _settle(session)
    exchanges, local_steps = session.exchanges, int(session.settings["local_steps"])
    if exchanges.rejected or exchanges.pushed * local_steps != loop.told:
        raise BenchmarkError(
            f"{exchanges.pushed} pushes of {local_steps} steps, and {exchanges.rejected} rejected, "
            f"are not the {loop.told} steps that were made."
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
