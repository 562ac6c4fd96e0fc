"""GEM's headline figure: the final training loss on MNIST as workers are added, one epoch each, for three rules.

    gem        gradient energy matching, variant `reference`
    downpour   every update as it is
    dynsgd     every update over its lag + 1: what the paper calls adaptive staleness

Setting of the paper (arXiv 1805.08469, section 4 and appendix A): its network and data, plain SGD with lr .05, mu .9,
batches of 64, 937 steps a worker. Time is virtual: steps take 100 ms with 10 % jitter, messages about a millisecond.
The final training loss is the mean over workers of their last 30 steps. Published figures: read off figure 1d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure

from benchmarks import harness, simulated
from benchmarks.harness import Benchmark
from benchmarks.simulated import Done, Run

STEPS = 937
PUBLISHED: Mapping[str, Mapping[int, float]] = {
    "gem": {5: 0.0737, 10: 0.0538, 20: 0.0408, 30: 0.0352},
    "downpour": {5: 0.0844, 10: 0.131, 20: 1.318, 30: 2.302},
    "dynsgd": {5: 0.326, 10: 0.357, 20: 0.387, 30: 0.404},
}
COLOURS = {"gem": "C0", "downpour": "C3", "dynsgd": "C2"}
CHANCE = 2.302585
"""Loss of a guess among ten classes."""

Workers = Annotated[list[int], typer.Option("--workers", min=1, help="Numbers of workers; repeat for more.")]
Rules = Annotated[list[str], typer.Option("--rule", help="Rules; repeat for more.")]


def run(
    data: simulated.Data,
    workers: Workers = [5, 10, 20, 30],  # noqa: B006  # typer's way
    rules: Rules = [*PUBLISHED],  # noqa: B006
    seeds: simulated.Seeds = 2,
    processes: simulated.Processes = simulated.CORES,
    keep: simulated.Keep = None,
    json_file: harness.JsonFile = None,
) -> None:
    """Simulate, print, write."""
    runs = [case(rule, number, seed, data) for seed in range(seeds) for number in workers for rule in rules]
    done = simulated.run_all(runs, processes=processes, keep=keep)
    settings = {"task": "mnist", "steps a worker": STEPS, "seeds": seeds}
    simulated.report(BENCHMARK.name, rows(done), settings, picture(done), json_file)


def case(rule: str, workers: int, seed: int, data: Any, *more: str) -> Run:
    """One run of the figure."""
    words = ("--rule", rule, "--workers", str(workers), "--task", "mnist", "--data", str(data), "--seed", str(seed))
    budget = ("--budget-updates", str(STEPS * workers), "--evaluations", "1")
    about = {"rule": rule, "workers": workers, "seed": seed}
    return Run(f"{rule} {' '.join(more)}, {workers} workers, seed {seed}", (*words, *budget, *more), about)


def rows(done: Sequence[Done]) -> list[dict[str, Any]]:
    """One for each rule and number of workers, its seeds side by side."""
    found = []
    for rule, workers in dict.fromkeys((one.run.about["rule"], one.run.about["workers"]) for one in done):
        runs = [one for one in done if (one.run.about["rule"], one.run.about["workers"]) == (rule, workers)]
        found.append(
            {
                "rule": rule,
                "workers": workers,
                "final training loss": [round(one.final_loss, 4) for one in runs],
                "published": PUBLISHED.get(rule, {}).get(workers),
                "test accuracy %": [percent(one.report["center_accuracy"]) for one in runs],
                "lag, median": mean(one.report["lag"]["median"] for one in runs),
                "ends": [(one.diverged and "diverged") or "trained" for one in runs],
            }
        )
    return found


def picture(done: Sequence[Done]) -> Figure:
    """Left: final loss against workers, ours beside the published; right: loss over a worker's steps under GEM."""
    figure = Figure(figsize=(11.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for rule in dict.fromkeys(one.run.about["rule"] for one in done):
        ours = [one for one in done if one.run.about["rule"] == rule]
        numbers = sorted({one.run.about["workers"] for one in ours})
        finals = [[shown(one.final_loss) for one in ours if one.run.about["workers"] == number] for number in numbers]
        colour = COLOURS.get(rule)
        left.plot(numbers, [mean(values) for values in finals], "o-", color=colour, label=rule)
        for number, values in zip(numbers, finals, strict=True):
            left.plot([number] * len(values), values, ".", color=colour, alpha=0.5)
        if published := PUBLISHED.get(rule):
            left.plot([*published], [*published.values()], "x--", color=colour, alpha=0.6, label=f"{rule}, published")
    left.axhline(CHANCE, color="0.7", linewidth=1)
    left.set(yscale="log", xlabel="workers", ylabel="final training loss", title="MNIST, one epoch a worker")
    left.legend(fontsize="small")
    for one in done:
        if one.run.about["rule"] == "gem" and one.run.about["seed"] == 0:
            steps = range(simulated.LAST_STEPS, STEPS - 10, 10)
            losses = [one.loss_at(step) for step in steps]
            right.plot(steps, losses, label=f"{one.run.about['workers']} workers")
    right.set(yscale="log", xlabel="steps of a worker", ylabel="training loss", title="gem, seed 0")
    if right.lines:
        right.legend(fontsize="small")
    return figure


def shown(loss: float) -> float:
    """For pictures: a run that diverged stands at chance."""
    return CHANCE if loss != loss else loss


def percent(share: float | None) -> float | None:
    """Two digits of it."""
    return None if share is None else round(100 * share, 2)


BENCHMARK = Benchmark("gem_figure1", "does GEM's loss fall as workers are added, where DOWNPOUR's rises?", run)
