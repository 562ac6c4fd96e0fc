"""What the run log tells of a run: curves, counts and events, gathered line by line.

Laws
* A log that is missing, torn or odd costs its own figures only.
* Memory is bounded: POINTS per curve and of leaders, WORKERS one by one, EVENTS in words, whatever the log holds.
* Time 0 is the given start (seconds since 1970; lines before it belong to an earlier run), else the first line.

Left out: what follows from it (`figures`), and writing the log (`paramserver.telemetry`).
"""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
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
FREQUENT = {"close": 3}
"""Kinds of event that may come every round -> how many of them are put in words; all of them are counted."""
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

COUNTS = ("updates", "steps", "samples", "bytes_up", "bytes_down", "rejected")
APPLY = {"time", "kind", "worker", "number", "version", "lag", "weight", "loss", "bytes_pulled", *COUNTS}
"""Values of every `apply` line; all others are the rule's own figures."""
LEADER = {"leader", "round"}
"""Figures of a rule with a leader, in `apply` and `close` lines: they make `Leaders`, and no curve."""
DIVERSITY = {"bound": "batch_bound", "in_flight": "batch_in_flight"}
"""Curves of gradient diversity -> their value in a `diversity` line."""
SENTENCES = {
    "join": "{worker} {resumed}",
    "leave": "{worker} left: {reason}, after {updates} updates",
    "close": "version {version}: {reasons}",
    "reject": "{worker}: update {number} was refused: {sentence}",
    "fault": "{worker} was told: {sentence}",
    "checkpoint": "version {version} is on the disk, written in {seconds} s",
    "checkpoint_failed": "{sentence}",
    "initialised": "{worker} gave the first weights, {parameters} parameters",
    "finished": "{reason}, at version {version}",
    "diverged": "the center is no longer finite since version {version}, after an update of {worker}",
}
RESUMED = {"new": "joined", "live": "is back", "record": "is back after its lease had ended"}


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


class Lead(NamedTuple):
    """From this time and round on, this worker led."""

    time_s: float
    round: int
    name: str


class Leaders:
    """Who led in which round: how often each, and every change; with too many changes, those of a sample.

    The sample looks at every `every`-th round: it may miss a short lead, and never tells of one that was not.
    """

    def __init__(self) -> None:
        self.counts, self.every = Counter[str](), 1
        self._rounds, self._round = 0, 0
        self._now: Lead | None = None
        self._kept: list[tuple[int, Lead]] = []  # with the first sampled round of each, counted from 0

    def add(self, time_s: float, number: int, name: str) -> None:
        """So many rounds are over, and this one led. Of the lines of one round, the first is that of its leader."""
        if number < 1 or number == self._round:
            return
        self._round = number
        name = name if name in self.counts or len(self.counts) < WORKERS else OTHERS
        self.counts[name] += 1
        if self._now is None or self._now.name != name:
            self._now = Lead(time_s, number, name)
        if self._rounds % self.every == 0:
            self._keep(self._rounds, self._now)
        self._rounds += 1
        while len(self._kept) == POINTS:
            self._thin()

    def changes(self) -> list[Lead]:
        """In the order they came, at most POINTS; the last one is that of the last leader."""
        kept = [lead for _, lead in self._kept]
        return [*kept, self._now] if self._now and kept[-1].name != self._now.name else kept

    def _keep(self, sampled: int, lead: Lead) -> None:
        if not self._kept or self._kept[-1][1].name != lead.name:
            self._kept.append((sampled, lead))

    def _thin(self) -> None:
        self.every *= 2
        kept, self._kept = self._kept, []
        ends = [*(first for first, _ in kept[1:]), self._rounds]
        for (first, lead), end in zip(kept, ends, strict=True):
            sampled = -(-first // self.every) * self.every
            if sampled < end:
                self._keep(sampled, lead)


class Run:
    """What the log tells of the run."""

    def __init__(self, started: float | None = None) -> None:
        self.started, self.seconds, self.updates, self.unreadable_lines = started, 0.0, 0, 0
        self._earliest = 0.0 if started is None else started - SLACK_S
        self.workers: dict[str, Trace] = {}
        self.loss, self.bytes = Curve(WINDOW), {"up": Curve(), "down": Curve()}
        self.sent = dict.fromkeys(self.bytes, 0)
        self.rule: dict[str, Curve] = {}
        self.leaders = Leaders()
        self.diversity = {name: Curve() for name in DIVERSITY}
        self.last_diversity: dict[str, Any] = {}
        self.kinds: Counter[str] = Counter()
        self.first_events: list[dict[str, Any]] = []
        self.last_events: deque[dict[str, Any]] = deque(maxlen=EVENTS[1])
        self.unlisted = 0
        self.diverged = ""

    def take(self, line: Any) -> None:
        """One line of the log; one that makes no sense is counted and passed over."""
        at = finite(line.get("time")) if isinstance(line, dict) else None
        if at is None or not 0 <= at <= LATEST_S or not isinstance(line.get("kind"), str):
            self.unreadable_lines += 1
            return
        self.started = at if self.started is None else self.started
        time_s = max(at - self.started, 0.0)
        if at < self._earliest:
            return
        self.seconds = max(self.seconds, time_s)
        if line["kind"] == "diversity":
            self._measured(line, time_s)
            return
        trace = self._trace(line, time_s)
        if line["kind"] in ("apply", "close"):
            self._led(line, time_s)
        if trace is not None and line["kind"] == "apply":
            self._apply(trace, line, time_s)
            return
        if trace is not None and line["kind"] == "reject":
            trace.counts["rejected"] += 1
        kind = line["kind"][:TEXT_CHARACTERS]
        self.kinds[kind if kind in self.kinds or len(self.kinds) < KINDS else "other"] += 1
        if kind in FREQUENT and self.kinds[kind] > FREQUENT[kind]:
            self.unlisted += 1
            return
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
        known = finite(line.get("updates"))  # more than the lines, where steps are reported instead of pushed
        self.updates = max(self.updates + 1, int(known or 0))
        trace.counts["updates"] += 1
        for name in ("steps", "samples", "bytes_up", "bytes_down"):
            trace.counts[name] += int(finite(line.get(name)) or 0)
        self.sent["down"] += int(finite(line.get("bytes_pulled")) or 0)
        for way, curve in self.bytes.items():
            self.sent[way] += int(finite(line.get(f"bytes_{way}")) or 0)
            curve.add(time_s, self.updates, self.sent[way])
        if (lag := finite(line.get("lag"))) is not None:
            trace.lags[min(max(int(lag), 0), LAG_LIMIT)] += 1
            trace.lag_max = max(trace.lag_max, int(lag))
        if (loss := finite(line.get("loss"))) is not None:
            trace.loss.add(time_s, self.updates, loss)
            self.loss.add(time_s, self.updates, loss)
        for name in [name for name in line if name not in APPLY | LEADER]:
            value = finite(line[name])
            if value is not None and (name in self.rule or len(self.rule) < DETAILS):
                self.rule.setdefault(name, Curve(WINDOW)).add(time_s, self.updates, value)

    def _measured(self, line: Mapping[str, Any], time_s: float) -> None:
        updates = max(self.updates, int(finite(line.get("updates")) or 0))
        for name, curve in self.diversity.items():
            if (value := finite(line.get(DIVERSITY[name]))) is not None:
                curve.add(time_s, updates, value)
        names = (*DIVERSITY.values(), "gradient", "noise", "delta")
        self.last_diversity = {name: finite(line.get(name)) for name in names} | {
            "measurements": int(finite(line.get("measurements")) or 0),
            "helps": line.get("helps") if isinstance(line.get("helps"), bool) else None,
            "sentence": str(line.get("sentence") or "")[:TEXT_CHARACTERS],
        }

    def _led(self, line: Mapping[str, Any], time_s: float) -> None:
        name, number = line.get("leader"), finite(line.get("round"))
        if isinstance(name, str) and name and number is not None:
            self.leaders.add(time_s, int(number), name[:TEXT_CHARACTERS])


def read(directory: Path, started: float | None = None) -> Run:
    """The run log of `directory`, from `started` (seconds since 1970) on."""
    run = Run(started)
    for path in (directory / PREVIOUS, directory / FILE):
        if path.is_file():
            with path.open("rb") as file:
                for data in iter(partial(file.readline, LINE_BYTES), b""):
                    run.take(_parsed(data))
    return run


def finite(value: Any) -> float | None:
    """A finite number; None for anything else."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if fine else None


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _sentence(line: Mapping[str, Any]) -> str:
    """One line of the log in words."""
    values = {name: _words(value) for name, value in line.items()}
    said = {"worker": values.get("worker") or "somebody", "resumed": RESUMED.get(values.get("resumed", ""), "joined")}
    try:
        text = SENTENCES[line["kind"]].format_map(values | said)
    except KeyError:
        text = ", ".join(f"{name} {value}" for name, value in values.items() if name not in ("time", "kind"))
    return text[:TEXT_CHARACTERS]


def _words(value: Any) -> str:
    """A value of a line; of a list of reasons, each once."""
    match value:
        case float():
            return f"{value:.3g}"
        case [str(), *_]:
            return "; ".join(dict.fromkeys(map(str, value)))
        case _:
            return str(value)
