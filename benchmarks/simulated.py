"""What benchmarks of training share: many simulated runs, a few at a time, each `paramserver simulate` in a process.

    runs = run_all([Run("gem, 5 workers", ("--rule", "gem", "--workers", "5", ...)), ...], processes=2, keep=None)
    runs[0].losses, runs[0].report

Laws
* A run is what a user would get from the same command: its words are told, and its figures are read from its report
  and its log.
* A run that diverges is a result, not a failure of the benchmark. Any other end of a run is a failure, with its words.
* Kept runs are not repeated: a benchmark that was broken off goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks import harness
from benchmarks.harness import BenchmarkError

LAST_STEPS = 30
"""The final training loss of a worker is its mean over so many."""
POLL_S = 0.2
DIVERGED = "Training diverged"

Data = Annotated[Path, typer.Option("--data", help="Folder of data sets.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Runs of each case, from seeds 0, 1, ...")]
Processes = Annotated[
    int, typer.Option("--processes", min=1, help="Simulations at one time; one alone uses all cores.")
]
Keep = Annotated[
    Path | None, typer.Option("--keep", file_okay=False, help="Keep the runs here, and do not repeat those kept.")
]
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Run:
    """One simulated run: what it is called, and the words of its command."""

    name: str
    words: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    """Of the case, for tables: rule, workers, seed ..."""


@dataclass(frozen=True)
class Done:
    """What a run came to. losses: of each worker, every one it pushed, in order; diverged: the sentence, or ''."""

    run: Run
    losses: Mapping[str, Sequence[float]]
    report: Mapping[str, Any]
    diverged: str

    @property
    def final_loss(self) -> float:
        """Training loss at the end: the mean over workers of their last steps; NaN where it diverged."""
        last = [sum(values[-LAST_STEPS:]) / len(values[-LAST_STEPS:]) for values in self.losses.values() if values]
        return float("nan") if self.diverged or not last else sum(last) / len(last)

    def loss_at(self, step: int) -> float:
        """Mean over workers of the loss around their step of that number."""
        around = [values[max(step - LAST_STEPS, 0) : step] for values in self.losses.values() if len(values) >= step]
        return sum(sum(values) / len(values) for values in around) / len(around) if around else float("nan")


def run_all(runs: Sequence[Run], *, processes: int, keep: Path | None) -> list[Done]:
    """All of them, so many at a time, the first ones first; raises BenchmarkError where one fails."""
    console = Console(stderr=True)
    with _folder(keep) as folder, _children() as children:
        waiting = [run for run in runs if not _is_done(folder, run)]
        console.print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them kept.", highlight=False)
        while waiting or children:
            while waiting and len(children) < processes:
                run = waiting.pop(0)
                if _is_done(folder, run):  # by another benchmark that keeps its runs here
                    continue
                children.append((run, _start(folder, run), time.monotonic()))
            time.sleep(POLL_S)
            for one in [one for one in children if one[1].poll() is not None]:
                children.remove(one)
                run, process, started = one
                _finish(folder, run, process)
                console.print(f"{run.name}: {time.monotonic() - started:.0f} s", highlight=False)
        return [_read(folder, run) for run in runs]


def report(
    benchmark: str,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    figure: Figure | None,
    json_file: Path | None,
) -> None:
    """Print machine, settings and table; with a file, write `{machine, settings, rows}` and the picture beside it."""
    about, console = harness.machine(), Console()
    if not console.is_terminal:
        console.width = harness.WIDE_COLUMNS
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), style="dim", highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in settings.items()), style="dim", highlight=False)
    table = Table(*rows[0], box=None, header_style="bold")
    for row in rows:
        table.add_row(*(cell(value) for value in row.values()))
    console.print(table)
    if json_file is None:
        return
    json_file.parent.mkdir(parents=True, exist_ok=True)
    found = {"benchmark": benchmark, "machine": about, "settings": dict(settings), "rows": [dict(row) for row in rows]}
    json_file.write_text(json.dumps(_plain(found), indent=1, allow_nan=False) + "\n")
    console.print(f"Written: {json_file}", highlight=False)
    if figure is not None:
        picture = json_file.with_suffix(".png")
        figure.savefig(picture, dpi=120)
        console.print(f"Written: {picture}", highlight=False)


def cell(value: Any) -> str:
    """A value of a row, for a table."""
    match value:
        case None:
            return ""
        case float():
            return f"{value:.4g}"
        case list():
            return " ".join(map(cell, value))
        case _:
            return str(value)


def _plain(value: Any) -> Any:
    """As JSON takes it: what is not finite becomes null."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case _:
            return value


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="paramserver-benchmark-") as name:
        yield Path(name)


@contextmanager
def _children() -> Iterator[list[tuple[Run, subprocess.Popen[bytes], float]]]:
    """Processes that do not outlive the block."""
    children: list[tuple[Run, subprocess.Popen[bytes], float]] = []
    try:
        yield children
    finally:
        for _, process, _ in children:
            process.send_signal(signal.SIGTERM)
        for _, process, _ in children:
            try:
                process.wait(harness.END_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _place(folder: Path, run: Run) -> Path:
    return folder / hashlib.sha256(json.dumps(run.words).encode()).hexdigest()[:16]


def _is_done(folder: Path, run: Run) -> bool:
    return (_place(folder, run) / "done.json").is_file()


def _start(folder: Path, run: Run) -> subprocess.Popen[bytes]:
    place = _place(folder, run)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    words = [sys.executable, "-m", "deploy", "simulate", *run.words, f"--directory={place / 'run'}", "--no-solo"]
    with (place / "output.txt").open("wb") as output:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)


def _finish(folder: Path, run: Run, process: subprocess.Popen[bytes]) -> None:
    place = _place(folder, run)
    said = (place / "output.txt").read_text(errors="replace")
    diverged = next((line for line in said.splitlines() if DIVERGED in line), "") if process.returncode else ""
    if process.returncode and not diverged:
        raise BenchmarkError(f"{run.name} failed (exit {process.returncode}):\n{said[-2000:]}")
    for file in (place / "run").glob("checkpoint-*"):
        shutil.rmtree(file)
    (place / "done.json").write_text(json.dumps({"words": run.words, "diverged": diverged}))


def _read(folder: Path, run: Run) -> Done:
    place = _place(folder, run)
    done = json.loads((place / "done.json").read_text())
    losses: dict[str, list[float]] = defaultdict(list)
    for line in (place / "run" / "run.jsonl").read_text().splitlines():
        found = json.loads(line)
        if found["kind"] == "apply" and found["loss"] is not None:
            losses[found["worker"]].append(found["loss"])
    return Done(run, losses, json.loads((place / "run" / "report.json").read_text()), done["diverged"])
