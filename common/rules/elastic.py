"""The elastic exchange, which `easgd` and `eamsgd` share: a worker and the center move towards each other.

    x_k <- x_k + D          D = x - a, a: what the worker knows that the server knows of its x
    E    = alpha (x_k - c)  alpha = beta / p, p: workers
    c   <- c + E,  x_k <- x_k - E                                               on the server
    x   <- x - E,  a   <- (a + D) - E                                           in the worker

Laws
* The worker's a and the server's x_k are changed by the same float operations in the same order, with D and E as the
  other side decodes them: they hold the same bits after every exchange, whatever the codec.
* What c gains, x loses: c + x changes by local steps only.

Left out: the synchronous form. `beta` and `recompute` are the settings of both rules.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from numpy.typing import DTypeLike
from pydantic import Field

from common.rules import base
from common.rules.base import Arrays, Config, Effect, Exchange, Facts, Floats, Member, Reply, Rule, Terms, kernel

Decisions: TypeAlias = dict[str, Any]
"""{"expected": workers, or None where that is not told; "members": names, in order of joining}."""


class Elastic(Config):
    """Settings of the elastic exchange."""

    beta: float = Field(0.9, gt=0.0, lt=1.0, description="pull of all workers together, without unit, in (0, 1)")
    recompute: bool = Field(False, description="true to take the live members for p, whoever is expected")


class Session(NamedTuple):
    """Per worker. replica: (n,) x_k, what the server knows of the worker's parameters."""

    replica: Floats


@kernel
def _propose(c: Any, replica: Any, d: Any, alpha: Any, out: Any) -> None:
    for i in range(c.size):
        replica[i] += d[i]
        out[i] = alpha * (replica[i] - c[i])


@kernel
def _settle(c: Any, replica: Any, reply: Any) -> None:
    for i in range(c.size):
        c[i] += reply[i]
        replica[i] -= reply[i]


# Worker half.


def merge(config: Elastic, x: Floats, reply: Floats) -> None:
    """x <- x - E."""
    x -= reply


def track(config: Elastic, anchor: Floats, sent: Floats, reply: Floats) -> None:
    """a <- (a + D) - E: as `propose` and `settle` do with x_k."""
    anchor += sent
    anchor -= reply


# Decisions.


def start(config: Elastic, terms: Terms) -> Decisions:
    """Nobody yet."""
    return {"expected": terms.workers, "members": []}


def join(config: Elastic, decisions: Decisions, member: Member, at_s: float) -> tuple[Decisions, list[Effect]]:
    """One more."""
    others = [name for name in decisions["members"] if name != member.worker]
    return {**decisions, "members": [*others, member.worker]}, []


def leave(config: Elastic, decisions: Decisions, worker: str, at_s: float) -> tuple[Decisions, list[Effect]]:
    """One less; what it gave to the center stays."""
    return {**decisions, "members": [name for name in decisions["members"] if name != worker]}, []


def workers(config: Elastic, decisions: Decisions) -> int:
    """p: the workers expected, where that is told, else those that are live now."""
    expected = decisions["expected"]
    return expected if expected is not None and not config.recompute else max(1, len(decisions["members"]))


def admit(config: Elastic, decisions: Decisions, facts: Facts) -> tuple[Decisions, list[Effect]]:
    """Exchange at once, with alpha = beta / p."""
    p = workers(config, decisions)
    alpha = config.beta / p
    return decisions, [
        Exchange(1.0, f"elastic exchange: alpha {alpha:.4g} = beta {config.beta:g} / {p}", args=(alpha,)),
        Reply(facts.worker, "made", "the elastic difference"),
    ]


def figures(config: Elastic, decisions: Decisions) -> dict[str, Any]:
    """`p` and `alpha` as they are now."""
    p = workers(config, decisions)
    return {"p": p, "alpha": config.beta / p}


# Kernels.


def session(config: Elastic, overlap: bool, n: int, dtype: DTypeLike) -> Session:
    """x_k = 0; `anchor` sets it to the center that the worker knows."""
    made: Session = base.allocate(Session, n, dtype)
    return made


def anchor(config: Elastic, c: Floats, session: Session) -> None:
    """x_k <- c: the center that the worker was given is what both know of its x."""
    session.replica[:] = c


def propose(
    config: Elastic,
    c: Floats,
    state: Arrays,
    session: Session,
    d: Floats,
    weight: float,
    args: tuple[float, ...],
    out: Floats,
) -> None:
    """x_k <- x_k + D; out <- weight alpha (x_k - c)."""
    (alpha,) = args
    _propose(c, session.replica, d, c.dtype.type(weight * alpha), out)


def settle(config: Elastic, c: Floats, state: Arrays, session: Session, reply: Floats) -> None:
    """c <- c + E; x_k <- x_k - E, E as the worker decodes it."""
    _settle(c, session.replica, reply)


def rule(**own: Any) -> Rule:
    """An elastic rule: `own` are the fields of `Rule` that are its own."""
    return Rule(
        lost_reply="resend",
        private=True,
        merge=merge,
        track=track,
        start=start,
        join=join,
        leave=leave,
        admit=admit,
        figures=figures,
        session=session,
        anchor=anchor,
        propose=propose,
        settle=settle,
        **own,
    )
