"""Without a device it says so; its code path runs on the CPU; int8 on the device is int8."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.__main__ import main
from benchmarks.players import WAYS

CPU = torch.device("cpu")


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu"]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_int8_is_off_by_half_a_step_at_most_and_takes_zeros() -> None:
    x = torch.randn(7, gpu.GROUP)
    x[3] = 0.0
    q, scales = torch.zeros(x.shape, dtype=torch.int8), torch.zeros(7, 1)
    gpu.int8(x, q, scales)
    assert ((q * scales - x).abs() <= 0.501 * scales).all()
    assert int(q[0].abs().max()) == 127


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
        "pinned, two buffers",
        "plain loop",
        "SDK, H = 1, overlap, ipc",
        "SDK, H = 8, overlap, ipc",
    ]
    assert all("stalled_percent" in row["also"] for row in rows[6:])
