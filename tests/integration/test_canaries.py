"""Real torch models on a real server: where a rule must equal something that everybody knows, it does.

Workers are threads of this process, each with a model and a session of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.integration.test_sdk import LR, batches, distance, network, train
from tests.processes import Server, cleaned_up, until
from worker import join
from worker.trainer import Session

STEPS = 24
Batches = list[tuple[torch.Tensor, torch.Tensor]]
MakeOptimizer = Callable[[torch.nn.Module], torch.optim.Optimizer]


def momentum(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def plain(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR)


def halves(data: Batches, workers: int) -> list[Batches]:
    """Each batch cut evenly: worker i gets the i-th part of every one."""
    return [[(x.chunk(workers)[i], y.chunk(workers)[i]) for x, y in data] for i in range(workers)]


def trained_together(
    folder: Path,
    flags: tuple[str, ...],
    make_optimizer: MakeOptimizer,
    parts: list[Batches],
    *,
    prepare: Callable[[int, torch.nn.Module], None] = lambda index, model: None,
    in_step: bool = False,
) -> tuple[list[torch.nn.Module], torch.nn.Module]:
    """The workers' models after their data, and the center once all have left nothing unpushed."""
    models = [network() for _ in parts]
    center: list[torch.nn.Module] = []
    failures: list[BaseException] = []
    together, stepped, done = (threading.Barrier(len(parts)) for _ in range(3))

    def work(index: int, session: Session, optimizer: torch.optim.Optimizer) -> None:
        try:
            with session:
                prepare(index, models[index])
                together.wait(60)
                for batch in parts[index]:
                    train(models[index], optimizer, [batch], session)
                    if in_step:
                        stepped.wait(60)
                if not session.settings["schedules"]:
                    session.flush()
                    done.wait(60)
                if index == 0:
                    center.append(session.global_model())
        except BaseException as error:
            failures.append(error)
            for barrier in (together, stepped, done):
                barrier.abort()

    with cleaned_up() as processes:
        server = Server(folder, *flags)
        processes.append(server)
        threads = []
        for index, model in enumerate(models):
            optimizer = make_optimizer(model)
            session = join(server.address, model, optimizer, name=f"w{index}")
            threads.append(threading.Thread(target=work, args=(index, session, optimizer)))
        until(lambda: len(server.status()["workers"]) == len(parts), "all workers")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not failures, failures
    return models, center[0]


@pytest.mark.parametrize(
    "flags",
    [("--rule=local_sgd",), ("--rule=local_sgd", "--local-steps=8", "--set=start_local_at=1000")],
    ids=["H 1", "post-local before the switch"],
)
def test_workers_with_one_local_step_are_one_worker_with_the_joined_batch(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    data, alone = batches(STEPS), network()
    train(alone, momentum(alone), data)
    models, center = trained_together(tmp_path, flags, momentum, halves(data, 2))
    assert distance(center, alone) < 1e-6
    for model in models:
        assert distance(model, center) == 0.0, "all go on from the same bits"


def test_a_clock_gap_of_0_is_bulk_synchronous_with_summed_updates(tmp_path: Path) -> None:
    """The sum of two updates at one learning rate is one update of the joined batch at twice that."""
    data, alone = batches(STEPS), network()
    train(alone, torch.optim.SGD(alone.parameters(), lr=2 * LR), data)
    models, center = trained_together(
        tmp_path, ("--rule=downpour", "--max-clock-gap=0", "--workers=2"), plain, halves(data, 2)
    )
    assert distance(center, alone) < 1e-6
    assert all(distance(model, center) < 1e-6 for model in models)


@pytest.mark.parametrize("clock", ["published", "latest"])
def test_leaders_that_do_not_pull_leave_runs_independent_bit_for_bit(tmp_path: Path, clock: str) -> None:
    parts = halves(batches(STEPS), 2)
    flags = ("--rule=lsgd", "--set=lambda_global=0", "--set=tau=2", "--set=tau_global=2", f"--set=clock={clock}")
    models, _ = trained_together(tmp_path, flags, momentum, parts)
    for model, data in zip(models, parts, strict=True):
        alone = network()
        train(alone, momentum(alone), data)
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_an_elastic_exchange_moves_worker_and_center_by_the_same(tmp_path: Path, codec: str) -> None:
    """Without local steps the sum of workers and center stays, whatever a codec loses, and they come together."""

    def apart(index: int, model: torch.nn.Module) -> None:
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)

    def vector(model: torch.nn.Module) -> torch.Tensor:
        return torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    starts = [network(), network(), network()]
    apart(0, starts[0])
    apart(1, starts[1])
    flags = ("--rule=easgd", "--workers=2", f"--codec={codec}", f"--reply-codec={codec}")
    parts = halves(batches(STEPS), 2)
    models, center = trained_together(
        tmp_path, flags, lambda model: torch.optim.SGD(model.parameters(), lr=0.0), parts, prepare=apart, in_step=True
    )
    before, after = (torch.stack([vector(model) for model in three]) for three in (starts, [*models, center]))
    # the evaluated center itself travels in the reply codec
    assert float((after.sum(0) - before.sum(0)).norm() / before.sum(0).norm()) < (1e-5 if codec == "fp32" else 5e-3)
    spread = [float((three - three.mean(0)).norm()) for three in (before, after)]
    assert spread[1] < 0.01 * spread[0]


@pytest.mark.parametrize("policy", ["average", "leader", "local"])
def test_float_buffers_are_as_the_setting_says(tmp_path: Path, policy: str) -> None:
    """running_mean is 2 in one worker and 6 in the other, which pushes last."""
    with cleaned_up() as processes:
        server = Server(tmp_path, f"--buffers={policy}")
        processes.append(server)
        models = [network(norm=True), network(norm=True)]
        sessions = [join(server.address, model, plain(model), name=f"w{index}") for index, model in enumerate(models)]
        for session, model, value in zip(sessions, models, (2.0, 6.0), strict=True):
            model[1].running_mean.fill_(value)  # type: ignore[index]
            session.step(0.5, samples=1)
        center = sessions[0].global_model()[1].running_mean.mean()  # type: ignore[index]
        own = models[1][1].running_mean.mean()  # type: ignore[index]
        expected = {"average": (4.0, 4.0), "leader": (6.0, 6.0), "local": (0.0, 6.0)}[policy]
        assert (float(center), float(own)) == pytest.approx(expected)
        assert float(models[0][1].running_mean.mean()) == pytest.approx(2.0)  # type: ignore[index]
        for session in sessions:
            session.close()
