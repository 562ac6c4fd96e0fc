"""Every rule with real processes: four workers on digits, one killed in the middle, one that comes late.

`make rules` runs it and leaves a line for each case in `runs/rules.jsonl`, from which the table in `docs/rules.md` is
taken. Rules are found, not listed: a new file runs with its defaults.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common import rules
from tests.integration.test_launch import Launch, assert_nothing_is_left
from tests.processes import Process, until

SECONDS = 30
ACCURACY = 0.94
LEASE_S = 3
"""How long a round waits for the one that was killed."""
FLAGS: dict[str, tuple[str, ...]] = {
    "downpour": ("--rule=downpour",),
    "gem, kappa .5": ("--rule=gem", "--set=kappa=0.5"),
    "easgd, H 4": ("--rule=easgd", "--local-steps=4"),
    "eamsgd, H 4, Nesterov": ("--rule=eamsgd", "--local-steps=4", "--optimizer=nesterov"),
    "fedbuff, H 4, K 4": ("--rule=fedbuff", "--local-steps=4", "--set=K=4"),
    "adag, H 4": ("--rule=adag", "--local-steps=4"),
    "delayed_nesterov, H 8": ("--rule=delayed_nesterov", "--local-steps=8", "--set=lr=0.4"),
    "local_sgd, H 8": ("--rule=local_sgd", "--local-steps=8"),
    "local_sgd, 2 blocks": ("--rule=local_sgd", "--local-steps=4", "--set=groups=2", "--set=h_block=3"),
    "local_sgd, post-local": ("--rule=local_sgd", "--local-steps=8", "--set=start_local_at=100"),
    "diloco, H 20, AdamW": ("--rule=diloco", "--local-steps=20", "--optimizer=adamw"),
    "diloco, 4 fragments, AdamW": (
        *("--rule=diloco", "--local-steps=20", "--optimizer=adamw", "--overlap"),
        *("--set=fragments=4", "--set=delay=2"),
    ),
    "decoupled_diloco, H 8": ("--rule=decoupled_diloco", "--local-steps=8"),
    "lsgd, published": ("--rule=lsgd",),
    "lsgd, latest": ("--rule=lsgd", "--set=clock=latest"),
}
NAMED = {flags[0].removeprefix("--rule=") for flags in FLAGS.values()}
CASES = FLAGS | {name: (f"--rule={name}",) for name in rules.names() if name not in NAMED}


@pytest.fixture
def late(tmp_path: Path) -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        if process.running:
            process.kill()


def launched(tmp_path: Path, *flags: str) -> Launch:
    """`launch` with a short lease, on digits."""
    config = tmp_path / "server.toml"
    config.write_text(f"lease_s = {LEASE_S}\n")
    return Launch(tmp_path, "--task=digits", f"--config={config}", "--no-solo", *flags)


def report_of(run: Launch) -> dict[str, Any]:
    """What is left of a run that has ended by itself."""
    assert run.wait(SECONDS + 60.0) == 0, run.text
    assert_nothing_is_left(run.directory)
    found: dict[str, Any] = json.loads((run.directory / "report.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", CASES)
def test_a_rule_ends_well_with_one_killed_and_one_late(case: str, tmp_path: Path, late: list[Process]) -> None:
    run = launched(tmp_path, "--workers=4", f"--budget-s={SECONDS}", *CASES[case])
    run.wait_for_training()
    before = run.status()["samples"]
    os.kill(run.child("worker-1"), signal.SIGKILL)
    address = (run.directory / "address").read_text().strip()
    optimizer = [flag for flag in CASES[case] if flag.startswith("--optimizer")]
    words = ["-m", "deploy", "worker", address, "--task=digits", "--name=late", "--seed=9", *optimizer]
    late.append(Process([*words, "--threads=1"], tmp_path / "late.log"))
    until(lambda: not run.running or run.status().get("samples", 0) > 2 * before, "training to go on", 40.0)
    found = report_of(run)
    assert late[0].wait(10.0) == 0, late[0].text
    assert found["center_accuracy"] >= ACCURACY
    rows = {row["name"]: row for row in found["workers"]}
    assert rows["worker-1"]["exit"] == -signal.SIGKILL
    assert all(rows[name]["exit"] == 0 for name in ("worker-0", "worker-2", "worker-3"))
    joined = [line for line in late[0].text.splitlines() if "joined as late" in line]
    assert joined, late[0].text
    _write_down(case, found, late[0].text)


def _write_down(case: str, found: dict[str, Any], said: str) -> None:
    """One line for the table, where one is wanted."""
    if not (path := os.environ.get("RULES_TABLE")):
        return
    row = {name: found[name] for name in ("center_accuracy", "center_loss", "updates", "samples", "samples_per_s")}
    totals = {name: sum(worker.get(name, 0) or 0 for worker in found["workers"]) for name in ("bytes_up", "bytes_down")}
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"case": case, **row, **totals, "late": said.splitlines()[-1]}) + "\n")


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("clock", ["published", "latest"])
def test_eight_workers_in_two_groups_follow_their_leaders(clock: str, tmp_path: Path) -> None:
    """Only leaders upload; each upload is one model; a dead leader is replaced; who led is in the report."""
    flags = ("--set=groups=2", "--set=tau=4", "--set=tau_global=8", f"--set=clock={clock}")
    run = launched(tmp_path, "--workers=8", f"--budget-s={SECONDS}", "--rule=lsgd", *flags)
    run.wait_for_training()
    leader = until(lambda: _last_leader(run), "a leader")
    at = len(_applied(run))
    os.kill(run.child(leader), signal.SIGKILL)
    until(lambda: not run.running or len(_applied(run)) > at + 20, "the next leaders", 40.0)
    found = report_of(run)
    assert found["center_accuracy"] >= ACCURACY
    lines = _applied(run)
    payload = lines[0]["bytes_up"]
    rows = {row["name"]: row for row in found["workers"]}
    uploads = {name: sum(line["worker"] == name for line in lines) for name in rows}
    more = {name: rows[name]["bytes_up"] / payload - n for name, n in uploads.items()}
    assert set(more.values()) <= {0.0, 1.0}
    assert sum(more.values()) <= 2, "an upload of each group's leader may be under way when training ends"
    assert {line["bytes_down"] for line in lines} == {0}, "a leader keeps its parameters"
    last = lines[-20:]
    assert leader not in {line["worker"] for line in last}
    assert len({line["leader"] for line in lines}) > 1
    assert sum(found["leaders"]["counts"].values()) > 0
    if clock == "published":
        # a local round asks two leaders and sends each group's to the three others; a global one goes to seven as well
        rounds = max(line["round"] for line in lines)
        assert sum(uploads.values()) == pytest.approx(2 * rounds, abs=4)
        down = sum(row["bytes_down"] for row in rows.values()) / payload
        assert down <= 8 + rounds * (2 * 3) + (rounds / 2 + 1) * 7


def _applied(run: Launch) -> list[dict[str, Any]]:
    """The uploads in the run log so far."""
    log = run.directory / "run.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [line for line in map(json.loads, lines) if line["kind"] == "apply"]


def _last_leader(run: Launch) -> str:
    lines = _applied(run)
    return str(lines[-1]["leader"]) if len(lines) > 20 else ""
