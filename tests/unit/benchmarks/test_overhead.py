"""Overhead is of turns, not of runs; the center is the model that was trained; and one small real run."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import overhead
from benchmarks.__main__ import main
from benchmarks.overhead import Seen


def test_a_round_is_compared_with_the_plain_one_of_the_same_turn() -> None:
    assert overhead.over([2.04, 1.02, 5.0], [2.0, 1.0, 1.0]) == pytest.approx(2.0)


def test_figures_are_of_a_step_and_leave_out_the_warm_up() -> None:
    plain = Seen([(9.0, 9.0, 0.0), (1.0, 0.8, 0.0), (1.0, 0.8, 0.0)])
    ours = Seen([(7.0, 7.0, 7.0), (1.1, 0.8, 0.02), (1.1, 1.0, 0.04)])
    assert overhead.figures(ours, plain, 10) == pytest.approx(
        {"step_ms": 110, "cpu_ms": 90, "stalled_ms": 3, "over_plain_percent": 10, "over_plain_cpu_percent": 12.5}
    )


def test_models_are_as_far_apart_as_their_farthest_parameter() -> None:
    one, other = nn.Linear(3, 1), nn.Linear(3, 1)
    for model in (one, other):
        nn.init.constant_(model.weight, 2.0)
        nn.init.zeros_(model.bias)
    with torch.no_grad():
        other.weight[0, 1] += 0.5
    assert overhead.farthest(one, other) == 0.25


def test_steps_that_hold_no_whole_number_of_exchanges_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overhead", "--steps", "12", "--local-steps", "8"]) == 1
    assert "no whole number of exchanges" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_few_steps_with_and_without_come_to_the_trained_model(tmp_path: Path) -> None:
    file = tmp_path / "overhead.json"
    with pytest.raises(SystemExit) as end:
        main(["overhead", "--steps", "4", "--local-steps", "2", "--batch", "4", "--rounds", "2", "--json", str(file)])
    assert end.value.code == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"].rpartition(", ")[0] or row["case"] for row in rows] == [
        "plain loop",
        "SDK, H = 1",
        "SDK, H = 2, overlap",
    ]
    assert rows[0]["also"]["over_plain_percent"] == 0
    assert multiprocessing.active_children() == []
