"""What a person sees: sentences with the time of day, progress that changes in place, and tables. Nobody else draws.

    console()                                  where to print, in colour and width as fits whoever reads
    Voice, Steps                               of `serve`, `worker` and `launch`; of one worker
    watch                                      of a whole run: a bar in a terminal, else a line now and then
    settings_table, list_table, status_view, closing_table

Laws
* Plain values in, something to print out: nothing is asked of a server here, and no setting is read.
* Where nobody watches (a pipe, a log) nothing moves: progress is a line now and then, and tables are wide.
* A name or a sentence from elsewhere is shown as it is, never read as markup.
* Neither torch nor settings are imported, so that help stays quick.

Left out: JSON for scripts (`deploy.cli` prints it), and the page of a run (`deploy.report`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from common.config import Row

INTERVAL_S, LINE_INTERVAL_S = 0.2, 5.0
"""How often the progress of one worker is shown: in a terminal, and as plain lines."""
LINE_S = 2.0
"""Between two plain lines of a whole run."""
WIDE_COLUMNS = 200
"""Of a table that nobody watches, such as one in a pipe."""
GONE = "gone"
"""State of a worker that left, in the server's words."""

Say = Callable[[str, str], None]
"""say(level, sentence)"""


# Where to print


def console(*, stderr: bool = False) -> Console:
    """The terminal, or whatever stands in its place; of one that is not watched, wide lines."""
    found = _Patient(stderr=stderr, highlight=False)
    if not found.is_terminal:
        found.width = WIDE_COLUMNS
    return found


class _Patient(Console):
    """One that goes on when nobody reads any more: a closed pipe stops no server."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Voice(logging.Handler):
    """Sentences with the time of day, on stderr; in colour where somebody watches."""

    STYLES = {"warning": "yellow", "error": "bold red"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.console = console(stderr=True)

    def say(self, level: str, sentence: str) -> None:
        """One sentence; `level` is info, warning or error."""
        style = self.STYLES.get(level)
        text = f"[{style}]{level}:[/] {escape(sentence)}" if style else escape(sentence)
        self.console.print(f"[dim]{datetime.now():%H:%M:%S}[/] {text}", soft_wrap=True)

    def emit(self, record: logging.LogRecord) -> None:
        """A line of the log."""
        self.say(record.levelname.lower(), record.getMessage())


# Progress


class Steps:
    """The progress of one worker: a line that changes in a terminal, else a line every few seconds."""

    def __init__(self, voice: Voice) -> None:
        self._voice = voice
        self._status = voice.console.status("joining") if voice.console.is_terminal else None
        self._interval_s = INTERVAL_S if self._status else LINE_INTERVAL_S
        self._due_s = 0.0

    def __enter__(self) -> Steps:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, step: int, loss: Any, samples_per_s: float, session: Any) -> None:
        """After each step; nearly all of them show nothing."""
        now = time.monotonic()
        if now < self._due_s:
            return
        self._due_s = now + self._interval_s
        e = session.exchanges
        done = max(e.pushed + e.rejected, 1)
        line = (
            f"step {step:,} · loss {float(loss):.4f} · {samples_per_s:,.0f} samples/s · version {session.version} · "
            f"stalled {1000 * e.stalled_s / done:.1f} ms, {100 * e.hidden / done:.0f} % hidden · "
            f"{size(e.bytes_up)} up, {size(e.bytes_down)} down"
        )
        if self._status is not None:
            self._status.update(Text(line, no_wrap=True, overflow="ellipsis"))
        else:
            self._voice.say("info", line)


class Screen(Protocol):
    """Where progress is shown."""

    def show(self, status: dict[str, Any], curve: Sequence[dict[str, Any]]) -> None:
        """The run as it is now."""
        ...


@contextmanager
def watch(console: Console, say: Say, budget_updates: int | None) -> Iterator[Screen]:
    """Where the progress of a whole run is shown: a bar in a terminal, else lines."""
    budget = f"/{budget_updates:,}" if budget_updates else ""
    if not console.is_terminal:
        yield Lines(say, budget)
        return
    words = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    columns = (BarColumn(bar_width=12), TaskProgressColumn(), words)
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress, budget)


class Lines:
    """A line every LINE_S, for logs and pipes."""

    def __init__(self, say: Say, budget: str) -> None:
        self._say, self._budget = say, budget
        self._due_s, self._shown = 0.0, 0

    def show(self, status: dict[str, Any], curve: Sequence[dict[str, Any]]) -> None:
        """A line, if it is time for one and something was done."""
        if time.monotonic() >= self._due_s and status["updates"] != self._shown:
            self._due_s, self._shown = time.monotonic() + LINE_S, status["updates"]
            self._say("info", _progress(status, curve, self._budget))


class Bar:
    """A bar that grows, in a terminal."""

    def __init__(self, progress: Progress, budget: str) -> None:
        self._progress, self._budget = progress, budget
        self._task = progress.add_task("starting", total=1.0)

    def show(self, status: dict[str, Any], curve: Sequence[dict[str, Any]]) -> None:
        """The bar, as long as the budget that is used up."""
        words = _progress(status, curve, self._budget) if status["updates"] else status["phase"]
        self._progress.update(self._task, completed=status["budget_used"], description=words)


def _progress(status: dict[str, Any], curve: Sequence[dict[str, Any]], budget: str) -> str:
    words = [f"{status['updates']:,}{budget} updates"]
    if curve:
        words.append(f"loss {curve[-1]['loss']:.3f}")
    elif (loss := _mean(row["loss"] for row in live(status))) is not None:
        words.append(f"training loss {loss:.3f}")
    if curve and curve[-1]["accuracy"] is not None:
        words.append(f"accuracy {_percent(curve[-1]['accuracy'])}")
    words.append(f"{status['samples_per_s']:,.0f} samples/s")
    words.append(f"lag {max((row['lag'] for row in live(status)), default=0)}")
    return " · ".join(words)


# Tables


def settings_table(rows: Iterable[Row]) -> Table:
    """Every setting, its value and where it came from."""
    table = _table("setting", "value", "from", "meaning")
    for row in rows:
        value = ", ".join(row.value) if isinstance(row.value, list) else "" if row.value is None else str(row.value)
        table.add_row(row.name, escape(value), escape(row.origin), escape(row.description))
    return table


def list_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What there is: a row for each, its columns those of the first."""
    table = _table(*(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
        table.add_section()
    return table


def status_view(address: str, found: Mapping[str, Any]) -> RenderableType:
    """A server's answer: what it is doing, its workers, and what it waits for."""
    by = "" if found["local_steps_by"] == "fixed" else f" by {found['local_steps_by']}"
    differences = "differences in " if found["replies"] == "difference" else ""
    codecs = f"{found['codec']} up and {differences}{found['reply_codec']} down"
    rule = f"{found['rule']}, {found['local_steps']} local steps{by}, {codecs}"
    sharing = sum(w["shares_memory"] for w in found["workers"])
    shared = f", shared with {sharing} of {len(found['workers'])}" if sharing else ""
    durable = "none" if found["durable"] == "0.0" else found["durable"]
    lines = [
        f"[bold]{escape(address)}[/]: {escape(found['phase'])}"
        + (f", {escape(found['finished'])}" if found["finished"] else ""),
        f"{escape(rule)}; {found['parameters']:,} parameters, {size(found['memory_bytes'])}{shared}",
        f"version {found['epoch']}.{found['version']}, on the disk {durable}; {found['updates']:,} updates "
        f"({found['updates_per_s']:,.1f}/s), {found['samples']:,} samples ({found['samples_per_s']:,.0f}/s), "
        f"{100 * found['budget_used']:.0f} % of the budget",
        escape(found["diversity"]["sentence"]),
    ]
    columns = (
        "worker",
        "state",
        "updates ",
        "refused ",
        "steps ",
        "samples ",
        "loss ",
        "lag ",
        "up ",
        "down ",
        "seen ",
    )
    table = _table(*columns)
    for w in found["workers"]:
        counts = (f"{w[name]:,}" for name in ("updates", "rejected", "steps", "samples"))
        loss = "" if w["loss"] is None else f"{w['loss']:.4f}"
        traffic = (size(w["bytes_up"]), size(w["bytes_down"]), f"{w['last_seen_s']:.1f} s")
        table.add_row(escape(w["name"]), w["state"], *counts, loss, str(w["lag"]), *traffic)
    waits = [f"[yellow]waiting for[/] {escape(sentence)}" for sentence in found["waiting_for"]]
    return Group(*lines, *([table] if found["workers"] else []), *waits)


def closing_table(found: dict[str, Any]) -> Table:
    """What a run came to, the center beside the lone worker."""
    solo, rows, lag = found.get("solo", {}), found["workers"], found["lag"]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("", f"{len(rows)} workers", "one worker alone"):
        table.add_column(column, justify="right" if column else "left")
    steps, loss = sum(row["steps"] for row in rows), _mean(row.get("loss") for row in rows)
    if found["center_accuracy"] is not None:
        table.add_row("accuracy", _percent(found["center_accuracy"]), _percent(found["solo_accuracy"]), style="bold")
    if found["center_loss"] is not None:
        table.add_row("test loss", _number(found["center_loss"], ".4f"), _number(found["solo_loss"], ".4f"))
    table.add_row("last training loss", _number(loss, ".4f"), _number(solo.get("last_loss"), ".4f"))
    table.add_row("steps", _number(steps), _number(solo.get("steps")))
    table.add_row("samples/s", _number(found["samples_per_s"]), _number(solo.get("samples_per_s")))
    table.add_row("seconds", _number(found["seconds"], ".1f"), _number(solo.get("seconds"), ".1f"))
    table.add_row("lag, median and most", f"{_number(lag['median'], 'g')} and {_number(lag['max'])}", "")
    table.add_row("sent up and down", f"{_mib(found['bytes_up'])} and {_mib(found['bytes_down'])}", "")
    table.add_row("refused updates", _number(found["rejected"]), "")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column.endswith(" ") else "left")
    return table


def _cell(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case list():
            return (
                "\n".join(escape(f"{one['name']} = {one['default']}: {one['description']}") for one in value) or "none"
            )
        case _:
            return escape(str(value))


# Words


def live(status: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the workers that are there."""
    return [row for row in status.get("workers", []) if row["state"] != GONE]


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, form: str = ",.0f") -> str:
    return "-" if value is None else format(value, form)


def _mib(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"
