"""`report.html`: its sections, made of the figures in `report.json` and of nothing else. Pure.

Laws
* The page is one file that loads nothing and runs nothing (its own policy forbids both): it works offline, in light
  and dark, at phone width, and its charts say in words what they show.
* What is not known is not claimed: a sentence, a tile or a chart without its figure is left out, or shows UNKNOWN.
* LINES, ROWS, PANELS and LANES bound what grows with the number of workers; the rest is in `report.json`.

Left out: drawing (`charts`), escaping (`markup`), colors and layout (`style`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from deploy.report.charts import Lane, Line, chart, from_columns, from_samples, histograms, strip
from deploy.report.figures import exchange
from deploy.report.log import finite
from deploy.report.markup import UNKNOWN, Html, count, duration, percent, short, size, tag, text, together
from deploy.report.style import PAGE, STYLE

LINES, ROWS, PANELS, LANES = 40, 64, 12, 16
"""At most: curves in a chart, rows of the workers' table, lag histograms, lanes of leaders."""
COLORS = 8
"""With more workers than this, a color no longer tells them apart."""
BAD = {"reject", "fault", "diverged", "checkpoint_failed", "unsendable", "log_lost"}
RULE_FIGURES = {
    "pi": ("Scale π", "By how much the rule scaled an update.", None),
    "energy": ("Energy of the center", "Kinetic energy over its bound: stable up to 1.", 1),
}
"""First word of a figure of the rule's own -> title, sentence, and the level to hold it against."""


def page(report: Mapping[str, Any]) -> str:
    """`report.html` for the figures of one run, as `report.json` holds them."""
    names = [row["name"] for row in report["workers"]]
    colors = {name: f"c{i}" if len(names) <= COLORS else "many" for i, name in enumerate(names)}
    title = " · ".join(str(report[key]) for key in ("task", "rule") if report.get(key)) or "Training"
    facts = [title, f"{len(names)} {'worker' if len(names) == 1 else 'workers'}"]
    made_up = report.get("simulated")
    if made_up:
        facts.append("simulated, in virtual time")
    elif report["started"] is not None:
        facts.append(f"{datetime.fromtimestamp(report['started'], UTC):%Y-%m-%d %H:%M} UTC")
    body = together(
        tag("header", tag("p", " · ".join(facts)), tag("h1", _result(report)), _notice(report)),
        tag("dl", (_tile(*tile) for tile in _tiles(report) if tile[1] != UNKNOWN), class_="tiles card"),
        tag("div", _charts(report, colors), class_="charts"),
        _leaders(report, colors),
        _lags(report["lag"]["workers"], colors),
        _section("Workers", _workers(report, colors)),
        _section("Events", _events(report["events"])),
        _section("Settings", _settings(report["settings"])),
        _section("Simulated cluster", _facts(made_up)) if made_up else Html(),
        tag("div", (_section(name, _facts(report[name.lower()])) for name in ("Versions", "Seeds")), class_="charts"),
    )
    return PAGE.substitute(style=STYLE, title=together(title), body=body)


def _section(name: str, *inside: Html) -> Html:
    return tag("section", tag("h2", name), *inside, class_="card")


def _result(report: Mapping[str, Any]) -> str:
    spent = f"after {count(report['updates'])} updates in {duration(report['seconds'])}"
    solo = report.get("solo")  # where the summary says how long the lone worker trained, so does the sentence
    steps = (
        f" after {count(finite(solo.get('steps')))} steps" if isinstance(solo, Mapping) and solo.get("steps") else ""
    )
    for unit, words, form in (("accuracy", "", percent), ("loss", "a test loss of ", short)):
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
        yield "Accuracy", percent(accuracy), "on test data" if alone is None else versus
    if loss is not None:
        alone = report["solo_loss"]
        yield "Test loss", short(loss), "of the center" if alone is None else f"one worker alone {short(alone)}"
    yield "Samples per second", count(report["samples_per_s"]), "all workers together"
    yield "Updates", count(report["updates"]), f"in {duration(report['seconds'])}"
    yield "Lag", short(lag["median"]), f"updates, median; at most {short(lag['max'])}"
    yield "Sent", size(report["bytes_up"] + report["bytes_down"]), f"{size(report['bytes_up'])} of it up"
    yield "Goodput", percent(report["goodput"]), f"{percent(report['stalled_share'])} of the time stalled"
    yield "Fairness", short(report["fairness"]), "Jain index of updates; 1 is even"


def _tile(name: str, figure: str, note: str) -> Html:
    return tag("div", tag("dt", name), tag("dd", tag("b", figure), tag("small", note)))


def _charts(report: Mapping[str, Any], colors: Mapping[str, str]) -> Iterator[Html]:
    curves, center, few = report["curves"], report["curve"], len(colors) <= COLORS
    for x, words in (("time_s", "time"), ("updates", "updates")):
        traced = [name for name in colors if name in curves["workers"]][:LINES]
        lines = [Line(name if few else "", from_columns(curves["workers"][name], x), colors[name]) for name in traced]
        lines += [] if few else [Line("all workers", from_columns(curves["loss"], x), "c0")]
        lines.append(Line("center, test data", from_samples(center, x, "loss"), "ink"))
        yield chart(f"Loss over {words}", "Training loss of the workers, moving average.", lines, x, "loss")
    reached = Line("center", from_samples(center, "time_s", "accuracy"), "ink")
    end_s = max((time_s for time_s, _ in reached.points), default=0.0)
    alone = [point for point in from_samples(report["solo_curve"], "time_s", "accuracy") if point[0] <= end_s]
    lines = [Line("one worker alone", alone, "soft"), reached]
    level = (f"one worker alone, in the end: {percent(report['solo_accuracy'])}", report["solo_accuracy"])
    yield chart("Accuracy over time", "On test data.", lines, "time_s", "percent", level)
    ways = (("up", "c0"), ("down", "c1 dash"))  # where both are as many, both show
    lines = [Line(way, from_columns(curves["bytes"][way], "time_s"), color) for way, color in ways]
    yield chart("Bytes sent over time", "Updates go up, the center comes down.", lines, "time_s", "bytes")
    if report["diversity"]:
        pairs = (("batch-size bound B_S", "bound", "c0"), ("batch in flight", "in_flight", "c1 dash"))
        lines = [Line(name, from_columns(curves["diversity"][curve], "time_s"), color) for name, curve, color in pairs]
        yield chart("Gradient diversity over time", report["diversity"]["sentence"], lines, "time_s", "samples")
    families: dict[str, list[Line]] = {}
    for name, curve in curves["rule"].items():
        family, _, member = name.partition("_")
        lines = families.setdefault(family, [])
        lines.append(Line(member or name, from_columns(curve, "updates"), f"c{len(lines)}"))
    for family, lines in families.items():
        title, sentence, bound = RULE_FIGURES.get(family, (family, "A figure of the rule.", None))
        level = (f"bound {bound}", bound)
        yield chart(f"{title} over updates", f"{sentence} Moving average.", lines, "updates", "", level)


def _lags(lags: Mapping[str, Any], colors: Mapping[str, str]) -> Html:
    lags = {name: lag for name, lag in lags.items() if lag["histogram"]}
    shown = [name for name in colors if name in lags][:PANELS]
    if not shown:
        return Html()
    panels = histograms({name: lags[name] for name in shown}, colors)
    sentence = "Updates that the center took between a worker's pull and its push: how often each lag came."
    if len(lags) > PANELS:
        sentence += f" {len(lags) - PANELS} more workers are in report.json."
    return _section("Lag per worker", tag("p", sentence), tag("div", panels, class_="panels"))


def _leaders(report: Mapping[str, Any], colors: Mapping[str, str]) -> Html:
    """A lane for each worker, a bar wherever it led; with too many workers, lanes of those that led most."""
    counts, changes = report["leaders"]["counts"], report["leaders"]["changes"]
    if not changes:
        return Html()
    rounds, names = sum(counts.values()), list(dict.fromkeys([*colors, *counts]))
    most = set(sorted(names, key=lambda name: -counts.get(name, 0))[:LANES])
    end_s = max([time_s for time_s, _, _ in changes] + report["curves"]["bytes"]["up"]["time_s"][-1:])
    spans: dict[str, list[tuple[float, float, str]]] = {name: [] for name in names}
    for (start_s, number, name), (stop_s, _, _) in zip(changes, [*changes[1:], (end_s, 0, "")], strict=True):
        words = f"from {duration(start_s)}, round {count(number)}, to {duration(stop_s)}"
        spans[name].append((start_s, max(start_s, stop_s), words))
    lanes = []
    for name in (name for name in names if name in most):
        led = counts.get(name, 0)
        note = f"{count(led)} {'round' if led == 1 else 'rounds'}, {percent(led / rounds)}"
        lanes.append(Lane(name, note, colors.get(name, "many"), spans[name]))
    sentence = f"Who led over time: {count(rounds)} {'round' if rounds == 1 else 'rounds'}, "
    if report["leaders"]["every"] == 1:
        sentence += f"{count(len(changes) - 1)} {'change' if len(changes) == 2 else 'changes'} of the leader."
    else:
        sentence += f"of which one in {count(report['leaders']['every'])} was looked at: short leads may be missing."
    if len(names) > LANES:
        sentence += f" {len(names) - LANES} more workers are in report.json."
    return _section("Leader", tag("p", sentence), strip(lanes, end_s, "time_s"))


def _workers(report: Mapping[str, Any], colors: Mapping[str, str]) -> Html:
    rows = []
    for row in report["workers"][:ROWS]:
        name, lag = row["name"], report["lag"]["workers"].get(row["name"], {})
        cells = [count(row["updates"]), count(row["steps"]), count(row["samples_per_s"])]
        cells += [short(lag.get("median")), short(lag.get("max")), size(row["bytes_up"]), size(row["bytes_down"])]
        cells += [count(row["rejected"]), duration(exchange(row, "stalled_s")), count(exchange(row, "hidden"))]
        head = tag("th", tag("i", class_=colors[name]), tag("bdi", name), scope="row")
        rows.append(together(head, (tag("td", cell) for cell in cells)))
    heads = "Worker|Updates|Steps|Samples/s|Lag, median|Lag, most|Up|Down|Refused|Stalled|Hidden"
    words = "Stalled: time spent waiting for the server. Hidden: exchanges that were over before anybody waited."
    if len(report["workers"]) > ROWS:
        words += f" {len(report['workers']) - ROWS} more workers are in report.json."
    return together(_table("Workers", heads, rows, "numbers"), tag("p", words)) if rows else tag("p", "None was here.")


def _events(events: Mapping[str, Any]) -> Html:
    left_out = sum(events["counts"].values()) - events["unlisted"] - len(events["first"]) - len(events["last"])
    gap = [{"time_s": None, "kind": "more", "text": f"{count(left_out)} are left out here"}] if left_out else []
    items = []
    for event in events["first"] + gap + events["last"]:
        kind = tag("b", event["kind"], class_="bad" if event["kind"] in BAD else "fine")
        items.append(tag("li", tag("time", duration(event["time_s"])), kind, tag("span", event["text"])))
    counts = ", ".join(f"{kind} {count(number)}" for kind, number in events["counts"].items())
    if events["unlisted"]:
        counts += f"; {count(events['unlisted'])} that come every round are not listed"
    listed = tag("div", tag("ol", items), class_="events", role="region", aria_label="Events", tabindex=0)
    return together(tag("p", counts or "The run log tells of none."), listed if items else "")


def _settings(settings: Sequence[Mapping[str, Any]]) -> Html:
    """Those that somebody chose, and the defaults folded away below them."""
    chosen: list[Html] = []
    default: list[Html] = []
    for row in settings:
        head = tag("th", tag("code", str(row.get("name"))), scope="row")
        cells = [tag("code", text(row.get("value"))), text(row.get("origin")), text(row.get("description"))]
        rows = default if row.get("origin") == "default" else chosen
        rows.append(together(head, (tag("td", cell) for cell in cells)))
    heads = "Setting|Value|From|Meaning"
    shown = _table("Chosen settings", heads, chosen, "words") if chosen else tag("p", "All are at their default.")
    folded = tag("summary", f"{len(default)} more, at their default"), _table("Defaults", heads, default, "words")
    return together(shown, tag("details", *folded) if default else "")


def _facts(facts: Mapping[str, Any]) -> Html:
    pairs = (tag("div", tag("dt", name), tag("dd", text(value))) for name, value in facts.items())
    return tag("dl", pairs, class_="facts") if facts else tag("p", "Not recorded.")


def _table(name: str, heads: str, rows: Iterable[Html], kind: str) -> Html:
    """A table in a box of its own, which scrolls where it is wider than the page."""
    head = tag("thead", tag("tr", (tag("th", title, scope="col") for title in heads.split("|"))))
    table = tag("table", head, tag("tbody", (tag("tr", row) for row in rows)), class_=kind)
    return tag("div", table, class_="wide", role="region", aria_label=name, tabindex=0)
