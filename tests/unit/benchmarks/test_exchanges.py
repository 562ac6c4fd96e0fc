"""Rates, fairness and percentiles are what they say, cases carry way, codec, peer and workers; and one real run."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import exchanges, harness, players
from benchmarks.__main__ import main
from benchmarks.exchanges import Seen
from benchmarks.harness import BenchmarkError
from benchmarks.players import WAYS

# Statistics


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_a_percentile_is_a_value_that_was_seen(share: float, expected: int) -> None:
    assert harness.percentile(list(range(100, 0, -1)), share) == expected


def test_of_nothing_there_is_no_percentile() -> None:
    with pytest.raises(BenchmarkError, match="Nothing was measured"):
        harness.percentile([], 0.5)


@pytest.mark.parametrize(("rates", "expected"), [([3, 3, 3], 1.0), ([0, 0, 0, 7], 0.25), ([1, 3], 0.8), ([0, 0], 0.0)])
def test_the_index_of_fairness(rates: list[float], expected: float) -> None:
    assert harness.jain(rates) == pytest.approx(expected)


def test_workers_together_exchange_as_often_as_the_sum_of_them() -> None:
    assert exchanges.per_exchange([[0.1] * 10, [0.2, 0.2]]) == pytest.approx(1 / 15)
    with pytest.raises(BenchmarkError, match="No exchange ended"):
        exchanges.per_exchange([[], []])


def test_only_measured_rounds_count_but_every_push_was_one() -> None:
    seen = Seen([[[9.0], [9.0, 9.0]], [[0.1] * 4, [0.1] * 4], [[0.1] * 4, [0.2] * 2]])
    also = seen.also()
    assert seen.pushes == 3 + 8 + 6
    assert also["exchanges_per_s"] == pytest.approx(1 / ((1 / 20 + 1 / 15) / 2))
    assert (also["p50_ms"], also["p99_ms"]) == pytest.approx((100, 200))
    assert also["jain_min"] == pytest.approx(harness.jain([10, 5]))
    assert also["jain"] == pytest.approx((1 + also["jain_min"]) / 2)


def test_a_window_takes_exchanges_until_its_time_is_over() -> None:
    taken = harness.window(lambda: time.sleep(0.01), 0.05)
    assert 1 <= len(taken) <= 5
    assert min(taken) >= 0.01


def test_who_is_paced_begins_once_in_every_period() -> None:
    taken = exchanges.paced(0.2, 0.1, lambda: None, 0.05)
    assert len(taken) == 2


# Checks


@pytest.mark.parametrize("at", [0, 2, -1])
@pytest.mark.parametrize("wrong", [math.nan, 3.0])
def test_one_wrong_value_fails(at: int, wrong: float) -> None:
    vector = np.full(5, 4.5, np.float32)
    players.check(vector, 4.5)
    players.check_ends(vector, 4.5)
    vector[at] = wrong
    with pytest.raises(BenchmarkError, match=r"1 of 5 values are not 4\.5"):
        players.check(vector, 4.5)
    if at != 2:
        with pytest.raises(BenchmarkError, match="at its ends"):
            players.check_ends(vector, 4.5)


def test_a_lossy_codec_is_given_its_rounding_and_no_more() -> None:
    players.check(np.full(3, 4.51, np.float32), 4.5, players.TOLERANCE["bf16"])
    with pytest.raises(BenchmarkError):
        players.check(np.full(3, 4.53, np.float32), 4.5, players.TOLERANCE["bf16"])


# Cases


def test_cases_carry_way_codec_peer_and_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(players, "has_ray", lambda: True)
    seen: dict[str, Seen] = {}
    found = exchanges.cases(list(WAYS.values()), 4, 1000, 1.0, seen)
    assert [(case.name, case.peer) for case in found] == [
        ("paramserver shm fp32 (4 workers)", False),
        ("paramserver ipc fp32 (4 workers)", False),
        ("paramserver tcp fp32 (4 workers)", False),
        ("torch.distributed.rpc (4 workers)", True),
        ("Ray actor (4 workers)", True),
    ]
    assert set(seen) == {case.name for case in found}


def test_without_ray_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(players, "has_ray", lambda: False)
    assert [case.name for case in exchanges.cases([], 1, 1000, 1.0, {})] == ["torch.distributed.rpc (1 worker)"]


@pytest.mark.parametrize("has", [True, False])
def test_shared_memory_is_measured_where_there_is_any(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    said: list[str] = []
    monkeypatch.setattr(players, "has_shared_memory", lambda: has)
    assert [way.name for way in players.ways(said.append)] == ["shm"] * has + ["ipc", "tcp"]
    assert said == ([] if has else [players.NO_SHARED_MEMORY])
    assert players.ways(said.append, ["tcp"]) == [WAYS["tcp"]]


# The command


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_workers_and_a_crowd_exchange_and_come_to_the_right_center(tmp_path: Path) -> None:
    file = tmp_path / "exchanges.json"
    small = ("--workers", "2", "--parameters", "1000", "--window-s", "0.1", "--rounds", "2", "--crowd", "6")
    with pytest.raises(SystemExit) as end:
        main(["exchanges", *small, "--load-mb", "1", "--pulls", "2", "--only", "ipc", "--json", str(file)])
    assert end.value.code == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"] for row in rows] == [
        "paramserver ipc fp32 (2 workers)",
        "paramserver ipc fp32 (6 workers)",
        "idle pull, paramserver ipc fp32",
        "loaded pull, paramserver ipc fp32",
    ]
    assert all(0 < row["min_s"] <= row["median_s"] <= row["max_s"] for row in rows)
    assert all(row["also"]["jain"] > 0.2 for row in rows[:2])
    assert multiprocessing.active_children() == []


def test_a_part_that_no_case_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exchanges", "--only", "nothing like it"]) == 1
    assert "No case has" in capsys.readouterr().err
