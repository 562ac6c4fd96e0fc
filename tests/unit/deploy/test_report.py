"""The report: its figures follow from the log, its page from its figures, and nothing from outside becomes markup."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StateError
from deploy.report import write
from deploy.report.charts import _axis
from deploy.report.figures import figures
from deploy.report.log import EVENTS, FREQUENT, OTHERS, POINTS, TEXT_CHARACTERS, WORKERS, Curve, Leaders, read
from deploy.report.markup import SCALES, tag
from deploy.report.page import LANES, page

HOSTILE = """<script>alert("x")</script>&'><img src=x onerror=alert(1)>$title\ud800"""
HARMLESS = "(harmless)"  # sorts where HOSTILE does
BYTES = 4000
START_S = 1_785_000_000.0


def apply(worker: str, at_s: float, lag: int, **more: Any) -> dict[str, Any]:
    counts = {"samples": 64, "steps": 2, "bytes_up": BYTES, "bytes_down": 2 * BYTES}
    line = {"time": START_S + at_s, "kind": "apply", "worker": worker, "number": 1, "version": 1, "lag": lag}
    return line | {"weight": 1.0, "loss": 2.0 / (1.0 + at_s)} | counts | more


def event(kind: str, at_s: float, **values: Any) -> dict[str, Any]:
    return {"time": START_S + at_s, "kind": kind} | values


def small_log(first: str = "a") -> list[dict[str, Any]]:
    """`first` has three updates of lag 0, 1, 5 and one refused; b one of lag 1. An observer watches."""
    return [
        event("join", 0.0, worker=first, role="worker", resumed="new", lost=[]),
        event("join", 0.0, worker="b", role="worker", resumed="new", lost=[]),
        event("join", 0.5, worker="watcher", role="observer", resumed="new", lost=[]),
        apply(first, 1.0, 0, pi_median=0.5, pi_mean=0.6, energy_ratio=0.9),
        apply("b", 2.0, 1),
        apply(first, 3.0, 1, loss=None),
        event("reject", 3.5, worker=first, number=3, code="not_finite", sentence="Element 7 is not finite."),
        event("fault", 3.6, worker="watcher", code="stale", sentence="Say Hello again."),
        apply(first, 4.0, 5, pi_median=0.7, pi_mean=0.8, energy_ratio=1.1),
        event("leave", 10.0, worker=first, role="worker", reason="done", updates=3),
        event("leave", 10.0, worker="b", role="worker", reason="done", updates=1),
    ]


def small_summary(first: str = "a") -> dict[str, Any]:
    exchanges = {"stalled_s": 2.5, "hidden": 1, "lost": 0}
    return {
        "settings": [
            {"name": "rule", "value": "gem", "origin": "flag --rule", "description": "update rule"},
            {"name": "seed", "value": 0, "origin": "default", "description": "start of every random choice"},
        ],
        "seeds": {"server": 0, "workers": [1, 2]},
        "versions": {"python": "3.11"},
        "task": "digits",
        "rule": "gem",
        "workers": [{"name": first, "exchanges": exchanges}, {"name": "b", "stalled_s": 2.5, "hidden": 0}],
        "center_accuracy": 0.9778,
        "center_loss": 0.08,
        "solo_accuracy": 0.9389,
        "solo_loss": 0.2,
        "samples_per_s": 25.6,
        "seconds": 10.0,
        "updates": 4,
        "curve": [{"time_s": t, "updates": t, "samples": t, "loss": 1 / t, "accuracy": 1 - 1 / t} for t in (1, 2, 4)],
        "solo_curve": [{"time_s": 1.0, "updates": 1, "samples": 1, "loss": 1.0, "accuracy": 0.2}],
        "exit": 0,
    }


def log_into(directory: Path, lines: list[dict[str, Any]], name: str = "run.jsonl", tail: str = "") -> None:
    (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines) + tail, encoding="utf-8")


def written(directory: Path, summary: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Both files, read back; a NaN in the JSON fails."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    as_json, as_html = write(directory, summary)
    found = json.loads(as_json.read_text(encoding="utf-8"), parse_constant=refuse)
    return found, as_html.read_text(encoding="utf-8")


@pytest.fixture
def small(tmp_path: Path) -> tuple[dict[str, Any], str]:
    log_into(tmp_path, small_log())
    return written(tmp_path, small_summary())


# --- report.json ---


def test_it_holds_the_whole_summary_and_what_a_script_may_rely_on(small: tuple[dict[str, Any], str]) -> None:
    found, summary = small[0], small_summary()
    for name in summary.keys() - {"workers"}:
        assert found[name] == summary[name]
    for given_row, row in zip(summary["workers"], found["workers"], strict=True):
        assert given_row.items() <= row.items()


def test_figures_follow_from_the_log(small: tuple[dict[str, Any], str]) -> None:
    found = small[0]
    assert found["lag"]["workers"]["a"] == {"median": 1, "max": 5, "histogram": {"0": 1, "1": 1, "5": 1}}
    assert (found["lag"]["median"], found["lag"]["max"], found["lag"]["histogram"]) == (1, 5, {"0": 1, "1": 2, "5": 1})
    assert (found["bytes_up"], found["bytes_down"]) == (4 * BYTES, 8 * BYTES)
    a, b = found["workers"]
    assert (a["updates"], a["steps"], a["samples"], a["rejected"]) == (3, 6, 192, 1)
    assert (b["updates"], b["bytes_up"], b["samples_per_s"]) == (1, BYTES, 6.4)
    assert found["fairness"] == pytest.approx((3 + 1) ** 2 / (2 * (9 + 1)))
    assert found["stalled_share"] == pytest.approx(5 / 20)
    assert found["applied_share"] == pytest.approx(4 / 5)
    assert found["goodput"] == pytest.approx(0.8 * 0.75)
    assert found["curves"]["bytes"]["up"] == {
        "time_s": [1, 2, 3, 4],
        "updates": [1, 2, 3, 4],
        "value": [BYTES, 2 * BYTES, 3 * BYTES, 4 * BYTES],
    }
    assert found["curves"]["workers"]["a"]["updates"] == [1, 4], "a loss that is not known is no point"
    assert set(found["curves"]["rule"]) == {"pi_median", "pi_mean", "energy_ratio"}


def test_what_the_summary_measured_beats_the_log(tmp_path: Path) -> None:
    log_into(tmp_path, small_log())
    summary = small_summary() | {"workers": [{"name": "a", "updates": 7, "bytes_up": 1, "samples_per_s": 3.0}]}
    found, _ = written(tmp_path, summary)
    row = next(row for row in found["workers"] if row["name"] == "a")
    assert (row["updates"], row["bytes_up"], row["bytes_down"], row["samples_per_s"]) == (7, 1, 6 * BYTES, 3.0)


def test_an_observer_is_no_worker(small: tuple[dict[str, Any], str]) -> None:
    assert [row["name"] for row in small[0]["workers"]] == ["a", "b"]


def test_workers_are_in_natural_order(tmp_path: Path) -> None:
    log_into(tmp_path, [apply(f"worker-{i}", 1.0, 0) for i in (10, 9, 1)])
    assert [row["name"] for row in written(tmp_path, {})[0]["workers"]] == ["worker-1", "worker-9", "worker-10"]


def test_what_is_not_finite_becomes_null_and_numpy_becomes_plain(tmp_path: Path) -> None:
    odd = {"center_loss": float("nan"), "solo_accuracy": np.float32(0.5), "extra": {"a": np.int64(3), "b": tmp_path}}
    odd |= {"seconds": float("inf"), "curve": [{"time_s": 1.0, "updates": 1, "loss": float("nan"), "accuracy": None}]}
    found, html = written(tmp_path, odd)
    assert found["center_loss"] is None
    assert found["solo_accuracy"] == 0.5
    assert found["extra"] == {"a": 3, "b": str(tmp_path)}
    assert found["curve"][0]["loss"] is None
    assert "nan" not in html.lower().replace("dominant", "")


# --- the log ---


@pytest.mark.parametrize("summary", [{}, small_summary()], ids=["no summary", "summary"])
def test_without_a_log_there_is_still_a_report(tmp_path: Path, summary: dict[str, Any]) -> None:
    found, html = written(tmp_path, summary)
    required = "center_accuracy solo_accuracy samples_per_s settings seeds versions workers lag bytes_up bytes_down"
    assert found.keys() >= {*required.split(), "fairness", "curves"}
    assert found["lag"]["median"] is None
    assert "<h1>" in html


def test_a_torn_or_odd_line_costs_only_itself(tmp_path: Path) -> None:
    log_into(tmp_path, small_log())
    whole = figures({}, read(tmp_path))
    odd = [
        "[1, 2]",
        "null",
        '{"kind": "apply"}',
        '{"time": 1e200, "kind": "x"}',
        '{"time": "now", "kind": "x"}',
        "\x00",
    ]
    lines = [json.dumps(line) for line in small_log()]
    (tmp_path / "run.jsonl").write_bytes("\n".join([*lines, *odd]).encode() + b"\n\xff\xfe\n" + lines[3].encode()[:40])
    torn = figures({}, read(tmp_path))
    assert torn.pop("unreadable_lines") == len(odd) + 2
    assert whole.pop("unreadable_lines") == 0
    assert torn == whole


def test_odd_values_in_a_line_cost_only_themselves(tmp_path: Path) -> None:
    odd = {"lag": "many", "loss": True, "samples": None, "bytes_up": [1], "pi_median": {}, "worker": "a"}
    log_into(tmp_path, [*small_log(), apply("a", 5.0, 0) | odd, event("join", 5.0, worker=7, resumed=[], role={})])
    found, _ = written(tmp_path, {})
    assert found["workers"][0]["updates"] == 4
    assert found["bytes_up"] == 4 * BYTES
    assert found["bytes_down"] == 10 * BYTES


def test_the_part_set_aside_comes_first(tmp_path: Path) -> None:
    lines = small_log()
    log_into(tmp_path, lines)
    whole = figures({}, read(tmp_path))
    log_into(tmp_path, lines[:5], "run.1.jsonl")
    log_into(tmp_path, lines[5:])
    assert figures({}, read(tmp_path)) == whole


def test_an_earlier_run_in_the_same_log_is_left_out(tmp_path: Path) -> None:
    log_into(tmp_path, [apply("old", -500.0, 9), *small_log()])
    found, _ = written(tmp_path, {"started": START_S})
    assert [row["name"] for row in found["workers"]] == ["a", "b"]
    assert found["curves"]["bytes"]["up"]["time_s"] == [1, 2, 3, 4]


def test_a_start_that_is_told_a_little_late_loses_no_join(tmp_path: Path) -> None:
    log_into(tmp_path, small_log())
    found, _ = written(tmp_path, {"started": START_S + 0.02})
    assert [event["time_s"] for event in found["events"]["first"][:3]] == [0, 0, 0.48]


def test_a_clock_that_is_set_back_loses_no_line(tmp_path: Path) -> None:
    log_into(tmp_path, [apply("a", 0.0, 0), apply("a", -3.0, 0), apply("a", 1.0, 0)])
    found, _ = written(tmp_path, {})
    assert found["curves"]["bytes"]["up"]["time_s"] == [0, 0, 1]


def test_updates_that_the_log_lost_still_count_on_the_axis(tmp_path: Path) -> None:
    log_into(tmp_path, small_log())
    found, _ = written(tmp_path, {"updates": 104})
    assert found["curves"]["bytes"]["up"]["updates"] == [101, 102, 103, 104]


# --- gradient diversity ---


def measured(at_s: float, bound: float | None, sentence: str = "More workers can still help.", **more: Any) -> Any:
    values = {"batch_bound": bound, "batch_in_flight": 128.0, "gradient": 1.0, "noise": 9.0, "measurements": 3}
    values |= {"updates": int(at_s), "delta": 1.0, "helps": True, "sentence": sentence}
    return event("diversity", at_s, **values | more)


def test_gradient_diversity_has_curves_a_chart_and_its_last_sentence(tmp_path: Path) -> None:
    lines = [*small_log(), measured(1.5, 50.0), measured(2.5, None), measured(3.5, 300.0, HOSTILE)]
    log_into(tmp_path, lines)
    found, html = written(tmp_path, {})
    assert found["curves"]["diversity"]["bound"] == {"time_s": [1.5, 3.5], "updates": [4, 4], "value": [50.0, 300.0]}
    assert found["curves"]["diversity"]["in_flight"]["value"] == [128.0] * 3
    last = found["diversity"]
    assert (last["batch_bound"], last["measurements"], last["delta"], last["helps"]) == (300.0, 3, 1.0, True)
    assert last["sentence"].startswith("<script>")
    assert "Gradient diversity over time" in html
    assert "<script>" not in html
    assert "diversity" not in found["events"]["counts"], "a curve, and no event"


def test_without_a_bound_there_is_still_the_sentence(tmp_path: Path) -> None:
    log_into(tmp_path, [*small_log(), measured(1.5, None, "B_S is larger than can be told.")])
    assert "B_S is larger than can be told." in written(tmp_path, {})[1]
    log_into(tmp_path, [*small_log(), measured(1.5, None, helps=7, sentence=None, measurements="many")])
    last = written(tmp_path, {})[0]["diversity"]
    assert (last["helps"], last["sentence"], last["measurements"]) == (None, "", 0)
    log_into(tmp_path, small_log())
    found, html = written(tmp_path, {})
    assert found["diversity"] is None
    assert "Gradient diversity over time" not in html


# --- leaders ---


def led_log(leaders: str, first: str = "a") -> list[dict[str, Any]]:
    """A round a second, led by `first` where the letter is a, else by the letter; the leader pushes."""
    names = [first if letter == "a" else letter for letter in leaders]
    return [apply(name, float(i), 0, leader=name, round=i + 1) for i, name in enumerate(names)]


def test_the_history_of_leaders_follows_from_the_log(tmp_path: Path) -> None:
    log_into(tmp_path, led_log("aabbba"))
    found, _ = written(tmp_path, {})
    assert found["leaders"] == {
        "counts": {"a": 3, "b": 3},
        "changes": [[0, 1, "a"], [2, 3, "b"], [5, 6, "a"]],
        "every": 1,
    }


def test_where_steps_are_reported_curves_follow_them_and_pulls_are_sent_bytes(tmp_path: Path) -> None:
    """Three uploads stand for thirty steps; what the others pulled meanwhile is in the next upload's line."""
    lines = [
        apply("a", float(i), 0, leader="a", round=i, updates=10 * i, bytes_down=0, bytes_pulled=3 * BYTES)
        for i in (1, 2, 3)
    ]
    log_into(tmp_path, lines)
    found, _ = written(tmp_path, {"updates": 30})
    down, loss = found["curves"]["bytes"]["down"], found["curves"]["loss"]
    assert down["updates"] == [10, 20, 30]
    assert down["value"] == [3 * BYTES, 6 * BYTES, 9 * BYTES]
    assert loss["updates"] == [10, 20, 30]


def test_of_several_uploads_in_a_round_the_first_tells_its_leader(tmp_path: Path) -> None:
    """With groups: the upload that ends a round, then those of the next election, which carry the same number."""
    lines = [apply("b", 0.0, 0, leader="a", round=0), apply("a", 1.0, 0, leader="a", round=1)]
    lines += [apply("c", 2.0, 0, leader="b", round=1), apply("b", 3.0, 0, leader="b", round=2)]
    log_into(tmp_path, lines)
    found, _ = written(tmp_path, {})
    assert found["leaders"]["counts"] == {"a": 1, "b": 1}
    assert found["leaders"]["changes"] == [[1, 1, "a"], [3, 2, "b"]]


def test_a_round_that_closes_without_a_push_has_a_leader_too(tmp_path: Path) -> None:
    close = event("close", 1.0, version=2, reasons=["b leads all"], leader="b", round=2)
    log_into(tmp_path, [*led_log("a"), close])
    found, _ = written(tmp_path, {})
    assert found["leaders"]["changes"] == [[0, 1, "a"], [1, 2, "b"]]
    assert found["updates"] == 1


def test_a_server_that_went_back_to_a_checkpoint_counts_the_repeated_rounds(tmp_path: Path) -> None:
    log_into(tmp_path, [*led_log("aab"), apply("b", 5.0, 0, leader="b", round=2), *led_log("aab")[2:]])
    found, _ = written(tmp_path, {})
    assert found["leaders"]["counts"] == {"a": 2, "b": 3}


def test_other_rules_have_no_leader_and_no_section(small: tuple[dict[str, Any], str]) -> None:
    found, html = small
    assert found["leaders"] == {"counts": {}, "changes": [], "every": 1}
    assert "Leader" not in Page(html).text
    assert 'class="lanes"' not in html


def test_neither_texts_nor_the_round_are_curves(tmp_path: Path) -> None:
    lines = [line | {"phase": "late" if i else 1.0, "alpha": 0.5} for i, line in enumerate(led_log("abba"))]
    log_into(tmp_path, [*lines, apply("a", 9.0, 0, leader="a", round=5, alpha="none", phase=2.0)])
    curves = written(tmp_path, {})[0]["curves"]["rule"]
    assert {name: curve["updates"] for name, curve in curves.items()} == {"alpha": [1, 2, 3, 4], "phase": [1, 5]}


def test_a_torn_or_odd_leader_costs_only_itself(tmp_path: Path) -> None:
    lines = led_log("aabb")
    log_into(tmp_path, lines)
    whole = written(tmp_path, {})[0]["leaders"]
    odd: list[dict[str, Any]] = [
        {"leader": 7},
        {"leader": ""},
        {"leader": None},
        {"round": None},
        {"round": "6"},
        {"round": True},
    ]
    odd += [{"round": [6]}, {"leader": ["b"]}, {"leader": {}}, {"round": -1}]
    lines += [apply("a", 4.0, 0, leader="c", round=6) | values for values in odd]
    log_into(tmp_path, lines, tail=json.dumps(apply("c", 5.0, 0, leader="c", round=7))[:-5])
    found, _ = written(tmp_path, {})
    assert found["leaders"] == whole
    assert (found["updates"], found["unreadable_lines"]) == (4 + len(odd), 1)


@given(st.integers(0, 5 * POINTS), st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_changes_are_bounded_and_true(rounds: int, patience: int, chance: Any) -> None:
    names = [""] * rounds
    for i in range(rounds):
        names[i] = chance.choice("abcd") if i == 0 or chance.random() < 1 / patience else names[i - 1]
    leaders = Leaders()
    for i, name in enumerate(names):
        leaders.add(float(i), i + 1, name)
    changes = leaders.changes()
    assert sum(leaders.counts.values()) == rounds
    assert len(changes) <= POINTS
    assert [name for _, _, name in changes] == [name for name, _ in groupby(name for _, _, name in changes)]
    for time_s, number, name in changes:
        assert time_s == number - 1
        assert names[number - 1] == name
        assert number == 1 or names[number - 2] != name, "it took the lead just then"
    if leaders.every == 1:
        assert len(changes) == sum(1 for _ in groupby(names))
    for i in range(0, rounds, leaders.every):
        assert [name for _, number, name in changes if number <= i + 1][-1] == names[i], "a round that was looked at"
    assert [name for _, _, name in changes[-1:]] == names[-1:]


def test_leaders_are_followed_one_by_one_up_to_a_bound() -> None:
    leaders = Leaders()
    for i in range(WORKERS + 50):
        leaders.add(float(i), i + 1, f"w{i}")
    assert len(leaders.counts) == WORKERS + 1
    assert leaders.counts[OTHERS] == 50


def test_the_page_has_a_lane_for_each_worker_and_bars_where_it_led(tmp_path: Path) -> None:
    log_into(tmp_path, [*led_log("aabbbaaaa"), apply("never", 10.0, 0)])
    found, html = written(tmp_path, {})
    assert page(found) == html
    shown = Page(html)
    assert "Leader" in shown.text
    assert "Who led over time: 9 rounds, 2 changes of the leader." in shown.text
    lanes = [attributes for attributes in shown.all("svg") if (attributes.get("class") or "").startswith("lane ")]
    assert [(lane["class"], lane["aria-label"]) for lane in lanes] == [
        ("lane c0", "a: 6 rounds, 66.7 %"),
        ("lane c1", "b: 3 rounds, 33.3 %"),
        ("lane c2", "never: 0 rounds, 0.0 %"),
    ]
    bars = [(bar["x"], bar["width"]) for bar in shown.all("rect") if bar["height"] == "100%"][:3]
    assert bars == [("0.00%", "20.00%"), ("50.00%", "50.00%"), ("20.00%", "30.00%")]


def test_with_many_workers_those_that_led_most_have_lanes(tmp_path: Path) -> None:
    workers = LANES + 9
    names = [f"w{i}" for i in range(workers) for _ in range(1 if i < 9 else 2)]
    log_into(tmp_path, [apply(name, float(i), 0, leader=name, round=i + 1) for i, name in enumerate(names)])
    found, html = written(tmp_path, {})
    assert len(found["leaders"]["counts"]) == workers
    labels = [a["aria-label"] or "" for a in Page(html).all("svg") if (a.get("class") or "").startswith("lane ")]
    assert [label.split(":")[0] for label in labels] == [f"w{i}" for i in range(9, workers)]
    assert "9 more workers are in report.json." in html


def test_a_sample_of_the_changes_says_so(tmp_path: Path) -> None:
    log_into(tmp_path, led_log("abc" * POINTS))
    found, html = written(tmp_path, {})
    assert found["leaders"]["every"] > 1
    assert f"one in {found['leaders']['every']} was looked at" in html
    assert "changes of the leader" not in html


@pytest.mark.parametrize("name", [HOSTILE, '"><svg onload=x>', "</section>", "\u202e\x00", "x" * 500, "$style"])
def test_a_leader_may_have_any_name(tmp_path: Path, name: str) -> None:
    log_into(tmp_path, led_log("aba"))
    plain = Page(written(tmp_path, {})[1])
    log_into(tmp_path, led_log("aba", first=name))
    found, html = written(tmp_path, {})
    assert found["leaders"]["counts"] == {name[:TEXT_CHARACTERS]: 2, "b": 1}
    assert sorted(tag for tag, _ in Page(html).elements) == sorted(tag for tag, _ in plain.elements)


# --- rounds that close by themselves ---


def test_closed_rounds_are_counted_and_only_the_first_listed(tmp_path: Path) -> None:
    reason = "round 3 closes: 2 of 3 had pushed in time"
    closes = [event("close", 1.0 + i, version=i, reasons=[reason, "next", "next"]) for i in range(500)]
    log_into(tmp_path, [*small_log()[:5], *closes, *small_log()[5:]])
    found, html = written(tmp_path, {})
    events, few = found["events"], FREQUENT["close"]
    assert events["counts"]["close"] == 500
    assert events["unlisted"] == 500 - few
    listed = [event["text"] for event in events["first"] + events["last"] if event["kind"] == "close"]
    assert listed == [f"version {i}: {reason}; next" for i in range(few)]
    assert sum(events["counts"].values()) == len(events["first"]) + len(events["last"]) + events["unlisted"]
    assert f"{500 - few} that come every round are not listed" in html
    assert "are left out here" not in html
    assert found["updates"] == 4


# --- bounds ---


@given(st.integers(0, 5 * POINTS), st.integers(1, 20))
def test_a_curve_is_thinned_evenly_and_keeps_its_ends(count: int, window: int) -> None:
    curve = Curve(window)
    for i in range(count):
        curve.add(float(i), i, float(i % 7))
    columns = curve.columns(0)
    kept = columns["updates"]
    assert len(kept) == len(columns["time_s"]) == len(columns["value"]) <= POINTS
    assert kept[:1] + kept[-1:] == ([0, count - 1] if count else [])
    assert len({b - a for a, b in pairwise(kept[:-1])}) <= 1
    assert len(kept) > POINTS // 2 or len(kept) == count
    assert all(0 <= value <= 6 for value in columns["value"])


def test_a_moving_average_of_a_constant_is_the_constant() -> None:
    curve = Curve(window=10)
    for i in range(3 * POINTS):
        curve.add(float(i), i, 2.5)
    assert set(curve.columns(0)["value"]) == {2.5}


def test_a_moving_average_settles_in_the_middle_of_a_noise() -> None:
    curve = Curve(window=10)
    for i in range(3 * POINTS):
        curve.add(float(i), i, float(i % 2))
    assert all(value == pytest.approx(0.5, abs=0.06) for value in curve.columns(0)["value"][10:])


def test_events_and_workers_are_bounded_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    extra = 50
    joins = [event("join", i, worker=f"w{i}", role="worker", resumed="new") for i in range(WORKERS + extra)]
    log_into(tmp_path, [*joins, *(apply(f"w{i}", 1000 + i, 0) for i in range(WORKERS + extra))])
    found, html = written(tmp_path, {})
    assert (len(found["events"]["first"]), len(found["events"]["last"])) == EVENTS
    assert found["events"]["counts"] == {"join": WORKERS + extra}
    assert f"{WORKERS + extra - sum(EVENTS)} are left out here" in html
    assert len(found["workers"]) == WORKERS + 1
    assert next(row for row in found["workers"] if row["name"] == OTHERS)["updates"] == extra
    assert sum(row["updates"] for row in found["workers"]) == WORKERS + extra


@given(st.lists(st.floats(-1e299, 1e299), min_size=1, max_size=5), st.sampled_from([*SCALES, "loss", "any"]))
def test_an_axis_holds_every_value_and_a_handful_of_marks(values: list[float], kind: str) -> None:
    if kind in ("time_s", "updates", "bytes"):
        values = [abs(value) for value in values]
    axis = _axis(values, kind)
    assert all(-1e-6 <= axis.place(value) <= 1 + 1e-6 for value in [*values, *axis.ticks])
    assert len(axis.ticks) <= 12 or kind == "loss"
    assert axis.ticks == sorted(set(axis.ticks))
    assert all(axis.label(tick) for tick in axis.ticks)


# --- report.html ---


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text; unbalanced markup fails."""

    VOID = frozenset({"meta", "link"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, name: str) -> Iterator[dict[str, str | None]]:
        return (attributes for tag, attributes in self.elements if tag == name)


def test_the_page_shows_nothing_that_the_json_does_not_hold(small: tuple[dict[str, Any], str]) -> None:
    found, html = small
    assert page(found) == html


def test_it_opens_with_the_result_in_one_sentence(small: tuple[dict[str, Any], str]) -> None:
    text = "".join(Page(small[1]).text)
    assert "Center reached 97.8 % after 4 updates in 10.0 s; one worker alone 93.9 %." in text


@pytest.mark.parametrize(
    ("summary", "sentence"),
    [
        ({}, "The run ended after 0 updates in 0.0 s."),
        (
            {"center_accuracy": 0.5, "updates": 9, "seconds": 1, "solo_accuracy": 0.25, "solo": {"steps": 3}},
            "Center reached 50.0 % after 9 updates in 1.0 s; one worker alone 25.0 % after 3 steps.",
        ),
        (
            {"center_loss": 0.25, "updates": 3, "seconds": 300},
            "Center reached a test loss of 0.25 after 3 updates in 5.0 min.",
        ),
        (
            {"center_accuracy": 1.0, "updates": 12000, "seconds": 1.5},
            "Center reached 100.0 % after 12\u202f000 updates in 1.5 s.",
        ),
    ],
)
def test_the_sentence_says_only_what_is_known(tmp_path: Path, summary: dict[str, Any], sentence: str) -> None:
    assert sentence in "".join(Page(written(tmp_path, summary)[1]).text)


def test_it_has_title_headings_and_words_for_every_picture(small: tuple[dict[str, Any], str]) -> None:
    found = Page(small[1])
    assert next(found.all("html"))["lang"] == "en"
    assert "digits · gem: run report" in found.text
    assert sum(1 for _ in found.all("h1")) == 1
    for heading in ("Loss over time", "Loss over updates", "Accuracy over time", "Bytes sent over time", "Workers"):
        assert heading in found.text
    for heading in (
        "Scale π over updates",
        "Energy of the center over updates",
        "Lag per worker",
        "Events",
        "Settings",
    ):
        assert heading in found.text
    pictures = [attributes for attributes in found.all("svg") if "viewbox" not in attributes]
    assert len(pictures) == 6 + 2, "six charts and a histogram for each worker"
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in pictures)


def test_it_loads_nothing_and_runs_nothing(small: tuple[dict[str, Any], str]) -> None:
    html, found = small[1], Page(small[1])
    assert "://" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert not {name for name, _ in found.elements} & {
        "script",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "a",
        "base",
    }
    assert [link["href"] for link in found.all("link")] == ["data:,"]
    policy = next(meta["content"] or "" for meta in found.all("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_nothing_from_outside_becomes_markup(tmp_path: Path) -> None:
    """With hostile text wherever text may come from, the page has the very elements it has with harmless text."""

    def everywhere(text: str, value: Any) -> Any:
        match value:
            case str():
                return text
            case dict():
                return {key: everywhere(text, item) for key, item in value.items()} | ({text: text} if text else {})
            case list():
                return [everywhere(text, item) for item in value]
        return value

    def shown(text: str) -> Page:
        summary = everywhere(text, small_summary()) | {"exit": text}
        summary["workers"] = [{"name": text}]
        lines = [
            line
            | {name: text for name, value in line.items() if isinstance(value, str) and name not in ("kind", "role")}
            for line in small_log()
        ]
        lines += [event(text, 11.0, **{text: text}), event("diverged", 12.0, worker=text, version=text)]
        lines += [apply(text, 13.0, 0, leader=text, round=1, **{text: 1.0})]
        lines += [event("close", 14.0, version=text, reasons=[text], leader=text, round=2)]
        log_into(tmp_path, lines)
        return Page(written(tmp_path, summary)[1])

    hostile, harmless = shown(HOSTILE), shown(HARMLESS)
    assert [name for name, _ in hostile.elements] == [name for name, _ in harmless.elements]
    assert [set(attributes) for _, attributes in hostile.elements] == [
        set(attributes) for _, attributes in harmless.elements
    ]
    readable = HOSTILE.replace("\ud800", "?")
    assert "".join(hostile.text).count(readable) == "".join(harmless.text).count(HARMLESS) > 20


def test_markup_is_made_of_text_and_markup() -> None:
    assert (
        tag("b", "<", tag("i", "&"), (part for part in (">",)), title='"')
        == '<b title="&quot;">&lt;<i>&amp;</i>&gt;</b>'
    )


def test_a_run_that_diverged_says_so_however_long_ago(tmp_path: Path) -> None:
    rejects = [event("reject", 5.0 + i, worker="a", number=i, code="diverged", sentence="No.") for i in range(500)]
    lines = [*small_log()[:5], *rejects[:100], event("diverged", 200.0, worker="a", version=2), *rejects[100:]]
    log_into(tmp_path, lines)
    found, html = written(tmp_path, {})
    assert found["diverged"].endswith("since version 2, after an update of a")
    assert "This run diverged" in html


# --- writing ---


def test_each_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, small_summary())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"report.json", "report.html"}

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(StateError, match=r"report\.json: disk full"):
        write(tmp_path, {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
