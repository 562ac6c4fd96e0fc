"""The figures of a run, plain values as `report.json` holds them: the summary, completed from the run log. Pure.

Laws
* What the summary measured beats the log; a worker that only the log knows has a row too.
* What is not known, or not finite, is null, never NaN.
* What scripts and the page rely on is there, whatever the summary leaves out.

Left out: reading the log (`log`), and how the figures look (`page`).
"""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deploy.report.log import Run, Trace, finite

ALWAYS: Mapping[str, Any] = {
    **dict.fromkeys(("center_accuracy", "center_loss", "solo_accuracy", "solo_loss", "samples_per_s")),
    **{"settings": [], "seeds": {}, "versions": {}, "curve": [], "solo_curve": []},
}
"""What stands in `report.json` for a key that the summary leaves out."""


def figures(summary: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """All that `report.json` holds: the summary as it is, and what the log adds; plain and finite."""
    known = {name: value for name, value in summary.items() if value is not None}
    rows = _rows(known.get("workers", ()), run)
    updates = finite(known.get("updates"))
    unseen = max(int(updates or 0) - run.updates, 0)
    lags = sum((trace.lags for trace in run.workers.values()), Counter[int]())
    seconds = finite(known.get("seconds")) or run.seconds
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
            "diversity": {name: curve.columns(unseen) for name, curve in run.diversity.items()},
            "rule": {name: curve.columns(unseen) for name, curve in sorted(run.rule.items())},
        },
        "diversity": run.last_diversity or None,
        "leaders": {
            "counts": {name: run.leaders.counts[name] for name in sorted(run.leaders.counts, key=_natural)},
            "changes": [[round(time_s, 3), number, name] for time_s, number, name in run.leaders.changes()],
            "every": run.leaders.every,
        },
        "events": {
            "counts": run.kinds,
            "first": run.first_events,
            "last": run.last_events,
            "unlisted": run.unlisted,
        },
        "diverged": run.diverged,
        "unreadable_lines": run.unreadable_lines,
    }
    plain: dict[str, Any] = _plain(found)
    return plain


def exchange(row: Mapping[str, Any], name: str) -> Any:
    """A figure of a worker's own about its exchanges, which stand by themselves or in the row."""
    exchanges = row.get("exchanges")
    return exchanges.get(name) if isinstance(exchanges, Mapping) else row.get(name)


def _rows(workers: Iterable[Mapping[str, Any]], run: Run) -> list[dict[str, Any]]:
    """One dict per worker, as given and completed from the log; a worker that only the log knows has one too."""
    given = {str(worker.get("name")): dict(worker) for worker in workers}
    rows = []
    for name in sorted({*given, *run.workers}, key=_natural):
        row, trace = {"name": name} | given.get(name, {}) | {"name": name}, run.workers.get(name, Trace())
        for key, count in trace.counts.items():
            value = finite(row.get(key))
            row[key] = count if value is None else int(value)
        if finite(row.get("samples_per_s")) is None:
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
        stalled_s += min(finite(exchange(row, "stalled_s")) or 0.0, here_s)
    applied, refused = (sum(row[name] for row in rows) for name in ("updates", "rejected"))
    share = applied / (applied + refused) if applied + refused else None
    stalled = stalled_s / present_s if present_s else None
    good = None if share is None or stalled is None else share * (1 - stalled)
    found = {"goodput": good, "stalled_share": stalled, "applied_share": share}
    return {name: None if value is None else round(value, 6) for name, value in found.items()}


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
