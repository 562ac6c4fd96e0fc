"""Kinds of pushes and the vectors they move are found; a wrong answer, or a block left out, fails; and one real run."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from benchmarks import apply, harness
from benchmarks.__main__ import main
from benchmarks.apply import Push
from benchmarks.harness import BenchmarkError
from common import rules
from common.config import ServerSettings
from common.rules.base import Effect


def pushes(rule: str, codec: str = "fp32") -> list[Push]:
    return apply.pushes(ServerSettings(rule=rule, codec=codec))


# What moves


@pytest.mark.parametrize(
    ("rule", "needed", "changed"),
    [
        ("downpour", {"center"}, {"center"}),
        ("gem", {"center", "session.m", "session.s"}, {"center", "session.m", "session.s"}),
        ("dc_asgd", {"center", "session.b"}, {"center", "session.b"}),
        ("easgd", {"center", "session.replica"}, {"center", "session.replica"}),
    ],
)
def test_vectors_that_are_needed_and_changed_are_found(rule: str, needed: set[str], changed: set[str]) -> None:
    [push] = pushes(rule)
    assert set(push.needed) == needed
    assert set(push.changed) == changed


def test_what_is_read_and_not_written_counts_once() -> None:
    between, last = pushes("delayed_nesterov")
    assert (between.number, last.number) == (1, 4)
    assert set(between.needed) - set(between.changed) == {"rule.m"}
    assert set(last.needed) == set(last.changed) == {"center", "rule.m", "rule.sum"}


def test_what_is_overwritten_unread_counts_as_written_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(config: object, c: object, state: object, session: object, d: object, *_: object) -> None:
        c[:] = d  # type: ignore[index]

    monkeypatch.setattr(rules, "load", lambda name, load=rules.load: load(name)._replace(apply=overwrite))
    [push] = pushes("downpour")
    assert (push.needed, push.changed) == ((), ("center",))


def test_a_push_that_is_held_moves_neither_center_nor_reply() -> None:
    held, closing_ = pushes("local_sgd", "int8")
    assert (held.needed, held.changed, held.replies) == (("rule.total",), ("rule.total",), False)
    assert closing_.replies
    assert closing_.changed == ("center", "rule.total")
    shard = apply._Model(held, apply.PERIOD).shard
    assert held.moved_bytes(shard) == apply.PERIOD * (1 + 4 + 4) + 8
    assert closing_.moved_bytes(shard) == apply.PERIOD * (1 + 4 * 4 + 4) + 8


@pytest.mark.parametrize("name", rules.names())
def test_every_rule_is_measured_or_left_out_with_a_sentence(name: str) -> None:
    if why := apply.left_out(name):
        assert why.endswith(".")
    else:
        assert all(pushes(name, codec) for codec in apply.CODECS)


# What is checked


def model(elements: int, rounds: int) -> apply._Model:
    made = apply._Model(pushes("gem", "int8")[0], elements)
    with closing(apply._Pool(2)) as pool:
        for _ in range(rounds):
            assert pool.seconds(made.work()) > 0
    return made


@pytest.mark.parametrize("elements", [apply.PERIOD, 70_001, 300_000])
def test_the_right_answer_passes(elements: int) -> None:
    apply._check(model(elements, 3), 3)


def test_a_push_too_few_fails() -> None:
    with pytest.raises(BenchmarkError, match="is wrong by"):
        apply._check(model(70_001, 2), 3)


@pytest.mark.parametrize("at", [5000, -1])
@pytest.mark.parametrize("name", ["center", "session.m"])
def test_an_element_that_differs_fails(name: str, at: int) -> None:
    spoiled = model(70_001, 2)
    spoiled.vectors()[name][at] += np.float32(1e-3)
    with pytest.raises(BenchmarkError, match=f"Not every block of {name}"):
        apply._check(spoiled, 2)


def test_a_reply_that_was_not_written_fails() -> None:
    spoiled = model(70_001, 2)
    spoiled.reply[:] = 0
    with pytest.raises(BenchmarkError, match="reply is wrong"):
        apply._check(spoiled, 2)


def test_a_kernel_that_comes_to_nan_fails() -> None:
    spoiled = model(apply.PERIOD, 0)
    spoiled.shard.center[7] = np.nan
    with closing(apply._Pool(1)) as pool, pytest.raises(BenchmarkError, match="NaN"):
        pool.seconds(spoiled.work())


def test_a_kernel_that_raises_fails() -> None:
    def broken(first: int, last: int, scratch: object) -> bool:
        raise ZeroDivisionError

    with closing(apply._Pool(2)) as pool, pytest.raises(BenchmarkError, match="failed"):
        pool.seconds(apply.Work(4, 10**6, broken))


def test_replies_to_others_are_no_part_of_a_push() -> None:
    effects: list[Effect] = [apply.Reply("b", "after", "x"), apply.Reply("a", "after", "y")]
    assert apply._as_first("b", effects) == (apply.Reply("a", "after", "x"),)


# The command


def test_the_command_measures_writes_and_compares_by_bytes(tmp_path: Path) -> None:
    file = tmp_path / "apply.json"
    words = ("--size-mb", "2", "--rounds", "2", "--threads", "2", "--only", "downpour", "--json", str(file))
    with pytest.raises(SystemExit) as end:
        main(["apply", *words])
    assert end.value.code == 0
    rows = json.loads(file.read_text())["rows"]
    alone, together = "numpy.copyto", "numpy.copyto, 2 threads"
    assert [row["case"] for row in rows] == ["downpour fp32", "downpour bf16", "downpour int8", alone, together]
    assert set(rows[0]) == set(harness.Row.__annotations__) - {"also"}
    peer = rows[3]
    for row, bytes_each in zip(rows, (16, 14, 13 + 4 / 1024), strict=False):
        assert row["gb_per_s"] * row["median_s"] == pytest.approx(bytes_each * 500_000 / 1e9, rel=1e-3)
        assert row["ratios"][alone] == pytest.approx(row["gb_per_s"] / peer["gb_per_s"])
    assert file.with_suffix(".png").exists()


def test_a_part_that_no_case_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", "--size-mb", "1", "--only", "nothing like it"]) == 1
    assert "No case has" in capsys.readouterr().err
