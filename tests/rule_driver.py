"""Workers in virtual time on one `common.replay.RuleServer`: what the tests of update rules drive rules with.

    run = simulate(rule, config, Quadratic(), Cluster(), seed=1, pushes=500)

Laws
* Workers know the server by replies alone: what they hold is always a copy. A reply goes to a worker whose last push
  has none yet, whoever's push, leave or deadline set it free; any other reply is an error.
* The server's clock is that of the simulation, and it ticks at every event and at every deadline of the rule.
* One seed, one run: every delay and every mini-batch is drawn from it, and events at one time keep their order.
* Nothing depends on which rule it is. What this file cannot do for a rule is an error, never ignored.

Left out: codecs, lost and repeated messages, members that come back (the simulator of the real cores has those); rules
that schedule their workers (`schedules`) or cut the vector (`fragments`): both are refused.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import DTypeLike

from common.replay import Result, RuleServer
from common.rules.base import Config, Floats, OptimizerFacts, Rule, Terms

# The objectives.


class Objective(Protocol):
    """What the workers minimise; gradients have the dtype of x."""

    best_loss: float

    def initial(self) -> Floats: ...

    def gradient(self, x: Floats, random: np.random.Generator) -> Floats: ...

    def loss(self, x: Floats) -> float: ...


class Quadratic:
    """sum(a (x - x*)^2) / 2 with curvatures a from .1 to 1 on a logarithmic scale; gradients are exact."""

    def __init__(self, n: int = 12) -> None:
        self.curvature = np.geomspace(0.1, 1.0, n)
        self.optimum = np.random.default_rng(12).normal(size=n)
        self.best_loss = 0.0

    def initial(self) -> Floats:
        return self.optimum + 1.0

    def gradient(self, x: Floats, random: np.random.Generator) -> Floats:
        return np.asarray(self.curvature * (x - self.optimum), dtype=x.dtype)

    def loss(self, x: Floats) -> float:
        return float(self.curvature @ (x - self.optimum) ** 2) / 2


class Logistic:
    """Logistic regression of noisy labels on correlated features, with a little weight decay, from mini-batches."""

    def __init__(self, n: int = 8, examples: int = 256, batch: int = 32, decay: float = 1e-2) -> None:
        random = np.random.default_rng(8)
        mixing = random.normal(size=(n, n)) / np.sqrt(n)
        self.features = random.normal(size=(examples, n)) @ mixing
        clean = self.features @ random.normal(size=n)
        self.labels = np.where(clean + 0.3 * random.normal(size=examples) > 0, 1.0, -1.0)
        self.batch, self.decay = batch, decay
        self.best_loss = self.loss(self._optimum())

    def initial(self) -> Floats:
        return np.zeros(self.features.shape[1])

    def gradient(self, x: Floats, random: np.random.Generator) -> Floats:
        rows = random.integers(self.labels.size, size=self.batch)
        return np.asarray(self._slope(x, rows), dtype=x.dtype)

    def loss(self, x: Floats) -> float:
        margin = self.labels * (self.features @ x)
        return float(np.logaddexp(0.0, -margin).mean() + self.decay * (x @ x) / 2)

    def _slope(self, x: Floats, rows: Any) -> Floats:
        features, labels = self.features[rows], self.labels[rows]
        miss = 1.0 / (1.0 + np.exp(labels * (features @ x)))
        slope: Floats = self.decay * x - (labels * miss) @ features / labels.size
        return slope

    def _optimum(self) -> Floats:
        """By Newton's method."""
        x = self.initial()
        for _ in range(30):
            p = 1.0 / (1.0 + np.exp(-self.features @ x))
            hessian = self.features.T @ (self.features * (p * (1 - p))[:, None]) / p.size + self.decay * np.eye(x.size)
            x = x - np.linalg.solve(hessian, self._slope(x, slice(None)))
        return x


# A real model: a small network under torch, alone or as the only worker of a server.

MakeOptimizer: TypeAlias = Callable[[Iterator[torch.nn.Parameter]], torch.optim.Optimizer]


def trained_alone(make_optimizer: MakeOptimizer, *, dtype: torch.dtype, steps: int = 50) -> Floats:
    """The network's parameters (n,) after `steps` of plain torch."""
    model = _network(dtype)
    with _one_thread():
        for _ in _steps(model, make_optimizer(model.parameters()), steps):
            pass
    return _flat(model)


def trained_with_server(
    rule: Rule,
    config: Config,
    make_optimizer: MakeOptimizer,
    *,
    dtype: torch.dtype,
    steps: int = 50,
    local_steps: int = 1,
) -> Floats:
    """The center (n,) after the same steps, with an exchange after every `local_steps` of them."""
    model = _network(dtype)
    optimizer = make_optimizer(model.parameters())
    facts = _facts(optimizer)
    server = RuleServer.start(rule, config, _flat(model), terms=Terms(local_steps, workers=1))
    anchor = server.join("w0")
    with _one_thread():
        for step in _steps(model, optimizer, steps):
            if step % local_steps:
                continue
            x, d = _flat(model), np.empty_like(anchor)
            rule.update(config, _exchanged(rule, config, x, _momentum(model, optimizer), facts), anchor, d)
            reply = server.push("w0", d, steps=local_steps, lr=facts.lr).replies["w0"]
            rule.merge(config, x, reply)
            anchor = _next_anchor(rule, config, anchor, d, reply)
            torch.nn.utils.vector_to_parameters(torch.from_numpy(x), model.parameters())
    return server.center


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a busy machine torch's threads would wait for each other longer than a step of this network takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _network(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).to(dtype)


def _steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Iterator[int]:
    """Train on batches that are always the same; yields the number of each step after it."""
    random = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    for step in range(1, steps + 1):
        inputs = torch.randn(20, 8, generator=random, dtype=torch.float64)
        labels = (inputs[:, :3] + inputs[:, 3:6]).argmax(1)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs.to(dtype)), labels).backward()
        optimizer.step()
        yield step


def _flat(model: torch.nn.Module) -> Floats:
    flat: Floats = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy()
    return flat


def _facts(optimizer: torch.optim.Optimizer) -> OptimizerFacts:
    known = {name: optimizer.defaults.get(name, 0.0) for name in ("lr", "momentum", "nesterov", "dampening")}
    return OptimizerFacts(type(optimizer).__name__, groups=len(optimizer.param_groups), **known)


def _momentum(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Floats:
    """(n,) The optimizer's momentum buffers; zeros where it has none."""
    buffers = [optimizer.state[p].get("momentum_buffer") for p in model.parameters()]
    whole = [torch.zeros_like(p) if m is None else m for p, m in zip(model.parameters(), buffers, strict=True)]
    flat: Floats = torch.nn.utils.parameters_to_vector(whole).detach().numpy().copy()
    return flat


# The worker half, as a worker uses it.


def inner_optimizer(rule: Rule, config: Config, lr: float) -> OptimizerFacts:
    """Plain SGD if the rule takes it, else SGD with Nesterov's momentum; raises AssertionError if it takes neither."""
    plain = OptimizerFacts("SGD", lr, 0.0, 1)
    nesterov = OptimizerFacts("SGD", lr, 0.5, 1, nesterov=True)
    for optimizer in (plain, nesterov):
        if rule.accept(config, optimizer) is None:
            return optimizer
    raise AssertionError(rule.accept(config, plain))


def _exchanged(rule: Rule, config: Config, x: Floats, m: Floats, optimizer: OptimizerFacts) -> Floats:
    """(n,) A copy of x, made the point that the rule exchanges."""
    point = x.copy()
    if rule.point is not None:
        rule.point(config, point, m, optimizer)
    return point


def _next_anchor(rule: Rule, config: Config, anchor: Floats, sent: Floats, reply: Floats) -> Floats:
    """(n,) The reply itself, or what the rule tracks."""
    if rule.track is None:
        return reply
    tracked = anchor.copy()
    rule.track(config, tracked, sent, reply)
    return tracked


# The workers and their clock.

STRAGGLER: Final = (1.0, 1.0, 1.0, 1.0, 4.0)
"""Five workers, one of which takes four times as long for a step."""

PATIENCE_STEPS: Final = 100
"""Steps of the slowest worker without a push, after which nobody is taken to push again."""


@dataclass(frozen=True)
class Cluster:
    """Workers that take `step_s` for a step, each time up to `jitter` longer; a message takes `delay_s` on average."""

    step_s: tuple[float, ...] = STRAGGLER
    jitter: float = 0.5
    delay_s: float = 0.3
    local_steps: int = 1
    lr: float = 0.1
    overlap: bool = False
    leave_s: tuple[tuple[int, float], ...] = ()
    """Which worker (by its place in `step_s`) leaves when."""


class Exchange(NamedTuple):
    """One push as the server saw it."""

    at_s: float
    worker: str
    steps: int
    lag_versions: int


class Run(NamedTuple):
    """What is left after a simulation."""

    server: RuleServer
    exchanges: list[Exchange]
    pushed: Floats
    """(n,) sum of all updates the server was given."""
    trained: Floats
    """(n,) what all local steps that are part of these updates moved the exchanged points by."""
    workers: dict[str, Floats]
    """(n,) parameters of each worker that is still there."""


@dataclass
class _Worker:
    name: str
    random: np.random.Generator
    step_s: float
    x: Floats
    anchor: Floats
    m: Floats
    """The inner optimizer's momentum."""
    trained: Floats
    """What the steps since the last push moved the exchanged point by, together."""
    steps: int = 0
    """Since the last push."""
    done: int = 0
    """Until the last push."""
    x_at_push: Floats | None = None
    """Set while an exchange is in flight."""
    sent: Floats | None = None
    """The update of that exchange."""
    unanswered: bool = False
    """The server has taken the update and made no reply yet."""
    reply: Floats | None = None
    """Arrived during a step; merged at its end."""
    gone: bool = False


class _Sent(NamedTuple):
    update: Floats
    steps: int
    loss: float
    trained: Floats


def simulate(
    rule: Rule,
    config: Config,
    objective: Objective,
    cluster: Cluster,
    *,
    seed: int,
    pushes: int,
    changes: int = 0,
    dtype: DTypeLike = np.float64,
) -> Run:
    """Train until the server took `pushes` updates, and at least until its center changed `changes` times.

    Raises AssertionError where the rule refuses what it is given, RuntimeError if everyone waits for everyone.
    """
    return _Simulation(rule, config, objective, cluster, seed, dtype).run(pushes, changes)


class _Simulation:
    def __init__(
        self, rule: Rule, config: Config, objective: Objective, cluster: Cluster, seed: int, dtype: DTypeLike
    ) -> None:
        if rule.schedules or rule.fragments(config) > 1:
            raise ValueError(f"tests/rule_driver.py cannot schedule workers or cut the vector for {rule.name}.")
        terms = Terms(cluster.local_steps, cluster.overlap, len(cluster.step_s))
        refused = rule.fits(config, terms)
        if refused is not None:
            raise AssertionError(refused)
        self.rule, self.config, self.objective, self.cluster = rule, config, objective, cluster
        self.optimizer = inner_optimizer(rule, config, cluster.lr)
        start = objective.initial().astype(dtype)
        self.server = RuleServer.start(rule, config, start, overlap=cluster.overlap, terms=terms)
        self.exchanges: list[Exchange] = []
        self.pushed, self.trained = np.zeros_like(self.server.center), np.zeros_like(self.server.center)
        self.events: list[tuple[float, int, _Worker, Callable[[float], None]]] = []
        self.order = 0
        self.workers: dict[str, _Worker] = {}
        streams = np.random.SeedSequence(seed).spawn(len(cluster.step_s))
        for i, (stream, step_s) in enumerate(zip(streams, cluster.step_s, strict=True)):
            self._join(f"w{i}", stream, step_s)
        for i, at_s in cluster.leave_s:
            self._at(at_s, self.workers[f"w{i}"], partial(self._leave, self.workers[f"w{i}"]))

    def run(self, pushes: int, changes: int) -> Run:
        patience_s = PATIENCE_STEPS * max(self.cluster.step_s) * self.cluster.local_steps
        while len(self.exchanges) < pushes or self.server.version < changes:
            next_s = self.events[0][0] if self.events else math.inf
            deadline_s = self.rule.deadline(self.config, self.server.decisions)
            now = next_s if deadline_s is None else min(next_s, max(deadline_s, self.server.now_s))
            if now > patience_s + (self.exchanges[-1].at_s if self.exchanges else 0.0):
                raise RuntimeError(f"After {len(self.exchanges)} of {pushes} pushes all workers wait for a reply.")
            self._tick(now)
            if now == next_s:
                _, _, worker, action = heapq.heappop(self.events)
                if not worker.gone:
                    action(now)
        left = {worker.name: worker.x for worker in self.workers.values() if not worker.gone}
        return Run(self.server, self.exchanges, self.pushed, self.trained, left)

    def _tick(self, now: float) -> None:
        self.server.now_s = now  # not by a difference: its rounding could stop short of a deadline
        self._answer(self.server.tick(0.0), now)
        deadline_s = self.rule.deadline(self.config, self.server.decisions)
        assert deadline_s is None or deadline_s > now, f"a tick at {now} s leaves the deadline at {deadline_s} s"

    def _at(self, at_s: float, worker: _Worker, action: Callable[[float], None]) -> None:
        self.order += 1
        heapq.heappush(self.events, (at_s, self.order, worker, action))

    def _message_s(self, worker: _Worker) -> float:
        return float(worker.random.exponential(self.cluster.delay_s))

    def _join(self, name: str, stream: np.random.SeedSequence, step_s: float) -> None:
        given = self.server.join(name)
        zeros = np.zeros_like(given)
        worker = _Worker(name, np.random.default_rng(stream), step_s, given.copy(), given, zeros, zeros.copy())
        self.workers[name] = worker
        self._begin_step(worker, 0.0)

    def _begin_step(self, worker: _Worker, now: float) -> None:
        end_s = now + worker.step_s * (1 + self.cluster.jitter * worker.random.random())
        self._at(end_s, worker, partial(self._end_step, worker))

    def _end_step(self, worker: _Worker, now: float) -> None:
        """One step; a reply that came meanwhile is merged; a push goes out when it is time."""
        before = self._exchanged(worker)
        self._step(worker)
        worker.trained += self._exchanged(worker) - before
        worker.steps += 1
        if worker.reply is not None:
            self._merge(worker, worker.reply)
        h = self.rule.local_steps(self.config, self.cluster.local_steps, worker.done)
        if worker.steps >= h and worker.x_at_push is None:
            self._push(worker, now)
        if worker.x_at_push is None or self.cluster.overlap:
            self._begin_step(worker, now)

    def _step(self, worker: _Worker) -> None:
        """SGD, as torch does it."""
        mu, g = self.optimizer.momentum, self.objective.gradient(worker.x, worker.random)
        worker.m = mu * worker.m + g
        worker.x += worker.x.dtype.type(-self.cluster.lr) * (g + mu * worker.m if self.optimizer.nesterov else worker.m)

    def _exchanged(self, worker: _Worker) -> Floats:
        return _exchanged(self.rule, self.config, worker.x, worker.m, self.optimizer)

    def _push(self, worker: _Worker, now: float) -> None:
        update = np.empty_like(worker.x)
        self.rule.update(self.config, self._exchanged(worker), worker.anchor, update)
        sent = _Sent(update, worker.steps, self.objective.loss(worker.x), worker.trained)
        worker.x_at_push, worker.sent = worker.x.copy(), update.copy()
        worker.done += worker.steps
        worker.steps, worker.trained = 0, np.zeros_like(worker.x)
        self._at(now + self._message_s(worker), worker, partial(self._arrive, worker, sent))

    def _arrive(self, worker: _Worker, sent: _Sent, now: float) -> None:
        """The server takes the update in one go."""
        lag = self.server.version - self.server.started_from[worker.name]
        self.exchanges.append(Exchange(now, worker.name, sent.steps, lag))
        self.pushed += sent.update
        self.trained += sent.trained
        worker.unanswered = True
        result = self.server.push(worker.name, sent.update, steps=sent.steps, lr=self.cluster.lr, loss=sent.loss)
        self._answer(result, now)

    def _answer(self, result: Result, now: float) -> None:
        assert not result.orders, f"{self.rule.name} gives orders and does not say that it schedules"
        for name, reply in result.replies.items():
            worker = self.workers[name]
            assert worker.unanswered, f"'{name}' is answered and did not wait"
            assert not worker.gone, f"'{name}' is answered and has left"
            worker.unanswered = False
            self._at(now + self._message_s(worker), worker, partial(self._receive, worker, reply))

    def _receive(self, worker: _Worker, reply: Floats, now: float) -> None:
        if self.cluster.overlap:
            worker.reply = reply
        else:
            self._merge(worker, reply)
            self._begin_step(worker, now)

    def _merge(self, worker: _Worker, reply: Floats) -> None:
        """x <- what the reply makes of x at the push, + progress in flight, which is no part of the anchor."""
        assert worker.x_at_push is not None
        assert worker.sent is not None
        in_flight = worker.x - worker.x_at_push
        worker.x = worker.x_at_push
        self.rule.merge(self.config, worker.x, reply)
        worker.x += in_flight
        worker.anchor = _next_anchor(self.rule, self.config, worker.anchor, worker.sent, reply)
        worker.reply = worker.x_at_push = worker.sent = None

    def _leave(self, worker: _Worker, now: float) -> None:
        worker.gone = True
        self._answer(self.server.leave(worker.name), now)
