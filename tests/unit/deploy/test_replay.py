"""`paramserver replay`: traces are exact, hold the numbers of the papers, and what is wrong is said in a sentence.

Laws
* Each case in `tests/golden/replay` gives its trace, character by character; a line read back and written is the line.
* The vectors hold in float64: GEM's to 1e-11 (they carry an epsilon of 1e-12), others to the last bits.
* What the worker's half does is the rule's own: x and the server's picture of it stay the same bits.
* A wrong case prints no line; a wrong entry ends the trace after those before it. Either exits with 2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from common import rules
from common.errors import ConfigError, ParamserverError
from deploy import cli
from deploy.replay import parse, replay

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden"
CASES = sorted((GOLDEN / "replay").glob("*.json"))
EXACT = 1e-11
PRINTED = 5.1e-11
"""Half a unit of the tenth decimal, the last that is printed."""
LAST_BITS = 1e-15


def run(*words: str, stdin: str | bytes | None = None) -> Any:
    return CliRunner().invoke(cli.app, ["replay", *words], input=stdin)


def trace(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in replay(parse(json.dumps(case).encode(), "case.json"))]


def golden(name: str) -> list[dict[str, Any]]:
    """The recorded trace; that the command still makes it is a test of its own."""
    lines = (GOLDEN / "replay" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def script_of(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((GOLDEN / "replay" / f"{name}.json").read_text())["script"]
    return found


def close(mine: Any, expected: Any, atol: float = LAST_BITS) -> None:
    np.testing.assert_allclose(mine, expected, rtol=0, atol=atol)


def case(rule: str = "downpour", script: Any = (), **more: Any) -> dict[str, Any]:
    return {"rule": rule, "center": [1.0, 2.0], "workers": 2, "script": list(script), **more}


def push(worker: int, *update: float, **scalars: Any) -> dict[str, Any]:
    return {"worker": worker, "update": list(update), **({"scalars": scalars} if scalars else {})}


# --- golden traces ---


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_case_gives_its_trace_to_the_bit(path: Path) -> None:
    found = run(str(path))
    assert found.exit_code == 0, found.stderr
    assert found.stdout == path.with_suffix(".jsonl").read_text(encoding="utf-8")
    assert all(json.dumps(json.loads(line)) == line for line in found.stdout.splitlines())


def test_no_trace_is_without_its_case() -> None:
    assert [path.stem for path in CASES] == sorted(path.stem for path in (GOLDEN / "replay").glob("*.jsonl"))


def test_the_example_in_the_docs_is_what_is_printed() -> None:
    text = (ROOT / "docs" / "replay.md").read_text(encoding="utf-8")
    source = text.partition("```json\n")[2].partition("```")[0]
    shown = text.partition("$ paramserver replay gem.json\n")[2].partition("```")[0]
    assert shown
    assert run("-", stdin=source).stdout == shown


# --- the vectors themselves ---


@pytest.mark.parametrize(("name", "vector"), [("gem", "TV2_code"), ("gem_paper", "TV2_paper")])
def test_gem_two_workers(name: str, vector: str) -> None:
    """TV2; the updates are gradients at what the trace itself replied to that worker before."""
    rows, lines = json.loads((GOLDEN / "gem.json").read_text())[vector], golden(name)
    atol = EXACT if vector == "TV2_code" else PRINTED
    held = {0: [1.0, -1.0], 1: [1.0, -1.0]}
    for row, line, entry in zip(rows, lines, script_of(name), strict=True):
        assert line["worker"] == row["worker"] == entry["worker"]
        close(entry["update"], -0.05 * np.array([1.0, 10.0]) * held[line["worker"]], atol=atol)
        details = line["details"]
        close(details["m"], row["m"], atol)
        close(details["shift"], row["shift"], atol)
        close(line["center"], row["theta"], atol)
        close(np.array(details["u"]) / entry["update"], row["pi"], 1e-10)  # u has the rounding of the center
        if "u" in row:
            close(details["u"], row["u"], atol)
        held[line["worker"]] = line["reply"]


def test_gem_cold_start() -> None:
    """TV4: commit, worker, m, shift, pi, u, theta."""
    rows, lines = json.loads((GOLDEN / "gem.json").read_text())["TV4"], golden("gem_cold_start")
    for (commit, worker, m, shift, pi, u, theta), line in zip(rows, lines, strict=True):
        assert (line["entry"], line["worker"]) == (commit + 1, worker)
        close(line["center"], [theta], EXACT)
        found = line["details"]
        close([found["m"][0], found["shift"][0], found["u"][0]], [m, shift, u], EXACT)
        close(found["pi_mean"], pi, 1.3e-11)  # the vector's epsilon of 1e-12 beside |D| = .1 is 1e-11 in pi


def test_gem_details_are_those_of_the_arrays() -> None:
    """Also with one momentum for all, which is an array of the rule's state."""
    script = [push(0, -0.5, 0.25), push(1, -0.5, 0.5), push(0, 0.0, 0.5)]
    for proxy in ("worker", "global"):
        lines, before = trace(case("gem", script, config={"proxy": proxy})), np.array([1.0, 2.0])
        s = {0: before, 1: before}
        for line in lines:
            worker, details, kept = line["worker"], line["details"], line["session" if proxy == "worker" else "state"]
            np.testing.assert_array_equal(details["u"], line["center"] - before)
            np.testing.assert_array_equal(details["shift"], before - s[worker])
            assert details["m"] == kept["m"]
            assert line["session"]["s"] == before.tolist()
            s[worker], before = before, np.array(line["center"])


def test_easgd_one_exchange_and_its_law() -> None:
    """x 1, center .4, alpha .5: E .3, x .7, center .7; an exchange leaves 1 - 2 alpha of x - c, here nothing."""
    for name in ("easgd", "eamsgd"):
        first = golden(name)[0]
        close([first["reply"][0], first["x"]["0"][0], first["center"][0]], [0.3, 0.7, 0.7])
    for line in golden("easgd"):
        assert line["x"]["0"] == line["center"]


def test_easgd_both_sides_hold_the_same_bits() -> None:
    """A transcription, and the law: c + x changes by local steps only."""
    center = np.array([0.0, 1.0])
    for line, entry in zip(golden("easgd_two"), script_of("easgd_two"), strict=True):
        x = np.array(entry["update"])
        elastic = 0.45 * (x - center)
        close(line["reply"], elastic)
        close(line["center"], center + elastic)
        moved = line["x"][str(line["worker"])]
        close(moved, x - elastic)
        assert line["session"]["replica"] == moved
        close(np.add(moved, line["center"]), x + center)
        center = np.array(line["center"])


def test_local_sgd_three_workers_and_a_leave() -> None:
    lines = golden("local_sgd")
    assert [line["outcome"] for line in lines] == (
        ["held", "held", "applied", "held", "held", "none", "held", "none", "applied"]
    )
    assert [line["version"] for line in lines] == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    rounds = [((1.0, 2.0), [(3.0, 0.0), (0.0, -3.0), (0.0, 0.0)])]  # the mean of three
    rounds += [((2.0, 1.0), [(1.0, 1.0), (0.5, -0.5)])]  # worker 1 left without a push: the mean of two
    rounds += [((2.75, 1.25), [(0.25, 0.25), (0.125, 0.0)])]  # worker 0 left after its push, which counts
    for (before, updates), line in zip(rounds, (lines[2], lines[5], lines[8]), strict=True):
        close(line["center"], before + np.mean(updates, axis=0))
    assert lines[2]["replies"] == {"0": lines[2]["reply"], "1": lines[2]["reply"]}
    assert lines[5]["replies"] == {"0": lines[5]["center"], "2": lines[5]["center"]}
    assert (lines[5]["reply"], "replies" in lines[8]) == (None, False)
    assert lines[3]["waits"] == [0, 1]


def test_local_sgd_blocks_reply_with_their_own_centers() -> None:
    lines = golden("local_sgd_blocks")
    assert [line["center"] for line in lines[:5]] == [[0.0]] * 5
    assert (lines[1]["reply"], lines[1]["replies"]) == ([2.0], {"0": [2.0]})
    assert lines[2]["reply"] == [8.0]
    close(lines[5]["center"], [(2 * 3.0 + 12.0) / 3])


def test_diloco_is_torchs_nesterov_on_the_mean() -> None:
    x = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    outer = torch.optim.SGD([x], lr=0.7, momentum=0.9, nesterov=True)
    updates = np.array([entry["update"] for entry in script_of("diloco")])
    for mean, line in zip(updates.reshape(2, 2, 2).mean(axis=1), golden("diloco")[1::2], strict=True):
        x.grad = -torch.tensor(mean)
        outer.step()
        close(line["center"], x.detach().numpy())
        assert line["reply"] == line["center"] == next(iter(line["replies"].values()))


def test_decoupled_diloco_closes_when_its_window_is_over() -> None:
    lines = golden("decoupled_diloco")
    assert [line.get("deadline_s") for line in lines] == [None, None, 3.0, 3.0, None, None]
    assert [line["version"] for line in lines] == [0, 0, 0, 0, 1, 1]
    mean = (16 * 1.0 + 4 * 2.0) / 20  # weights: samples, times samples per step
    close(lines[4]["center"], [0.7 * (mean + 0.9 * mean)])
    assert lines[4]["replies"] == {"0": lines[4]["center"], "1": lines[4]["center"]}
    assert lines[5]["outcome"] == "held"


def test_delayed_nesterov_vector() -> None:
    rows = [(-0.25, 0.0), (-1.425, 1.5), (-2.175, 1.5), (-5.3575, 4.85)]
    for (center, m), line in zip(rows, golden("delayed_nesterov"), strict=True):
        close([line["center"][0], line["state"]["m"][0]], [center, m])


@pytest.mark.parametrize(
    ("name", "center"), [("dc_asgd", 1.14), ("dc_asgd_adaptive", 1.060557638668738), ("dynsgd", -0.0125)]
)
def test_vectors_of_rules_that_correct_for_delay(name: str, center: float) -> None:
    close(golden(name)[-1]["center"], [center])


def test_lsgd_a_tick_where_both_pulls_fall() -> None:
    """A-1: after the gradient step 3.6, 1.8, -.9, 2.7 in groups {0, 1} and {2, 3}, which are {0, 2} and {1, 3} here."""
    lines = golden("lsgd")
    assert [order["until"] for order in lines[0]["orders"]] == [1, 1, 1, 1]
    asked = [order["worker"] for order in lines[10]["orders"] if order["upload"]]
    assert sorted(asked) == [1, 2]
    last = lines[-1]
    assert [order["pull"] for order in last["orders"]] == [["local", "global"], [], ["global"], ["local", "global"]]
    assert "1" not in last["x"], "the leader of all skips its pulls"
    close(last["center"], [-0.9])
    close([last["x"][worker][0] for worker in ("0", "2", "3")], [2.556, 1.26, 1.692])


def test_lsgd_refuses_an_upload_that_nobody_asked_for() -> None:
    before, refused = golden("lsgd")[10:12]
    assert (refused["outcome"], refused["code"], refused["weight"]) == ("rejected", "rule", None)
    assert "is not the leader" in refused["sentence"]
    for key in ("version", "center", "state", "waits"):
        assert refused[key] == before[key]


def test_lsgd_a_leader_leaves_before_its_upload() -> None:
    lines = golden("lsgd_leader_leaves")
    assert [order["worker"] for order in lines[4]["orders"]] == [1]
    assert not any(order["upload"] for order in lines[5]["orders"]), "the other's last losses were not finite"
    assert lines[8]["center"] == [0.25]


def test_float32_computes_and_prints_float32() -> None:
    center = np.array([1.0, -2.0], np.float32)
    for line, entry in zip(golden("downpour_float32"), script_of("downpour_float32"), strict=True):
        center += np.array(entry["update"], np.float32)
        np.testing.assert_array_equal(np.array(line["center"]), center.astype(np.float64))


# --- laws ---


@pytest.mark.parametrize("name", rules.names())
def test_every_rule_can_be_replayed_and_twice_is_the_same(name: str) -> None:
    if rules.load(name).schedules:
        script: list[Any] = [{"report": 0, "loss": 0.5}, {"report": 1, "loss": 0.25}, {"leave": 1}, {"tick": 1}]
    else:
        script = [push(i, 0.1, -0.2) for i in (0, 1, 1, 0)] + [{"leave": 1}, {"tick": 1}]
    data = json.dumps(case(name, script)).encode()
    lines = list(replay(parse(data, "case.json")))
    assert lines == list(replay(parse(data, "case.json")))
    entries = [json.loads(line) for line in lines]
    assert [entry["entry"] for entry in entries if entry["entry"]] == [*range(1, len(script) + 1)]
    assert all(isinstance(entry["center"], list) for entry in entries)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6))
def test_a_number_comes_out_as_it_went_in(center: list[float], added: list[float]) -> None:
    n = min(len(center), len(added))
    (line,) = trace(case(center=center[:n], script=[push(0, *added[:n])]))
    np.testing.assert_array_equal(line["center"], np.array(center[:n]) + added[:n])


def test_scalars_reach_the_rule() -> None:
    (line,) = trace(case("adag", [push(0, 4.0, 8.0, steps=4, samples=3, loss=0.5, lr=0.1)]))
    assert line["center"] == [2.0, 4.0]


def test_pulls_act_only_on_parameters_that_were_told() -> None:
    """Worker 1 leads; worker 0 pulls to it, if its x is known."""
    config = {"tau": 1, "tau_global": 1, "lambda_global": 0.5}
    for told, pulled in (({"x": [3.0, 5.0]}, {"0": [2.0, 3.0]}), ({}, None)):
        reports = [{"report": 0, "loss": 2.0, **told}, {"report": 1, "loss": 1.0}]
        line = trace(case("lsgd", [*reports, push(1, 1.0, 1.0)], config=config))[-1]
        assert line.get("x") == pulled
        assert line["reply"] is None


# --- what is wrong ---

OVERFLOW = [push(0, 1.7e308, 0.0)] * 2
WRONG: list[tuple[Any, str]] = [
    (case("gemm"), "There is no rule named 'gemm' (did you mean 'gem'?)"),
    (case("gem", config={"kapa": 1}), "has no setting 'kapa' (did you mean 'kappa'?)"),
    (case("gem", config={"kappa": -1}), "Setting 'kappa' of rule 'gem' cannot be -1"),
    (case(dtype="float16"), "case.json: 'dtype' cannot be 'float16'"),
    (case(centre=[1.0]), "case.json has an unknown key 'centre' (did you mean 'center'?)"),
    (case(center=[]), "'center' cannot be []"),
    (
        case(center=[1.0, float("nan")]),
        "case.json: element 1 of 'center' cannot be NaN: input should be a finite number",
    ),
    (case(center=["1"]), "element 0 of 'center' cannot be '1': input should be a valid number"),
    (case(center=[1e39], dtype="float32"), "'center' of case.json: element 0, 1e+39, is too large for float32"),
    (case(workers=0), "'workers' cannot be 0"),
    (case(workers=True), "'workers' cannot be True"),
    ({"rule": "gem", "center": [1.0], "workers": 1}, "case.json lacks 'script'"),
    ([1], "case.json must be a JSON object; it is [1]"),
    (case("lsgd", config={"groups": 3}), "There are 3 groups for 2 workers"),
    (case("diloco", config={"fragments": 4}), "Rule 'diloco' has 4 fragments but 1 local steps"),
    (case(script=[{"leave": 0}, 7]), "Script entry 2 of case.json must have exactly one of the keys 'worker'"),
    (case(script=[{"leave": 0, "tick": 1}]), "Script entry 1 of case.json must have exactly one"),
    (case(script=[{"pull": 0}]), "must have exactly one of the keys 'worker', 'report', 'leave', 'tick'"),
    (case(script=[{"leave": 2}]), "Script entry 1 of case.json names worker 2, but 'workers' is 2"),
    (case(script=[push(-1, 0.0, 0.0)]), "'worker' cannot be -1"),
    (case(script=[{"worker": 0}]), "Script entry 1 of case.json lacks 'update'"),
    (case(script=[push(0, 1.0)]), "Script entry 1 of case.json: 'update' has length 1, 'center' has 2"),
    (case(script=[push(0, 1.0, float("inf"))]), "element 1 of 'update' cannot be Infinity"),
    (case(script=[push(0, 1.0, 1e39)], dtype="float32"), "'update' in script entry 1 of case.json: element 1, 1e+39"),
    (case(script=[push(0, 1.0, True)]), "element 1 of 'update' cannot be True"),
    (case(script=[push(0, 1.0, 10**400)]), "element 1 of 'update' cannot be 1000"),
    (case(script=[push(0, 1.0, 1.0, los=1.0)]), "has an unknown key 'scalars.los' (did you mean 'loss'?)"),
    (case(script=[push(0, 1.0, 1.0, steps=0.5)]), "'scalars.steps' cannot be 0.5"),
    (case(script=[push(0, 1.0, 1.0, lr=float("nan"))]), "'scalars.lr' cannot be NaN"),
    (case(script=[{"tick": -1}]), "'tick' cannot be -1"),
    (case(script=[{"tick": "1"}]), "'tick' cannot be '1'"),
    (case(script=[{"report": 0, "loss": 1.0}]), "is a report, but rule 'downpour' does not schedule"),
    (case("lsgd", [{"report": 0, "loss": 1.0, "x": [1.0]}]), "'x' has length 1, 'center' has 2"),
]

WRONG_IN_TIME: list[tuple[Any, int, str]] = [
    (
        case("local_sgd", [push(0, 1.0, 1.0), push(0, 1.0, 1.0)]),
        1,
        "Script entry 2 of case.json: worker 0 pushes, but its update of entry 1 is held. It waits for worker 1.",
    ),
    (
        case(script=[push(0, 1.0, 1.0), {"leave": 0}, push(0, 1.0, 1.0)]),
        2,
        "Script entry 3 of case.json: worker 0 pushes, but it left with entry 2",
    ),
    (case(script=[{"leave": 1}, {"leave": 1}]), 1, "worker 1 leaves, but it left with entry 1"),
    (
        case("lsgd", [{"report": 0, "loss": 1.0}] * 9),
        7,
        "Script entry 8 of case.json: worker 0 reports step 8, but the last order lets it train until it has done 7",
    ),
    (case(script=OVERFLOW), 1, "Script entry 2 of case.json: 'center' is not finite after it"),
    (case("local_sgd", [push(0, 1.7e308, 0.0), push(1, 1.7e308, 0.0)]), 1, "Script entry 2 of case.json: 'center'"),
    (case("easgd", [push(0, 1.7e308, 0.0), push(0, -1.7e308, 0.0)]), 1, "is not finite after it"),
]


@pytest.mark.parametrize(("wrong", "why"), WRONG, ids=[why[-50:] for _, why in WRONG])
def test_a_wrong_case_is_refused_before_its_first_line(wrong: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ParamserverError) as refused:
        list(replay(parse(json.dumps(wrong).encode(), "case.json")))
    assert why in refused.value.sentence
    assert refused.value.sentence.count("\n") == 0
    assert refused.value.fix
    assert refused.value.exit_code == 2
    file = tmp_path / "case.json"
    file.write_text(json.dumps(wrong))
    found = run(str(file))
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.startswith("error: ")


@pytest.mark.parametrize(("wrong", "lines", "why"), WRONG_IN_TIME, ids=[why[-50:] for *_, why in WRONG_IN_TIME])
def test_a_wrong_entry_ends_the_trace_and_the_lines_before_it_stand(wrong: Any, lines: int, why: str) -> None:
    with pytest.raises(ConfigError) as refused:
        trace(wrong)
    assert why in str(refused.value)
    assert refused.value.fix
    found = run("-", stdin=json.dumps(wrong))
    assert found.exit_code == 2
    entries = [json.loads(line)["entry"] for line in found.stdout.splitlines()]
    assert [entry for entry in entries if entry] == [*range(1, lines + 1)]
    assert f"error: {refused.value.sentence.replace('case.json', 'standard input')}" in found.stderr


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is not JSON: Expecting value at line 1, column 1"),
        (b'{"rule":\n gem}', "is not JSON: Expecting value at line 2, column 2"),
        (b"\xff", "it is not UTF-8 text"),
        (b'{"rule": "\\ud800"}', "it is not UTF-8 text"),
        (b"[" * 100_000, "the nesting too deep"),
        (b"1" * 5000, "a number is too long"),
        (b'{"rule": "gem", "rule": "adag"}', "has the key 'rule' twice"),
    ],
)
def test_what_is_not_json_is_told_where(data: bytes, why: str) -> None:
    found = run("-", stdin=data)
    assert (found.exit_code, found.stdout) == (2, "")
    assert f"error: standard input {why}" in found.stderr or why in found.stderr
    assert "fix: " in found.stderr


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for place, why in ((tmp_path / "no.json", "No such file"), (tmp_path, "Is a directory")):
        found = run(str(place))
        assert (found.exit_code, found.stdout) == (2, "")
        assert f"error: {place} cannot be read: {why}" in found.stderr


def test_the_command_needs_a_file() -> None:
    found = run()
    assert found.exit_code == 2
    assert "FILE" in found.stderr
