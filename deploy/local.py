"""A whole run on this machine: a server, its workers and a lone worker to compare with, each a process of its own.

    found = local.launch(plan.make(loaded, task="digits", workers=4, ...), console, say)

    DIRECTORY/                      checkpoints and run log of the server; report.json, report.html
    DIRECTORY/logs/NAME.log         all that the process NAME wrote

Laws
* However a run ends, no process of it is left: the launcher ends its children, each with its process group, and the
  kernel ends them where the launcher is killed. Ctrl-C reaches the launcher alone, for each child has its own session.
* A run that fails or is stopped after its first update still leaves a report, which says how it ended.
* Imports go one way: `local` sees `run`; `run` sees `plan`, `measure`, `children` and `screens`, which see none of
  the others.

Left out: other machines (`paramserver worker` joins from there), and what the figures look like (`deploy.report`).
"""

from __future__ import annotations

from typing import Any

from rich.console import Console

from common.errors import ParamserverError, StateError
from deploy import report
from deploy.plan import Plan
from deploy.run import Run, read
from deploy.screens import Say, watch
from deploy.summary import STOPPED, summary


def launch(plan: Plan, console: Console, say: Say) -> dict[str, Any]:
    """Run it all and write the report; returns what report.json holds, and its path as `report`.

    Raises ParamserverError where the server or every worker died, or training diverged.
    """
    run, solo = Run(plan, say), dict[str, Any]()
    try:
        with run:
            run.start_server()
            run.start_workers()
            say("info", f"{len(plan.devices)} workers, {plan.threads} threads each, on {plan.where}.")
            with watch(console, say, plan.server.settings.budget_updates) as screen:
                run.train(screen)
            run.finish()
            say("info", _sentence(run.status["finished"] or "all workers left"))
            steps = run.start_solo() if plan.solo else 0
            run.stop_server()
            if steps:
                say("info", f"One worker alone trains for {steps:,} steps, to compare.")
            solo = run.solo()
            run.stop_workers()
    except (ParamserverError, KeyboardInterrupt, SystemExit) as error:
        end = error.sentence if isinstance(error, ParamserverError) else STOPPED
        if run.status.get("updates"):
            try:
                _, page = report.write(plan.directory, _summary(plan, run, solo, end))
                say("info", f"What was done until then: {page}")
            except StateError as no_room:
                say("warning", str(no_room))
        raise
    path, page = report.write(plan.directory, _summary(plan, run, solo, 0))
    return read(path) | {"report": str(page)}


def _summary(plan: Plan, run: Run, solo: dict[str, Any], end: int | str) -> dict[str, Any]:
    curve, rows = run.center.curve, run.rows()
    return summary(plan, status=run.status, rows=rows, curve=curve, solo=solo, started=run.started, end=end)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
