"""Every codec is measured both ways, a wrong answer fails, and one real run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import codecs as benchmark
from benchmarks import harness
from benchmarks.__main__ import main
from benchmarks.harness import BenchmarkError
from common import chunks, codecs
from common.layout import Layout, Tensor

N = 70_000


@pytest.mark.parametrize("name", codecs.names())
def test_both_ways_of_every_codec_run_and_move_vector_and_payload(name: str) -> None:
    x, y = benchmark.noise(N), np.zeros(N, np.float32)
    cases = benchmark.coding(codecs.load(name), x, y)
    assert [case.name for case in cases] == [f"{name} encode", f"{name} check + decode"]
    harness.measure(cases, 1, warmup=0)
    assert 4 * N < cases[0].moved_bytes == cases[1].moved_bytes <= 8 * N + 16
    assert y.any()


def test_a_wrong_payload_fails() -> None:
    x = benchmark.noise(N)
    plan = chunks.plan(Layout((Tensor("w", (1, N), "float32", "parameter"),)), "bf16")
    data = np.zeros(plan.bytes, np.uint8)
    plan.encode(x, data)
    benchmark.check(plan, data, x)
    data[-20] ^= 0x40
    with pytest.raises(BenchmarkError, match="beyond its bound"):
        benchmark.check(plan, data, x)


def test_one_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "codecs.json"
    with pytest.raises(SystemExit) as end:
        main(["codecs", "--size-mb", "1", "--rounds", "1", "--codec", "int8:256", "--json", str(file)])
    assert end.value.code == 0
    found = json.loads(file.read_text())
    assert [row["case"] for row in found["rows"]] == ["numpy.copyto", "int8:256 encode", "int8:256 check + decode"]
    assert found["codecs"][0]["bytes_per_element"] == 1 + 4 / 256
    assert "bytes per element" in capsys.readouterr().out
