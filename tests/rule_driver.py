"""A parameter server and its workers in virtual time: what the tests of update rules drive rules with.

    run = simulate(rule, config, Quadratic(), Cluster(), seed=1)

Laws
* `Server` does with a rule what a server does, and no more: join (anchor), push (admit, apply, reply), leave.
* Workers know the server by replies alone: what they hold is always a copy.
* One seed, one run: every delay and every mini-batch is drawn from it, and events at one time keep their order.
* Nothing depends on which rule it is. An effect this file does not know is an error, never ignored.

Left out: codecs, lost and repeated messages, members that come back. The simulator of the real cores has those.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import DTypeLike

from common.rules.base import Apply, Arrays, Config, Effect, Facts, Floats, OptimizerFacts, Reply, Rule

# The server.


@dataclass
class Server:
    """The server half of one rule over one center, with no time and no wire. Make it with `start`."""

    rule: Rule
    config: Config
    center: Floats
    """(n,) float32 or float64; changed in place."""
    state: Arrays
    overlap: bool = False
    block_elements: int | None = None
    """Longest block a kernel is given; None: the whole vector."""
    decisions: Any = None
    sessions: dict[str, Arrays] = field(default_factory=dict)
    started_from: dict[str, int] = field(default_factory=dict)
    """Version each worker last received."""
    numbers: dict[str, int] = field(default_factory=dict)
    """Pushes of each worker so far."""
    version: int = 0
    stats: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    """(blocks, stats_width) figures of the last apply."""

    @classmethod
    def start(
        cls, rule: Rule, config: Config, center: Floats, *, overlap: bool = False, block_elements: int | None = None
    ) -> Server:
        """A server that owns a copy of `center`."""
        state = rule.state(config, overlap, center.size, center.dtype)
        return cls(rule, config, center.copy(), state, overlap, block_elements)

    def join(self, worker: str) -> Floats:
        """A new session for `worker`; returns a copy of the center it is given."""
        made = self.rule.session(self.config, self.overlap, self.center.size, self.center.dtype)
        self.sessions[worker] = made
        for low, high in self._blocks():
            self.rule.anchor(self.config, self.center[low:high], part(made, low, high))
        self.started_from[worker], self.numbers[worker] = self.version, 0
        return self.center.copy()

    def push(
        self, worker: str, d: Floats, *, steps: int = 1, lr: float = 0.01, loss: float = 0.0, samples: int = 1
    ) -> Floats | None:
        """Admit and apply update d: (n,); returns a copy of the center that answers it, or None where none does yet."""
        self.numbers[worker] += 1
        lag = self.version - self.started_from[worker]
        facts = Facts(worker, self.numbers[worker], steps, lag, loss, samples, lr)
        self.decisions, effects = self.rule.admit(self.config, self.decisions, facts)
        before, version_before = self.center.copy(), self.version
        answer: Floats | None = None
        for effect in effects:
            match effect:
                case Apply(weight):
                    self._apply(worker, d, weight)
                case Reply("before"):
                    answer, self.started_from[worker] = before, version_before
                case Reply("after"):
                    answer, self.started_from[worker] = self.center.copy(), self.version
                case _:
                    raise NotImplementedError(f"tests/rule_driver.py does not know the effect {effect!r} of a push.")
        return answer

    def leave(self, worker: str) -> list[Effect]:
        """`worker` is gone, its session with it."""
        self.decisions, effects = self.rule.leave(self.config, self.decisions, worker)
        if effects:
            raise NotImplementedError(f"tests/rule_driver.py does not know the effects {effects!r} of a leave.")
        del self.sessions[worker]
        return effects

    def details(self) -> dict[str, float]:
        """The rule's own figures of the last apply."""
        return self.rule.details(self.config, self.stats)

    def _apply(self, worker: str, d: Floats, weight: float) -> None:
        blocks = self._blocks()
        self.stats = np.zeros((len(blocks), self.rule.stats_width))
        for row, (low, high) in zip(self.stats, blocks, strict=True):
            state, session = part(self.state, low, high), part(self.sessions[worker], low, high)
            self.rule.apply(self.config, self.center[low:high], state, session, d[low:high], weight, row)
        self.version += 1

    def _blocks(self) -> list[tuple[int, int]]:
        n = self.center.size
        length = self.block_elements or n
        return [(low, min(low + length, n)) for low in range(0, n, length)]


def part(arrays: Arrays, low: int, high: int) -> Arrays:
    """The same named tuple over the elements low to high, as views."""
    return type(arrays)(*(array[low:high] for array in arrays))


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
        for _ in _steps(model, make_optimizer, steps):
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
    server = Server.start(rule, config, _flat(model))
    anchor = server.join("w0")
    with _one_thread():
        for step in _steps(model, make_optimizer, steps):
            if step % local_steps:
                continue
            x, d = _flat(model), np.empty_like(anchor)
            rule.update(config, x, anchor, d)
            reply = server.push("w0", d, steps=local_steps)
            assert reply is not None
            rule.merge(config, x, reply)
            anchor = reply
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


def _steps(model: torch.nn.Module, make_optimizer: MakeOptimizer, steps: int) -> Iterator[int]:
    """Train on batches that are always the same; yields the number of each step after it."""
    random = torch.Generator().manual_seed(1)
    optimizer, dtype = make_optimizer(model.parameters()), next(model.parameters()).dtype
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

    server: Server
    exchanges: list[Exchange]
    pushed: Floats
    """(n,) sum of all updates the server was given."""
    trained: Floats
    """(n,) sum of all local steps that are part of these updates."""


@dataclass
class _Worker:
    name: str
    random: np.random.Generator
    step_s: float
    x: Floats
    anchor: Floats
    trained: Floats
    """What the steps since the last push moved x by, together."""
    steps: int = 0
    """Since the last push."""
    x_at_push: Floats | None = None
    """Set while an exchange is in flight."""
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
    dtype: DTypeLike = np.float64,
) -> Run:
    """Train until the server took `pushes` updates; raises RuntimeError if before that everyone waits for everyone."""
    return _Simulation(rule, config, objective, cluster, seed, dtype).run(pushes)


class _Simulation:
    def __init__(
        self, rule: Rule, config: Config, objective: Objective, cluster: Cluster, seed: int, dtype: DTypeLike
    ) -> None:
        refused = rule.accept(config, OptimizerFacts("SGD", cluster.lr, 0.0, 1))
        if refused is not None:
            raise AssertionError(refused)
        self.rule, self.config, self.objective, self.cluster = rule, config, objective, cluster
        self.server = Server.start(rule, config, objective.initial().astype(dtype), overlap=cluster.overlap)
        self.exchanges: list[Exchange] = []
        self.pushed, self.trained = np.zeros_like(self.server.center), np.zeros_like(self.server.center)
        self.events: list[tuple[float, int, _Worker, Callable[[float], None]]] = []
        self.order = 0
        streams = np.random.SeedSequence(seed).spawn(len(cluster.step_s))
        workers = [
            self._join(f"w{i}", stream, step_s)
            for i, (stream, step_s) in enumerate(zip(streams, cluster.step_s, strict=True))
        ]
        for i, at_s in cluster.leave_s:
            self._at(at_s, workers[i], partial(self._leave, workers[i]))

    def run(self, pushes: int) -> Run:
        patience_s = PATIENCE_STEPS * max(self.cluster.step_s) * self.cluster.local_steps
        last_s = 0.0
        while len(self.exchanges) < pushes:
            now = self.events[0][0] if self.events else math.inf
            if now > last_s + patience_s:
                raise RuntimeError(f"After {len(self.exchanges)} of {pushes} pushes all workers wait for a reply.")
            _, _, worker, action = heapq.heappop(self.events)
            if not worker.gone:
                action(now)
            if self.exchanges:
                last_s = self.exchanges[-1].at_s
        return Run(self.server, self.exchanges, self.pushed, self.trained)

    def _at(self, at_s: float, worker: _Worker, action: Callable[[float], None]) -> None:
        self.order += 1
        heapq.heappush(self.events, (at_s, self.order, worker, action))

    def _message_s(self, worker: _Worker) -> float:
        return float(worker.random.exponential(self.cluster.delay_s))

    def _join(self, name: str, stream: np.random.SeedSequence, step_s: float) -> _Worker:
        given = self.server.join(name)
        worker = _Worker(name, np.random.default_rng(stream), step_s, given.copy(), given, np.zeros_like(given))
        self._begin_step(worker, 0.0)
        return worker

    def _begin_step(self, worker: _Worker, now: float) -> None:
        end_s = now + worker.step_s * (1 + self.cluster.jitter * worker.random.random())
        self._at(end_s, worker, partial(self._end_step, worker))

    def _end_step(self, worker: _Worker, now: float) -> None:
        """One step of plain SGD; a reply that came meanwhile is merged; a push goes out when it is time."""
        moved = worker.x.dtype.type(-self.cluster.lr) * self.objective.gradient(worker.x, worker.random)
        worker.x += moved
        worker.trained += moved
        worker.steps += 1
        if worker.reply is not None:
            self._merge(worker, worker.reply)
        if worker.steps >= self.cluster.local_steps and worker.x_at_push is None:
            self._push(worker, now)
        if worker.x_at_push is None or self.cluster.overlap:
            self._begin_step(worker, now)

    def _push(self, worker: _Worker, now: float) -> None:
        update = np.empty_like(worker.x)
        self.rule.update(self.config, worker.x, worker.anchor, update)
        sent = _Sent(update, worker.steps, self.objective.loss(worker.x), worker.trained)
        worker.x_at_push, worker.steps, worker.trained = worker.x.copy(), 0, np.zeros_like(worker.x)
        self._at(now + self._message_s(worker), worker, partial(self._arrive, worker, sent))

    def _arrive(self, worker: _Worker, sent: _Sent, now: float) -> None:
        """The server takes the update in one go."""
        lag = self.server.version - self.server.started_from[worker.name]
        self.exchanges.append(Exchange(now, worker.name, sent.steps, lag))
        self.pushed += sent.update
        self.trained += sent.trained
        reply = self.server.push(worker.name, sent.update, steps=sent.steps, lr=self.cluster.lr, loss=sent.loss)
        if reply is not None:
            self._at(now + self._message_s(worker), worker, partial(self._receive, worker, reply))

    def _receive(self, worker: _Worker, reply: Floats, now: float) -> None:
        if self.cluster.overlap:
            worker.reply = reply
        else:
            self._merge(worker, reply)
            self._begin_step(worker, now)

    def _merge(self, worker: _Worker, reply: Floats) -> None:
        """x <- reply + progress in flight; the reply alone becomes the anchor."""
        assert worker.x_at_push is not None
        in_flight = worker.x - worker.x_at_push
        worker.x = worker.x_at_push
        self.rule.merge(self.config, worker.x, reply)
        worker.x += in_flight
        worker.anchor, worker.reply, worker.x_at_push = reply, None, None

    def _leave(self, worker: _Worker, now: float) -> None:
        worker.gone = True
        self.server.leave(worker.name)
