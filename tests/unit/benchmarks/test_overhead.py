"""Overhead is of rounds, not of runs; the center is the model that was trained; and one small real run."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import overhead
from benchmarks.__main__ import main
from benchmarks.overhead import Round, Spent


def test_figures_are_of_a_step_against_those_of_the_same_round() -> None:
    measured = [
        Round(Spent(1.0, 0.8, 0.0), Spent(1.1, 0.8, 0.02)),
        Round(Spent(5.0, 4.0, 0.0), Spent(5.1, 4.1, 0.04)),
        Round(Spent(1.0, 0.8, 0.0), Spent(1.3, 1.0, 0.03)),
    ]
    assert overhead.figures(measured, 10) == pytest.approx(
        {
            "step_ms": 130,
            "stalled_ms": 3,
            "over_plain_ms": 10,
            "over_plain_percent": 10,
            "quartiles_percent": 14,
            "over_plain_cpu_percent": 2.5,
        }
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
    cases = [(row["case"].partition(",")[0], row["case"].partition(" (")[2]) for row in rows]
    assert cases == [
        ("plain loop (H = 1)", "H = 1)"),
        ("SDK", "H = 1)"),
        ("plain loop (H = 2", "H = 2, overlap)"),
        ("SDK", "H = 2, overlap)"),
    ]
    for plain, ours in zip(rows[::2], rows[1::2], strict=True):
        assert list(ours["ratios"]) == [plain["case"]]
        assert ours["also"]["step_ms"] > 0
    assert multiprocessing.active_children() == []
