"""What an update rule is: a value made of pure functions, both halves in one file.

A worker pushes an update D (for most rules x - anchor, what it trained since its last merge); the server *decides*
(scalar logic: effects, each with a reason), *computes* (block kernels) and *replies*, at once or when a round closes.

Laws
* Decisions are pure, see scalars only, and return effects that carry a reason. Their state is JSON (dicts, lists,
  strings, numbers): it goes into the checkpoint as it is, and a decision returns a new one, never changes the old.
* Kernels are element-wise, work in place on one block of the flat vector, and decide nothing. They never write to the
  update, allocate nothing, give the same bits for any block size, and are generic in dtype: float32 on the server,
  float64 in the proofs.
* All hidden state is declared: arrays of the vector's length for the rule (`state`) and for each session
  (`session`), as named tuples, zero when made. They go into the checkpoint as they are.
* Randomness and I/O do not occur here; time is an argument: seconds of training so far, over all lives of the server.
* The worker half takes torch's tensors as well (`for_kernels`), wherever they lie, and gives the same bits.

A rule file offers one value, `RULE`. Its header gives the paper, the equations, the symbols, and what it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pydantic import BaseModel, ConfigDict

from common import buffers
from common.errors import Code, ConfigError, PeerError
from common.kernels import EXPONENT, exponent, goes_far, kernel, put, settle

__all__ = [
    "Accumulate",
    "Apply",
    "Arrays",
    "Close",
    "Code",
    "Config",
    "ConfigError",
    "Decisions",
    "Effect",
    "Exchange",
    "Facts",
    "Floats",
    "Member",
    "NoArrays",
    "OptimizerFacts",
    "Order",
    "PeerError",
    "Reply",
    "Rule",
    "Terms",
    "add_update",
    "admit_at_once",
    "allocate",
    "allocate_rows",
    "any_optimizer",
    "changes_center",
    "computes",
    "delta",
    "for_kernels",
    "kernel",
    "merge_reply",
    "perform",
    "reply_to",
    "weighted",
]

Floats: TypeAlias = NDArray[Any]
"""A flat block or vector, float32 or float64."""

Arrays: TypeAlias = Any
"""A named tuple of `Floats`, the last axis as long as the vector (or the block, inside a kernel)."""

Decisions: TypeAlias = Any
"""What the decisions remember: JSON, or None."""


class Config(BaseModel):
    """A rule's settings: frozen, each field with its unit, default and range. Unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NoArrays(NamedTuple):
    """The state of a rule, or of its sessions, that keeps none."""


class OptimizerFacts(NamedTuple):
    """What a rule may know of a worker's inner optimizer when it joins."""

    name: str
    """Class name, such as `SGD`."""
    lr: float
    momentum: float
    groups: int
    """Number of parameter groups with learning rates of their own."""
    nesterov: bool = False
    dampening: float = 0.0


class Terms(NamedTuple):
    """What is set beside the rule and what a rule may depend on."""

    local_steps: int = 1
    """H."""
    overlap: bool = False
    workers: int | None = None
    """p: members that are expected, where that is told."""
    lossless: bool = True
    """Whether updates and replies travel as they are."""
    max_clock_gap: int | None = None
    """Pushes a worker may be ahead of the slowest before its reply waits."""


class Member(NamedTuple):
    """Who joins. `group`: the one it asks for; -1 leaves it to the rule."""

    worker: str
    host: str = ""
    group: int = -1


class Facts(NamedTuple):
    """The scalars of one push, as the decisions see them."""

    worker: str
    number: int
    steps: int
    """H: optimizer steps since the last push."""
    lag_versions: int
    """Center version now minus the version the worker started from."""
    loss: float
    samples: int
    lr: float
    at_s: float = 0.0
    """Seconds of training so far."""
    fragment: int = 0
    """The part of the vector that is pushed, for rules that cut it."""


# Effects. Kernels run in the order of their effects, block by block; `args` are handed to them as they are.


class Apply(NamedTuple):
    """Let `apply` change the center by the pushed update, scaled by `weight`."""

    weight: float
    reason: str
    args: tuple[float, ...] = ()


class Accumulate(NamedTuple):
    """Fold the pushed update, scaled by `weight`, into the rule's state: its `total`, or by `accumulate`. The center
    stays."""

    weight: float
    reason: str
    args: tuple[float, ...] = ()


class Close(NamedTuple):
    """Let `close` bring what was accumulated into the center, or into rule state where `center` is False."""

    reason: str
    args: tuple[float, ...] = ()
    center: bool = True


class Exchange(NamedTuple):
    """Let `propose` make the reply, and `settle` take what the worker will decode of it; Reply("made") sends it."""

    weight: float
    reason: str
    args: tuple[float, ...] = ()


class Reply(NamedTuple):
    """Answer the last push of `worker`: the center "after" all this or "before" it, the "made" reply, "nothing" but
    that it was taken, or row `row` of the array of that name in the rule's state. A push that gets no Reply is held
    until a later effect answers it."""

    worker: str
    what: str
    reason: str
    row: int = 0


class Order(NamedTuple):
    """Tell `worker`, under a rule that schedules, what is next: train until it has done `until` steps in all; upload
    its parameters; pull from these sources in this order."""

    worker: str
    reason: str
    until: int = 0
    upload: bool = False
    pull: tuple[str, ...] = ()


Effect: TypeAlias = Apply | Accumulate | Close | Exchange | Reply | Order
Decided: TypeAlias = tuple[Decisions, list[Effect]]


class Rule(NamedTuple):
    """One update rule. n: length of the vector; c: (n,) center; d: (n,) update; x: (n,) a worker's parameters;
    S, K: arrays of rule and session; D: what the decisions remember.

    Worker half, on whole vectors, in the worker
        accept(config, optimizer)           None, or the sentence that refuses this inner optimizer
        point(config, x, m, optimizer)      x becomes the point that is exchanged; m: (n,) the optimizer's momentum
        update(config, x, anchor, out)      out: (n,) what to push
        merge(config, x, reply)             x becomes what the reply makes of it
        track(config, anchor, sent, reply)  the anchor after that, `sent`: the update as decoded; None: the reply is it
        pull(config, x, source, leader)     x becomes what a pull from `source` makes of it
        local_steps(config, h, done)        steps until the next push, where h are set and `done` are behind
    Decisions
        fits(config, terms)                 None, or the sentence that refuses what is set beside the rule
        start(config, terms) -> D
        join(config, D, member, at_s), leave(config, D, worker, at_s), tick(config, D, at_s) -> D, effects
        admit(config, D, facts) -> D, effects
        report(config, D, worker, steps, loss, at_s) -> D, effects       `steps` it has done in all
        deadline(config, D)                 when `tick` is wanted, seconds of training; None: never
        waits(config, D)                    names of the workers that others wait for
        source(config, D, worker, name)     (array of S or "", row) that a pull from `name` reads; "" is the center
        figures(config, D)                  named plain values for the run log, where there are new ones
    Kernels, on blocks
        state(config, overlap, n, dtype) -> S       session(config, overlap, n, dtype) -> K
        load(config, c, S)                          the center was just given its first weights
        anchor(config, c, K)                        the worker of K is given the center as it is, to go on from
        given(config, c, K)                         the worker of K is given the center later than its push
        apply(config, c, S, K, d, weight, args, stats)     stats: (stats_width,) float64, this block's row
        total(config, S, args)                      the vector that `accumulate` adds weight d to, and no more; or None
        accumulate(config, c, S, K, d, weight, args)       where it does something else
        close(config, c, S, args)
        propose(config, c, S, K, d, weight, args, out)     out: (n,) the reply
        settle(config, c, S, K, reply)                     reply: (n,) as the worker decodes it
        details(config, stats)                      stats: (blocks, stats_width) -> named figures for the run log
    For whoever checks by hand
        vectors(config, before, kept, c, S, K)      named vectors of one apply; before, kept: c and K as they were
    """

    name: str
    summary: str
    paper: str
    Config: type[Config]

    elementwise: bool = True
    """May the kernels be sharded freely? Decisions never are."""
    lost_reply: Literal["reanchor", "resend"] = "reanchor"
    """After a lost reply: give the center as it is now (`anchor` runs), or send the very same bytes again."""
    private: bool = False
    """Does each worker keep parameters of its own, that no re-join overwrites?"""
    schedules: bool = False
    """Does the server say when to train, upload and pull? Then workers report every step and push only when told."""
    buffers: Literal["average", "leader", "local"] = "average"
    """Float buffers of the center, unless set otherwise: the mean of the members' last, the last pushed, or nobody's.
    Workers adopt the mean, and keep their own otherwise."""
    rounds: bool = False
    """Does a push wait for those of others?"""
    fragments: Callable[[Any], int] = lambda config: 1
    """Parts the vector is cut into, each pushed and answered by itself, in turn."""
    delay: Callable[[Any], int] = lambda config: 0
    """Local steps between a push and the merge of its reply, under overlap; 0: as soon as it is there."""

    accept: Callable[[Any, OptimizerFacts], str | None] = lambda config, optimizer: None
    point: Callable[[Any, Floats, Floats, OptimizerFacts], None] | None = None
    update: Callable[[Any, Floats, Floats, Floats], None] = lambda config, x, anchor, out: delta(config, x, anchor, out)
    merge: Callable[[Any, Floats, Floats], None] = lambda config, x, reply: merge_reply(config, x, reply)
    track: Callable[[Any, Floats, Floats, Floats], None] | None = None
    pull: Callable[[Any, Floats, str, Floats], None] | None = None
    local_steps: Callable[[Any, int, int], int] = lambda config, h, done: h

    fits: Callable[[Any, Terms], str | None] = lambda config, terms: None
    start: Callable[[Any, Terms], Decisions] = lambda config, terms: None
    join: Callable[[Any, Decisions, Member, float], Decided] = lambda config, decisions, member, at_s: (decisions, [])
    leave: Callable[[Any, Decisions, str, float], Decided] = lambda config, decisions, worker, at_s: (decisions, [])
    tick: Callable[[Any, Decisions, float], Decided] = lambda config, decisions, at_s: (decisions, [])
    admit: Callable[[Any, Decisions, Facts], Decided] = lambda config, decisions, facts: admit_at_once(
        config, decisions, facts
    )
    report: Callable[[Any, Decisions, str, int, float, float], Decided] = (
        lambda config, decisions, worker, steps, loss, at_s: (
            decisions,
            [],
        )
    )
    deadline: Callable[[Any, Decisions], float | None] = lambda config, decisions: None
    waits: Callable[[Any, Decisions], Sequence[str]] = lambda config, decisions: ()
    source: Callable[[Any, Decisions, str, str], tuple[str, int]] = lambda config, decisions, worker, name: ("", 0)
    figures: Callable[[Any, Decisions], dict[str, Any]] = lambda config, decisions: {}

    state: Callable[[Any, bool, int, DTypeLike], Arrays] = lambda config, overlap, n, dtype: NoArrays()
    session: Callable[[Any, bool, int, DTypeLike], Arrays] = lambda config, overlap, n, dtype: NoArrays()
    load: Callable[[Any, Floats, Arrays], None] | None = None
    anchor: Callable[[Any, Floats, Arrays], None] | None = None
    given: Callable[[Any, Floats, Arrays], None] | None = None
    apply: Callable[[Any, Floats, Arrays, Arrays, Floats, float, tuple[float, ...], Floats], None] | None = None
    total: Callable[[Any, Arrays, tuple[float, ...]], Floats | None] = lambda config, state, args: None
    accumulate: Callable[[Any, Floats, Arrays, Arrays, Floats, float, tuple[float, ...]], None] | None = None
    close: Callable[[Any, Floats, Arrays, tuple[float, ...]], None] | None = None
    propose: Callable[[Any, Floats, Arrays, Arrays, Floats, float, tuple[float, ...], Floats], None] | None = None
    settle: Callable[[Any, Floats, Arrays, Arrays, Floats], None] | None = None
    stats_width: int = 0
    details: Callable[[Any, Floats], dict[str, float]] = lambda config, stats: {}
    vectors: Callable[[Any, Floats, Arrays, Floats, Arrays, Arrays], dict[str, Floats]] = (
        lambda config, before, kept, c, state, session: {}
    )


# What servers do with rules and effects: the parameter server, and `common.replay`.


def has_own(rule: Rule, part: str) -> bool:
    """Whether the rule has that part itself, and not what all have that need none."""
    return getattr(rule, part) is not Rule._field_defaults[part]


def computes(effects: Sequence[Effect]) -> bool:
    """Whether any of them needs a kernel."""
    return any(isinstance(effect, Apply | Accumulate | Close | Exchange) for effect in effects)


def changes_center(effects: Sequence[Effect]) -> bool:
    """Whether they change the center: then its version grows by one."""
    for effect in effects:  # loops, here and below: a generator costs as much again as what it looks at
        if isinstance(effect, Apply | Exchange) or (isinstance(effect, Close) and effect.center):
            return True
    return False


def reply_to(worker: str, effects: Sequence[Effect]) -> Reply | None:
    """The effect that answers `worker`."""
    for effect in effects:
        if isinstance(effect, Reply) and effect.worker == worker:
            return effect
    return None


def weight_of(effects: Sequence[Effect]) -> float:
    """What the pushed update is scaled by; 0 where it goes nowhere."""
    for effect in effects:
        if isinstance(effect, Apply | Accumulate | Exchange):
            return effect.weight
    return 0.0


def weighted(effects: Sequence[Effect], weight: float) -> Sequence[Effect]:
    """The same effects, the pushed update scaled once more."""
    if weight == 1.0:
        return effects
    return [
        effect._replace(weight=effect.weight * weight) if isinstance(effect, Apply | Accumulate | Exchange) else effect
        for effect in effects
    ]


def perform(
    rule: Rule, config: Config, effects: Sequence[Effect], c: Floats, S: Arrays, K: Arrays, d: Floats, stats: Floats
) -> None:
    """Run the kernels of `effects`, but Exchange, on one block. d: the update; unread where none is pushed."""
    for effect in effects:
        match effect:
            case Apply(weight=weight, args=args):
                assert rule.apply is not None, rule.name
                rule.apply(config, c, S, K, d, weight, args, stats)
            case Accumulate(weight=weight, args=args):
                if (total := rule.total(config, S, args)) is not None:
                    add(total, d, weight)
                else:
                    assert rule.accumulate is not None, rule.name
                    rule.accumulate(config, c, S, K, d, weight, args)
            case Close(args=args):
                assert rule.close is not None, rule.name
                rule.close(config, c, S, args)


# Shared parts: what most rules do.


def for_kernels(x: Floats) -> bool:
    """Whether x is numpy's, so that a kernel takes it. On a tensor the same operations are done as operators, one
    after the other: each rounds as it does in the kernel."""
    return isinstance(x, np.ndarray)


def delta(config: Config, x: Floats, anchor: Floats, out: Floats) -> None:
    """D = x - anchor: the progress since the last merge."""
    if for_kernels(x):
        np.subtract(x, anchor, out=out)
    else:
        out[:] = x
        out -= anchor


def merge_reply(config: Config, x: Floats, reply: Floats) -> None:
    """x <- reply: go on from the center that was sent."""
    x[:] = reply


def any_optimizer(config: Config, optimizer: OptimizerFacts) -> str | None:
    """Every inner optimizer will do."""
    return None


def admit_at_once(config: Config, decisions: Decisions, facts: Facts) -> Decided:
    """Apply every update as it comes, in full, and answer with the center after it."""
    return decisions, [
        Apply(1.0, "applied on arrival"),
        Reply(facts.worker, "after", "the center after this update"),
    ]


@kernel
def _add(c: Any, d: Any, weight: Any) -> None:
    for i in range(c.size):
        c[i] += weight * d[i]


def add(total: Floats, d: Floats, weight: float) -> None:
    """total <- total + weight D."""
    _add(total, d, total.dtype.type(weight))


def add_update(
    config: Config,
    c: Floats,
    state: Arrays,
    session: Arrays,
    d: Floats,
    weight: float,
    args: tuple[float, ...],
    stats: Floats,
) -> None:
    """c <- c + weight D."""
    add(c, d, weight)


@kernel
def _sum(c: Floats, d: Floats, weight: Any, made: Floats, copy: Floats, far: Any) -> bool:
    wanted, top = copy.size > 0, np.uint32(0)
    for i in range(c.size):
        value = c[i] + weight * d[i]
        put(made, i, value, far)
        if wanted:
            put(copy, i, value, far)
        top = max(top, exponent(value))
    settle(far)
    return bool(top < EXPONENT)


def sum_of(c: Floats, d: Floats, weight: np.float32, made: Floats, copy: Floats, size: int) -> bool:
    """made, copy <- what `add_update` makes of c, which stays: whether all of it is finite. (n,) float32 each; copy:
    (0,) where nobody wants it; size: bytes of the vectors that these are parts of."""
    return bool(_sum(c, d, weight, made, copy, goes_far(made, size) and goes_far(copy, size)))


def allocate(kind: type[Any], n: int, dtype: DTypeLike) -> Arrays:
    """A named tuple of zero vectors of length n."""
    return kind(*(buffers.zeros(n, dtype) for _ in kind._fields))


def allocate_rows(kind: type[Any], rows: int, n: int, dtype: DTypeLike) -> Arrays:
    """A named tuple of zero arrays of shape (rows, n)."""
    return kind(*(buffers.zeros(rows * n, dtype).reshape(rows, n) for _ in kind._fields))
