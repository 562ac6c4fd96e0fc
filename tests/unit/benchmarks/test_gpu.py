"""Without a device it says so; its code path runs on the CPU, and notices what is wrong."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.__main__ import main
from benchmarks.harness import BenchmarkError
from benchmarks.players import WAYS

CPU = torch.device("cpu")


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu"]) == 1
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "opened",
    [gpu._copied, gpu._encoded, partial(gpu._gathered, CPU), gpu._scattered, gpu._down, gpu._up],
    ids=["copy", "int8", "gather", "scatter", "down", "up"],
)
def test_each_does_what_it_measures_and_would_say_if_not(opened: Any) -> None:
    """Checked before anything is done, it fails."""
    with opened(CPU, 300_001) as competitor:
        with pytest.raises(BenchmarkError, match="not what it should be"):
            competitor.verify()
        assert competitor.round() > 0.0
        competitor.verify()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_its_code_path_runs_on_the_cpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    gpu.measure(CPU, WAYS["ipc"], 1, 8, (2, 16, 4), 2, file)
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"] for row in rows] == [
        "device copy",
        "int8 encode",
        "gather",
        "scatter",
        "down",
        "up",
        "pageable",
        "plain loop",
        "SDK, H = 1, overlap, ipc",
        "SDK, H = 8, overlap, ipc",
    ]
    assert all("stalled_percent" in row["also"] for row in rows[8:])
