"""`paramserver simulate`: one seed is one run, bit for bit, under every rule and with faults, reported like a live one.

Laws
* The SHA-256 of the center, the run log and all figures of two runs of one seed are equal; another seed is another run.
* What a run is told to be is what it was: stragglers do less, faults happen, the center learns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common import config, rules
from common.config import ServerSettings
from common.errors import NetworkError, ParamserverError, StateError
from deploy import plan, simulation
from deploy.screens import console
from deploy.simulation import scenario

FAULTS = "loss=0.03,duplicate=0.03,reorder=0.03,cuts=4s,worker_crashes=6s,server_crashes=5s"
FOR_RULE: dict[str, dict[str, Any]] = {
    "eamsgd": {"optimizer": "nesterov"},
    "lsgd": {"rule_settings": ["groups=2", "tau=1", "tau_global=2"]},
}


KINDS = ("gem", "fedbuff", "easgd", "lsgd", "diloco")
"""One rule of each kind: answered at once, held, elastic, scheduled, in rounds. The others are slow tests."""


def simulate(directory: Path, rule: str = "gem", *, workers: int = 4, updates: int = 60, **more: Any) -> dict[str, Any]:
    """A small run; `more` are settings of the server, or words of the scenario."""
    words: dict[str, Any] = {
        "compute": "lognormal:100ms,0.2",
        "network": "lognormal:2ms,0.5",
        "bandwidth_mb_s": 0.0,
        "server_bandwidth_mb_s": 0.0,
        "stragglers": "",
        "faults": "",
        "evaluations": 2,
        "check": True,
    }
    words |= {name: more.pop(name) for name in tuple(more) if name in words}
    optimizer, task = more.pop("optimizer", ""), more.pop("task", "digits")
    flags = {"rule": rule, "directory": str(directory), "budget_updates": str(updates), "lease_s": "4"}
    flags |= {"checkpoint_interval_s": "1"} | {name: value for name, value in more.items()}
    loaded = config.load(ServerSettings, file=None, environ={}, flags=flags)
    made = plan.make(loaded, task=task, workers=workers, optimizer=optimizer, solo=False, threads=1)
    return simulation.simulate(made, scenario.make(workers=workers, **words), console(), lambda level, sentence: None)


def without_real_time(report: dict[str, Any]) -> dict[str, Any]:
    """Of a report, what the seed decides."""
    kept = {name: value for name, value in report.items() if name not in ("report", "settings", "versions")}
    return kept | {"simulated": {k: v for k, v in report["simulated"].items() if "seconds" not in k}}


@pytest.mark.parametrize(
    "rule", [rule if rule in KINDS else pytest.param(rule, marks=pytest.mark.slow) for rule in rules.names()]
)
def test_one_seed_is_one_run_under_every_rule_and_with_faults(rule: str, tmp_path: Path) -> None:
    one, two = (simulate(tmp_path / n, rule, faults=FAULTS, **FOR_RULE.get(rule, {})) for n in ("one", "two"))
    assert one["center_sha256"] == two["center_sha256"]
    assert len(one["center_sha256"]) == 64
    assert without_real_time(one) == without_real_time(two)
    assert (tmp_path / "one/run.jsonl").read_bytes() == (tmp_path / "two/run.jsonl").read_bytes()
    assert one["updates"] >= 60


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    one, two = (simulate(tmp_path / str(seed), seed=str(seed)) for seed in (0, 1))
    assert one["center_sha256"] != two["center_sha256"]


def test_faults_happen_and_the_center_learns_all_the_same(tmp_path: Path) -> None:
    found = simulate(tmp_path / "run", updates=400, faults=FAULTS, evaluations=5)
    crashes = found["simulated"]["crashes"]
    assert min(crashes["cut"], crashes["worker"], crashes["server"]) >= 1, crashes
    assert found["center_accuracy"] > 0.9
    assert found["events"]["counts"]["checkpoint"] >= 2
    times = [point["time_s"] for point in found["curve"]]
    assert times == sorted(times)
    assert len(times) >= 4


@pytest.mark.parametrize(("reply_codec", "times"), [("plain:int4", 4), ("plain:topk:0.05", 8), ("plain:powersgd", 8)])
def test_differences_are_a_fraction_of_whole_replies_and_teach_as_much(
    reply_codec: str, times: int, tmp_path: Path
) -> None:
    """int8 alone is not a quarter: its scales, the tensors that go dense and the anchors come on top."""
    words = {"rule": "downpour", "updates": 200, "local_steps": "4"}
    whole = simulate(tmp_path / "whole", **words)
    found = simulate(tmp_path / "difference", replies="difference", reply_codec=reply_codec, **words)
    assert found["bytes_down"] * times < whole["bytes_down"]
    assert found["bytes_up"] == whole["bytes_up"]
    assert found["center_accuracy"] > whole["center_accuracy"] - 0.02 > 0.9


@pytest.mark.parametrize(("reply_codec", "codec"), [("plain:int4", "topk:0.05"), ("plain:powersgd", "powersgd")])
def test_differences_with_faults_are_one_run_too(reply_codec: str, codec: str, tmp_path: Path) -> None:
    words = {
        "replies": "difference",
        "reply_codec": reply_codec,
        "codec": codec,
        "local_steps": "2",
        "faults": FAULTS,
    }
    one, two = (simulate(tmp_path / n, "diloco", rule_settings=["fragments=2"], **words) for n in ("one", "two"))
    assert one["center_sha256"] == two["center_sha256"]
    assert (tmp_path / "one/run.jsonl").read_bytes() == (tmp_path / "two/run.jsonl").read_bytes()


@pytest.mark.parametrize(
    "rule",
    [
        rule if rule in ("downpour", "diloco") else pytest.param(rule, marks=pytest.mark.slow)
        for rule in rules.names()
        if not rules.load(rule).schedules
    ],
)
def test_factors_of_a_low_rank_teach_as_much_under_every_rule_that_takes_them(rule: str, tmp_path: Path) -> None:
    """A rule that uploads parameters does not; one whose updates hold what was lost takes them without feedback."""
    words = {"updates": 300, "local_steps": "1" if rule == "dc_asgd" else "4", **FOR_RULE.get(rule, {})}
    if rule == "diloco":
        words["rule_settings"] = ["fragments=2"]  # the border between them cuts a row
    exact = simulate(tmp_path / "exact", rule, **words)
    codec = "powersgd" if rules.load(rule).track is None else "plain:powersgd"
    found = simulate(tmp_path / "factors", rule, codec=codec, **words)
    assert found["bytes_up"] * 9 < exact["bytes_up"]
    assert found["center_accuracy"] > exact["center_accuracy"] - 0.03 > 0.87


def test_stragglers_do_less(tmp_path: Path) -> None:
    found = simulate(tmp_path / "run", updates=200, stragglers="1:4")
    steps = [row["steps"] for row in found["workers"]]
    assert steps[0] * 3 < min(steps[1:])
    assert found["simulated"]["stragglers"] == "1 x 4"


def test_a_narrow_link_takes_its_time(tmp_path: Path) -> None:
    wide, narrow = (simulate(tmp_path / str(mb), updates=40, bandwidth_mb_s=mb) for mb in (0.0, 1.0))
    model_bytes = 4 * 21_386
    least_s = 40 / 4 * 2 * model_bytes / 1e6
    assert narrow["seconds"] - wide["seconds"] > 0.8 * least_s
    shared = simulate(tmp_path / "shared", updates=40, server_bandwidth_mb_s=1.0)
    assert shared["seconds"] > narrow["seconds"], "four workers behind one link wait for one another"


def test_the_report_is_that_of_a_live_run(tmp_path: Path) -> None:
    found = simulate(tmp_path / "run")
    assert {"curves", "lag", "workers", "goodput", "fairness", "seeds", "versions"} <= found.keys()
    assert all(row["exit"] == 0 and row["steps"] for row in found["workers"])
    page = Path(found["report"]).read_text()
    assert "simulated, in virtual time" in page
    assert "Simulated cluster" in page


def test_what_was_trained_can_be_gone_on_with_but_not_by_a_simulation(tmp_path: Path) -> None:
    simulate(tmp_path / "run")
    assert list((tmp_path / "run").glob("checkpoint-*"))
    with pytest.raises(StateError, match="begins at nothing"):
        simulate(tmp_path / "run")


def test_a_cluster_that_cannot_train_comes_to_an_end(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="stands still"):
        simulate(tmp_path / "lost", faults="loss=0.9", workers=2, updates=10_000, check=False)


def test_a_task_that_fails_in_every_worker_is_told(tmp_path: Path) -> None:
    task = tmp_path / "broken.py"
    task.write_text(
        "import torch\n\n\ndef make_task(context):\n"
        "    model = torch.nn.Linear(2, 1)\n"
        "    def loss(model, batch):\n        raise ValueError('no such loss')\n"
        "    return model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.ones(4, 2)], loss\n"
    )
    with pytest.raises(
        ParamserverError, match=r"Every worker failed, the last one so: ValueError: no such loss\."
    ) as told:
        simulate(tmp_path / "run", task=str(task))
    assert told.value.fix == f"Look at {task}, line 7."


def test_divergence_is_told_and_reported(tmp_path: Path) -> None:
    task = tmp_path / "steep.py"
    task.write_text(
        "import torch\n\n\ndef make_task(context):\n"
        "    model = torch.nn.Linear(2, 1)\n"
        "    return model, torch.optim.SGD(model.parameters(), lr=1e20), [torch.ones(4, 2)], "
        "lambda m, x: (m(x) ** 2).sum()\n"
    )
    with pytest.raises(ParamserverError):
        simulate(tmp_path / "run", "downpour", task=str(task), updates=500)
    report = tmp_path / "run/report.json"
    assert not report.exists() or json.loads(report.read_text())["exit"] != 0
