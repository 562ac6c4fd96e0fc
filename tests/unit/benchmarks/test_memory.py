"""Figures of memory and CPU are what the system says; shares and drift are laws; and one small real run."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import memory
from benchmarks.__main__ import main
from benchmarks.memory import Hosting, Soak
from common.buffers import zeros


def test_memory_that_is_written_to_is_there() -> None:
    before = memory.resident_bytes(os.getpid())
    kept = zeros(20_000_000, np.uint8)  # mapped anew, where malloc might have it still
    assert memory.resident_bytes(os.getpid()) - before == pytest.approx(kept.nbytes, rel=0.2)


def test_cpu_time_is_of_the_whole_process() -> None:
    before, started = memory.cpu_s(os.getpid()), time.process_time()
    while time.process_time() - started < 0.1:
        pass
    assert memory.cpu_s(os.getpid()) - before >= 0.08


def test_what_grew_is_compared_with_what_was_stated() -> None:
    found = Soak(before=100, stated=1000, samples=[500, 900, 1000, 1000, 1010, 1010]).also()
    assert found["of_stated"] == 0.91
    assert found["drift_percent"] == pytest.approx(1.0)
    assert Soak(before=0, stated=10, samples=[5]).also()["drift_percent"] == 0


def test_times_are_compared_with_that_of_the_middle_size() -> None:
    found = memory.linear([(10, 2e-8), (100, 1e-7), (1000, 3e-6)])
    assert [one["ns_per_byte"] for one in found] == pytest.approx([2.0, 1.0, 3.0])
    assert [one["of_middle"] for one in found] == pytest.approx([2.0, 1.0, 3.0])
    assert memory.linear([]) == []


def test_a_hosting_says_what_it_is() -> None:
    assert Hosting("gem", "int8", 4).name == "gem int8 (4 workers)"
    assert Hosting("downpour", "fp32", 2, saved=True).name == "downpour fp32, checkpoints (2 workers)"


def test_a_part_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--part", "stated", "--part", "nothing"]) == 1
    assert "There is no part nothing" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_small_server_is_looked_at_from_all_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "HOSTINGS", (Hosting("downpour", "fp32", 2, saved=True), Hosting("gem", "int8", 2)))
    file = tmp_path / "memory.json"
    small = ("--size-mb", "4", "--soak-s", "0.5", "--sizes", "1", "--sizes", "2", "--window-s", "0.1", "--rounds", "2")
    with pytest.raises(SystemExit) as end:
        main(["memory", *small, "--idle", "0", "--idle", "6", "--json", str(file)])
    assert end.value.code == 0
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 6
    for row in rows[:2]:
        assert row["also"]["stated_mb"] > 4
    assert [row["size_bytes"] for row in rows[2:4]] == [10**6, 2 * 10**6]
    assert rows[5]["also"]["server_cpu_us"] > 0
    assert multiprocessing.active_children() == []
