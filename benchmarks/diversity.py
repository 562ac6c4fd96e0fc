"""Gradient diversity against replication: fewer different samples lower B_S, and large batches pay for it.

    r-replicated     1/r of the samples, each r times: as many samples, less to learn from each batch
    B_S              exact, from the gradients of all samples, at the same parameters for every r
    loss gap         training loss after the same passes with batches of B, over that with batches of 16

Yin et al., arXiv 1706.05699, section 6: there the gap grows with r, on CIFAR-10. Here: 1,024 of the `digits`, the
network of that task, SGD with one step size per sample for all batch sizes (so lr grows with B), as the theorems want
it. The gap is a geometric mean over the seeds. `estimate` is what workers would measure: from half-batches, at the same
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean
from typing import Annotated, Any, NamedTuple

import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import harness, simulated
from benchmarks.harness import Benchmark
from worker import diversity, mechanisms, moments, tasks
from worker.tasks import Context, digits

SAMPLES, PASSES = 1024, 10
SMALL, LR = 16, 0.025
"""Batches that the others are compared with, and their learning rate."""
WARM_PASSES = 3
"""Of training before B_S is taken."""
PAIRS, HALF = 400, 16
"""Half-batches of the estimate, and the samples of one."""

Replicas = Annotated[list[int], typer.Option("--replicas", min=1, max=SAMPLES // HALF, help="r; repeat for more.")]
Batches = Annotated[list[int], typer.Option("--batch", min=SMALL, max=SAMPLES, help="Large batches; repeat for more.")]


class Data(NamedTuple):
    """x: (SAMPLES, 1, 8, 8) float32; y: (SAMPLES,) int64."""

    x: Tensor
    y: Tensor


def run(
    replicas: Replicas = [1, 2, 4, 8, 16],  # noqa: B006  # typer's way
    batches: Batches = [128, 256, 512],  # noqa: B006
    seeds: simulated.Seeds = 5,
    json_file: harness.JsonFile = None,
) -> None:
    """Train, measure, print, write."""
    torch.set_num_threads(1)
    task = tasks.load("digits").make(Context())
    passed = list(task.batches)
    pool = Data(torch.cat([x for x, _ in passed]), torch.cat([y for _, y in passed]))
    rows = [_row(pool, r, batches, seeds) for r in replicas]
    settings = {"samples": SAMPLES, "passes": PASSES, "lr at 16": LR, "seeds": seeds}
    simulated.report(BENCHMARK.name, rows, settings, _picture(rows, batches), json_file)


def replicated(pool: Data, r: int, seed: int) -> Data:
    """SAMPLES of the pool, of which the first 1/r stand for all others."""
    chosen = torch.randperm(len(pool.y), generator=torch.Generator().manual_seed(seed))[: SAMPLES // r]
    return Data(pool.x[chosen].repeat(r, 1, 1, 1), pool.y[chosen].repeat(r))


def trained(data: Data, batch: int, passes: int, seed: int) -> nn.Module:
    """The network after so many passes of plain SGD with batches of that size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = digits.network()
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR * batch / SMALL)
    for _ in range(passes):
        for chosen in torch.randperm(len(data.y), generator=order).split(batch):
            optimizer.zero_grad()
            _loss(model, Data(data.x[chosen], data.y[chosen])).backward()
            optimizer.step()
    return model


def exact(model: nn.Module, data: Data) -> float:
    """B_S at the model's parameters."""
    gradients, _ = mechanisms.per_example(model, _loss, data)
    return moments.moments([torch.cat([g.flatten(1) for g in gradients], 1)]).bound


def estimated(model: nn.Module, data: Data, seed: int) -> float:
    """B_S as workers measure it: of pairs of half-batches, both parts averaged before they are divided."""
    draw = torch.Generator().manual_seed(seed)
    meter = diversity.Meter(model.parameters(), 1)
    for _ in range(PAIRS):
        a, b = torch.randint(len(data.y), (2, HALF), generator=draw)
        loss_a, loss_b = (_loss(model, Data(data.x[half], data.y[half])) for half in (a, b))
        meter.measure(loss_a, loss_b, (HALF, HALF))
        meter.stepped(1, 2 * HALF)
    found = meter.take()
    return 1 + found.noise / found.gradient if found is not None and found.gradient > 0 else math.inf


def _row(pool: Data, r: int, batches: Sequence[int], seeds: int) -> dict[str, Any]:
    gaps: dict[int, list[float]] = {batch: [] for batch in batches}
    small, bounds, estimates = [], [], []
    for seed in range(seeds):
        data = replicated(pool, r, seed)
        small.append(_final(data, SMALL, seed))
        for batch in batches:
            gaps[batch].append(_final(data, batch, seed) / small[-1])
        common = trained(replicated(pool, 1, seed), SMALL, WARM_PASSES, seed)  # the same for every r
        bounds.append(exact(common, data))
        estimates.append(estimated(common, data, seed))
    return {
        "replicas": r,
        "B_S": round(mean(bounds), 1),
        "estimate": round(mean(estimates), 1),
        f"loss, batch {SMALL}": float(f"{mean(small):.3g}"),
        **{f"gap, batch {batch}": float(f"{_geometric_mean(values):.3g}") for batch, values in gaps.items()},
    }


def _final(data: Data, batch: int, seed: int) -> float:
    model = trained(data, batch, PASSES, seed)
    with torch.no_grad():
        return float(_loss(model, data))


def _loss(model: nn.Module, data: Data) -> Tensor:
    return functional.cross_entropy(model(data[0]), data[1])


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(mean(map(math.log, values)))


def _picture(rows: Sequence[dict[str, Any]], batches: Sequence[int]) -> Figure:
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    replicas = [row["replicas"] for row in rows]
    left.plot(replicas, [row["B_S"] for row in rows], "o-", label="exact")
    left.plot(replicas, [row["estimate"] for row in rows], "x--", label="estimate from half-batches")
    left.set(xscale="log", xlabel="replicas r", ylabel="B_S", title="Batch-size bound at the same parameters")
    left.legend(fontsize="small")
    for batch in batches:
        right.plot(replicas, [row[f"gap, batch {batch}"] for row in rows], "o-", label=f"B = {batch}")
    title = f"Training loss over that of B = {SMALL}"
    right.set(xscale="log", yscale="log", xlabel="replicas r", ylabel="ratio", title=title)
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.set_xticks(replicas, [str(r) for r in replicas])
        axes.minorticks_off()
    return figure


BENCHMARK = Benchmark("diversity", "do replicated samples lower B_S, and do large batches pay for it?", run)
