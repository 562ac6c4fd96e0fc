"""What a server uses: memory against the sum that it states, time by the size of the model, CPU by who is idle.

stated    some workers exchange for a while under several rules; how much larger is the server's process (resident set)
          than before the first of them joined, as a share of `memory_bytes` in its status? And does it grow on:
          `drift`, the last third of the soak against the one before, in percent of the stated sum.
sizes     one exchange of models from 1 MB up: `ns per byte`, and that in times of the middle one of the sizes.
idle      one worker exchanges a small model while others sit there: the server's CPU time per exchange, and in times
          of that without idle ones; and per idle worker and second, while nobody exchanges.

The pool is as large as these workers need, so that the stated sum is what they can come to use. The sum does not
count the interpreter and its libraries, and neither do we: they are there before the first worker is.

Checked: after all of it, the center is exactly start + all pushes of all workers, where the rule adds them up.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from benchmarks import exchanges, harness, players, roundtrip
from benchmarks.harness import Benchmark, BenchmarkError, Case, Child, Competitor, Result, Row, child, children
from benchmarks.players import MB, START, STEP, Way

PARTS = ("stated", "sizes", "idle")
CODEC = "fp32"
SAMPLE_S = 0.25
IDLE_PROCESSES = 4
WARMUP = 1
IDLE_PARAMETERS = 100_000
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
CHECKPOINT = {"checkpoint_interval_s": 2.0, "keep_checkpoints": 1}


class Hosting(NamedTuple):
    """A server to look at: its rule and codec, how many workers it has, whether it saves checkpoints."""

    rule: str
    codec: str
    workers: int
    saved: bool = False

    @property
    def name(self) -> str:
        """Of the case."""
        return f"{self.rule} {self.codec}{', checkpoints' * self.saved} ({self.workers} workers)"


HOSTINGS = (
    Hosting("downpour", "fp32", 2),
    Hosting("downpour", "fp32", 2, saved=True),
    Hosting("gem", "fp32", 4),
    Hosting("gem", "int8", 4),
    Hosting("easgd", "fp32", 4),
)

Parts = Annotated[list[str] | None, typer.Option("--part", help=f"{', '.join(PARTS)}; repeat for more.")]
SizeMb = Annotated[int, typer.Option("--size-mb", min=1, help="Model of the stated sum, 10^6 bytes.")]
SoakS = Annotated[float, typer.Option("--soak-s", min=0.1, help="So long workers exchange under each rule.")]
Sizes = Annotated[list[int], typer.Option("--sizes", min=1, help="Models to time, 10^6 bytes; repeat for more.")]
Idle = Annotated[list[int], typer.Option("--idle", min=0, help="Idle workers; repeat for more.")]
WindowS = Annotated[float, typer.Option("--window-s", min=0.01, help="Length of a round beside idle workers.")]
WayName = Annotated[str, typer.Option("--way", help="shm, ipc or tcp; without, the fastest there is.")]


def run(
    parts: Parts = None,
    size_mb: SizeMb = 100,
    soak_s: SoakS = 20.0,
    sizes: Sizes = [1, 10, 100, 1000],  # noqa: B006 (typer's way to say it)
    idle: Idle = [0, 10, 100],  # noqa: B006
    window_s: WindowS = 2.0,
    way: WayName = "",
    rounds: harness.Rounds = 7,
    json_file: harness.JsonFile = None,
) -> None:
    """Measure, print, write."""
    console = Console()

    def say(sentence: str) -> None:
        console.print(sentence, style="dim", highlight=False)

    if unknown := set(parts or ()) - set(PARTS):
        raise BenchmarkError(f"There is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}.")
    found_ways = players.ways(say, [way] if way else [])
    if not found_ways:
        raise BenchmarkError(f"There is no way '{way}' to reach a server here.")
    chosen, results, found = found_ways[0], list[Result](), list[Row]()
    todo = {
        "stated": partial(_stated, chosen, size_mb, soak_s, say),
        "sizes": partial(_sizes, chosen, sizes, rounds, say),
        "idle": partial(_idle, chosen, idle, window_s, rounds),
    }
    for part in parts or PARTS:
        say(f"Measuring {part}.")
        done, rows = todo[part]()
        results += done
        found += rows
    settings = {"way": chosen.name, "size_mb": size_mb, "soak_s": soak_s, "window_s": window_s, "rounds": rounds}
    harness.report(BENCHMARK.name, results, settings, json_file, found)


# What a process uses


def resident_bytes(pid: int) -> int:
    """Of its memory, what is there."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise BenchmarkError(f"Process {pid} has ended.")


def cpu_s(pid: int) -> float:
    """CPU time of all its threads so far, to a hundredth."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


# Stated


@dataclass
class Soak:
    """The server's memory over a soak. Bytes."""

    before: int
    stated: int
    samples: list[int] = field(default_factory=list)

    def also(self) -> dict[str, float]:
        """The figures."""
        third = max(len(self.samples) // 3, 1)
        middle, last = self.samples[third:-third] or self.samples, self.samples[-third:]
        grown = max(self.samples) - self.before
        return {
            "grown_mb": grown / 1e6,
            "stated_mb": self.stated / 1e6,
            "of_stated": grown / self.stated,
            "drift_percent": 100 * (median(last) - median(middle)) / self.stated,
        }


def _stated(way: Way, size_mb: int, soak_s: float, say: Any) -> tuple[list[Result], list[Row]]:
    results: list[Result] = []
    found: list[Row] = []
    for hosting in HOSTINGS:
        say(f"{hosting.name}: {soak_s:g} s.")
        soak, seconds = _soak(way, hosting, size_mb * MB // 4, soak_s)
        size = size_mb * MB // 4 * 4
        result = Result(Case(f"stated, {hosting.name}", size, 2 * size, False, _unopened), tuple(seconds))
        results.append(result)
        [row] = harness.rows(BENCHMARK.name, [result])
        row["also"] = soak.also()
        found.append(row)
    return results, found


def _soak(way: Way, hosting: Hosting, elements: int, soak_s: float) -> tuple[Soak, list[float]]:
    """Workers that exchange as often as they can; the seconds of each exchange."""
    pool_mib = players.pool_mib(elements, hosting.workers, hosting.codec)
    settings: dict[str, Any] = {"rule": hosting.rule, "codec": hosting.codec, "pool_mib": max(pool_mib, 1)}
    made = (
        child(f"worker {number}", players.work, way, elements, hosting.codec, 1, number)
        for number in range(hosting.workers)
    )
    with ExitStack() as stack:
        if hosting.saved:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-"))
            settings |= CHECKPOINT | {"directory": f"{folder}/run"}
        server = stack.enter_context(players.served(way, settings))
        workers = stack.enter_context(children(made))
        address, pid = server.ready(), server.process.pid
        soak = Soak(before=resident_bytes(pid), stated=0)
        for worker in workers:
            worker.tell(address)
        for worker in workers:
            worker.hear(harness.START_LIMIT_S)
        soak.stated = int(server.status()["memory_bytes"])
        for worker in workers:
            worker.tell(f"window {soak_s}")
        end = time.monotonic() + soak_s
        while time.monotonic() < end:
            soak.samples.append(resident_bytes(pid))
            time.sleep(SAMPLE_S)
        taken = [one for worker in workers for one in worker.hear(soak_s + harness.ROUND_LIMIT_S)]
        if hosting.rule == players.RULE:
            pushes = sum(map(len, taken))
            workers[0].ask(f"verify {START + STEP * (pushes + 1)}", harness.ROUND_LIMIT_S)
    return soak, [seconds for one in taken for seconds in one]


# Sizes


def _sizes(way: Way, sizes: Sequence[int], rounds: int, say: Any) -> tuple[list[Result], list[Row]]:
    cases = [
        roundtrip.ours(way, CODEC, size * MB // 4, roundtrip.times_of(size))._replace(name=f"one exchange, {way.name}")
        for size in sizes
    ]
    groups = harness.groups(cases, int(roundtrip.ROOM * harness.free_bytes()))
    for case in cases:
        if not any(case in group for group in groups):
            say(f"{case.size_bytes / MB:g} MB are left out: there is not the memory.")
    results = [result for group in groups for result in harness.measure(group, rounds)]
    rows = harness.rows(BENCHMARK.name, results)
    for row, also in zip(rows, linear([(one.case.size_bytes, one.median_s) for one in results]), strict=True):
        row["also"] = also
    return results, rows


def linear(found: Sequence[tuple[int, float]]) -> list[dict[str, float]]:
    """Of pairs (bytes, seconds): the time of a byte, and that in times of the one that the middle size has."""
    each = [1e9 * seconds / size for size, seconds in found]
    middle = each[len(each) // 2] if each else 1.0
    return [{"ns_per_byte": one, "of_middle": one / middle} for one in each]


# Idle


@dataclass
class Idling:
    """Of each round: the server's CPU per exchange. And of the last: per second while nobody exchanged."""

    rounds: list[float] = field(default_factory=list)
    resting: float = 0.0
    pushes: int = 0


def _idle(way: Way, counts: Sequence[int], window_s: float, rounds: int) -> tuple[list[Result], list[Row]]:
    seen = {count: Idling() for count in counts}
    size = 4 * IDLE_PARAMETERS
    cases = [
        Case(
            f"beside {count} idle, {way.name}",
            size,
            2 * size,
            False,
            partial(_beside, way, count, window_s, seen[count]),
        )
        for count in counts
    ]
    results = harness.measure(cases, rounds, warmup=WARMUP)
    rows = harness.rows(BENCHMARK.name, results)
    base = median(seen[counts[0]].rounds[WARMUP:])
    for row, (count, one) in zip(rows, seen.items(), strict=True):
        each = median(one.rounds[WARMUP:])
        row["also"] = {
            "server_cpu_us": 1e6 * each,
            "of_first": each / base,
            "cpu_us_per_idle_s": 1e6 * one.resting / count if count else 0.0,
        }
    return results, rows


@contextmanager
def _beside(way: Way, count: int, window_s: float, seen: Idling) -> Iterator[Competitor]:
    processes = min(IDLE_PROCESSES, count)
    made = (
        child(f"idle {number}", players.work, way, IDLE_PARAMETERS, CODEC, share, number)
        for number, share in enumerate(exchanges.shares(count, processes))
    )
    with (
        players.served(way, {"max_sessions": count + 2}) as server,
        children(made) as idle,
        child("active", players.work, way, IDLE_PARAMETERS, CODEC, 1, processes) as active,
    ):
        workers: list[Child] = [active, *idle]

        def ready() -> None:
            address = server.ready()
            for worker in workers:
                worker.tell(address)
            for worker in workers:
                worker.hear(harness.START_LIMIT_S)

        def one_round() -> float:
            used = cpu_s(server.process.pid)
            taken: list[float] = active.ask(f"window {window_s}", window_s + harness.ROUND_LIMIT_S)[0]
            seen.rounds.append((cpu_s(server.process.pid) - used) / len(taken))
            seen.pushes += len(taken)
            return sum(taken) / len(taken)

        def verify() -> None:
            used = cpu_s(server.process.pid)
            time.sleep(window_s)
            seen.resting = (cpu_s(server.process.pid) - used) / window_s
            active.ask(f"verify {START + STEP * (seen.pushes + 1)}", harness.ROUND_LIMIT_S)

        yield server.checked(Competitor(ready, one_round, verify, (server.process, *workers)))


def _unopened() -> Any:
    raise BenchmarkError("This case is no competitor.")


BENCHMARK = Benchmark("memory", "does a server keep to the memory it states; what do size and idle workers cost?", run)
