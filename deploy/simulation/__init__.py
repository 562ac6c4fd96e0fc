"""A whole run in virtual time: real gradients, the real server and workers, a made-up cluster, on one machine.

    found = simulation.simulate(plan.make(loaded, task="mnist", workers=100, ...), scenario.make(...), console, say)

    DIRECTORY/                      what a live run leaves there: checkpoints, run log, report.json, report.html

Laws
* One seed, one run, bit for bit: the SHA-256 of the center says so.
* The report is that of a live run; its seconds are virtual. What is made up stands in it as `simulated`.
* Workers are processes and share nothing but what they read; whatever ends one of them ends no other, and however a
  simulation ends, none of them is left.
* Imports go one way: `cluster` > `workers` > `cores`, `carrier`, `remote` > `pipe`, `fibers`, `server`, `scenario`.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from rich.console import Console

from common.errors import ParamserverError, StateError
from deploy import measure, report
from deploy.plan import Plan
from deploy.run import read
from deploy.screens import Say, watch
from deploy.simulation.cluster import Cluster
from deploy.simulation.cores import WorkerEnded
from deploy.simulation.scenario import Scenario
from deploy.summary import STOPPED, summary
from paramserver import checkpoint
from paramserver.telemetry import FILE

__all__ = ["Cluster", "Scenario", "simulate"]


def simulate(plan: Plan, scenario: Scenario, console: Console, say: Say) -> dict[str, Any]:
    """Run it all and write the report; returns what report.json holds, and its path as `report`.

    Raises ParamserverError where training diverged, every worker failed, or the cluster came to a stand; StateError
    for a directory in which something was trained before.
    """
    _expect_nothing(plan)
    logging.getLogger("paramserver.worker").addHandler(logging.NullHandler())  # workers' warnings are the scenario
    cluster = Cluster(plan, scenario, lambda level, sentence: None)
    started, solo = time.monotonic(), dict[str, Any]()
    end: int | str = 0
    try:
        with watch(console, say, plan.server.settings.budget_updates) as screen:
            cluster.run(screen)
        say("info", f"{_words(cluster, time.monotonic() - started)}")
        for worker in cluster.workers:
            if (error := worker.error) is not None:
                say("warning", f"{error}" if isinstance(error, WorkerEnded) else f"{worker.name} failed: {error}")
        steps = round(sum(row.get("steps", 0) for row in cluster.rows()) / len(plan.devices)) if plan.solo else 0
        if steps:
            say("info", f"One worker alone trains for {steps:,} steps, to compare.")
            solo = _alone(plan, scenario, steps)
    except ParamserverError as error:
        end = error.sentence
        raise
    except (KeyboardInterrupt, SystemExit):
        end = STOPPED
        raise
    finally:
        if end == 0 or cluster.status.get("updates"):
            path, page = report.write(plan.directory, _summary(plan, scenario, cluster, solo, end, started))
            if end:
                say("info", f"What was done until then: {page}")
    return read(path) | {"report": str(page)}


def _summary(
    plan: Plan, scenario: Scenario, cluster: Cluster, solo: dict[str, Any], end: int | str, started: float
) -> dict[str, Any]:
    found = summary(
        plan, status=cluster.status, rows=cluster.rows(), curve=cluster.center.curve, solo=solo, started=0.0, end=end
    )
    made_up = {
        **scenario.words,
        "crashes": cluster.crashes,
        "real_seconds": round(time.monotonic() - started, 3),
        "training_seconds": round(cluster.real_seconds[0], 3),
        "training_cpu_seconds": round(cluster.real_seconds[1], 3),
        "events": cluster.world.events,
    }
    return found | {"simulated": made_up, "center_sha256": cluster.sha256}


def _alone(plan: Plan, scenario: Scenario, steps: int) -> dict[str, Any]:
    """The lone worker's figures, its time as virtual as that of the others."""
    found = measure.train_alone(
        plan.task,
        steps,
        device=plan.devices[0],
        seed=plan.seed,
        model_seed=plan.seed,
        data=plan.data,
        threads=plan.threads,
        optimizer=plan.optimizer,
        mechanism=plan.mechanism,
    )
    step_s = scenario.compute.mean_s
    found["seconds"] = seconds = found["steps"] * step_s
    found["samples_per_s"] = found["samples"] / seconds
    for point in found["curve"]:
        point["time_s"] = round(point["updates"] * step_s, 3)
    return found


def _expect_nothing(plan: Plan) -> None:
    if plan.directory.is_dir() and (checkpoint.checkpoints(plan.directory) or (plan.directory / FILE).exists()):
        raise StateError(
            f"{plan.directory} holds checkpoints or the log of an earlier run, and a simulation begins at nothing.",
            fix="Choose another --directory, or leave it out.",
        )


def _words(cluster: Cluster, real_s: float) -> str:
    kinds = {"cut": "broken connections", "worker": "workers crashed", "server": "crashes of the server"}
    faults = [f"{count} {kinds[kind]}" for kind, count in cluster.crashes.items() if count]
    passed = f"{cluster.world.now:,.0f} s passed in {real_s:,.1f} s, {cluster.world.events:,} events"
    return "; ".join([passed, *([", ".join(faults)] if faults else [])]) + "."
