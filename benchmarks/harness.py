"""What benchmarks share: competitors in processes of their own, measured in turn; the table, the JSON, the picture.

    case   one competitor at one size     open() -> Competitor(ready, round, verify)
    round  one measured exchange          A B C  A B C  A B C ...

Laws
* Competitors take turns within one run, after a warm-up round each. The machine may be shared and noisy: only ratios
  within one run mean anything.
* Who waits for its turn is stopped: some poll when idle (TensorPipe's reactors keep two cores busy), which would be
  measured as the slowness of the others.
* A competitor checks its own answers, outside the measured time; a fast wrong answer fails the benchmark.
* A competitor's processes end with the benchmark, however that ends: done, failed, interrupted or killed.
* Every wait has a limit.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from common.errors import ParamserverError

START_LIMIT_S = 120.0
"""A process is ready within this time, its kernels compiled."""
ROUND_LIMIT_S = 60.0
END_LIMIT_S = 5.0
"""A process that was told to end and has not is killed."""
WIDE_COLUMNS = 200
"""Of a table that nobody watches."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl.h."""
PRELOADED = ("benchmarks.players",)
"""Imported once, before processes are forked off: torch alone takes each process two seconds and 170 MB otherwise."""
ENVIRONMENT = {"TORCH_CPP_LOG_LEVEL": "ERROR", "RAY_USAGE_STATS_ENABLED": "0"}
"""Of all processes. Without the first, each end of a connection of a peer reports the end of the other."""
if sys.platform == "linux":  # or peers look for a network interface by the host's name, which may not resolve
    ENVIRONMENT |= {"GLOO_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo"}
LIBRARIES = ("torch", "numpy", "numba", "pyzmq", "uvloop", "msgpack")

JsonFile = Annotated[
    Path | None, typer.Option("--json", dir_okay=False, help="Write the rows here, and a picture beside it.")
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Measured rounds of each competitor.")]


class BenchmarkError(ParamserverError):
    """A competitor failed, hung, or computed a wrong answer."""


class Benchmark(NamedTuple):
    """One question. `run` measures, prints and writes; its parameters are the options of the command line."""

    name: str
    summary: str
    run: Callable[..., None]


class Competitor(NamedTuple):
    """A case that is open, its processes starting.

    ready() waits until they have; round() -> seconds of one exchange; verify() raises unless all rounds did their work.
    """

    ready: Callable[[], None]
    round: Callable[[], float]
    verify: Callable[[], None]
    processes: tuple[Child, ...]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Its processes run inside the block, and are stopped after it."""
        for process in self.processes:
            process.resume()
        try:
            yield
        finally:
            for process in self.processes:
                process.suspend()


class Case(NamedTuple):
    """One competitor at one size. `peer`: the others' medians are compared with it."""

    name: str
    size_bytes: int
    """Bytes of the model."""
    moved_bytes: int
    """Bytes that one round carries, all directions together."""
    peer: bool
    open: Callable[[], AbstractContextManager[Competitor]]
    needs_bytes: int = 0
    """Memory of all its processes, about."""


class Row(TypedDict):
    """One line of the JSON. ratios: how many times the bytes per second of each peer, by medians.

    also: what this benchmark alone has to say, by name and unit.
    """

    benchmark: str
    case: str
    size_bytes: int
    median_s: float
    min_s: float
    max_s: float
    gb_per_s: float
    ratios: dict[str, float]
    also: NotRequired[dict[str, float]]


@dataclass(frozen=True, slots=True)
class Result:
    """The seconds of every measured round of one case."""

    case: Case
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def gb_per_s(self) -> float:
        """Carried bytes, in 10^9 per second, at the median."""
        return self.case.moved_bytes / self.median_s / 1e9


# Measuring


def measure(cases: Sequence[Case], rounds: int, *, warmup: int = 2) -> list[Result]:
    """Open all cases, let them take turns for `warmup` and then `rounds` rounds, verify each, close them.

    A peer that does not get ready is left out, and said to be: none of ours may.
    """
    seconds: list[list[float]] = []
    with ExitStack() as stack:
        competitors: list[Competitor] = []
        found: list[Case] = []
        for case in cases:  # one after the other: dozens of processes that start together run into the limits of some
            competitor = stack.enter_context(case.open())
            stack.callback(_resume, competitor)
            try:
                with competitor.turn():
                    competitor.ready()
            except BenchmarkError as error:
                if not case.peer:
                    raise
                Console(stderr=True).print(f"{case.name} is left out: {error}", highlight=False)
                continue
            competitors.append(competitor)
            found.append(case)
            seconds.append([])
        for turn in range(warmup + rounds):
            for taken, competitor in zip(seconds, competitors, strict=True):
                with competitor.turn():
                    spent = competitor.round()
                if turn >= warmup:
                    taken.append(spent)
        for competitor in competitors:
            with competitor.turn():
                competitor.verify()
    return [Result(case, tuple(taken)) for case, taken in zip(found, seconds, strict=True)]


def _resume(competitor: Competitor) -> None:
    """Who ends may have to say something to another."""
    for process in competitor.processes:
        process.resume()


def groups(cases: Sequence[Case], room_bytes: int) -> list[list[Case]]:
    """Cases that are open together: all, where there is room; else one at a time, each with the peers that fit too.

    A case that does not fit alone is in none.
    """
    if sum(case.needs_bytes for case in cases) <= room_bytes:
        return [list(cases)]
    found = []
    for one in [case for case in cases if not case.peer] or cases:
        group, left = [one], room_bytes - one.needs_bytes
        for peer in (case for case in cases if case.peer and case is not one):
            if peer.needs_bytes <= left:
                group.append(peer)
                left -= peer.needs_bytes
        if one.needs_bytes <= room_bytes:
            found.append(group)
    return found


def free_bytes() -> int:
    """Memory that this machine has to give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise BenchmarkError("This system does not say how much memory is available.")


def rows(benchmark: str, results: Sequence[Result]) -> list[Row]:
    """The results as plain values; each is compared with every peer of its size but itself."""
    return [
        Row(
            benchmark=benchmark,
            case=result.case.name,
            size_bytes=result.case.size_bytes,
            median_s=result.median_s,
            min_s=min(result.seconds),
            max_s=max(result.seconds),
            gb_per_s=result.gb_per_s,
            ratios={
                other.case.name: result.case.moved_bytes * other.median_s / (other.case.moved_bytes * result.median_s)
                for other in results
                if other.case.peer and other is not result and other.case.size_bytes == result.case.size_bytes
            },
        )
        for result in results
    ]


# Statistics


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of them do not exceed; raises BenchmarkError where there is none."""
    if not values:
        raise BenchmarkError("Nothing was measured: no exchange ended in its time.")
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def jain(rates: Sequence[float]) -> float:
    """Jain's index of fairness: 1 where all rates are equal, 1 / n where one of n has everything."""
    squares = sum(rate * rate for rate in rates)
    return sum(rates) ** 2 / (len(rates) * squares) if squares else 0.0


def window(exchange: Callable[[], None], window_s: float) -> list[float]:
    """The seconds of each exchange, one after the other, begun within so long; of one at least."""
    taken: list[float] = []
    now = time.perf_counter()
    end = now + window_s
    while now < end or not taken:
        started = now
        exchange()
        now = time.perf_counter()
        taken.append(now - started)
    return taken


# Reporting


def report(
    benchmark: str,
    results: Sequence[Result],
    settings: dict[str, Any],
    json_file: Path | None,
    found: Sequence[Row] | None = None,
    *,
    more: dict[str, Any] | None = None,
) -> None:
    """Print machine, settings and table; with a file, write `{machine, settings, rows}` and the picture beside it.

    found: the rows, where the results are not all of one run of `measure`. more: what else the file is to hold.
    """
    found, about = rows(benchmark, results) if found is None else found, machine()
    console = Console()
    if not console.is_terminal:
        console.width = WIDE_COLUMNS
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), style="dim", highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in settings.items()), style="dim", highlight=False)
    for _, rows_of_a_kind in groupby(found, lambda row: tuple(row.get("also", {}))):
        console.print(times(list(rows_of_a_kind)))
    if any(row["ratios"] for row in found):
        console.print(ratios(found))
    if json_file is None:
        return
    json_file.parent.mkdir(parents=True, exist_ok=True)
    written = {"machine": about, "settings": settings, "rows": found} | (more or {})
    json_file.write_text(json.dumps(written, indent=2) + "\n")
    picture_file = json_file.with_suffix(".png")
    picture(results, picture_file, title=f"{benchmark}: {about['cpu']}, {about['cores']} cores")
    console.print(f"Written: {json_file}, {picture_file}", highlight=False)


def machine() -> dict[str, str]:
    """What this machine is and runs: for a person who compares two reports."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "memory": f"{memory_bytes / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    } | {name: version(name) for name in LIBRARIES}


def times(found: Sequence[Row]) -> Table:
    """The rows for a terminal."""
    more = list(dict.fromkeys(name for row in found for name in row.get("also", {})))
    shown = _table("case", "MB", "median ms", "min", "max", "GB/s", *(name.replace("_", " ") for name in more))
    for row in found:
        spent = (_ms(row[key]) for key in ("median_s", "min_s", "max_s"))
        also = row.get("also", {})
        figures = (f"{also[name]:.4g}" if name in also else "" for name in more)
        shown.add_row(row["case"], f"{row['size_bytes'] / 1e6:g}", *spent, f"{row['gb_per_s']:.2f}", *figures)
    return shown


def _ms(seconds: float) -> str:
    """In ms, to a thousandth of what is short."""
    return f"{1e3 * seconds:.{1 if seconds >= 0.01 else 3}f}"


def ratios(found: Sequence[Row]) -> Table:
    """A column for each peer: how many times as fast as it, in bytes per second, by medians.

    What stands in brackets at the end of a name, such as the number of workers, is the same in row and column.
    """
    peers = list(dict.fromkeys(name.partition(" (")[0] for row in found for name in row["ratios"]))
    shown = _table("times as fast as", "MB", *peers)
    for row in found:
        by_peer = {name.partition(" (")[0]: ratio for name, ratio in row["ratios"].items()}
        figures = (f"{by_peer[name]:.2f}" if name in by_peer else "" for name in peers)
        shown.add_row(row["case"], f"{row['size_bytes'] / 1e6:g}", *figures)
    return shown


def _table(first: str, *others: str) -> Table:
    shown = Table(first, *others, box=None, header_style="bold")
    shown.columns[0].no_wrap = True
    for column in shown.columns[1:]:
        column.justify = "right"
    return shown


def picture(results: Sequence[Result], file: Path, *, title: str) -> None:
    """A bar for each median, a whisker from the fastest to the slowest round; peers in grey."""
    figure = Figure(figsize=(8.0, 1.2 + 0.45 * len(results)), layout="constrained")
    axes = figure.subplots()
    medians = [1e3 * result.median_s for result in results]
    below = [1e3 * (result.median_s - min(result.seconds)) for result in results]
    above = [1e3 * (max(result.seconds) - result.median_s) for result in results]
    axes.barh(
        [f"{result.case.name}, {result.case.size_bytes / 1e6:g} MB" for result in results],
        medians,
        xerr=[below, above],
        color=["C7" if result.case.peer else "C0" for result in results],
    )
    axes.invert_yaxis()
    axes.set_xlabel("ms per round (bar: median, whisker: fastest to slowest)")
    axes.set_title(title, fontsize="medium")
    figure.savefig(file, dpi=150)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


# Processes


class Link:
    """A child's end of the line to the benchmark. When the benchmark is gone, so is the child, soon."""

    def __init__(self, line: Connection) -> None:
        self._line = line
        self._requests: SimpleQueue[str | None] = SimpleQueue()
        self._serves = False
        threading.Thread(target=self._listen, daemon=True).start()

    def answer(self, value: Any) -> None:
        """Say `value`, whatever plain data it is."""
        self._line.send((value, ""))

    def fail(self, sentence: str) -> None:
        """Say that it does not work, and why."""
        with suppress(ConnectionError):  # nobody is left to hear it
            self._line.send((None, sentence))

    def requests(self) -> Iterator[str]:
        """What the benchmark asks for, until it has had enough or is gone."""
        return iter(self._requests.get, None)

    def serve(self) -> None:
        """From now on this process listens to others, and SIGTERM will end it."""
        self._serves = True

    def _listen(self) -> None:
        with suppress(EOFError, ConnectionError):
            while True:
                self._requests.put(self._line.recv())
        self._requests.put(None)
        if self._serves:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(END_LIMIT_S)
        os._exit(1)


class Child:
    """A process of the benchmark, seen from there."""

    def __init__(self, name: str, process: BaseProcess, line: Connection) -> None:
        self._name = name
        self._process = process
        self._line = line

    @property
    def pid(self) -> int:
        """Its process, which has started."""
        assert self._process.pid is not None
        return self._process.pid

    def suspend(self) -> None:
        """Stop it where it stands; the system ends a stopped process, too, when the benchmark is gone."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def dismiss(self) -> None:
        """Have it end, and do not wait for that; leaving its block does."""
        self.resume()
        self._line.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.pid is not None and self._process.is_alive():
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self._process.pid, number)

    def hear(self, limit_s: float) -> Any:
        """The next answer; raises BenchmarkError where there is none in time, or it is a failure."""
        if not self._line.poll(limit_s):
            raise BenchmarkError(f"{self._name} did not answer within {limit_s:g} s.")
        try:
            value, failure = self._line.recv()
        except (EOFError, ConnectionError):
            self._process.join(END_LIMIT_S)
            raise BenchmarkError(f"{self._name} ended with exit code {self._process.exitcode}.") from None
        if failure:
            raise BenchmarkError(f"{self._name} failed:\n{failure}")
        return value

    def tell(self, request: str) -> None:
        """Say something; a child that is gone shows when its answer is missed."""
        with suppress(ConnectionError):
            self._line.send(request)

    def ask(self, request: str, limit_s: float) -> Any:
        """The answer to `request`."""
        self.tell(request)
        return self.hear(limit_s)


@contextmanager
def child(name: str, target: Callable[..., None], *arguments: Any) -> Iterator[Child]:
    """A fresh process that runs `target(link, *arguments)`; it is gone when the block is left."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(there, target, arguments), name=name, daemon=True)
    try:
        with _deaf_to_interrupts():
            process.start()
        there.close()
        started = Child(name, process, here)
        try:
            yield started
        finally:
            started.resume()
        here.close()
        process.join(END_LIMIT_S)
    finally:
        here.close()
        for end in (process.terminate, process.kill):
            if process.is_alive():
                end()
                process.join(END_LIMIT_S)


@contextmanager
def children(made: Iterable[AbstractContextManager[Child]]) -> Iterator[list[Child]]:
    """Several, which end at the same time: each may have to say something to another on its way out."""
    with ExitStack() as stack:
        started = [stack.enter_context(one) for one in made]
        try:
            yield started
        finally:
            for one in started:
                one.dismiss()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal; a child inherits that it ignores it, for the benchmark ends it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def answer_rounds(
    link: Link,
    exchange: Callable[[], None],
    check: Callable[[int], None],
    verify: Callable[[int], None],
    times: int = 1,
) -> None:
    """The loop of a competitor's child: the seconds of one exchange, of `times` in each round.

    check(k) after the round that ends with exchange k, and verify(k) at the end, raise.
    """
    link.answer("ready")
    done = 0
    for request in link.requests():
        if request == "verify":
            verify(done)
            link.answer("right")
            continue
        started = time.perf_counter()
        for _ in range(times):
            exchange()
        spent = time.perf_counter() - started
        done += times
        check(done)
        link.answer(spent / times)


def competitor(of: Child, *others: Child, first: Callable[[], None] = lambda: None) -> Competitor:
    """A Competitor whose child `of` runs `answer_rounds` with the help of the others.

    `first` is what it waits for, such as a server.
    """

    def ready() -> None:
        first()
        of.hear(START_LIMIT_S)

    return Competitor(
        ready,
        lambda: float(of.ask("round", ROUND_LIMIT_S)),
        lambda: of.ask("verify", ROUND_LIMIT_S),
        (of, *others),
    )


def _die_with_the_benchmark() -> None:
    """Even while it is stopped and hears nothing (where the system can: Linux)."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _run(line: Connection, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """What a child does."""
    _die_with_the_benchmark()
    link = Link(line)
    try:
        target(link, *arguments)
    except Exception as error:
        link.fail(str(error) if isinstance(error, ParamserverError) else traceback.format_exc())
