"""Benchmarks of training: runs are what the command gives, are kept, and fail with their words; figures are laws."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks import diversity, gem_figure1, rules, simulated
from benchmarks.harness import BenchmarkError
from benchmarks.simulated import Done, Run
from worker import tasks
from worker.tasks import Context

WORDS = ("--rule", "gem", "--workers", "2", "--budget-updates", "80", "--evaluations", "1")
SMALL = Run("small", WORDS, {"rule": "gem", "workers": 2, "seed": 0})


@pytest.mark.slow
def test_a_run_is_what_the_command_gives_and_is_kept(tmp_path: Path) -> None:
    [done] = simulated.run_all([SMALL], processes=1, keep=tmp_path)
    assert sum(map(len, done.losses.values())) == done.report["updates"] == 80
    assert sorted(done.losses) == ["worker-0", "worker-1"]
    assert done.final_loss < done.loss_at(30) < math.log(10) + 0.5
    assert not done.diverged
    [kept] = tmp_path.glob("*/done.json")
    before = kept.stat().st_mtime_ns
    [again] = simulated.run_all([SMALL], processes=1, keep=tmp_path)
    assert again == done
    assert kept.stat().st_mtime_ns == before, "what is kept is not run again"
    json_file = tmp_path / "figure.json"
    simulated.report("test", gem_figure1.rows([done]), {"seeds": 1}, gem_figure1.picture([done]), json_file)
    [row] = json.loads(json_file.read_text())["rows"]
    assert row["final training loss"] == [round(done.final_loss, 4)]
    assert json_file.with_suffix(".png").stat().st_size > 10_000


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="no rule named 'gemm'"):
        simulated.run_all([Run("wrong", ("--rule", "gemm"))], processes=1, keep=tmp_path)


def test_a_run_that_diverged_is_a_result() -> None:
    done = Done(SMALL, {"worker-0": [2.3] * 40}, {}, "Training diverged: ...")
    assert math.isnan(done.final_loss)
    assert gem_figure1.shown(done.final_loss) == gem_figure1.CHANCE


def test_every_rule_has_its_cases() -> None:
    """Those that take local steps get them, those that refuse them do not."""
    steps = {name: rules._case(name, 4, 1, 0).about["H"] for name in ("local_sgd", "easgd", "dc_asgd", "lsgd")}
    assert steps["local_sgd"] == steps["easgd"] == rules.LOCAL_STEPS
    assert steps["dc_asgd"] == 1


@pytest.mark.slow
def test_replication_lowers_the_bound_and_the_estimate_is_near_it() -> None:
    torch.set_num_threads(1)
    passed = list(tasks.load("digits").make(Context()).batches)
    pool = diversity.Data(torch.cat([x for x, _ in passed]), torch.cat([y for _, y in passed]))
    model = diversity.trained(diversity.replicated(pool, 1, 0), diversity.SMALL, 3, 0)
    bounds = []
    for r in (1, 16):
        data = diversity.replicated(pool, r, 0)
        assert len(data.y) == diversity.SAMPLES
        assert len(data.x.unique(dim=0)) == diversity.SAMPLES // r
        bounds.append(diversity.exact(model, data))
        assert diversity.estimated(model, data, 0) == pytest.approx(bounds[-1], rel=0.2)
    assert bounds == sorted(bounds, reverse=True)


def test_all_benchmarks_are_found() -> None:
    assert {"gem_figure1", "gem_kappa", "rules", "diversity", "bytes_to_accuracy", "simulator", "roundtrip"} <= set(
        benchmarks.names()
    )
