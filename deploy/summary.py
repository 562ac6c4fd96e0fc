"""What a run came to, as `report.json` begins: settings, seeds, versions, counts, curves; of a live run or a simulated.

Left out: what the run log adds, and how it looks (`deploy.report`).
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any

from common import config
from deploy.plan import Plan

STOPPED = "stopped before the budget was used up"
"""How a run ended that Ctrl-C or SIGTERM ended."""
LIBRARIES = ("paramserver", "torch", "numpy", "numba", "pyzmq")


def summary(
    plan: Plan,
    *,
    status: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    curve: Sequence[Mapping[str, Any]],
    solo: Mapping[str, Any],
    started: float,
    end: int | str,
) -> dict[str, Any]:
    """Plain values by name. started: seconds since 1970; end: the exit code, or why the run failed."""
    settings = plan.server.settings
    last = curve[-1] if curve else {"loss": None, "accuracy": None}
    return {
        "task": plan.task,
        "rule": settings.rule,
        "settings": [row._asdict() for row in config.describe(plan.server)],
        "seeds": {"server": plan.seed, "weights": plan.seed}
        | {row["name"]: plan.seed_of(number) for number, row in enumerate(rows)},
        "versions": _versions(),
        "started": started,
        "seconds": status["elapsed_s"],
        "updates": status["updates"],
        "samples": status["samples"],
        "samples_per_s": status["samples"] / status["elapsed_s"] if status["elapsed_s"] else None,
        "workers": rows,
        "center_accuracy": last["accuracy"],
        "center_loss": last["loss"],
        "curve": curve,
        "solo_accuracy": solo.get("accuracy"),
        "solo_loss": solo.get("loss"),
        "solo_curve": solo.get("curve", []),
        "solo": {name: value for name, value in solo.items() if name != "curve"},
        "exit": end,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
