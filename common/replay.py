"""One rule over one center, with no time and no wire: what a server does with a rule, and no more.

    server = RuleServer.start(rule, config, center)
    center = server.join("w0")
    result = server.push("w0", update)          result.replies["w0"], result.outcome, server.details()

Production decisions and kernels, in the dtype of the center (float32 or float64), so that a rule can be checked by
hand, against a paper's numbers, and by the contract suite. Left out: codecs, weights by lag, averaged buffers, lost and
repeated messages; those are the business of the real server. A rule that cuts the vector is refused, because a push
would be all of it here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from common.errors import UsageError
from common.rules.base import (
    Accumulate,
    Apply,
    Arrays,
    Config,
    Decisions,
    Effect,
    Exchange,
    Facts,
    Floats,
    Member,
    Order,
    Reply,
    Rule,
    Terms,
    changes_center,
    computes,
    perform,
    reply_to,
)

NO_TERMS = Terms()


class Result(NamedTuple):
    """What one event led to. outcome: applied, held (no reply yet) or none; replies: by worker, each (n,)."""

    outcome: str
    weight: float
    replies: dict[str, Floats]
    orders: list[Order]
    effects: list[Effect]


@dataclass
class RuleServer:
    """The server half of one rule. Make it with `start`."""

    rule: Rule
    config: Config
    center: Floats
    """(n,) float32 or float64; changed in place."""
    state: Arrays
    overlap: bool = False
    block_elements: int | None = None
    """Longest block a kernel is given; None: the whole vector."""
    decisions: Decisions = None
    sessions: dict[str, Arrays] = field(default_factory=dict)
    started_from: dict[str, int] = field(default_factory=dict)
    """Version each worker last received."""
    numbers: dict[str, int] = field(default_factory=dict)
    """Pushes of each worker so far."""
    held: set[str] = field(default_factory=set)
    """Workers whose last push was not answered yet."""
    joined: Result | None = None
    """What the last join led to: a rule may have orders for the newcomer."""
    version: int = 0
    now_s: float = 0.0
    """Seconds of training so far; moved by `tick`."""
    stats: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    """(blocks, stats_width) figures of the last apply."""

    @classmethod
    def start(
        cls,
        rule: Rule,
        config: Config,
        center: Floats,
        *,
        overlap: bool = False,
        terms: Terms = NO_TERMS,
        block_elements: int | None = None,
    ) -> RuleServer:
        """A server that owns a copy of `center`; raises UsageError where the rule cuts the vector."""
        if (fragments := rule.fragments(config)) > 1:
            raise UsageError(
                f"Rule '{rule.name}' cuts the vector into {fragments} fragments, and this server takes it whole.",
                fix="Take one fragment: each is an instance of the same rule on its own part of the vector.",
            )
        state = rule.state(config, overlap, center.size, center.dtype)
        made = cls(rule, config, center.copy(), state, overlap, block_elements, rule.start(config, terms))
        if rule.load is not None:
            for low, high in made.blocks():
                rule.load(config, made.center[low:high], part(state, low, high))
        return made

    def join(self, worker: str, *, host: str = "", group: int = -1) -> Floats:
        """A new session for `worker`; returns a copy of the center it is given. `joined`: what the rule decided."""
        kept = self.rule.session(self.config, self.overlap, self.center.size, self.center.dtype)
        self.sessions[worker] = kept
        if self.rule.anchor is not None:
            for low, high in self.blocks():
                self.rule.anchor(self.config, self.center[low:high], part(kept, low, high))
        self.started_from[worker], self.numbers[worker] = self.version, 0
        self.joined = self._decide(lambda d: self.rule.join(self.config, d, Member(worker, host, group), self.now_s))
        return self.center.copy()

    def push(
        self, worker: str, d: Floats, *, steps: int = 1, lr: float = 0.01, loss: float = 0.0, samples: int = 1
    ) -> Result:
        """Admit update d: (n,), and do what the rule decides. Raises UsageError where the worker may not push, and what
        the rule refuses it with (PeerError): then only the number of this push is used up, as it is at a server."""
        self._expect(worker)
        if worker in self.held:
            raise UsageError(
                f"'{worker}' pushes although its last update is held.", fix="Let the others push first, or tick."
            )
        self.numbers[worker] += 1
        lag = self.version - self.started_from[worker]
        facts = Facts(worker, self.numbers[worker], steps, lag, loss, samples, lr, self.now_s)
        return self._decide(lambda decisions: self.rule.admit(self.config, decisions, facts), worker, d)

    def leave(self, worker: str) -> Result:
        """`worker` is gone, its session with it."""
        self._expect(worker)
        self.held.discard(worker)
        result = self._decide(lambda decisions: self.rule.leave(self.config, decisions, worker, self.now_s))
        del self.sessions[worker]
        return result

    def report(self, worker: str, steps: int, loss: float) -> Result:
        """`worker` has done so many steps in all, the last with this loss."""
        self._expect(worker)
        return self._decide(lambda decisions: self.rule.report(self.config, decisions, worker, steps, loss, self.now_s))

    def tick(self, seconds: float) -> Result:
        """Time passes."""
        self.now_s += seconds
        return self._decide(lambda decisions: self.rule.tick(self.config, decisions, self.now_s))

    def pull(self, worker: str, source: str) -> Floats:
        """A copy of what a pull of `worker` from `source` reads."""
        return self._read(*self.rule.source(self.config, self.decisions, worker, source)).copy()

    def details(self) -> dict[str, float]:
        """The rule's own figures of the last apply."""
        return self.rule.details(self.config, self.stats)

    def blocks(self) -> list[tuple[int, int]]:
        """(first, last) element of each block."""
        n = self.center.size
        length = self.block_elements or n
        return [(low, min(low + length, n)) for low in range(0, n, length)]

    def _expect(self, worker: str) -> None:
        """Raise UsageError where it is not here."""
        if worker not in self.sessions:
            raise UsageError(f"'{worker}' has not joined, or has left.", fix="Let it join (again) first.")

    def _decide(
        self,
        decision: Callable[[Decisions], tuple[Decisions, list[Effect]]],
        pusher: str | None = None,
        d: Floats | None = None,
    ) -> Result:
        self.decisions, effects = decision(self.decisions)
        before, version_before = self.center.copy(), self.version
        made = self._compute(effects, pusher, d) if computes(effects) else None
        if changes_center(effects):
            self.version += 1
        replies: dict[str, Floats] = {}
        if pusher is not None:
            self.held.add(pusher)
        for effect in effects:
            if not isinstance(effect, Reply):
                continue
            worker = effect.worker
            self.held.discard(worker)
            self.started_from[worker] = self.version
            if effect.what == "nothing":
                continue
            if effect.what == "before":
                replies[worker], self.started_from[worker] = before.copy(), version_before
            elif effect.what == "made":
                assert made is not None
                replies[worker] = made.copy()
            else:
                replies[worker] = self._read("" if effect.what == "after" else effect.what, effect.row).copy()
                if worker != pusher and self.rule.given is not None:
                    for low, high in self.blocks():
                        self.rule.given(self.config, self.center[low:high], part(self.sessions[worker], low, high))
        answered = pusher is None or reply_to(pusher, effects) is not None
        weight = next((e.weight for e in effects if isinstance(e, Apply | Accumulate | Exchange)), 0.0)
        orders = [effect for effect in effects if isinstance(effect, Order)]
        outcome = "none" if pusher is None else "applied" if answered else "held"
        return Result(outcome, weight, replies, orders, list(effects))

    def _compute(self, effects: Sequence[Effect], pusher: str | None, d: Floats | None) -> Floats | None:
        """Run the kernels; returns the made reply, where there is one."""
        blocks = self.blocks()
        exchange = next((effect for effect in effects if isinstance(effect, Exchange)), None)
        made = np.zeros_like(self.center) if exchange is not None else None
        d = np.zeros_like(self.center) if d is None else d
        if pusher is not None:
            self.stats = np.zeros((len(blocks), self.rule.stats_width))
        scratch = np.zeros((len(blocks), self.rule.stats_width))
        session = self.sessions[pusher] if pusher is not None else None
        for index, (low, high) in enumerate(blocks):
            c, state = self.center[low:high], part(self.state, low, high)
            kept = None if session is None else part(session, low, high)
            row = self.stats[index] if pusher is not None else scratch[index]
            perform(self.rule, self.config, effects, c, state, kept, d[low:high], row)
            if exchange is not None and made is not None:
                assert self.rule.propose is not None
                assert self.rule.settle is not None
                out = made[low:high]
                self.rule.propose(self.config, c, state, kept, d[low:high], exchange.weight, exchange.args, out)
                self.rule.settle(self.config, c, state, kept, out)
        return made

    def _read(self, name: str, row: int) -> Floats:
        if not name:
            return self.center
        array: Floats = getattr(self.state, name)
        return array[row] if array.ndim > 1 else array


def part(arrays: Arrays, low: int, high: int) -> Any:
    """The same named tuple over the elements low to high, as views."""
    return type(arrays)(*(array[..., low:high] for array in arrays))
