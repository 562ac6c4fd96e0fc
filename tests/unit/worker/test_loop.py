"""The reference loop: the same as a loop written by hand, and every step told to the session exactly once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

from common.config import WorkerSettings
from common.errors import ConfigError
from worker import loop, mechanisms, tasks
from worker.diversity import Meter
from worker.driver import Driver
from worker.tasks import Context, Task, TaskFamily, digits
from worker.trainer import Exchanges


class FakeSession:
    """Finished after `steps`; remembers what it was told."""

    def __init__(self, steps: int, interrupt_at: int | None = None) -> None:
        self._steps, self._interrupt_at = steps, interrupt_at
        self.told: list[tuple[Tensor, int]] = []
        self.name = "w0"
        self.measures = False
        self.exchanges = Exchanges(pushed=steps)
        self.left_by: type[BaseException] | str | None = "not yet"

    @property
    def finished(self) -> bool:
        return len(self.told) >= self._steps

    def step(self, loss: Tensor, samples: int) -> None:
        self.told.append((loss, samples))
        if len(self.told) == self._interrupt_at:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.left_by = kind


class Joins:
    """In place of `worker.join`: hands out one session and keeps what it was asked."""

    def __init__(self, session: FakeSession) -> None:
        self.session = session
        self.asked: dict[str, Any] = {}

    def __call__(self, address: str, model: nn.Module, optimizer: torch.optim.Optimizer, **named: Any) -> FakeSession:
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        self.asked = {"address": address, "weights": weights, **named}
        return self.session


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> Joins:
    made = Joins(FakeSession(3))
    monkeypatch.setattr(loop.trainer, "join", made)
    return made


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine torch's threads wait for each other longer than such small models compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(context: Context = Context()) -> Task:  # noqa: B008
    """A task with randomness in its model: dropout."""
    torch.manual_seed(context.model_seed)
    model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    batches = [(torch.full((n, 2), float(n)), torch.ones(n, 1)) for n in (4, 3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return Task(model, optimizer, batches, lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]))


def after(task: Task, steps: int) -> list[bytes]:
    """The bits of all parameters after so many steps alone."""
    loop.train_alone(task, steps)
    return [parameter.detach().numpy().tobytes() for parameter in task.model.parameters()]


# --- the loop ---


def test_twenty_steps_alone_are_the_same_bits_with_the_same_seed() -> None:
    assert after(digits.make(Context(1)), 20) == after(digits.make(Context(1)), 20)
    assert after(digits.make(Context(1)), 20) != after(digits.make(Context(2)), 20)


def test_the_loop_is_the_one_written_by_hand() -> None:
    task, mine = digits.make(Context(1)), digits.make(Context(1))
    passes = itertools.chain.from_iterable(itertools.repeat(mine.batches))
    for x, y in itertools.islice(passes, 60):  # more than one pass
        nn.functional.cross_entropy(mine.model(x), y).backward()
        mine.optimizer.step()
        mine.optimizer.zero_grad()
    assert after(task, 60) == after(mine, 0)


def test_every_step_is_told_once_with_its_loss_and_samples() -> None:
    task, session, seen = small(), FakeSession(5), []
    done = loop.train(task, session, on_step=lambda *what: seen.append(what))
    losses, sizes = zip(*session.told, strict=True)
    assert sizes == (4, 3, 4, 3, 4)
    assert not any(loss.requires_grad for loss in losses)
    assert [step for step, *_ in seen] == [1, 2, 3, 4, 5]
    assert all(shown is told for (_, shown, *_), told in zip(seen, losses, strict=True))
    assert all(samples_per_s > 0 and who is session for *_, samples_per_s, who in seen)
    assert (done.steps, done.samples, done.last_loss) == (5, 18, float(losses[-1]))
    assert done.samples_per_s == pytest.approx(done.samples / done.seconds)


class Measuring(FakeSession):
    """Measures every step, and keeps what came of it."""

    def __init__(self, steps: int, model: nn.Module) -> None:
        super().__init__(steps)
        self.meter, self.measures = Meter(model.parameters(), 1), True

    def measure(self, *what: Any) -> None:
        self.meter.measure(*what)

    def measure_gradients(self, *what: Any) -> None:
        self.meter.gradients(*what)

    def step(self, loss: Tensor, samples: int) -> None:
        super().step(loss, samples)
        self.meter.stepped(len(self.told), samples)


def drawing() -> Task:
    """A model whose every forward pass draws random numbers and changes buffers."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    batches = [(torch.randn(n, 2), torch.randn(n, 1)) for n in (8, 5, 3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return Task(model, optimizer, batches, lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]))


def test_a_step_that_is_measured_is_the_same_step_bit_for_bit() -> None:
    """Weights, batch-norm statistics, losses, and the random numbers after it."""
    runs = []
    for measured in (False, True):
        task = drawing()
        session = Measuring(9, task.model) if measured else FakeSession(9)
        loop._seed(4)
        loop.train(task, session)
        state = [value.numpy().tobytes() for value in task.model.state_dict().values()]
        runs.append((state, [float(loss) for loss, _ in session.told], torch.rand(1).item()))
        if isinstance(session, Measuring):
            found = session.meter.take()
            assert found is not None
            assert found.measurements == 6, "three samples are not halved"
    assert runs[0] == runs[1]


@pytest.mark.parametrize("text", ["dropconnect:0.5", "langevin:0.01", "quantise"])
def test_a_mechanism_trains_and_is_measured(text: str) -> None:
    task = replace(small(), mechanism=mechanisms.parse(text))
    session = Measuring(6, task.model)
    before = after(task, 0)
    done = loop.train(task, session)
    assert math.isfinite(done.last_loss)
    assert after(task, 0) != before
    found = session.meter.take()
    assert found is not None
    assert found.measurements == 6


def test_a_mechanism_that_changes_nothing_is_the_plain_loop() -> None:
    plain, task = digits.make(Context(1)), replace(digits.make(Context(1)), mechanism=mechanisms.parse("dropconnect:0"))
    loop.train_alone(plain, 5)
    loop.train_alone(task, 5)
    for a, b in zip(plain.model.parameters(), task.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_session_that_is_finished_trains_nothing() -> None:
    task = small()
    before = after(task, 0)
    done = loop.train_alone(task, 0)
    assert after(task, 0) == before
    assert (done.steps, done.samples, done.samples_per_s) == (0, 0, 0.0)
    assert math.isnan(done.last_loss)


def test_the_model_trains_in_training_mode() -> None:
    task = small()
    task.model.eval()
    loop.train_alone(task, 1)
    assert task.model.training


@pytest.mark.parametrize("batches", [[], iter([]), iter([(torch.ones(1, 2), torch.ones(1, 1))])])
def test_data_that_ends_for_good_is_refused(batches: Any) -> None:
    task = small()
    with pytest.raises(ConfigError, match=r"holds no batch.*iterated again"):
        loop.train_alone(Task(task.model, task.optimizer, batches, task.loss), 2)


def test_an_iterator_without_end_will_do() -> None:
    task = small()
    endless = (task.batches[0] for _ in itertools.count())  # type: ignore[index]
    assert loop.train_alone(Task(task.model, task.optimizer, endless, task.loss), 5).steps == 5


# --- a whole worker ---


def test_a_run_reports_what_it_did_and_what_its_exchanges_cost(joins: Joins) -> None:
    settings = WorkerSettings(address="tcp://127.0.0.1:7777", name="w0", connect_timeout_s=4, seed=5)
    report = loop.run(settings, model_seed=9, threads=1)
    assert torch.get_num_threads() == 1
    assert (report.name, report.steps, report.samples) == ("w0", 3, 96)
    assert asdict(report)["exchanges"]["pushed"] == 3
    expected = digits.make(Context(seed=5, model_seed=9)).model.parameters()
    assert all(torch.equal(*pair) for pair in zip(joins.asked.pop("weights"), expected, strict=True))
    assert joins.asked.pop("machine").carry is Driver
    assert joins.asked == {"address": "tcp://127.0.0.1:7777", "name": "w0", "group": None, "connect_timeout_s": 4}
    assert joins.session.left_by is None


def test_what_a_model_draws_while_training_follows_the_workers_seed(
    joins: Joins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "load", lambda name: TaskFamily(name, "", small))

    def losses(seed: int) -> list[float]:
        joins.session = FakeSession(4)
        loop.run(WorkerSettings(seed=seed))
        return [float(loss) for loss, _ in joins.session.told]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_an_interrupt_reaches_the_caller_and_ends_the_session(joins: Joins) -> None:
    joins.session = FakeSession(9, interrupt_at=2)
    with pytest.raises(KeyboardInterrupt):
        loop.run(WorkerSettings())
    assert joins.session.left_by is KeyboardInterrupt
    assert len(joins.session.told) == 2


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_named(joins: Joins, device: str) -> None:
    with pytest.raises(ConfigError, match=f"Setting 'device' cannot be '{device}'.*cpu or cuda:0"):
        loop.run(WorkerSettings(device=device))
    assert joins.asked == {}
