"""What simulating costs: a simulated run against the bare gradient computations that it cannot do without.

    bare        batch, zero_grad, loss, backward, optimizer step, in a plain loop over the workers' models
    simulated   `paramserver simulate`: the same steps, and sessions, cores, wire messages, kernels and virtual time

Both use one thread of torch. The simulator computes the gradients of as many workers at one time as there are cores,
each in the worker's own process, and everything else beside them: `wall` falls with every core, and may be below 1,
while `cpu` says what simulating costs, the workers' processes counted. How long workers take to be born and to load
what they need is in both; what comes before the first of them and after the last one, and looks at the center, in
neither. The two take turns; ratios are of medians.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks import harness, simulated
from benchmarks.harness import Benchmark
from benchmarks.simulated import Run
from worker import tasks
from worker.tasks import Context

WARM_STEPS = 20

Task = Annotated[str, typer.Option("--task", help="What to train.")]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Simulated workers.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Of all workers, in each round.")]
Rule = Annotated[str, typer.Option("--rule", help="Update rule.")]


def run(
    data: simulated.Data,
    task: Task = "mnist",
    workers: Workers = 10,
    steps: Steps = 2000,
    rule: Rule = "gem",
    rounds: harness.Rounds = 3,
    json_file: harness.JsonFile = None,
) -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    words = ("--rule", rule, "--workers", str(workers), "--task", task, "--data", str(data), "--evaluations", "1")
    budget = ("--budget-updates", str(steps), "--diversity-every-steps", "0")
    bare: list[tuple[float, float]] = []
    whole: list[tuple[float, float]] = []
    for round_ in range(rounds):
        bare.append(_bare(task, data, workers, steps))
        one = Run(f"round {round_ + 1}", (*words, *budget, "--seed", str(round_)))
        [done] = simulated.run_all([one], processes=1, keep=None)
        made_up = done.report["simulated"]
        whole.append((made_up["training_seconds"], made_up["training_cpu_seconds"]))
    rows = [_row("bare", bare, bare, steps), _row("simulated", whole, bare, steps)]
    settings = {"task": task, "rule": rule, "workers": workers, "steps": steps, "rounds": rounds}
    simulated.report(BENCHMARK.name, rows, settings, None, json_file)


def _bare(task: str, data: Any, workers: int, steps: int) -> tuple[float, float]:
    """(seconds, seconds of CPU) of so many steps, the workers in turn."""
    made = [tasks.load(task).make(Context(seed, 0, "", torch.device("cpu"), data)) for seed in range(workers)]
    batches = [iter(one.batches) for one in made]
    started, used = 0.0, 0.0
    for step in range(-WARM_STEPS, steps):
        if step == 0:
            started, used = time.perf_counter(), time.process_time()
        one, number = made[step % workers], step % workers
        batch = next(batches[number], None)
        if batch is None:
            batches[number] = iter(one.batches)
            batch = next(batches[number])
        one.optimizer.zero_grad()
        one.loss(one.model, batch).backward()
        one.optimizer.step()
    return time.perf_counter() - started, time.process_time() - used


def _row(case: str, found: list[tuple[float, float]], against: list[tuple[float, float]], steps: int) -> dict[str, Any]:
    wall, cpu = (median(values) for values in zip(*found, strict=True))
    bare_wall, bare_cpu = (median(values) for values in zip(*against, strict=True))
    return {
        "case": case,
        "wall ms a step": round(1e3 * wall / steps, 2),
        "least": round(1e3 * min(one for one, _ in found) / steps, 2),
        "most": round(1e3 * max(one for one, _ in found) / steps, 2),
        "cpu ms a step": round(1e3 * cpu / steps, 2),
        "wall ratio": round(wall / bare_wall, 3),
        "cpu ratio": round(cpu / bare_cpu, 3),
    }


BENCHMARK = Benchmark("simulator", "what does simulating cost beside the gradients themselves?", run)
