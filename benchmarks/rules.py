"""Every rule beside every other: on digits, in virtual time, with 1, 4 and 16 workers, equal and one four times slower.

Each worker makes about 150 steps of 100 ms with 10 % jitter; all workers together share a budget of samples. Every rule
has its defaults, 4 local steps where it has them, and the inner optimizer that it asks for. `seconds` are virtual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure

from benchmarks import harness, simulated
from benchmarks.harness import Benchmark
from benchmarks.simulated import Done, Run
from common import rules
from common.errors import ConfigError
from common.rules.base import Terms

STEPS, BATCH = 150, 32
LOCAL_STEPS = 4
SLOW = 4

Workers = Annotated[list[int], typer.Option("--workers", min=1, help="Numbers of workers; repeat for more.")]
Only = Annotated[list[str] | None, typer.Option("--rule", help="Only these rules; repeat for more.")]


def run(
    workers: Workers = [1, 4, 16],  # noqa: B006  # typer's way
    only: Only = None,
    seeds: simulated.Seeds = 1,
    processes: simulated.Processes = simulated.CORES,
    keep: simulated.Keep = None,
    json_file: harness.JsonFile = None,
) -> None:
    """Simulate, print, write."""
    runs = [
        _case(rule, number, slow, seed)
        for rule in only or rules.names()
        for number in workers
        for slow in ((1, SLOW) if number > 1 else (1,))
        for seed in range(seeds)
    ]
    done = simulated.run_all(runs, processes=processes, keep=keep)
    rows = [_row(one) for one in done]
    settings = {"task": "digits", "steps a worker": STEPS, "seeds": seeds}
    simulated.report(BENCHMARK.name, rows, settings, _picture(rows), json_file)
