"""The report of a run: `report.json` for scripts, and `report.html`, the page to show others.

    summary of the run + run.1.jsonl, run.jsonl  ->  figures (plain values)  ->  report.json, report.html

Laws
* The page shows nothing that `report.json` does not hold: `page` takes those figures and nothing else.
* The page is one file that loads nothing and runs nothing (its own policy forbids both): it works offline, in light
  and dark, at phone width, and its charts say in words what they show.
* What came from outside (names, sentences, paths) enters the page only through `_e`.
* A log that is missing, torn or odd costs its own figures only; what is not known is null, never NaN.
* Memory is bounded: POINTS per curve, WORKERS one by one, EVENTS in words, whatever the log holds.

Left out: `summary` itself (the launcher measures it); comparing runs. Time 0 is `summary["started"]` (seconds since
1970; log lines before it belong to an earlier run), else the first line of the log.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple, TypeVar

from paramserver.telemetry import FILE, PREVIOUS

POINTS = 400
"""Points of one curve, at most."""
WINDOW = 10
"""Updates in a moving average; more where a curve is thinned."""
WORKERS, OTHERS = 256, "(other workers)"
"""Workers followed one by one; all later ones are added up."""
EVENTS = (60, 140)
"""First and last events that are kept."""
LAG_LIMIT = 1024
"""Larger lags are counted as this one; the largest is known all the same."""
LINE_BYTES, TEXT_CHARACTERS = 1 << 16, 300
COLORS, LINES, ROWS, PANELS, BINS, DETAILS = 8, 40, 64, 12, 24, 8
"""On the page: colors of workers, lines in a chart, rows of the workers' table, lag histograms, their bars, and
figures of the rule."""
REQUIRED = {
    **dict.fromkeys(("center_accuracy", "center_loss", "solo_accuracy", "samples_per_s", "seconds", "updates")),
    **{"settings": [], "seeds": {}, "versions": {}, "curve": [], "solo_curve": []},
}
"""What stands in for a key that the summary leaves out."""
APPLY = {"time", "kind", *"worker number version lag weight loss samples steps bytes_up bytes_down".split()}
"""Values of every `apply` line; all others are the rule's own figures."""
T = TypeVar("T")


def write(directory: Path, summary: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into `directory`, each whole or not at all; returns their paths."""
    found = figures(summary, read(directory, _number(summary.get("started"))))
    texts = {"report.json": json.dumps(found, indent=1, allow_nan=False) + "\n", "report.html": page(found)}
    for name, text in texts.items():
        temporary = directory / f".{name}.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8", errors="replace")
        temporary.replace(directory / name)
    return directory / "report.json", directory / "report.html"


# The run log


class Curve:
    """Points (time_s, updates, value), thinned evenly as they come: at most POINTS, the last one always kept."""

    def __init__(self, window: int = 1) -> None:
        self._window, self._stride, self._count = window, 1, 0
        self._kept: list[tuple[float, int, float]] = []
        self._last = (0.0, 0, 0.0)

    def add(self, time_s: float, updates: int, value: float) -> None:
        """One more; with a `window`, a moving average over about so many is kept instead of `value`."""
        if self._window > 1 and self._count:
            weight = 1 / min(self._count + 1, max(self._window, 2 * self._stride))
            value = self._last[2] + weight * (value - self._last[2])
        self._last = (time_s, updates, value)
        if self._count % self._stride == 0:
            self._kept.append(self._last)
            if len(self._kept) == POINTS:
                self._kept, self._stride = self._kept[::2], self._stride * 2
        self._count += 1

    def columns(self, unseen: int) -> dict[str, list[float]]:
        """As three lists; `unseen` updates came before those of the log."""
        points = self._kept + ([self._last] if self._count and self._kept[-1] != self._last else [])
        return {
            "time_s": [round(time_s, 3) for time_s, _, _ in points],
            "updates": [unseen + updates for _, updates, _ in points],
            "value": [float(f"{value:.6g}") for _, _, value in points],
        }


class Trace:
    """What the log tells of one worker."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("updates", "steps", "samples", "bytes_up", "bytes_down", "rejected"), 0)
        self.loss, self.lags, self.lag_max = Curve(WINDOW), Counter[int](), 0
        self.first_s, self.last_s = math.inf, 0.0


class Run:
    """What the log tells of the run."""

    def __init__(self, started: float | None) -> None:
        self.started, self.seconds, self.updates, self.unreadable_lines = started, 0.0, 0, 0
        self.workers: dict[str, Trace] = {}
        self.loss, self.bytes = Curve(WINDOW), {"up": Curve(), "down": Curve()}
        self.rule: dict[str, Curve] = {}
        self.kinds: Counter[str] = Counter()
        self.first_events: list[dict[str, Any]] = []
        self.last_events: deque[dict[str, Any]] = deque(maxlen=EVENTS[1])
        self._bytes = {"up": 0, "down": 0}

    def take(self, line: Any) -> None:
        """One line of the log; one that makes no sense is counted and passed over."""
        at = _number(line.get("time")) if isinstance(line, dict) else None
        if at is None or not isinstance(line.get("kind"), str):
            self.unreadable_lines += 1
            return
        self.started = at if self.started is None else self.started
        time_s = at - self.started
        if time_s < 0:
            return
        self.seconds = max(self.seconds, time_s)
        trace = self._trace(line, time_s)
        if line["kind"] == "apply" and trace is not None:
            self._apply(trace, line, time_s)
            return
        if line["kind"] == "reject" and trace is not None:
            trace.counts["rejected"] += 1
        if len(self.kinds) < LAG_LIMIT:
            self.kinds[line["kind"][:TEXT_CHARACTERS]] += 1
        event = {"time_s": round(time_s, 3), "kind": line["kind"][:TEXT_CHARACTERS], "text": _sentence(line)}
        (self.first_events if len(self.first_events) < EVENTS[0] else self.last_events).append(event)

    def _trace(self, line: dict[str, Any], time_s: float) -> Trace | None:
        name = line.get("worker")
        if not isinstance(name, str) or not name or line.get("role", "worker") != "worker":
            return None
        name = name if name in self.workers or len(self.workers) < WORKERS else OTHERS
        trace = self.workers.setdefault(name, Trace())
        trace.first_s, trace.last_s = min(trace.first_s, time_s), max(trace.last_s, time_s)
        return trace

    def _apply(self, trace: Trace, line: dict[str, Any], time_s: float) -> None:
        self.updates += 1
        trace.counts["updates"] += 1
        for name in ("steps", "samples", "bytes_up", "bytes_down"):
            trace.counts[name] += int(_number(line.get(name)) or 0)
        for way, curve in self.bytes.items():
            self._bytes[way] += int(_number(line.get(f"bytes_{way}")) or 0)
            curve.add(time_s, self.updates, self._bytes[way])
        if (lag := _number(line.get("lag"))) is not None:
            trace.lags[min(max(int(lag), 0), LAG_LIMIT)] += 1
            trace.lag_max = max(trace.lag_max, int(lag))
        if (loss := _number(line.get("loss"))) is not None:
            trace.loss.add(time_s, self.updates, loss)
            self.loss.add(time_s, self.updates, loss)
        for name in line.keys() - APPLY:
            value = _number(line[name])
            if value is not None and (name in self.rule or len(self.rule) < DETAILS):
                self.rule.setdefault(name, Curve(WINDOW)).add(time_s, self.updates, value)


def read(directory: Path, started: float | None = None) -> Run:
    """The run log of `directory`, from `started` (seconds since 1970) on."""
    run = Run(started)
    for path in (directory / PREVIOUS, directory / FILE):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            for data in iter(partial(file.readline, LINE_BYTES), b""):
                try:
                    line = json.loads(data)
                except (ValueError, RecursionError):
                    line = None
                run.take(line)
    return run


SENTENCES = {
    "join": "{worker} joined ({resumed})",
    "leave": "{worker} left: {reason}, after {updates} updates",
    "reject": "{worker}: update {number} was refused: {sentence}",
    "fault": "{worker} was told: {sentence}",
    "checkpoint": "version {version} is on the disk, written in {seconds} s",
    "checkpoint_failed": "{sentence}",
    "initialised": "{worker} gave the first weights, {parameters} parameters",
    "finished": "{reason}, at version {version}",
    "diverged": "the center is no longer finite since version {version}, after an update of {worker}",
}


def _sentence(line: dict[str, Any]) -> str:
    """One line of the log in words."""
    values = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in line.items()}
    if not values.get("worker"):
        values["worker"] = "somebody"
    pattern = SENTENCES.get(line["kind"], "")
    try:
        text = pattern.format_map(values)
    except KeyError:
        text = ""
    return (text or ", ".join(f"{k} {v}" for k, v in line.items() if k not in ("time", "kind")))[:TEXT_CHARACTERS]


# The figures


def figures(summary: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """All that `report.json` holds: the summary as it is, and what the log adds; plain and finite."""
    rows = _rows(summary, run)
    updates = [row["updates"] for row in rows]
    unseen = max(int(_number(summary.get("updates")) or 0) - run.updates, 0)
    total = sum((trace.lags for trace in run.workers.values()), Counter[int]())
    known: dict[str, Any] = REQUIRED | dict(summary)
    if known["updates"] is None:
        known["updates"] = run.updates
    if known["seconds"] is None:
        known["seconds"] = run.seconds
    found = known | {
        "started": run.started,
        "workers": rows,
        "bytes_up": sum(row["bytes_up"] for row in rows),
        "bytes_down": sum(row["bytes_down"] for row in rows),
        "rejected": sum(row["rejected"] for row in rows),
        "fairness": _jain(updates),
        **_goodput(rows, run, _number(known["seconds"]) or 0.0),
        "lag": _lag(total, max((trace.lag_max for trace in run.workers.values()), default=0))
        | {"workers": {name: _lag(trace.lags, trace.lag_max) for name, trace in run.workers.items()}},
        "curves": {
            "loss": run.loss.columns(unseen),
            "workers": {name: trace.loss.columns(unseen) for name, trace in run.workers.items()},
            "bytes": {way: curve.columns(unseen) for way, curve in run.bytes.items()},
            "rule": {name: curve.columns(unseen) for name, curve in sorted(run.rule.items())},
        },
        "events": {"counts": run.kinds, "first": run.first_events, "last": list(run.last_events)},
        "unreadable_lines": run.unreadable_lines,
    }
    plain: dict[str, Any] = _plain(found)
    return plain


def _rows(summary: Mapping[str, Any], run: Run) -> list[dict[str, Any]]:
    """One dict per worker: what the summary says, completed by the log. A worker that only the log knows gets a row."""
    given = {str(worker.get("name")): dict(worker) for worker in summary.get("workers") or []}
    rows = []
    for name in sorted({*given, *run.workers}, key=_natural):
        row, trace = given.get(name, {}), run.workers.get(name, Trace())
        for key, count in trace.counts.items():
            value = _number(row.get(key))
            row[key] = count if value is None else int(value)
        span_s = trace.last_s - trace.first_s
        if _number(row.get("samples_per_s")) is None:
            row["samples_per_s"] = round(row["samples"] / span_s, 3) if span_s > 0 else None
        rows.append({"name": name} | row)
    return rows


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts worker-10 after worker-9."""
    digits = "".join(character if character.isdecimal() and character.isascii() else " " for character in name).split()
    return [(0, name.rstrip("0123456789")), *((int(part[:18]), "") for part in digits), (0, name)]


def _lag(lags: Counter[int], largest: int) -> dict[str, Any]:
    """Histogram (lag -> updates), median and maximum; null where nothing was applied."""
    ordered, count = sorted(lags.items()), lags.total()
    if not count:
        return {"median": None, "max": None, "histogram": {}}

    def at(rank: int) -> int:
        for lag, number in ordered:
            rank -= number
            if rank < 0:
                return lag
        return largest

    median = (at((count - 1) // 2) + at(count // 2)) / 2
    return {"median": median, "max": largest, "histogram": {str(lag): number for lag, number in ordered}}


def _jain(values: Sequence[float]) -> float | None:
    """Jain's index (sum x)^2 / (n sum x^2): 1 where all are equal, 1/n where one has all."""
    squares = sum(value * value for value in values)
    return round(sum(values) ** 2 / (len(values) * squares), 6) if squares else None


def _goodput(rows: list[dict[str, Any]], run: Run, seconds: float) -> dict[str, float | None]:
    """Goodput: share of the workers' time not spent waiting for the server, times share of updates that were taken."""
    present_s = stalled_s = 0.0
    for row in rows:
        trace = run.workers.get(row["name"])
        here_s = trace.last_s - trace.first_s if trace and trace.last_s > trace.first_s else seconds
        present_s += here_s
        stalled_s += min(_number(_exchange(row, "stalled_s")) or 0.0, here_s)
    pushed = sum(row["updates"] + row["rejected"] for row in rows)
    taken = sum(row["updates"] for row in rows) / pushed if pushed else None
    stalled = stalled_s / present_s if present_s > 0 else None
    good = taken * (1 - stalled) if taken is not None and stalled is not None else None
    return {
        "goodput": _round(good, 6),
        "stalled_share": _round(stalled, 6),
        "taken_share": _round(taken, 6),
    }


def _exchange(row: Mapping[str, Any], name: str) -> Any:
    """A figure of the worker's own about its exchanges, which stand by themselves or in the row."""
    exchanges = row.get("exchanges")
    return exchanges.get(name) if isinstance(exchanges, Mapping) else row.get(name)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 and value is not True else None


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _plain(value: Any) -> Any:
    """As JSON takes it: whatever is not finite becomes null, whatever is unknown its text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset() | deque():
            return [_plain(item) for item in value]
        case _ if callable(getattr(value, "item", None)) and getattr(value, "shape", None) == ():
            return _plain(value.item())
        case _:
            return str(value)
