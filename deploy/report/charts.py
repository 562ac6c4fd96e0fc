"""The charts: curves, bars and lanes in an inline SVG that stretches to any width, its text staying as it is. Pure.

Laws
* A chart says in words what it shows, to those who cannot see it.
* An axis holds every value that it was made for, and all of its marks.
* A curve without points is left out, and so is a chart without curves.

Left out: which charts the page has and what they are fed (`page`), and their colors (`style`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from deploy.report.log import POINTS, finite
from deploy.report.markup import Html, percent, short, tag, unit_of

BINS = 24
"""Bars of one histogram."""
TAIL = 0.99
"""Share of a worker's updates whose lag has a bar of its own; the last bar holds all others."""
FEWEST = 7
"""The lag histograms reach at least this far."""
SPANNING = ("loss", "samples")
"""Kinds of value that may span orders of magnitude."""
NARROWEST = 0.15
"""Width of a short span in a lane, percent: less could not be seen."""


class Line(NamedTuple):
    """One curve of a chart; without a name it has no entry in the key."""

    name: str
    points: list[tuple[float, float]]
    color: str


class Lane(NamedTuple):
    """One lane of a strip: its name, what stands beside it, its color, and its spans (from, to, what is told of it)."""

    name: str
    note: str
    color: str
    spans: list[tuple[float, float, str]]


class Axis(NamedTuple):
    """ticks: values that get a mark; place: value -> [0, 1]; label: value -> text."""

    ticks: list[float]
    place: Callable[[float], float]
    label: Callable[[float], str]

    def right(self, value: float) -> str:
        """How far from the left edge, for SVG."""
        return f"{100 * self.place(value):.2f}%"

    def down(self, value: float) -> str:
        """How far from the upper edge, for SVG."""
        return f"{100 - 100 * self.place(value):.2f}%"


def from_columns(columns: Mapping[str, list[float]], x: str) -> list[tuple[float, float]]:
    """Points of one of the log's curves, over its column `x`."""
    return list(zip(columns[x], columns["value"], strict=True))


def from_samples(curve: Sequence[Mapping[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    """Points of one of the summary's own curves; thinned, and without those where something is missing."""
    pairs = [(finite(point.get(x)), finite(point.get(y))) for point in curve]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return known[:: len(known) // POINTS + 1] + known[-1:]


def chart(title: str, sentence: str, lines: list[Line], x: str, y: str, level: tuple[str, Any] = ("", None)) -> Html:
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


def histograms(lags: Mapping[str, Mapping[str, Any]], colors: Mapping[str, str]) -> list[Html]:
    """Small multiples: one histogram of lags per worker, all on the same scales; `lags` is not empty, nor any in it."""
    counts = {name: {int(n): times for n, times in lag["histogram"].items()} for name, lag in lags.items()}
    most = max(FEWEST, *(_covering(count) for count in counts.values()))
    width = most // BINS + 1
    shares = {name: _shares(count, width, most) for name, count in counts.items()}
    top = max(max(share) for share in shares.values())
    panels = []
    for name, lag in lags.items():
        words = f"median {short(lag['median'])}, at most {short(lag['max'])}"
        bars, step = [], 100 / len(shares[name])
        for i, share in enumerate(shares[name]):
            to = "and more" if i == len(shares[name]) - 1 else f"to {(i + 1) * width - 1}"
            told = tag("title", f"lag {i * width} {to}: {percent(share)} of updates")
            x, y = f"{(i + 0.1) * step:.2f}%", f"{100 - 100 * share / top:.2f}%"
            bars.append(tag("rect", told, x=x, width=f"{0.8 * step:.2f}%", y=y, height=f"{100 * share / top:.2f}%"))
        last = f"{(len(bars) - 1) * width} and more"
        picture = tag("svg", bars, class_=f"bars {colors[name]}", role="img", aria_label=f"Lag of {name}: {words}")
        caption = tag("figcaption", tag("bdi", name), tag("small", words))
        ends = tag("div", tag("span", "0"), tag("span", last), class_="ends", aria_hidden="true")
        panels.append(tag("figure", caption, picture, ends))
    return panels


def strip(lanes: list[Lane], end: float, x: str) -> Html:
    """Lanes one below the other over one axis from 0 to `end`, a bar wherever a lane has a span; not without lanes."""
    across, rows = _axis([0.0, end], x), []
    for name, note, color, spans in lanes:
        bars = []
        for start, stop, words in spans:
            wide = max(100 * (across.place(stop) - across.place(start)), NARROWEST)
            bars.append(tag("rect", tag("title", words), x=across.right(start), width=f"{wide:.2f}%", height="100%"))
        rows += [tag("bdi", name), tag("small", note)]
        rows.append(tag("svg", bars, class_=f"lane {color}", role="img", aria_label=f"{name}: {note}"))
    marks = [tag("text", across.label(tick), x=across.right(tick), y=12) for tick in across.ticks]
    return tag("div", rows, tag("svg", marks, class_="ticks", aria_hidden="true"), class_="lanes")


def _axis(values: Sequence[float], kind: str) -> Axis:
    """The scale for values of a kind of `SCALES`, of `SPANNING` (logarithmic where they span much), or any other."""
    low, high = min(values), max(values)
    if kind in SPANNING and low > 0 and high / low > 20:
        a, b = math.log10(low / 1.1), math.log10(high * 1.1)
        steps = (1, 2, 5) if b - a < 3 else (1,)
        marks = [step * 10.0**power for power in range(math.floor(a), math.ceil(b)) for step in steps]
        ticks = [mark for mark in marks if a <= math.log10(mark) <= b]
        return Axis(ticks, lambda value: (math.log10(value) - a) / (b - a), "{:.3g}".format)
    runs = kind in ("time_s", "updates")
    if runs or kind == "bytes" or 0 < low < 0.4 * high:
        low = 0.0
    unit, name = unit_of(high, kind)
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
