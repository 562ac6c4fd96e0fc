"""Bytes to accuracy: a server takes every case, its bytes are what workers count, and it is compared fairly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bytes_to_accuracy, simulated
from benchmarks.bytes_to_accuracy import CASES, Case, Traffic, Training, synchronous
from benchmarks.simulated import Done
from common import chunks
from common.binding import layout_of
from common.config import ServerSettings
from worker import tasks
from worker.tasks import Context, charlm, mnist

EVERY_CASE = [case for cases in CASES.values() for case in cases]
LAYOUTS = {"mnist": layout_of(mnist.Network()), "charlm": layout_of(charlm.Network())}


def _traffic(case: Case, samples: float) -> Traffic:
    up, down = (chunks.plan(LAYOUTS[case.task], codec).bytes for codec in (case.codec, case.reply_codec))
    return Traffic(up, down, samples * case.local_steps)


@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: f"{case.task}-{case.rule}-{case.codec}-{case.down}")
def test_a_server_takes_every_case_and_its_budget_is_whole_rounds(case: Case) -> None:
    training = bytes_to_accuracy.TRAININGS[case.task]
    run = bytes_to_accuracy.simulation(case, training, 0, Path("data"))
    words = dict(zip(run.words[::2], run.words[1::2], strict=True))
    names = {"--rule", "--codec", "--replies", "--reply-codec", "--local-steps", "--budget-updates"} & words.keys()
    settings = ServerSettings(**{name[2:].replace("-", "_"): words[name] for name in names})
    assert settings.budget_updates is not None
    assert settings.budget_updates * case.local_steps == training.steps * bytes_to_accuracy.WORKERS
    assert settings.codec == case.codec, "the shortest name, which is the one that is shown"


def test_whatever_is_compared_has_its_reference() -> None:
    for task, cases in CASES.items():
        assert cases[0] == synchronous(task)
        assert len(set(cases)) == len(cases)
        for case in cases:
            [exact] = [other for other in cases if bytes_to_accuracy._is_exact_twin(other, case)]
            assert exact.codec == exact.reply_codec == "fp32"


def test_updates_of_mnist_are_8_25_and_100_times_smaller() -> None:
    """4 bits and the scales of groups of 128, with the 790 parameters that travel as fp16, are 7.4 times smaller."""
    fp32 = chunks.plan(LAYOUTS["mnist"], "fp32").bytes
    smaller = {codec: fp32 / chunks.plan(LAYOUTS["mnist"], codec).bytes for codec in bytes_to_accuracy.CODECS}
    assert smaller["int4"] == smaller["e3m0"] == pytest.approx(7.43, abs=0.01)
    assert smaller["sign"] > 25
    assert smaller["topk:0.0075"] > 100
    down = chunks.plan(LAYOUTS["mnist"], "plain:int4").bytes
    assert fp32 / down > 4, "replies as differences"


def test_diloco_with_four_bits_sends_400_times_less() -> None:
    reference = _traffic(synchronous("charlm"), 16).bytes_a_sample
    fewer = [reference / _traffic(case, 16).bytes_a_sample for case in CASES["charlm"] if case.codec == "int4"]
    assert len(fewer) == 2
    assert min(fewer) > 400


@pytest.mark.slow
def test_the_bytes_are_those_that_workers_count(tmp_path: Path) -> None:
    cases = [synchronous("digits"), Case("digits", "local_sgd", 2), Case("digits", "local_sgd", 2, "int4", "int8")]
    done = [_run(case, tmp_path) for case in cases]
    layout = layout_of(tasks.load("digits").make(Context()).model)
    for one in done:
        found = bytes_to_accuracy.traffic(one, layout)
        for row in one.report["workers"]:
            assert row["exchanges"]["bytes_up"] == row["updates"] * found.update_bytes
            assert row["exchanges"]["bytes_down"] == row["exchanges"]["pushed"] * found.reply_bytes
        assert found.samples == one.run.about["case"].local_steps * 32
    rows = bytes_to_accuracy.rows(done, {"digits": layout})
    assert [row["fewer x"] for row in rows[:2]] == [1, 2]
    assert rows[2]["fewer x"] == pytest.approx(4 / (1 / rows[2]["update x"] + 1 / rows[2]["reply x"]), rel=0.02)
    assert rows[0]["samples to target"] <= 80 * 32, "20 steps of 4 workers are enough for three digits in ten"
    json_file = tmp_path / "figure.json"
    simulated.report("test", rows, {"seeds": 1}, bytes_to_accuracy.picture(rows), json_file)
    assert json.loads(json_file.read_text())["rows"][2]["down"] == "int8"
    assert json_file.with_suffix(".png").stat().st_size > 10_000


def _run(case: Case, folder: Path) -> Done:
    [done] = simulated.run_all(
        [bytes_to_accuracy.simulation(case, Training(20, 4, 0.3), 0, None)], processes=1, keep=folder
    )
    return done
