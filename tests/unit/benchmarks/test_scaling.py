"""Shares are of what workers would do alone; simulated speeds count waits; and one small real run."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.__main__ import main
from benchmarks.scaling import SLOW, Seen


def test_workers_that_keep_their_speed_have_all_of_it() -> None:
    found = scaling.shares([9.0, 9.0, 9.0], 1.0, 9.0, 0.1)
    assert found == pytest.approx({"steps_per_s": 27.0, "of_solo": 1.0, "others_of_solo": 1.0})


def test_a_straggler_is_compared_with_itself_alone_and_the_others_without_it() -> None:
    solo, exchange_s = 1 / 0.11, 0.01
    alone = 1 / (SLOW * 0.1 + exchange_s)
    kept = scaling.shares([alone, solo, solo], SLOW, solo, 0.1)
    assert kept == pytest.approx({"steps_per_s": alone + 2 * solo, "of_solo": 1.0, "others_of_solo": 1.0})
    in_step = scaling.shares([alone] * 3, SLOW, solo, 0.1)
    assert in_step["others_of_solo"] == pytest.approx(0.11 / 0.41)


def test_rates_are_medians_without_the_warm_up() -> None:
    assert Seen(rounds=[[99.0, 99.0], [1.0, 5.0], [2.0, 4.0], [3.0, 9.0]]).rates() == [2.0, 5.0]


def test_a_simulated_speed_counts_the_waits_for_the_server() -> None:
    workers = [
        {"steps": 5, "exchanges": {"stalled_s": 0.0}},
        {"steps": 20, "exchanges": {"stalled_s": 0.5}},
        {"steps": 0, "exchanges": {"stalled_s": 9.0}},
    ]
    slow = {"workers": workers, "simulated": {"stragglers": "1 x 4"}}
    assert scaling._speeds(slow) == pytest.approx([2.5, 8.0])
    assert scaling._speeds(slow | {"simulated": {"stragglers": "none"}}) == pytest.approx([10.0, 8.0])


def test_a_simulated_run_is_named_by_what_it_is() -> None:
    name, words = scaling._run_of("local_sgd", 10, SLOW, 3)
    assert name == "simulated local_sgd, one 4x slower (10 workers)"
    assert words[words.index("--budget-updates") + 1] == "30"
    assert words[-2:] == ("--stragglers", "1:4")
    assert scaling._run_of("downpour", 1, 1.0, 3)[0] == "simulated downpour (1 worker)"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_straggler_slows_those_in_step_and_nobody_else(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    small = ("--workers", "2", "--parameters", "1000", "--step-s", "0.02", "--window-s", "0.2", "--rounds", "2")
    with pytest.raises(SystemExit) as end:
        main(["scaling", *small, "--simulated", "2", "--simulated-steps", "5", "--json", str(file)])
    assert end.value.code == 0
    rows = {row["case"]: row for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == 9
    share = {name: row["also"]["others_of_solo"] for name, row in rows.items()}
    assert share["simulated local_sgd, one 4x slower (2 workers)"] < 0.5
    assert share["simulated downpour, one 4x slower (2 workers)"] > 0.9
    assert multiprocessing.active_children() == []
