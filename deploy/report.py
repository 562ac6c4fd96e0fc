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


# The page


def page(report: Mapping[str, Any]) -> str:
    """`report.html` for the figures of one run, as `report.json` holds them."""
    names = [row["name"] for row in report["workers"]]
    title = " · ".join(str(report[key]) for key in ("task", "rule") if report.get(key)) or "training run"
    facts = [title, _counted(len(names), "worker")]
    if report["started"] is not None:
        facts.append(datetime.fromtimestamp(report["started"], UTC).strftime("%Y-%m-%d %H:%M UTC"))
    colors = {name: f"c{i}" if len(names) <= COLORS else "many" for i, name in enumerate(names)}
    return PAGE.substitute(
        title=_e(f"Run report: {title}"),
        facts=" · ".join(map(_e, facts)),
        result=_e(_result(report)),
        notice=_notice(report),
        style=STYLE,
        tiles="".join(_tile(*tile) for tile in _tiles(report)),
        charts="".join(_charts(report, colors)),
        lags=_lags(report, colors),
        workers=_workers(report, colors),
        events=_events(report["events"]),
        settings=_settings(report["settings"]),
        versions=_facts(report["versions"]),
        seeds=_facts(report["seeds"]),
    )


def _e(value: Any) -> str:
    """Any value as text of the page; the one way in for what we did not write ourselves."""
    return escape("–" if value is None or value == "" else str(value), quote=True)


def _result(report: Mapping[str, Any]) -> str:
    spent = f"after {_count(report['updates'])} updates in {_duration(report['seconds'])}"
    for unit, form in (("accuracy", _percent), ("loss", "{:.4g}".format)):
        reached, alone = (_number(report.get(f"{who}_{unit}")) for who in ("center", "solo"))
        if reached is not None:
            of = "" if unit == "accuracy" else "a test loss of "
            versus = f"; one worker alone {form(alone)}" if alone is not None else ""
            return f"Center reached {of}{form(reached)} {spent}{versus}."
    return f"The run ended {spent}."


def _notice(report: Mapping[str, Any]) -> str:
    """A sentence where the run did not end well."""
    diverged = [event["text"] for event in _all_events(report["events"]) if event["kind"] == "diverged"]
    ended = report.get("exit")
    if diverged:
        sentence = f"This run diverged: {diverged[0]}."
    elif ended and not isinstance(ended, Mapping):
        sentence = f"Ended with exit code {ended}." if isinstance(ended, int) else f"Ended: {ended}"
    else:
        return ""
    return f'<p class="notice" role="note">{_e(sentence)}</p>'


def _tiles(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, figure, what to hold it against)."""
    accuracy, alone = _number(report["center_accuracy"]), _number(report["solo_accuracy"])
    if accuracy is not None:
        better = f"{100 * (accuracy - alone):+.1f} points to one worker alone" if alone is not None else "on test data"
        yield "Accuracy", _percent(accuracy), better.replace("-", "−")
    if (loss := _number(report["center_loss"])) is not None:
        solo = _number(report.get("solo_loss"))
        yield "Test loss", f"{loss:.3g}", f"one worker alone {solo:.3g}" if solo is not None else "of the center"
    yield "Samples per second", _count(report["samples_per_s"]), "all workers together"
    yield "Updates", _count(report["updates"]), f"in {_duration(report['seconds'])}"
    yield "Lag", _plainly(report["lag"]["median"]), f"updates, median; at most {_plainly(report['lag']['max'])}"
    yield "Sent", _size(report["bytes_up"] + report["bytes_down"]), f"{_size(report['bytes_up'])} of it up"
    yield "Goodput", _percent(report["goodput"]), f"{_percent(report['stalled_share'])} of the time stalled"
    yield "Fairness", _plainly(report["fairness"]), "Jain index of updates; 1 is even"


def _tile(name: str, figure: str, note: str) -> str:
    return f'<div class="tile"><dt>{_e(name)}</dt><dd><b>{_e(figure)}</b><small>{_e(note)}</small></dd></div>'


def _charts(report: Mapping[str, Any], colors: Mapping[str, str]) -> Iterator[str]:
    curves, center, solo = report["curves"], report["curve"], report["solo_curve"]
    for x, words in (("time_s", "time"), ("updates", "updates")):
        lines = [Line(n, _points(curves["workers"].get(n), x), color) for n, color in list(colors.items())[:LINES]]
        if len(colors) > COLORS:
            lines = [line._replace(name="") for line in lines]
            lines.append(Line("all workers", _points(curves["loss"], x), "c0"))
        lines.append(Line("center, test data", _samples(center, x, "loss"), "ink"))
        yield _chart(f"Loss over {words}", "Training loss of the workers, moving average.", lines, x, "log")
    lines = [
        Line("one worker alone", _samples(solo, "time_s", "accuracy"), "soft"),
        Line("center", _samples(center, "time_s", "accuracy"), "ink"),
    ]
    level = _number(report["solo_accuracy"])
    end_s = max((x for x, _ in lines[1].points), default=math.inf)
    lines[0] = lines[0]._replace(points=[point for point in lines[0].points if point[0] <= end_s])
    yield _chart("Accuracy over time", "On test data.", lines, "time_s", "percent", level, "one worker alone, at its end")
    lines = [Line(way, _points(curve, "time_s"), f"c{i}") for i, (way, curve) in enumerate(curves["bytes"].items())]
    yield _chart("Bytes sent over time", "Updates up, the center down.", lines, "time_s", "bytes")
    families = dict.fromkeys(name.partition("_")[0] for name in curves["rule"])
    for family in families:
        title, sentence, level = RULE_FIGURES.get(family, (family, "A figure of the rule.", None))
        members = [name for name in curves["rule"] if name.partition("_")[0] == family]
        lines = [
            Line(name.partition("_")[2], _points(curves["rule"][name], "updates"), f"c{i}")
            for i, name in enumerate(members)
        ]
        yield _chart(f"{title} over updates", sentence, lines, "updates", "plain", level, "bound")


RULE_FIGURES = {
    "pi": ("Scale π", "By how much the rule scaled an update, moving average.", None),
    "energy": ("Energy of the center", "Kinetic energy over its bound: stable up to 1.", 1.0),
}
"""First word of a figure of the rule -> title, sentence, and the level to hold it against."""


def _lags(report: Mapping[str, Any], colors: Mapping[str, str]) -> str:
    lags = {name: lag for name, lag in report["lag"]["workers"].items() if lag["histogram"]}
    if not lags:
        return ""
    names = [name for name in colors if name in lags][:PANELS]
    largest = max(int(lag) for name in names for lag in lags[name]["histogram"])
    width = largest // BINS + 1
    shares = {}
    for name in names:
        counts, histogram = [0] * (largest // width + 1), lags[name]["histogram"]
        for lag, number in histogram.items():
            counts[int(lag) // width] += number
        shares[name] = [count / sum(histogram.values()) for count in counts]
    top = max(max(share) for share in shares.values())
    panels = "".join(_panel(name, lags[name], shares[name], width, top, colors[name]) for name in names)
    more = f" {len(lags) - PANELS} more workers are in report.json." if len(lags) > PANELS else ""
    return (
        '<section class="card"><h2>Lag</h2><p>Updates of others that the center took between a worker’s pull and its '
        f"push: how often each lag came, per worker.{more}</p>"
        f'<div class="panels">{panels}</div></section>'
    )


def _panel(name: str, lag: Mapping[str, Any], shares: Sequence[float], width: int, top: float, color: str) -> str:
    step, bars = 100 / len(shares), []
    for i, share in enumerate(shares):
        tall = 100 * share / top
        lags = str(i) if width == 1 else f"{i * width} to {(i + 1) * width - 1}"
        bars.append(
            f'<rect x="{i * step + 0.1 * step:.2f}%" y="{100 - tall:.2f}%" width="{0.8 * step:.2f}%" '
            f'height="{tall:.2f}%"><title>lag {lags}: {_percent(share)} of updates</title></rect>'
        )
    words = f"median {_plainly(lag['median'])}, at most {_plainly(lag['max'])}"
    last = (len(shares) - 1) * width
    axis = f"<span>0</span><span>{last if last else ''}</span>"
    return (
        f'<figure><figcaption><bdi class="name">{_e(name)}</bdi><small>{_e(words)}</small></figcaption>'
        f'<svg class="bars {color}" role="img" aria-label="{_e(f"Histogram of the lag of {name}: {words}")}">'
        f'{"".join(bars)}</svg><div class="axis" aria-hidden="true">{axis}</div></figure>'
    )


def _workers(report: Mapping[str, Any], colors: Mapping[str, str]) -> str:
    heads = "Worker|Updates|Steps|Samples/s|Lag median|Lag max|Up|Down|Refused|Stalled|Hidden".split("|")
    rows = []
    for row in report["workers"][:ROWS]:
        lag = report["lag"]["workers"].get(row["name"], {})
        cells = [_count(row["updates"]), _count(row["steps"]), _count(row["samples_per_s"])]
        cells += [_plainly(lag.get("median")), _plainly(lag.get("max"))]
        cells += [_size(row["bytes_up"]), _size(row["bytes_down"]), _count(row["rejected"])]
        cells += [_duration(_exchange(row, "stalled_s")), _count(_exchange(row, "hidden"))]
        dot = f'<i class="dot {colors[row["name"]]}"></i>'
        head = f'<th scope="row">{dot}<bdi class="name">{_e(row["name"])}</bdi></th>'
        rows.append(head + "".join(f"<td>{_e(cell)}</td>" for cell in cells))
    more = len(report["workers"]) - ROWS
    after = f"<p>{more} more workers are in report.json.</p>" if more > 0 else ""
    return _table("Workers", heads, rows, "numbers") + after


def _events(events: Mapping[str, Any]) -> str:
    counts = events["counts"]
    left_out = sum(counts.values()) - len(events["first"]) - len(events["last"])
    items = [
        f'<li><time>{_e(_duration(event["time_s"]))}</time><b class="kind {_kind(event["kind"])}">{_e(event["kind"])}</b>'
        f"<span>{_e(event['text'])}</span></li>"
        for event in _all_events(events)
    ]
    if left_out > 0:
        items.insert(len(events["first"]), f"<li><time>…</time><span>{_count(left_out)} more, left out here</span></li>")
    summed = ", ".join(f"{_e(kind)} {_count(number)}" for kind, number in list(counts.items())[:BINS])
    return (
        f"<p>{summed or 'The run log tells of none.'}</p>"
        f'<ol class="events" role="region" aria-label="Events" tabindex="0">{"".join(items)}</ol>'
    )


def _all_events(events: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*events["first"], *events["last"]]


def _kind(kind: str) -> str:
    return "bad" if kind in {"reject", "fault", "diverged", "checkpoint_failed", "unsendable", "log_lost"} else "good"


def _settings(settings: Sequence[Mapping[str, Any]]) -> str:
    def table(name: str, rows: Iterable[Mapping[str, Any]]) -> str:
        cells = [
            f'<th scope="row"><code>{_e(row.get("name"))}</code></th><td><code>{_e(_value(row.get("value")))}</code></td>'
            f"<td>{_e(row.get('origin'))}</td><td>{_e(row.get('description'))}</td>"
            for row in rows
        ]
        return _table(name, ["Setting", "Value", "From", "Meaning"], cells, "words") if cells else ""

    chosen = [row for row in settings if row.get("origin") != "default"]
    rest = [row for row in settings if row.get("origin") == "default"]
    folded = f"<details><summary>{_counted(len(rest), 'setting')} at the default</summary>{table('Defaults', rest)}</details>"
    return (table("Chosen settings", chosen) or "<p>None was chosen.</p>") + (folded if rest else "")


def _value(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value)


def _facts(facts: Any) -> str:
    pairs = facts.items() if isinstance(facts, Mapping) else [("", facts)]
    items = (f"<div><dt>{_e(name)}</dt><dd>{_e(_value(value))}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{"".join(items)}</dl>'


def _table(name: str, heads: Sequence[str], rows: Sequence[str], kind: str) -> str:
    head = "".join(f'<th scope="col">{_e(head)}</th>' for head in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="wide" role="region" aria-label="{_e(name)}" tabindex="0"><table class="{kind}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# Charts: lines in an inline SVG that stretches to any width while its text stays as it is


class Line(NamedTuple):
    """One curve of a chart; without a name it has no entry in the key."""

    name: str
    points: list[tuple[float, float]]
    color: str


def _points(columns: Mapping[str, list[float]] | None, x: str) -> list[tuple[float, float]]:
    return list(zip(columns[x], columns["value"], strict=True)) if columns else []


def _samples(curve: Sequence[Mapping[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    """Points of the summary's own curve; thinned, and without those where something is missing."""
    pairs = [(_number(point.get(x)), _number(point.get(y))) for point in curve]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return known[:: len(known) // POINTS + 1] + known[-1:]


def _chart(
    title: str, sentence: str, lines: list[Line], x: str, y: str, level: float | None = None, level_name: str = ""
) -> str:
    """A figure with its title, its key and a sentence for those who cannot see it; nothing where nothing is known."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [a for line in lines for a, _ in line.points]
    ys = [b for line in lines for _, b in line.points] + ([level] if level is not None else [])
    across, up = _axis(xs, x), _axis(ys, y)
    marks = [
        f'<line class="grid" x1="0" x2="100%" y1="{y0}%" y2="{y0}%"/><text x="-8" y="{y0}%" dy=".32em" class="y">{_e(text)}</text>'
        for y0, text in ((_percentage(1 - up.place(tick)), up.label(tick)) for tick in up.ticks)
    ]
    marks += [
        f'<text x="{_percentage(across.place(tick))}%" y="100%" dy="1.5em" class="x">{_e(across.label(tick))}</text>'
        for tick in across.ticks
    ]
    paths = "".join(
        f'<path class="{line.color}" d="M{"L".join(f"{1000 * across.place(a):.1f} {1000 - 1000 * up.place(b):.1f}" for a, b in line.points)}"/>'
        for line in lines
    )
    over = ""
    if level is not None:
        y0 = _percentage(1 - up.place(level))
        over += (
            f'<line class="level" x1="0" x2="100%" y1="{y0}%" y2="{y0}%"/>'
            f'<text class="note" x="100%" y="{y0}%" dy="1.3em">{_e(f"{level_name} {up.label(level)}")}</text>'
        )
    last = lines[-1]
    if last.color == "ink":
        a, b = last.points[-1]
        over += f'<circle class="ink" cx="{_percentage(across.place(a))}%" cy="{_percentage(1 - up.place(b))}%" r="4"/>'
    named = [line for line in lines if line.name]
    key = "".join(f'<li><i class="dot {line.color}"></i><bdi class="name">{_e(line.name)}</bdi></li>' for line in named)
    spoken = "; ".join(
        f"{line.name} from {up.label(line.points[0][1])} to {up.label(line.points[-1][1])}" for line in named[-COLORS - 1 :]
    )
    return (
        f'<figure class="card"><figcaption><h2>{_e(title)}</h2><p>{_e(sentence)}</p></figcaption><div class="plot">'
        f'<svg role="img" aria-label="{_e(f"{title}: {spoken}")}">{"".join(marks)}'
        f'<svg class="curves" viewBox="0 0 1000 1000" preserveAspectRatio="none">{paths}</svg>{over}</svg></div>'
        f'<ul class="key">{key if len(named) > 1 else ""}</ul></figure>'
    )


class Axis(NamedTuple):
    """ticks: values that get a mark; place: value -> [0, 1]; label: value -> text."""

    ticks: list[float]
    place: Callable[[float], float]
    label: Callable[[float], str]


def _axis(values: Sequence[float], kind: str) -> Axis:
    low, high = min(values), max(values)
    if kind == "log" and low > 0 and high / low > 20:
        a, b = math.log10(low / 1.15), math.log10(high * 1.15)
        steps = (1, 2, 5) if b - a < 2.5 else (1,)
        ticks = [m * 10.0**e for e in range(math.floor(a), math.ceil(b)) for m in steps if a <= math.log10(m * 10.0**e) <= b]
        return Axis(ticks, lambda value: (math.log10(value) - a) / (b - a), "{:g}".format)
    if kind in {"time_s", "updates", "bytes"} or low > 0 and low < 0.4 * high:
        low = min(low, 0.0)
    unit, name = _unit(high, kind)
    step = _step((high - low) / unit or 1.0) * unit
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last += last == first
    ticks = [i * step for i in range(first, last + 1)]
    bottom, top = ticks[0], ticks[-1]
    if kind in {"time_s", "updates"}:
        top = high or top
        ticks = [tick for tick in ticks if tick <= top]
    if kind == "percent":
        return Axis(ticks, lambda value: (value - bottom) / (top - bottom), lambda v: _percent(v).replace(".0", ""))
    return Axis(ticks, lambda value: (value - bottom) / (top - bottom), lambda value: f"{value / unit:.4g}{name if value else ''}")


def _step(span: float) -> float:
    """1, 2 or 5 times a power of ten: about four to a span."""
    power = 10.0 ** math.floor(math.log10(span / 4))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= span / 4 * 0.999)


UNITS: Mapping[str, Sequence[tuple[float, str]]] = {
    "time_s": ((86_400 * 3, " d"), (3600 * 3, " h"), (180, " min"), (0, " s")),
    "bytes": ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (0, " B")),
    "updates": ((2e6, " M"), (2e4, " k"), (0, "")),
    "percent": ((0, ""),),
}
