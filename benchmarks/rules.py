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
from common.rules.base import Terms

STEPS, BATCH = 150, 32
LOCAL_STEPS = 4
SLOW = 4
LEAST_SHOWN = 60

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


def _case(rule: str, workers: int, slow: int, seed: int) -> Run:
    local = LOCAL_STEPS if _takes_local_steps(rule) else 1
    budget = STEPS * workers * BATCH
    words = ["--rule", rule, "--workers", str(workers), "--task", "digits", "--seed", str(seed)]
    words += ["--budget-samples", str(budget), "--evaluations", "1", "--local-steps", str(local)]
    words += ["--stragglers", f"1:{slow}"] if slow > 1 else []
    words += ["--optimizer", OPTIMIZERS[rule]] if rule in OPTIMIZERS else []
    about = {"rule": rule, "workers": workers, "slowest": slow, "seed": seed, "H": local}
    return Run(f"{rule}, {workers} workers{f', one {slow} x slower' if slow > 1 else ''}", tuple(words), about)


def _takes_local_steps(name: str) -> bool:
    """Whether the rule, at its defaults, is content with more than one."""
    rule = rules.load(name)
    return rule.fits(rules.configure(rule, {}), Terms(LOCAL_STEPS)) is None


def _row(one: Done) -> dict[str, Any]:
    found, samples = one.report, one.report["samples"] or 1
    return {
        **one.run.about,
        "loss": _short(found["center_loss"]),
        "accuracy %": None if found["center_accuracy"] is None else round(100 * found["center_accuracy"], 1),
        "lag, median": found["lag"]["median"],
        "lag, most": found["lag"]["max"],
        "bytes a sample": round((found["bytes_up"] + found["bytes_down"]) / samples),
        "seconds": round(found["seconds"], 1),
        "ends": "diverged" if one.diverged else "trained",
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _picture(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy of every rule, a bar for each number of workers; hatched: with a straggler."""
    names = list(dict.fromkeys(row["rule"] for row in rows))
    kinds = list(dict.fromkeys((row["workers"], row["slowest"]) for row in rows))
    figure = Figure(figsize=(10.0, 1.0 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    for i, (workers, slow) in enumerate(kinds):
        chosen = {row["rule"]: row["accuracy %"] for row in rows if (row["workers"], row["slowest"]) == (workers, slow)}
        places = [k + (i - len(kinds) / 2) * 0.8 / len(kinds) for k in range(len(names))]
        label = f"{workers} workers" + (f", one {slow} x slower" if slow > 1 else "")
        heights = [chosen.get(name) or 0.0 for name in names]
        axes.barh(places, heights, height=0.8 / len(kinds), hatch="//" if slow > 1 else "", label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    title = f"digits, about {STEPS} steps a worker; missing: below {LEAST_SHOWN} %"
    axes.set(xlabel="test accuracy of the center, %", title=title, xlim=(LEAST_SHOWN, 100))
    figure.legend(fontsize="small", loc="outside lower center", ncols=len(kinds))
    return figure


OPTIMIZERS = {"eamsgd": "nesterov"}
"""What a rule asks for where it is not plain SGD."""
BENCHMARK = Benchmark("rules", "how does every rule fare, with few workers and many, and with a straggler?", run)
