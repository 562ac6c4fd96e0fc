"""`diloco`: DiLoCo, arXiv 2311.08105, and Streaming DiLoCo, arXiv 2501.18512. Douillard et al.

    g  = -(1/K) sum D           a round: the mean over K workers of their progress in H local steps
    v <- mu v + g
    c <- c - lr (g + mu v)      Nesterov, as torch.optim.SGD(lr, momentum=mu, nesterov=True) on g

    c  center    D  a worker's progress since its last merge    v  outer momentum    lr .7    mu .9
    H  local steps, of any inner optimizer, AdamW in the papers, whose state stays with the worker

Streaming: the vector is cut into `fragments` parts f = 0 ... F - 1, each with a round of its own, H steps long; the
rounds are staggered: f is pushed when done mod H is its `offset`, ((f + 1) H / F) mod H, rounded down. They take turns
(`fragment`), so that a worker that missed its step pushes late, but not another fragment than the others. A reply is
merged `delay` steps after its push:

    x <- alpha x + (1 - alpha) c_f          and the anchor is c_f

where x is the worker's as it was at its push. What was trained in flight is added to that in full and is part of the
next D, so that no step is lost; in the paper it is mixed by alpha as the rest.

Laws
* Who is held in the round of one fragment is not waited for in that of another: a joiner, whose turns start with
  fragment 0, and the others would else wait for each other for ever. Where several rounds could close, that of most
  members does. So the others go on until their turn comes to the joiner's fragment, and it falls in with them.
* `delay` fits between two pushes: a worker has one exchange under way at a time.

A push computes on its own fragment only. Where it completes the round of another one, that is closed by the next tick,
which is asked for at once. A tick computes on the whole vector, so each element remembers which fragment it is in.

Left out: fragments by layer (they are cut evenly by elements); the papers' quantised updates (a codec's business).
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from numpy.typing import DTypeLike
from pydantic import Field

from common.rules import base, rounds
from common.rules.base import (
    Accumulate,
    Arrays,
    Config,
    Effect,
    Facts,
    Floats,
    Member,
    Rule,
    Terms,
    for_kernels,
    kernel,
)

Decisions: TypeAlias = dict[str, Any]
"""{"fragments": [a round for each], "due_s": when a tick is wanted, or None}."""


class Diloco(Config):
    """Settings of DiLoCo."""

    lr: float = Field(0.7, gt=0.0, le=10.0, description="outer learning rate, without unit, in (0, 10]")
    mu: float = Field(0.9, ge=0.0, lt=1.0, description="outer Nesterov momentum, without unit, in [0, 1)")
    fragments: int = Field(1, ge=1, le=64, description="parts of the vector with rounds of their own")
    delay: int = Field(0, ge=0, le=10_000, description="local steps between a push and the merge of its reply")
    alpha: float = Field(0.0, ge=0.0, lt=1.0, description="share of the worker's own x in a merge, in [0, 1)")


class Whole(NamedTuple):
    """total: (n,) sum of the updates of the round; v: (n,) outer momentum, in the direction of D."""

    total: Floats
    v: Floats


class Parts(NamedTuple):
    """As `Whole`; part: (n,) 1 + the fragment an element is in, 0 until its first update."""

    total: Floats
    v: Floats
    part: Floats


# Worker half.


def offset(config: Diloco, h: int, fragment: int) -> int:
    """The fragment is pushed when done mod H is this."""
    return ((fragment + 1) * h // config.fragments) % h


def fragment(config: Diloco, number: int) -> int:
    """The fragment of a session's push, numbered from 1."""
    return (number - 1) % config.fragments


def local_steps(config: Diloco, h: int, done: int) -> int:
    """Steps to the next push, of whichever fragment."""
    return min((offset(config, h, f) - done - 1) % h + 1 for f in range(config.fragments))


def merge(config: Diloco, x: Floats, reply: Floats) -> None:
    """x <- alpha x + (1 - alpha) c."""
    if config.alpha == 0.0:
        x[:] = reply
    elif for_kernels(x):
        _mix(x, reply, x.dtype.type(config.alpha))
    else:
        x -= reply
        x *= config.alpha
        x += reply


@kernel
def _mix(x: Any, c: Any, alpha: Any) -> None:
    for i in range(x.size):
        x[i] = c[i] + alpha * (x[i] - c[i])


# Decisions.


def fits(config: Diloco, terms: Terms) -> str | None:
    """Fragments and delay fit into H."""
    if config.fragments > terms.local_steps:
        return (
            f"Rule 'diloco' has {config.fragments} fragments but {terms.local_steps} local steps: each fragment needs "
            "a step of its own to be pushed after."
        )
    between = terms.local_steps // config.fragments
    if config.delay and not terms.overlap:
        return f"Rule 'diloco' has delay {config.delay}, which needs overlap: workers train on during an exchange."
    if config.delay and config.delay >= between:
        return (
            f"Rule 'diloco' has delay {config.delay}, but pushes follow each other after {between} steps (local_steps "
            f"/ fragments): the delay must be below {between}."
        )
    return None


def start(config: Diloco, terms: Terms) -> Decisions:
    """Nobody yet."""
    return {"fragments": [rounds.start() for _ in range(config.fragments)], "due_s": None}


def join(config: Diloco, decisions: Decisions, member: Member, at_s: float) -> tuple[Decisions, list[Effect]]:
    """One more, in the rounds of all fragments."""
    fragments = [rounds.join(round_, member.worker) for round_ in decisions["fragments"]]
    return {**decisions, "fragments": fragments}, []


def leave(config: Diloco, decisions: Decisions, worker: str, at_s: float) -> tuple[Decisions, list[Effect]]:
    """One less; that may complete rounds."""
    fragments = [rounds.leave(round_, worker) for round_ in decisions["fragments"]]
    return _closed({**decisions, "fragments": fragments}, f"{worker} left")


def admit(config: Diloco, decisions: Decisions, facts: Facts) -> tuple[Decisions, list[Effect]]:
    """Hold the update until all have pushed that fragment. Other fragments are left to the next tick."""
    f, fragments = facts.fragment, list(decisions["fragments"])
    fragments[f] = rounds.push(fragments[f], facts.worker, 1.0)
    effects: list[Effect] = [Accumulate(1.0, f"{facts.worker} has pushed", args=(float(f),))]
    if _next(fragments) == f:
        fragments[f], ended = rounds.end(fragments[f], "all members have pushed", float(f))
        effects += ended
    return {"fragments": fragments, "due_s": None if _next(fragments) is None else facts.at_s}, effects


def tick(config: Diloco, decisions: Decisions, at_s: float) -> tuple[Decisions, list[Effect]]:
    """Close what is complete."""
    return _closed(decisions, "the members it waited for are held in the rounds of other fragments")


def deadline(config: Diloco, decisions: Decisions) -> float | None:
    """At once, where the round of a fragment was completed by a push of another."""
    due_s: float | None = decisions["due_s"]
    return due_s


def waits(config: Diloco, decisions: Decisions) -> list[str]:
    """Members that somebody who is held waits for."""
    fragments = decisions["fragments"]
    return list(
        dict.fromkeys(
            name
            for f, round_ in enumerate(fragments)
            for name in rounds.waits(round_)
            if name not in _elsewhere(fragments, f)
        )
    )


def _elsewhere(fragments: list[rounds.Round], f: int) -> set[str]:
    """Members that are held in the rounds of other fragments."""
    return {name for g, round_ in enumerate(fragments) if g != f for name in round_["held"]}


def _next(fragments: list[rounds.Round]) -> int | None:
    """The fragment whose round closes next: one that all have pushed, else one that waits for nobody who is free."""
    complete = [f for f, round_ in enumerate(fragments) if rounds.complete(round_)]
    closable = complete or [
        f
        for f, round_ in enumerate(fragments)
        if round_["updates"] and _elsewhere(fragments, f).issuperset(rounds.missing(round_))
    ]
    return max(closable, key=lambda f: len(fragments[f]["held"]), default=None)


def _closed(decisions: Decisions, reason: str) -> tuple[Decisions, list[Effect]]:
    """Close rounds until each waits for somebody who is free."""
    fragments, effects = list(decisions["fragments"]), list[Effect]()
    while (f := _next(fragments)) is not None:
        fragments[f], ended = rounds.end(fragments[f], reason, float(f))
        effects += ended
    return {"fragments": fragments, "due_s": None}, effects


# Kernels.


@kernel
def _accumulate_part(total: Any, part: Any, d: Any, weight: Any, fragment: Any) -> None:
    for i in range(total.size):
        part[i] = fragment
        total[i] += weight * d[i]


@kernel
def _nesterov_part(c: Any, v: Any, total: Any, part: Any, weight: Any, mu: Any, lr: Any, fragment: Any) -> None:
    for i in range(c.size):
        if part[i] == fragment:
            mean = total[i] / weight
            v[i] = mu * v[i] + mean
            c[i] += lr * (mean + mu * v[i])
            total[i] = 0


def state(config: Diloco, overlap: bool, n: int, dtype: DTypeLike) -> Arrays:
    """All zero."""
    return base.allocate(Parts if config.fragments > 1 else Whole, n, dtype)


def accumulate(
    config: Diloco, c: Floats, state: Arrays, session: Arrays, d: Floats, weight: float, args: tuple[float, ...]
) -> None:
    """total <- total + weight D, and the fragment is noted beside it."""
    real = c.dtype.type
    _accumulate_part(state.total, state.part, d, real(weight), real(1.0 + args[0]))


def close(config: Diloco, c: Floats, state: Arrays, args: tuple[float, ...]) -> None:
    """The outer step, on the elements of the fragment."""
    fragment, weight = args
    if config.fragments > 1:
        real = c.dtype.type
        scalars = (real(weight), real(config.mu), real(config.lr), real(1.0 + fragment))
        _nesterov_part(c, state.v, state.total, state.part, *scalars)
    else:
        rounds.outer_step(c, state.v, state.total, weight, config.mu, config.lr, nesterov=True)


RULE = Rule(
    name="diloco",
    summary="DiLoCo: rounds of many local steps, whose mean is the gradient of an outer Nesterov step; streaming",
    paper="Douillard et al., arXiv 2311.08105 and 2501.18512",
    Config=Diloco,
    rounds=True,
    fragments=lambda config: int(config.fragments),
    delay=lambda config: int(config.delay),
    merge=merge,
    local_steps=local_steps,
    fits=fits,
    start=start,
    join=join,
    leave=leave,
    tick=tick,
    admit=admit,
    deadline=deadline,
    waits=waits,
    state=state,
    total=lambda config, state, args: None if config.fragments > 1 else state.total,
    accumulate=accumulate,
    close=close,
)
