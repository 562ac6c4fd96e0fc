"""The report of a run: `report.json` for scripts, and `report.html`, the page to show others.

    summary of the run + run.1.jsonl, run.jsonl  ->  figures (plain values)  ->  report.json, report.html

Laws
* The page shows nothing that `report.json` does not hold: `page` takes those figures and nothing else.
* The page is one file that loads nothing and runs nothing (its own policy forbids both): it works offline, in light
  and dark, at phone width, and its charts say in words what they show.
* All markup is made by `tag`, which escapes every text that is not markup itself.
* A log that is missing, torn or odd costs its own figures only; what is not known is null, never NaN.
* Memory is bounded: POINTS per curve, WORKERS one by one, EVENTS in words, whatever the log holds.

Time 0 is `summary["started"]` (seconds since 1970; log lines before it belong to an earlier run), else the first line
of the log. Left out: the summary itself (whoever ran the workers measures it), and comparing runs.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from html import escape
from itertools import accumulate
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from paramserver.telemetry import FILE, PREVIOUS

POINTS = 400
"""Points of one curve, at most."""
WINDOW = 10
"""Updates in a moving average; more where a curve is thinned."""
WORKERS, OTHERS = 256, "(other workers)"
"""Workers followed one by one; all later ones are added up."""
EVENTS = (60, 140)
"""First and last events that are kept."""
KINDS = 64
"""Kinds of event that are counted one by one."""
LAG_LIMIT = 1024
"""Larger lags are counted as this one; the largest is known all the same."""
DETAILS = 8
"""Figures of the rule's own that are followed."""
SLACK_S = 1.0
"""`started` may be an estimate: lines from so short a time before it belong to the run, at time 0."""
LINE_BYTES, TEXT_CHARACTERS = 1 << 16, 300
LATEST_S = 253_402_300_799
"""End of the year 9999, in seconds since 1970: no log is from later."""
LINES, ROWS, PANELS, BINS = 40, 64, 12, 24
"""On the page: curves in a chart, rows of the workers' table, lag histograms, bars in one."""
TAIL = 0.99
"""Share of a worker's updates whose lag has a bar of its own; the last bar holds all others."""
FEWEST = 7
"""The lag histograms reach at least this far."""
COLORS = 8
"""With more workers than this, a color no longer tells them apart."""

COUNTS = ("updates", "steps", "samples", "bytes_up", "bytes_down", "rejected")
APPLY = {"time", "kind", "worker", "number", "version", "lag", "weight", "loss", *COUNTS}
"""Values of every `apply` line; all others are the rule's own figures."""
ALWAYS: Mapping[str, Any] = {
    **dict.fromkeys(("center_accuracy", "center_loss", "solo_accuracy", "solo_loss", "samples_per_s")),
    **{"settings": [], "seeds": {}, "versions": {}, "curve": [], "solo_curve": []},
}
"""What stands in `report.json` for a key that the summary leaves out."""
SENTENCES = {
    "join": "{worker} {resumed}",
    "leave": "{worker} left: {reason}, after {updates} updates",
    "reject": "{worker}: update {number} was refused: {sentence}",
    "fault": "{worker} was told: {sentence}",
    "checkpoint": "version {version} is on the disk, written in {seconds} s",
    "checkpoint_failed": "{sentence}",
    "initialised": "{worker} gave the first weights, {parameters} parameters",
    "finished": "{reason}, at version {version}",
    "diverged": "the center is no longer finite since version {version}, after an update of {worker}",
}
RESUMED = {"new": "joined", "live": "is back", "record": "is back after its lease had ended"}
BAD = {"reject", "fault", "diverged", "checkpoint_failed", "unsendable", "log_lost"}
RULE_FIGURES = {
    "pi": ("Scale π", "By how much the rule scaled an update.", None),
    "energy": ("Energy of the center", "Kinetic energy over its bound: stable up to 1.", 1),
}
"""First word of a figure of the rule's own -> title, sentence, and the level to hold it against."""
UNKNOWN = "\N{EN DASH}"


def write(directory: Path, summary: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into `directory`, each whole or not at all; returns their paths.

    Reads the run log that lies there. `summary` is what is known of the run beside it, JSON-like values by name.
    """
    report = figures(summary, read(directory, _number(summary.get("started"))))
    texts = {"report.json": json.dumps(report, indent=1, allow_nan=False) + "\n", "report.html": page(report)}
    for name, text in texts.items():
        temporary = directory / f".{name}.{os.getpid()}"
        try:
            temporary.write_text(text, encoding="utf-8", errors="replace")
            temporary.replace(directory / name)
        finally:
            temporary.unlink(missing_ok=True)
    return directory / "report.json", directory / "report.html"


# The run log


class Curve:
    """Points (time_s, updates, value), thinned evenly as they come: at most POINTS, the last one always kept."""

    def __init__(self, window: int = 1) -> None:
        self._window, self._stride, self._count = window, 1, 0
        self._kept: list[tuple[float, int, float]] = []
        self._last = (0.0, 0, 0.0)

    def add(self, time_s: float, updates: int, value: float) -> None:
        """One more; with a `window`, the moving average over about so many stands for the value."""
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
        """As three lists; `unseen` updates came before those that were added."""
        points = self._kept + ([self._last] if self._count and self._kept[-1] != self._last else [])
        return {
            "time_s": [round(time_s, 3) for time_s, _, _ in points],
            "updates": [unseen + updates for _, updates, _ in points],
            "value": [float(f"{value:.6g}") for _, _, value in points],
        }


class Trace:
    """What the log tells of one worker."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COUNTS, 0)
        self.loss, self.lags, self.lag_max = Curve(WINDOW), Counter[int](), 0
        self.first_s, self.last_s = math.inf, 0.0

    @property
    def present_s(self) -> float:
        """From its first line to its last."""
        return max(self.last_s - self.first_s, 0.0)


class Run:
    """What the log tells of the run."""

    def __init__(self, started: float | None = None) -> None:
        self.started, self.seconds, self.updates, self.unreadable_lines = started, 0.0, 0, 0
        self._earliest = 0.0 if started is None else started - SLACK_S
        self.workers: dict[str, Trace] = {}
        self.loss, self.bytes = Curve(WINDOW), {"up": Curve(), "down": Curve()}
        self.sent = dict.fromkeys(self.bytes, 0)
        self.rule: dict[str, Curve] = {}
        self.kinds: Counter[str] = Counter()
        self.first_events: list[dict[str, Any]] = []
        self.last_events: deque[dict[str, Any]] = deque(maxlen=EVENTS[1])
        self.diverged = ""

    def take(self, line: Any) -> None:
        """One line of the log; one that makes no sense is counted and passed over."""
        at = _number(line.get("time")) if isinstance(line, dict) else None
        if at is None or not 0 <= at <= LATEST_S or not isinstance(line.get("kind"), str):
            self.unreadable_lines += 1
            return
        self.started = at if self.started is None else self.started
        time_s = max(at - self.started, 0.0)
        if at < self._earliest:
            return
        self.seconds = max(self.seconds, time_s)
        trace = self._trace(line, time_s)
        if trace is not None and line["kind"] == "apply":
            self._apply(trace, line, time_s)
            return
        if trace is not None and line["kind"] == "reject":
            trace.counts["rejected"] += 1
        kind = line["kind"][:TEXT_CHARACTERS]
        self.kinds[kind if kind in self.kinds or len(self.kinds) < KINDS else "other"] += 1
        event = {"time_s": round(time_s, 3), "kind": kind, "text": _sentence(line)}
        self.diverged = event["text"] if kind == "diverged" else self.diverged
        (self.first_events if len(self.first_events) < EVENTS[0] else self.last_events).append(event)

    def _trace(self, line: Mapping[str, Any], time_s: float) -> Trace | None:
        name = line.get("worker")
        trains = line["kind"] in ("apply", "reject") or line.get("role") == "worker"  # observers are named as well
        if not isinstance(name, str) or not name or not trains:
            return None
        name = name[:TEXT_CHARACTERS]
        name = name if name in self.workers or len(self.workers) < WORKERS else OTHERS
        trace = self.workers.get(name) or self.workers.setdefault(name, Trace())
        trace.first_s, trace.last_s = min(trace.first_s, time_s), max(trace.last_s, time_s)
        return trace

    def _apply(self, trace: Trace, line: Mapping[str, Any], time_s: float) -> None:
        self.updates += 1
        trace.counts["updates"] += 1
        for name in ("steps", "samples", "bytes_up", "bytes_down"):
            trace.counts[name] += int(_number(line.get(name)) or 0)
        for way, curve in self.bytes.items():
            self.sent[way] += int(_number(line.get(f"bytes_{way}")) or 0)
            curve.add(time_s, self.updates, self.sent[way])
        if (lag := _number(line.get("lag"))) is not None:
            trace.lags[min(max(int(lag), 0), LAG_LIMIT)] += 1
            trace.lag_max = max(trace.lag_max, int(lag))
        if (loss := _number(line.get("loss"))) is not None:
            trace.loss.add(time_s, self.updates, loss)
            self.loss.add(time_s, self.updates, loss)
        for name in [name for name in line if name not in APPLY]:
            value = _number(line[name])
            if value is not None and (name in self.rule or len(self.rule) < DETAILS):
                self.rule.setdefault(name, Curve(WINDOW)).add(time_s, self.updates, value)


def read(directory: Path, started: float | None = None) -> Run:
    """The run log of `directory`, from `started` (seconds since 1970) on."""
    run = Run(started)
    for path in (directory / PREVIOUS, directory / FILE):
        if path.is_file():
            with path.open("rb") as file:
                for data in iter(partial(file.readline, LINE_BYTES), b""):
                    run.take(_parsed(data))
    return run


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _sentence(line: Mapping[str, Any]) -> str:
    """One line of the log in words."""
    values = {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in line.items()}
    said = {"worker": values.get("worker") or "somebody", "resumed": RESUMED.get(values.get("resumed", ""), "joined")}
    try:
        text = SENTENCES[line["kind"]].format_map(values | said)
    except KeyError:
        text = ", ".join(f"{name} {value}" for name, value in values.items() if name not in ("time", "kind"))
    return text[:TEXT_CHARACTERS]


# The figures


def figures(summary: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """All that `report.json` holds: the summary as it is, and what the log adds; plain and finite."""
    known = {name: value for name, value in summary.items() if value is not None}
    rows = _rows(known.get("workers", ()), run)
    updates = _number(known.get("updates"))
    unseen = max(int(updates or 0) - run.updates, 0)
    lags = sum((trace.lags for trace in run.workers.values()), Counter[int]())
    seconds = _number(known.get("seconds")) or run.seconds
    found = {
        **summary,
        **{name: known.get(name, value) for name, value in ALWAYS.items()},
        "started": run.started,
        "seconds": seconds,
        "updates": run.updates if updates is None else int(updates),
        "workers": rows,
        **{name: sum(row[name] for row in rows) for name in ("bytes_up", "bytes_down", "rejected")},
        "fairness": _jain([row["updates"] for row in rows]),
        **_goodput(rows, run, seconds),
        "lag": _lag(lags, max((trace.lag_max for trace in run.workers.values()), default=0))
        | {"workers": {name: _lag(trace.lags, trace.lag_max) for name, trace in run.workers.items()}},
        "curves": {
            "loss": run.loss.columns(unseen),
            "workers": {name: trace.loss.columns(unseen) for name, trace in run.workers.items()},
            "bytes": {way: curve.columns(unseen) for way, curve in run.bytes.items()},
            "rule": {name: curve.columns(unseen) for name, curve in sorted(run.rule.items())},
        },
        "events": {"counts": run.kinds, "first": run.first_events, "last": run.last_events},
        "diverged": run.diverged,
        "unreadable_lines": run.unreadable_lines,
    }
    plain: dict[str, Any] = _plain(found)
    return plain


def _rows(workers: Iterable[Mapping[str, Any]], run: Run) -> list[dict[str, Any]]:
    """One dict per worker, as given and completed from the log; a worker that only the log knows has one too."""
    given = {str(worker.get("name")): dict(worker) for worker in workers}
    rows = []
    for name in sorted({*given, *run.workers}, key=_natural):
        row, trace = {"name": name} | given.get(name, {}) | {"name": name}, run.workers.get(name, Trace())
        for key, count in trace.counts.items():
            value = _number(row.get(key))
            row[key] = count if value is None else int(value)
        if _number(row.get("samples_per_s")) is None:
            row["samples_per_s"] = round(row["samples"] / trace.present_s, 3) if trace.present_s else None
        rows.append(row)
    return rows


def _natural(name: str) -> list[str | int]:
    """Puts worker-10 behind worker-9."""
    parts = re.split("([0-9]{1,18})", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _lag(lags: Counter[int], largest: int) -> dict[str, Any]:
    """Histogram (lag -> updates), median and maximum; null where nothing was applied."""
    if not lags:
        return {"median": None, "max": None, "histogram": {}}
    ordered, total, before, middle = sorted(lags.items()), lags.total(), 0, 0
    for lag, number in ordered:
        middle += lag * sum(before <= rank < before + number for rank in ((total - 1) // 2, total // 2))
        before += number
    return {"median": middle / 2, "max": largest, "histogram": dict(ordered)}


def _jain(values: Sequence[int]) -> float | None:
    """Jain's index (sum x)^2 / (n sum x^2): 1 where all are equal, 1/n where one has all."""
    squares = sum(value * value for value in values)
    return round(sum(values) ** 2 / (len(values) * squares), 6) if squares else None


def _goodput(rows: Sequence[Mapping[str, Any]], run: Run, seconds: float) -> dict[str, float | None]:
    """Goodput = share of the workers' time not spent waiting for the server * share of pushes that were applied."""
    present_s = stalled_s = 0.0
    for row in rows:
        trace = run.workers.get(row["name"])
        here_s = trace.present_s if trace and trace.present_s else seconds
        present_s += here_s
        stalled_s += min(_number(_exchange(row, "stalled_s")) or 0.0, here_s)
    applied, refused = (sum(row[name] for row in rows) for name in ("updates", "rejected"))
    share = applied / (applied + refused) if applied + refused else None
    stalled = stalled_s / present_s if present_s else None
    good = None if share is None or stalled is None else share * (1 - stalled)
    found = {"goodput": good, "stalled_share": stalled, "applied_share": share}
    return {name: None if value is None else round(value, 6) for name, value in found.items()}


def _exchange(row: Mapping[str, Any], name: str) -> Any:
    """A figure of a worker's own about its exchanges, which stand by themselves or in the row."""
    exchanges = row.get("exchanges")
    return exchanges.get(name) if isinstance(exchanges, Mapping) else row.get(name)


def _number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if fine else None


def _plain(value: Any) -> Any:
    """As JSON takes it: what is not finite becomes null, what JSON does not know its text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset() | deque():
            return [_plain(item) for item in value]
        case _ if getattr(value, "shape", None) == ():  # a scalar of numpy or torch
            return _plain(value.item())
        case _:
            return str(value)


# Markup


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, *inside: str | Iterable[str], **attributes: Any) -> Html:
    """An element. Text inside is escaped unless it is Html; so are attributes (`class_`, `aria_label`)."""
    words = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{words}>{together(*inside)}</{name}>")


def together(*parts: str | Iterable[str]) -> Html:
    """Parts one after the other, text among them escaped."""
    texts = (text for part in parts for text in ([part] if isinstance(part, str) else part))
    return Html("".join(text if isinstance(text, Html) else escape(text) for text in texts))


# The page


def page(report: Mapping[str, Any]) -> str:
    """`report.html` for the figures of one run, as `report.json` holds them."""
    names = [row["name"] for row in report["workers"]]
    colors = {name: f"c{i}" if len(names) <= COLORS else "many" for i, name in enumerate(names)}
    title = " · ".join(str(report[key]) for key in ("task", "rule") if report.get(key)) or "Training"
    facts = [title, f"{len(names)} {'worker' if len(names) == 1 else 'workers'}"]
    if report["started"] is not None:
        facts.append(f"{datetime.fromtimestamp(report['started'], UTC):%Y-%m-%d %H:%M} UTC")
    body = together(
        tag("header", tag("p", " · ".join(facts)), tag("h1", _result(report)), _notice(report)),
        tag("dl", (_tile(*tile) for tile in _tiles(report) if tile[1] != UNKNOWN), class_="tiles card"),
        tag("div", _charts(report, colors), class_="charts"),
        _lags(report["lag"]["workers"], colors),
        _section("Workers", _workers(report, colors)),
        _section("Events", _events(report["events"])),
        _section("Settings", _settings(report["settings"])),
        tag("div", (_section(name, _facts(report[name.lower()])) for name in ("Versions", "Seeds")), class_="charts"),
    )
    return PAGE.substitute(style=STYLE, title=together(title), body=body)


def _section(name: str, *inside: Html) -> Html:
    return tag("section", tag("h2", name), *inside, class_="card")


def _result(report: Mapping[str, Any]) -> str:
    spent = f"after {_count(report['updates'])} updates in {_duration(report['seconds'])}"
    solo = report.get("solo")  # where the summary says how long the lone worker trained, so does the sentence
    steps = (
        f" after {_count(_number(solo.get('steps')))} steps" if isinstance(solo, Mapping) and solo.get("steps") else ""
    )
    for unit, words, form in (("accuracy", "", _percent), ("loss", "a test loss of ", _short)):
        reached, alone = report[f"center_{unit}"], report[f"solo_{unit}"]
        if reached is not None:
            versus = f"; one worker alone {form(alone)}{steps}" if alone is not None else ""
            return f"Center reached {words}{form(reached)} {spent}{versus}."
    return f"The run ended {spent}."


def _notice(report: Mapping[str, Any]) -> Html:
    """A sentence where the run did not end well."""
    ended = report.get("exit")
    if report["diverged"]:
        return tag("p", f"This run diverged: {report['diverged']}.", class_="notice")
    return tag("p", f"Exit: {ended}", class_="notice") if ended and isinstance(ended, int | str) else Html()


def _tiles(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, figure, what to hold it against)."""
    accuracy, loss, lag = report["center_accuracy"], report["center_loss"], report["lag"]
    if accuracy is not None:
        alone = report["solo_accuracy"]
        points = 100 * (accuracy - (alone or 0.0))
        versus = f"{abs(points):.1f} points {'above' if points >= 0 else 'below'} one worker alone"
        yield "Accuracy", _percent(accuracy), "on test data" if alone is None else versus
    if loss is not None:
        alone = report["solo_loss"]
        yield "Test loss", _short(loss), "of the center" if alone is None else f"one worker alone {_short(alone)}"
    yield "Samples per second", _count(report["samples_per_s"]), "all workers together"
    yield "Updates", _count(report["updates"]), f"in {_duration(report['seconds'])}"
    yield "Lag", _short(lag["median"]), f"updates, median; at most {_short(lag['max'])}"
    yield "Sent", _size(report["bytes_up"] + report["bytes_down"]), f"{_size(report['bytes_up'])} of it up"
    yield "Goodput", _percent(report["goodput"]), f"{_percent(report['stalled_share'])} of the time stalled"
    yield "Fairness", _short(report["fairness"]), "Jain index of updates; 1 is even"


def _tile(name: str, figure: str, note: str) -> Html:
    return tag("div", tag("dt", name), tag("dd", tag("b", figure), tag("small", note)))


def _charts(report: Mapping[str, Any], colors: Mapping[str, str]) -> Iterator[Html]:
    curves, center, few = report["curves"], report["curve"], len(colors) <= COLORS
    for x, words in (("time_s", "time"), ("updates", "updates")):
        traced = [name for name in colors if name in curves["workers"]][:LINES]
        lines = [Line(name if few else "", _points(curves["workers"][name], x), colors[name]) for name in traced]
        lines += [] if few else [Line("all workers", _points(curves["loss"], x), "c0")]
        lines.append(Line("center, test data", _samples(center, x, "loss"), "ink"))
        yield _chart(f"Loss over {words}", "Training loss of the workers, moving average.", lines, x, "loss")
    reached = Line("center", _samples(center, "time_s", "accuracy"), "ink")
    end_s = max((time_s for time_s, _ in reached.points), default=0.0)
    alone = [point for point in _samples(report["solo_curve"], "time_s", "accuracy") if point[0] <= end_s]
    lines = [Line("one worker alone", alone, "soft"), reached]
    level = (f"one worker alone, in the end: {_percent(report['solo_accuracy'])}", report["solo_accuracy"])
    yield _chart("Accuracy over time", "On test data.", lines, "time_s", "percent", level)
    ways = (("up", "c0"), ("down", "c1 dash"))  # where both are as many, both show
    lines = [Line(way, _points(curves["bytes"][way], "time_s"), color) for way, color in ways]
    yield _chart("Bytes sent over time", "Updates go up, the center comes down.", lines, "time_s", "bytes")
    families: dict[str, list[Line]] = {}
    for name, curve in curves["rule"].items():
        family, _, member = name.partition("_")
        lines = families.setdefault(family, [])
        lines.append(Line(member or name, _points(curve, "updates"), f"c{len(lines)}"))
    for family, lines in families.items():
        title, sentence, bound = RULE_FIGURES.get(family, (family, "A figure of the rule.", None))
        level = (f"bound {bound}", bound)
        yield _chart(f"{title} over updates", f"{sentence} Moving average.", lines, "updates", "", level)


def _lags(lags: Mapping[str, Any], colors: Mapping[str, str]) -> Html:
    """Small multiples: one histogram per worker, all on the same scales."""
    lags = {name: lag for name, lag in lags.items() if lag["histogram"]}
    shown = [name for name in colors if name in lags][:PANELS]
    if not shown:
        return Html()
    counts = {name: {int(lag): number for lag, number in lags[name]["histogram"].items()} for name in shown}
    most = max(FEWEST, *(_covering(count) for count in counts.values()))
    width = most // BINS + 1
    shares = {name: _shares(count, width, most) for name, count in counts.items()}
    top = max(max(share) for share in shares.values())
    panels = []
    for name in shown:
        words = f"median {_short(lags[name]['median'])}, at most {_short(lags[name]['max'])}"
        bars, step = [], 100 / len(shares[name])
        for i, share in enumerate(shares[name]):
            to = "and more" if i == len(shares[name]) - 1 else f"to {(i + 1) * width - 1}"
            told = tag("title", f"lag {i * width} {to}: {_percent(share)} of updates")
            x, y = f"{(i + 0.1) * step:.2f}%", f"{100 - 100 * share / top:.2f}%"
            bars.append(tag("rect", told, x=x, width=f"{0.8 * step:.2f}%", y=y, height=f"{100 * share / top:.2f}%"))
        last = f"{(len(bars) - 1) * width} and more"
        picture = tag("svg", bars, class_=f"bars {colors[name]}", role="img", aria_label=f"Lag of {name}: {words}")
        caption = tag("figcaption", tag("bdi", name), tag("small", words))
        ends = tag("div", tag("span", "0"), tag("span", last), class_="ends", aria_hidden="true")
        panels.append(tag("figure", caption, picture, ends))
    sentence = "Updates that the center took between a worker's pull and its push: how often each lag came."
    if len(lags) > PANELS:
        sentence += f" {len(lags) - PANELS} more workers are in report.json."
    return _section("Lag per worker", tag("p", sentence), tag("div", panels, class_="panels"))


def _covering(counts: Mapping[int, int]) -> int:
    """The smallest lag that TAIL of all updates do not exceed."""
    lags, enough = sorted(counts), TAIL * sum(counts.values())
    below = accumulate(counts[lag] for lag in lags)
    return next(lag for lag, number in zip(lags, below, strict=True) if number >= enough)


def _shares(counts: Mapping[int, int], width: int, most: int) -> list[float]:
    """Share of each bar of `width` lags; the last one holds all beyond `most`."""
    bars = [0] * (most // width + 2)
    for lag, number in counts.items():
        bars[min(lag // width, len(bars) - 1)] += number
    return [number / sum(bars) for number in bars]


def _workers(report: Mapping[str, Any], colors: Mapping[str, str]) -> Html:
    rows = []
    for row in report["workers"][:ROWS]:
        name, lag = row["name"], report["lag"]["workers"].get(row["name"], {})
        cells = [_count(row["updates"]), _count(row["steps"]), _count(row["samples_per_s"])]
        cells += [_short(lag.get("median")), _short(lag.get("max")), _size(row["bytes_up"]), _size(row["bytes_down"])]
        cells += [_count(row["rejected"]), _duration(_exchange(row, "stalled_s")), _count(_exchange(row, "hidden"))]
        head = tag("th", tag("i", class_=colors[name]), tag("bdi", name), scope="row")
        rows.append(together(head, (tag("td", cell) for cell in cells)))
    heads = "Worker|Updates|Steps|Samples/s|Lag, median|Lag, most|Up|Down|Refused|Stalled|Hidden"
    words = "Stalled: time spent waiting for the server. Hidden: exchanges that were over before anybody waited."
    if len(report["workers"]) > ROWS:
        words += f" {len(report['workers']) - ROWS} more workers are in report.json."
    return together(_table("Workers", heads, rows, "numbers"), tag("p", words)) if rows else tag("p", "None was here.")


def _events(events: Mapping[str, Any]) -> Html:
    left_out = sum(events["counts"].values()) - len(events["first"]) - len(events["last"])
    gap = [{"time_s": None, "kind": "more", "text": f"{_count(left_out)} are left out here"}] if left_out else []
    items = []
    for event in events["first"] + gap + events["last"]:
        kind = tag("b", event["kind"], class_="bad" if event["kind"] in BAD else "fine")
        items.append(tag("li", tag("time", _duration(event["time_s"])), kind, tag("span", event["text"])))
    counts = ", ".join(f"{kind} {_count(number)}" for kind, number in events["counts"].items())
    listed = tag("div", tag("ol", items), class_="events", role="region", aria_label="Events", tabindex=0)
    return together(tag("p", counts or "The run log tells of none."), listed if items else "")


def _settings(settings: Sequence[Mapping[str, Any]]) -> Html:
    """Those that somebody chose, and the defaults folded away below them."""
    chosen: list[Html] = []
    default: list[Html] = []
    for row in settings:
        head = tag("th", tag("code", str(row.get("name"))), scope="row")
        cells = [tag("code", _text(row.get("value"))), _text(row.get("origin")), _text(row.get("description"))]
        rows = default if row.get("origin") == "default" else chosen
        rows.append(together(head, (tag("td", cell) for cell in cells)))
    heads = "Setting|Value|From|Meaning"
    shown = _table("Chosen settings", heads, chosen, "words") if chosen else tag("p", "All are at their default.")
    folded = tag("summary", f"{len(default)} more, at their default"), _table("Defaults", heads, default, "words")
    return together(shown, tag("details", *folded) if default else "")


def _facts(facts: Mapping[str, Any]) -> Html:
    pairs = (tag("div", tag("dt", name), tag("dd", _text(value))) for name, value in facts.items())
    return tag("dl", pairs, class_="facts") if facts else tag("p", "Not recorded.")


def _table(name: str, heads: str, rows: Iterable[Html], kind: str) -> Html:
    """A table in a box of its own, which scrolls where it is wider than the page."""
    head = tag("thead", tag("tr", (tag("th", title, scope="col") for title in heads.split("|"))))
    table = tag("table", head, tag("tbody", (tag("tr", row) for row in rows)), class_=kind)
    return tag("div", table, class_="wide", role="region", aria_label=name, tabindex=0)


# Figures as people read them

SCALES: Mapping[str, Sequence[tuple[float, float, str]]] = {
    "time_s": ((172_800, 86_400, "d"), (7200, 3600, "h"), (120, 60, "min"), (0, 1, "s")),
    "bytes": ((1e12, 1e12, "TB"), (1e9, 1e9, "GB"), (1e6, 1e6, "MB"), (1e3, 1e3, "kB"), (0, 1, "B")),
    "updates": ((2e6, 1e6, "M"), (2e4, 1e3, "k"), (0, 1, "")),
    "percent": ((-math.inf, 0.01, "%"),),
}
"""Kind of value -> (from what size on, unit, its name); any other kind stands as it is."""


def _unit(value: float, kind: str) -> tuple[float, str]:
    return next(((unit, name) for least, unit, name in SCALES.get(kind, ()) if value >= least), (1, ""))


def _scaled(value: float | None, kind: str, form: str) -> str:
    if value is None:
        return UNKNOWN
    unit, name = _unit(value, kind)
    return f"{value / unit:{form}} {name}".strip()


_percent = partial(_scaled, kind="percent", form=".1f")
_duration = partial(_scaled, kind="time_s", form=".1f")
_size = partial(_scaled, kind="bytes", form=".3g")
_short = partial(_scaled, kind="", form=".3g")


def _count(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else UNKNOWN if value is None else json.dumps(value)


# Charts: curves in an inline SVG that stretches to any width while its text stays as it is


class Line(NamedTuple):
    """One curve of a chart; without a name it has no entry in the key."""

    name: str
    points: list[tuple[float, float]]
    color: str


class Axis(NamedTuple):
    """ticks: values that get a mark; place: value -> [0, 1]; label: value -> text."""

    ticks: list[float]
    place: Callable[[float], float]
    label: Callable[[float], str]

    def right(self, value: float) -> str:
        return f"{100 * self.place(value):.2f}%"

    def down(self, value: float) -> str:
        return f"{100 - 100 * self.place(value):.2f}%"


def _points(columns: Mapping[str, list[float]], x: str) -> list[tuple[float, float]]:
    return list(zip(columns[x], columns["value"], strict=True))


def _samples(curve: Sequence[Mapping[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    """Points of one of the summary's own curves; thinned, and without those where something is missing."""
    pairs = [(_number(point.get(x)), _number(point.get(y))) for point in curve]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return known[:: len(known) // POINTS + 1] + known[-1:]


def _chart(title: str, sentence: str, lines: list[Line], x: str, y: str, level: tuple[str, Any] = ("", None)) -> Html:
    """A figure with title, key, and words for those who cannot see it; nothing where nothing is known."""
    lines = [line for line in lines if line.points]
    if not lines:
        return Html()
    bounds = [level[1]] if level[1] is not None else []
    across = _axis([a for line in lines for a, _ in line.points], x)
    up = _axis([b for line in lines for _, b in line.points] + bounds, y)
    named = [line for line in lines if line.name]
    key = [tag("li", tag("i", class_=line.color), tag("bdi", line.name)) for line in named]
    marks, paths, over = [], [], []
    for tick in up.ticks:
        marks.append(tag("line", x2="100%", y1=up.down(tick), y2=up.down(tick)))
        marks.append(tag("text", up.label(tick), class_="y", x=-8, y=up.down(tick), dy=".32em"))
    marks += [tag("text", across.label(tick), x=across.right(tick), y="100%", dy="1.6em") for tick in across.ticks]
    for line in lines:
        corners = (f"{1000 * across.place(a):.1f} {1000 - 1000 * up.place(b):.1f}" for a, b in line.points)
        paths.append(tag("path", class_=line.color, d=f"M{'L'.join(corners)}"))
    for bound in bounds:
        over.append(tag("line", class_="level", x2="100%", y1=up.down(bound), y2=up.down(bound)))
        key.append(tag("li", tag("i", class_="level"), level[0]))
    if lines[-1].color == "ink":
        a, b = lines[-1].points[-1]
        over.append(tag("circle", cx=across.right(a), cy=up.down(b), r=4))
    curves = tag("svg", paths, viewBox="0 0 1000 1000", preserveAspectRatio="none")
    spoken = "; ".join(f"{i.name} from {up.label(i.points[0][1])} to {up.label(i.points[-1][1])}" for i in named)
    picture = tag("svg", marks, curves, over, role="img", aria_label=f"{title}: {spoken}")
    return tag(
        "figure",
        tag("figcaption", tag("h2", title), tag("p", sentence)),
        tag("div", picture, class_="plot"),
        tag("ul", key, class_="key") if len(key) > 1 else "",
        class_="card",
    )


def _axis(values: Sequence[float], kind: str) -> Axis:
    """The scale for values of a kind of `SCALES`, for `loss` (logarithmic where it spans much), or any other."""
    low, high = min(values), max(values)
    if kind == "loss" and low > 0 and high / low > 20:
        a, b = math.log10(low / 1.1), math.log10(high * 1.1)
        steps = (1, 2, 5) if b - a < 3 else (1,)
        marks = [step * 10.0**power for power in range(math.floor(a), math.ceil(b)) for step in steps]
        ticks = [mark for mark in marks if a <= math.log10(mark) <= b]
        return Axis(ticks, lambda value: (math.log10(value) - a) / (b - a), "{:.3g}".format)
    runs = kind in ("time_s", "updates")
    if runs or kind == "bytes" or 0 < low < 0.4 * high:
        low = 0.0
    unit, name = _unit(high, kind)
    span = high - low if high - low > 1e-9 * max(abs(low), abs(high)) else abs(high) or 1.0
    span = max(span / unit, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = unit * next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= span / 5 * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, max(last, first + 1) + 1)]
    start, end = ticks[0], high if runs and high > ticks[0] else ticks[-1]

    def label(value: float) -> str:
        return f"{value / unit:.4g} {name}".strip() if value else "0"

    return Axis([tick for tick in ticks if tick <= end], lambda value: (value - start) / (end - start), label)


STYLE = """
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fff;--ink:#1c1e22;--soft:#676c75;--line:#e5e5e0;--bad:#b3261e;
--c0:#2a78d6;--c1:#e06a2b;--c2:#179a6b;--c3:#8557d3;--c4:#c98500;--c5:#d5508a;--c6:#0f8fa8;--c7:#6f8f1d;--many:#8fb2dc}
@media(prefers-color-scheme:dark){:root{--page:#131416;--card:#1c1d20;--ink:#ededea;--soft:#9da2ab;--line:#303338;
--bad:#ff8a80;--c0:#5a9ff0;--c1:#f0854a;--c2:#35b886;--c3:#a585ea;--c4:#dba028;--c5:#ea74a6;--c6:#3db4cb;--c7:#9bb84a;
--many:#41618a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:clamp(20px,5vw,56px) 16px;display:grid;gap:16px;grid-template-columns:100%}
header{padding:0 4px 12px}
h1{font-size:clamp(1.45rem,1rem + 2.2vw,2.3rem);line-height:1.2;letter-spacing:-.015em;font-weight:650;margin:.3em 0 0;
max-width:26em;text-wrap:balance}
h2{font-size:1rem;font-weight:600;margin:0}
p{margin:0}header p,figcaption p,.card>p,small,summary,footer{color:var(--soft)}small{font-size:.8rem;display:block}
.notice{color:var(--bad);margin-top:.8em;font-weight:600;overflow-wrap:anywhere}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px;margin:0;min-width:0}
.card>p{font-size:.875rem;margin-bottom:14px}.card>p:last-child{margin:10px 0 0}
figcaption p{font-size:.875rem}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:1px;margin:0;padding:0;overflow:hidden}
.tiles>div{box-shadow:0 0 0 1px var(--line);padding:16px 20px;min-width:0}
.tiles dt{color:var(--soft);font-size:.8rem}.tiles dd{margin:0}
.tiles b{display:block;font-size:1.55rem;font-weight:620;letter-spacing:-.01em;line-height:1.35}
.charts:empty{display:none}
.charts{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}
.plot{padding:18px 10px 26px 54px}.plot svg{display:block;width:100%;height:220px;overflow:visible}
.plot text{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums;text-anchor:middle}
.plot .y{text-anchor:end}
.plot line{stroke:var(--line)}.plot .level{stroke:var(--soft);stroke-dasharray:2 4;stroke-width:1.5}
.plot circle{fill:var(--ink);stroke:var(--card);stroke-width:2}
path{fill:none;stroke:var(--c);stroke-width:1.75;stroke-linejoin:round;vector-effect:non-scaling-stroke}
path.ink{stroke-width:2.5}path.soft{stroke-dasharray:5 4}path.dash{stroke-dasharray:9 7}
path.many{stroke-width:1;opacity:.7}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.c6{--c:var(--c6)}.c7{--c:var(--c7)}.many{--c:var(--many)}.ink{--c:var(--ink)}.soft{--c:var(--soft)}
.key{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;margin:0;padding:0;font-size:.8rem;color:var(--soft)}
.key li{display:flex;align-items:center;gap:6px;min-width:0}i{flex:none;width:14px;height:3px;border-radius:2px;
background:var(--c)}i.level,i.soft{background:repeating-linear-gradient(90deg,var(--soft) 0 4px,transparent 4px 7px)}
bdi{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;max-width:16em}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,210px),1fr));gap:20px 28px}
.panels figure{margin:0;min-width:0}
.panels figcaption{display:flex;justify-content:space-between;gap:8px;margin-bottom:6px}
.panels bdi{font-weight:600;font-size:.875rem}.panels small{white-space:nowrap}
.bars{display:block;width:100%;height:76px;border-bottom:1px solid var(--line)}.bars rect{fill:var(--c)}
.ends{display:flex;justify-content:space-between;font-size:12px;color:var(--soft)}
.wide,.events{overflow:auto;max-width:100%}.events{max-height:330px;margin-top:8px}
table{border-collapse:collapse;width:100%;font-size:.875rem;margin-top:8px}
th,td{padding:7px 10px;text-align:left;border-bottom:1px solid var(--line);vertical-align:baseline}
th:first-child{padding-left:0}tbody tr:last-child>*{border-bottom:0}thead th{color:var(--soft);font-weight:500;
font-size:.8rem;white-space:nowrap}tbody th{font-weight:500}
.numbers th{white-space:nowrap}.numbers :is(td,th+th){text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums}
tbody th i{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:8px}
.numbers bdi{display:inline-block;vertical-align:bottom}.words td:last-child{min-width:16em;color:var(--soft)}
.words td{overflow-wrap:break-word;min-width:8em;max-width:26em}.words td+td{color:var(--soft)}
code{font:.85em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
ol{list-style:none;margin:0;padding:0;font-size:.875rem}
ol li{display:grid;grid-template-columns:5.2em 6.6em minmax(0,1fr);gap:4px 10px;padding:5px 0;border-bottom:1px solid
var(--line)}ol li:last-child{border:0}time{color:var(--soft);font-variant-numeric:tabular-nums}ol span,ol b{
overflow-wrap:anywhere}ol b{font-weight:500}ol .bad{color:var(--bad)}
summary{cursor:pointer;margin-top:14px;font-size:.875rem}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(140px,1fr));gap:12px 20px;margin:8px 0 0}
.facts dt{color:var(--soft);font-size:.8rem}.facts dd{margin:0;overflow-wrap:anywhere}
footer{font-size:.8rem;padding:0 4px}
:focus-visible{outline:2px solid var(--c0);outline-offset:2px;border-radius:4px}
@media(max-width:640px){.card{padding:16px}.tiles{padding:0;grid-template-columns:1fr 1fr}
.tiles>div{padding:14px 16px}
ol li{grid-template-columns:5.2em 1fr}ol span{grid-column:1/-1}}
"""

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';style-src 'unsafe-inline';img-src data:">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title: run report</title>
<style>$style</style>
</head>
<body>
<main>
$body
<footer>All figures, and the points of every curve, are in report.json beside this page.</footer>
</main>
</body>
</html>
""")
