"""EAMSGD: torch's Nesterov SGD and an exchange on x are the paper's v and x; what is shared is `test_easgd`'s."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common import rules
from common.replay import RuleServer
from common.rules.base import Floats, OptimizerFacts, Terms

EAMSGD = rules.load("eamsgd")
CONFIG = rules.configure(EAMSGD, {})
DELTA, LR, H = 0.9, 0.05, 3


class Quadratic:
    """sum(a (x - x*)^2) / 2."""

    def __init__(self, n: int = 9) -> None:
        self.a = np.geomspace(0.2, 2.0, n)
        self.optimum = np.random.default_rng(4).normal(size=n)

    def gradient(self, x: Floats) -> Floats:
        return self.a * (x - self.optimum)


def published(workers: int, steps: int, objective: Quadratic, start: Floats) -> tuple[Floats, list[Floats]]:
    """The paper's lines, round robin: v <- delta v - lr g(x + delta v); x <- x + v; every H steps the elastic pull."""
    c, xs, vs = start.copy(), [start.copy() + i for i in range(workers)], [np.zeros_like(start) for _ in range(workers)]
    for step in range(1, steps + 1):
        for i in range(workers):
            vs[i] = DELTA * vs[i] - LR * objective.gradient(xs[i] + DELTA * vs[i])
            xs[i] = xs[i] + vs[i]
            if step % H == 0:
                e = 0.9 / workers * (xs[i] - c)
                c, xs[i] = c + e, xs[i] - e
    return c, xs


class Worker:
    """Real torch SGD; its parameters are y."""

    def __init__(self, server: RuleServer, name: str, start: torch.Tensor, objective: Quadratic) -> None:
        self.server, self.name, self.anchor = server, name, server.join(name)
        self.a, self.optimum = (torch.from_numpy(v).to(start.dtype) for v in (objective.a, objective.optimum))
        self.y = torch.nn.Parameter(start.clone())
        self.optimizer = torch.optim.SGD([self.y], lr=LR, momentum=DELTA, nesterov=True)
        self.facts = OptimizerFacts("SGD", LR, DELTA, 1, nesterov=True)
        assert EAMSGD.accept(CONFIG, self.facts) is None

    def step(self) -> None:
        self.optimizer.zero_grad()
        ((self.a * (self.y - self.optimum) ** 2).sum() / 2).backward()
        self.optimizer.step()

    def point(self) -> Floats:
        x: Floats = self.y.detach().numpy().copy()
        buffer = self.optimizer.state[self.y].get("momentum_buffer")
        assert EAMSGD.point is not None
        EAMSGD.point(CONFIG, x, np.zeros_like(x) if buffer is None else buffer.numpy(), self.facts)
        return x

    def exchange(self) -> None:
        x = self.point()
        d = np.empty_like(x)
        EAMSGD.update(CONFIG, x, self.anchor, d)
        reply = self.server.push(self.name, d, steps=H, lr=LR).replies[self.name]
        buffer = self.optimizer.state[self.y]["momentum_buffer"].clone()
        EAMSGD.merge(CONFIG, self.y.detach().numpy(), reply)
        assert EAMSGD.track is not None
        EAMSGD.track(CONFIG, self.anchor, d, reply)
        assert torch.equal(buffer, self.optimizer.state[self.y]["momentum_buffer"]), "v is the worker's own"
        assert self.anchor.tobytes() == self.server.sessions[self.name].replica.tobytes()


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["f32", "f64"])
def test_torch_and_the_exchange_are_the_paper(dtype: torch.dtype, tolerance: float, workers: int) -> None:
    objective, steps = Quadratic(), 60
    start = np.random.default_rng(5).normal(size=objective.a.size)
    expected, xs = published(workers, steps, objective, start)

    center = torch.from_numpy(start).to(dtype)
    server = RuleServer.start(EAMSGD, CONFIG, center.numpy().copy(), terms=Terms(H, workers=workers))
    fleet = [Worker(server, f"w{i}", center + i, objective) for i in range(workers)]
    for step in range(1, steps + 1):
        for worker in fleet:
            worker.step()
            if step % H == 0:
                worker.exchange()
    assert np.linalg.norm(server.center - expected) < tolerance * np.linalg.norm(expected)
    for worker, x in zip(fleet, xs, strict=True):
        assert np.linalg.norm(worker.point() - x) < tolerance * np.linalg.norm(x)


def test_the_point_before_the_first_step_is_the_model() -> None:
    x = np.array([1.0, 2.0])
    assert EAMSGD.point is not None
    EAMSGD.point(CONFIG, x, np.zeros(2), OptimizerFacts("SGD", LR, DELTA, 1, nesterov=True))
    np.testing.assert_array_equal(x, [1.0, 2.0])


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (OptimizerFacts("Adam", 1e-3, 0.0, 1), "uses Adam"),
        (OptimizerFacts("SGD", 0.1, 0.9, 1), "nesterov=False"),
        (OptimizerFacts("SGD", 0.1, 0.0, 1, nesterov=True), "momentum 0"),
        (OptimizerFacts("SGD", 0.1, 0.9, 1, nesterov=True, dampening=0.1), "dampening=0.1"),
        (OptimizerFacts("SGD", 0.1, 0.9, 3, nesterov=True), "has 3"),
    ],
)
def test_other_optimizers_are_refused_in_a_sentence_that_helps(optimizer: OptimizerFacts, said: str) -> None:
    sentence = EAMSGD.accept(CONFIG, optimizer)
    assert sentence is not None
    assert said in sentence
    assert "'easgd'" in sentence
    assert sentence.endswith(".")


def test_the_exchange_is_that_of_easgd() -> None:
    easgd = rules.load("easgd")
    for half in ("merge", "track", "start", "join", "leave", "admit", "session", "anchor", "propose", "settle"):
        assert getattr(EAMSGD, half) is getattr(easgd, half)
    assert (EAMSGD.private, EAMSGD.lost_reply) == (True, "resend")
