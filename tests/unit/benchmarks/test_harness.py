"""Competitors take turns, wrong answers fail, everything that was opened is closed; and one real round trip."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import benchmarks
from benchmarks import harness
from benchmarks.__main__ import main
from benchmarks.harness import BenchmarkError, Case, Competitor, Result

ROW = {"benchmark", "case", "size_bytes", "median_s", "min_s", "max_s", "gb_per_s", "ratios"}


class Track:
    """Scripted competitors that write down what is done to them."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def case(self, name: str, *seconds: float, wrong: bool = False, interrupted: bool = False) -> Case:
        times = iter(seconds)

        def one_round() -> float:
            self.log.append(name)
            if interrupted:
                raise KeyboardInterrupt
            return next(times)

        def verify() -> None:
            self.log.append(f"verify {name}")
            if wrong:
                raise BenchmarkError("off by one")

        @contextmanager
        def opened() -> Iterator[Competitor]:
            try:
                yield Competitor(lambda: self.log.append(f"ready {name}"), one_round, verify, ())
            finally:
                self.log.append(f"close {name}")

        return Case(name, size_bytes=10**6, moved_bytes=2 * 10**6, peer=False, open=opened)


def result(name: str, *seconds: float, peer: bool = False, size_bytes: int = 10**8) -> Result:
    return Result(Case(name, size_bytes, 2 * size_bytes, peer, lambda: pytest.fail("not to be opened")), seconds)


# Measuring


def test_competitors_take_turns_and_only_measured_rounds_count() -> None:
    track = Track()
    a, b = harness.measure([track.case("a", 9, 1, 2), track.case("b", 9, 3, 4)], rounds=2, warmup=1)
    assert track.log[:8] == ["ready a", "ready b", "a", "b", "a", "b", "a", "b"]
    assert track.log[8:] == ["verify a", "verify b", "close b", "close a"]
    assert (a.seconds, b.seconds) == ((1, 2), (3, 4))


def test_a_fast_wrong_answer_fails() -> None:
    track = Track()
    with pytest.raises(BenchmarkError, match="off by one"):
        harness.measure([track.case("a", 1e-9, 1e-9, wrong=True)], rounds=1, warmup=1)
    assert track.log[-1] == "close a"


def test_a_peer_that_does_not_get_ready_is_left_out_and_one_of_ours_may_not(capsys: pytest.CaptureFixture[str]) -> None:
    @contextmanager
    def broken() -> Iterator[Competitor]:
        yield Competitor(fails, lambda: 0.0, lambda: None, ())

    def fails() -> None:
        raise BenchmarkError("no such thing here")

    track = Track()
    peer = Case("peer", 1, 1, peer=True, open=broken)
    assert [one.case.name for one in harness.measure([peer, track.case("a", 9, 1)], rounds=1, warmup=1)] == ["a"]
    assert "peer is left out: no such thing here" in capsys.readouterr().err
    with pytest.raises(BenchmarkError, match="no such thing"):
        harness.measure([peer._replace(peer=False)], rounds=1)


def test_an_interrupt_closes_everything() -> None:
    track = Track()
    with pytest.raises(KeyboardInterrupt):
        harness.measure([track.case("a", 1), track.case("b", interrupted=True)], rounds=1, warmup=0)
    assert track.log[-2:] == ["close b", "close a"]


# Statistics


def test_rows_hold_the_statistics_of_the_rounds() -> None:
    (row,) = harness.rows("x", [result("a", 0.5, 0.1, 0.2)])
    assert set(row) == ROW
    assert (row["min_s"], row["median_s"], row["max_s"]) == (0.1, 0.2, 0.5)
    assert row["gb_per_s"] == pytest.approx(2 * 0.1 / 0.2)
    assert row["ratios"] == {}


def test_a_ratio_says_how_many_times_as_fast_as_the_peer() -> None:
    ours, fast, slow = harness.rows(
        "x", [result("ours", 1, 2, 9), result("fast", 1, peer=True), result("slow", 8, peer=True)]
    )
    assert ours["ratios"] == {"fast": 0.5, "slow": 4.0}
    assert fast["ratios"] == {"slow": 8.0}
    assert slow["ratios"]["fast"] * fast["ratios"]["slow"] == 1


def test_only_cases_of_one_size_are_compared() -> None:
    small, _ = harness.rows("x", [result("a", 1, size_bytes=4), result("b", 1, peer=True, size_bytes=8)])
    assert small["ratios"] == {}


# Reporting


def test_a_report_prints_a_table_and_writes_rows_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "x.json"
    harness.report("x", [result("a", 0.125), result("b", 0.5, peer=True)], {"rounds": 1}, file)
    written = json.loads(file.read_text())
    assert set(written) == {"machine", "settings", "rows"}
    assert [set(row) for row in written["rows"]] == [ROW, ROW]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "125.0" in printed
    assert "4.00" in printed
    assert "torch" in printed


# The command


def test_without_a_name_the_command_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert benchmarks.names()
    assert all(name in printed and benchmarks.load(name).name == name for name in benchmarks.names())


def test_an_unknown_name_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roundtripp"]) == 2
    assert "did you mean 'roundtrip'?" in capsys.readouterr().err


# Real processes


@pytest.mark.slow
def test_a_child_that_says_nothing_is_given_up_and_gone() -> None:
    with harness.child("deaf", _keep_silent) as deaf:
        assert deaf.hear(harness.START_LIMIT_S) == "listening"
        with pytest.raises(BenchmarkError, match=r"within 0\.1 s"):
            deaf.ask("anybody there?", 0.1)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_who_waits_for_its_turn_is_stopped_and_ends_all_the_same() -> None:
    with harness.child("waiting", _keep_silent) as waiting:
        turns = harness.competitor(waiting)
        assert waiting.hear(harness.START_LIMIT_S) == "listening"
        with turns.turn():
            assert _comes_to(waiting, "S")
        assert _comes_to(waiting, "T")
    assert multiprocessing.active_children() == []


def _comes_to(child: harness.Child, expected: str) -> bool:
    """Whether the process soon is what the system calls by this letter: T stopped, S asleep."""
    stat, deadline = Path(f"/proc/{child._process.pid}/stat"), time.monotonic() + 5.0
    while (found := stat.read_text().rpartition(")")[2].split()[0]) != expected and time.monotonic() < deadline:
        time.sleep(0.01)  # a signal takes effect soon, not at once
    return found == expected


@pytest.mark.slow
def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(BenchmarkError, match="ZeroDivisionError"), harness.child("wrong", _divide) as wrong:
        wrong.hear(harness.START_LIMIT_S)


def _keep_silent(link: harness.Link) -> None:
    link.answer("listening")
    signal.pause()


def _divide(link: harness.Link) -> None:
    link.answer(1 / 0)
