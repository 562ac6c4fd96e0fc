"""How far GEM's kappa can be turned up: final training loss on MNIST for kappa 1 to 4, one epoch a worker.

Paper (arXiv 1805.08469, figure 8): kappa 2 and 3 beat 1, and 4 diverges. The number of workers is not stated; its curve
for kappa 1 is that of 5 workers in figure 1a. The setting is that of `gem_figure1`.
"""

from __future__ import annotations

from statistics import mean
from typing import Annotated

import typer
from matplotlib.figure import Figure

from benchmarks import gem_figure1, harness, simulated
from benchmarks.harness import Benchmark

PUBLISHED = {1: (0.162, 0.083, 0.072), 2: (0.109, 0.061, 0.050), 3: (0.120, 0.063, 0.058), 4: (None, None, 2.30)}
"""kappa -> training loss at a worker's steps STEPS, read off figure 8a."""
STEPS = (200, 600, 900)

Workers = Annotated[list[int], typer.Option("--workers", min=1, help="Numbers of workers; repeat for more.")]


def run(
    data: simulated.Data,
    workers: Workers = [5, 10, 30],  # noqa: B006  # typer's way
    seeds: simulated.Seeds = 1,
    processes: simulated.Processes = simulated.CORES,
    keep: simulated.Keep = None,
    json_file: harness.JsonFile = None,
) -> None:
    """Simulate, print, write."""
    cases = [(kappa, number, seed) for seed in range(seeds) for number in workers for kappa in PUBLISHED]
    runs = [
        # kappa 1 is the default: the very run of `gem_figure1`, where both keep their runs in one place
        gem_figure1.case("gem", number, seed, data, *(("--set", f"kappa={kappa}") if kappa > 1 else ()))
        for kappa, number, seed in cases
    ]
    done = simulated.run_all(runs, processes=processes, keep=keep)
    rows = [
        {
            "kappa": kappa,
            "workers": number,
            "seed": seed,
            **{f"loss at {step}": round(one.loss_at(step), 4) for step in STEPS},
            "final training loss": round(one.final_loss, 4),
            "published at 900": PUBLISHED[kappa][-1],
            "test accuracy %": gem_figure1.percent(one.report["center_accuracy"]),
            "ends": "diverged" if one.diverged else "trained",
        }
        for (kappa, number, seed), one in zip(cases, done, strict=True)
    ]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for number in workers:
        finals = [(kappa, one.final_loss) for (kappa, many, _), one in zip(cases, done, strict=True) if many == number]
        losses = [mean(gem_figure1.shown(loss) for kappa, loss in finals if kappa == k) for k in PUBLISHED]
        axes.plot([*PUBLISHED], losses, "o-", label=f"{number} workers")
    axes.plot([*PUBLISHED], [values[-1] for values in PUBLISHED.values()], "x--", color="0.5", label="published")
    axes.set(yscale="log", xlabel="kappa", ylabel="final training loss", title="gem on MNIST, one epoch a worker")
    axes.legend()
    simulated.report(BENCHMARK.name, rows, {"task": "mnist", "seeds": seeds}, figure, json_file)


BENCHMARK = Benchmark("gem_kappa", "how far can GEM's kappa be turned up?", run)
