"""The SDK against a real server: what a user's own loop is promised."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from common.errors import Code, NetworkError, Refused, UsageError
from common.query import status
from tests.processes import Server, cleaned_up
from worker import join
from worker.observer import Observer

STEPS = 60
LR = 0.05


def network(hidden: int = 16, *, norm: bool = False) -> torch.nn.Module:
    """A small classifier, always with the same weights."""
    torch.manual_seed(7)
    layers = [torch.nn.Linear(8, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 3)]
    if norm:
        layers.insert(1, torch.nn.BatchNorm1d(hidden))
    return torch.nn.Sequential(*layers)


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same data for everybody."""
    generator = torch.Generator().manual_seed(11)
    return [
        (torch.randn(32, 8, generator=generator), torch.randint(0, 3, (32,), generator=generator)) for _ in range(steps)
    ]


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data, session=None) -> None:  # type: ignore[no-untyped-def]
    """A user's loop, with or without the one line."""
    for x, y in data:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if session is not None:
            session.step(loss, samples=len(x))


def distance(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """Relative distance of two models' parameters."""
    x, y = (torch.nn.utils.parameters_to_vector(model.parameters()).detach() for model in (a, b))
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("flags", [(), ("--overlap",), ("--overlap", "--local-steps", "7")], ids=" ".join)
def test_one_worker_pushes_every_step_exactly_once(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Whatever overlaps, the center of one worker equals its serial run."""
    alone, shared = network(), network()
    train(alone, torch.optim.SGD(alone.parameters(), lr=LR), batches(STEPS))
    with cleaned_up() as processes:
        server = Server(tmp_path, *flags)
        processes.append(server)
        optimizer = torch.optim.SGD(shared.parameters(), lr=LR)
        with join(server.address, shared, optimizer) as session:
            train(shared, optimizer, batches(STEPS), session)
            assert session.flush()
            center = session.global_model()
        worker = server.status()["workers"][0]
        assert worker["steps"] == STEPS
        assert worker["updates"] == math.ceil(STEPS / (7 if "7" in flags else 1)), "an empty update was pushed"
        assert distance(center, alone) < 1e-6
        assert distance(shared, alone) < 1e-6


def test_self_excluded_gem_alone_is_momentum_sgd(tmp_path: Path) -> None:
    alone, shared = network(), network()
    train(alone, torch.optim.SGD(alone.parameters(), lr=LR, momentum=0.5), batches(STEPS))
    with cleaned_up() as processes:
        server = Server(tmp_path, "--rule", "gem", "--set", "variant=self_excluded", "--set", "mu=0.5")
        processes.append(server)
        optimizer = torch.optim.SGD(shared.parameters(), lr=LR)
        with join(server.address, shared, optimizer) as session:
            train(shared, optimizer, batches(STEPS), session)
        assert distance(shared, alone) < 1e-6


def test_refusals_name_the_cause_and_change_nothing(tmp_path: Path) -> None:
    """Wrong layout, wrong optimizer, NaN: a code and a sentence each, and the center is as it was."""
    first = network()
    with cleaned_up() as processes:
        server = Server(tmp_path, "--rule", "gem")
        processes.append(server)
        optimizer = torch.optim.SGD(first.parameters(), lr=LR)
        with join(server.address, first, optimizer, name="first") as session:
            train(first, optimizer, batches(3), session)
            before = server.status()["version"]

            other = network(hidden=17)
            with pytest.raises(Refused, match=r"'0.weight' float32\[17, 8\] in the worker") as refused:
                join(server.address, other, torch.optim.SGD(other.parameters(), lr=LR))
            assert refused.value.code == Code.LAYOUT_MISMATCH

            second = network()
            with pytest.raises(Refused, match="plain SGD without momentum") as refused:
                join(server.address, second, torch.optim.SGD(second.parameters(), lr=LR, momentum=0.9))
            assert refused.value.code == Code.OPTIMIZER
            with pytest.raises(Refused, match="uses Adam"):
                join(server.address, second, torch.optim.Adam(second.parameters(), lr=LR))

            with torch.no_grad():
                first[0].weight[0, 0] = float("nan")  # type: ignore[index]
            session.step(0.1, samples=1)
            assert session.exchanges.rejected == 1
            assert all(torch.isfinite(p).all() for p in first.parameters())
            assert server.status()["version"] == before

            def diverge() -> None:
                for _ in range(20):
                    with torch.no_grad():
                        first[0].weight[0, 0] = float("inf")  # type: ignore[index]
                    session.step(0.1, samples=1)

            with pytest.raises(UsageError, match="updates in a row could not be pushed"):
                diverge()
        assert server.status()["version"] == before


def test_float_buffers_are_averaged_and_late_joiners_adopt_the_center(tmp_path: Path) -> None:
    with cleaned_up() as processes:
        server = Server(tmp_path)
        processes.append(server)
        models = [network(norm=True), network(norm=True)]
        optimizers = [torch.optim.SGD(model.parameters(), lr=LR) for model in models]
        with join(server.address, models[0], optimizers[0], name="a") as a:
            train(models[0], optimizers[0], batches(5), a)
            with torch.no_grad():
                models[1][0].weight.fill_(9.0)  # type: ignore[index]
            with join(server.address, models[1], optimizers[1], name="a") as b:
                assert b.name == "a#2"
                assert distance(models[1], models[0]) == 0.0
                mean = models[0][1].running_mean  # type: ignore[index]
                assert torch.equal(models[1][1].running_mean, mean)  # type: ignore[index]
                models[1][1].running_mean.fill_(3.0)  # type: ignore[index]
                own = models[0][1].running_mean.clone()  # type: ignore[index]
                b.step(0.5, samples=1)
                assert torch.allclose(models[1][1].running_mean, (own + 3.0) / 2)  # type: ignore[index]


def test_half_precision_models_do_not_push_their_rounding(tmp_path: Path) -> None:
    """What a merge rounds away is no training: a worker that stands still leaves the center as it is."""
    with cleaned_up() as processes:
        server = Server(tmp_path)
        processes.append(server)
        exact, half = network(), network().to(torch.bfloat16)
        with join(server.address, half, torch.optim.SGD(half.parameters(), lr=LR)) as session:
            for _ in range(5):
                session.step(0.1, samples=1)
            center = session.global_model()
            assert distance(center, half) == 0.0
        assert half[0].weight.dtype == torch.bfloat16  # type: ignore[index]
        with pytest.raises(Refused):
            join(server.address, exact, torch.optim.SGD(exact.parameters(), lr=LR))


def test_observer_sees_the_center_and_is_no_member(tmp_path: Path) -> None:
    model, seen = network(), network()
    with cleaned_up() as processes:
        server = Server(tmp_path, "--budget-updates", "4")
        processes.append(server)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with Observer(server.address, seen) as observer, join(server.address, model, optimizer) as session:
            train(model, optimizer, batches(9), session)
            assert session.finished
            assert session.exchanges.pushed == 4
            assert observer.fetch().version == 4
            found = server.status()
            assert found["observers"] == 1
            assert len(found["workers"]) == 1
            assert found["updates"] == 4
            assert found["finished"]


def test_nobody_there(tmp_path: Path) -> None:
    model = network()
    address = f"ipc://{tmp_path}/nobody"
    with pytest.raises(NetworkError, match="Nothing answers"):
        join(address, model, torch.optim.SGD(model.parameters(), lr=LR), connect_timeout_s=1.0)
    with pytest.raises(NetworkError, match="Nothing answers"):
        status(address, timeout_s=0.5)


@pytest.mark.parametrize("how", ["split", "micro-batches"])
def test_gradient_diversity_is_measured_on_the_way(tmp_path: Path, how: str) -> None:
    """What is measured arrives, and the training is the one without it."""
    alone, shared = network(), network()
    train(alone, torch.optim.SGD(alone.parameters(), lr=LR), batches(STEPS))
    with cleaned_up() as processes:
        server = Server(tmp_path, "--diversity-every-steps", "10", "--local-steps", "4")
        processes.append(server)
        optimizer = torch.optim.SGD(shared.parameters(), lr=LR)
        with join(server.address, shared, optimizer) as session:
            for x, y in batches(STEPS):
                losses = torch.nn.functional.cross_entropy(shared(x), y, reduction="none")
                if how == "split":
                    loss = session.split(losses[:16].mean(), losses[16:].mean())
                else:
                    loss = losses.mean().detach()
                    for part in (losses[:16], losses[16:]):
                        (part.mean() / 2).backward(retain_graph=True)
                        session.micro_batch(16)
                optimizer.step()
                optimizer.zero_grad()
                session.step(loss, samples=len(x))
            assert session.flush()
            found = server.status()["diversity"]
        assert found["measurements"] == STEPS / 10
        assert found["batch_in_flight"] == 4 * 32
        assert "1 worker x 32 samples x 4 steps" in found["sentence"]
        assert distance(shared, alone) < 1e-6
