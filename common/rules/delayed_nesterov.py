"""`delayed_nesterov`: asynchronous local SGD with a delayed outer momentum. Liu et al., arXiv 2401.09135.

Outer Nesterov momentum that is renewed at every push amplifies stale updates. Here it is renewed at every N-th only;
the pushes in between move the center by plain gradient descent, and if told by a share of the old momentum.

    g    = -D
    sum <- sum + g
    every push but the N-th      c <- c - lr (c_coef mu m + g / N)
    the N-th instead             m <- mu m + sum / N
                                 c <- c - lr ((1 - c_coef N + c_coef) mu m + g / N)
                                 sum <- 0

    c       center            D = x - anchor  the worker's update        m  outer momentum      sum  of the g since
    lr .7   outer learning rate                mu .9  outer momentum (the paper's beta)
    N 4     pushes between two momenta         c_coef 0  share of the momentum at a push in between, in [0, 1/N]

Over N pushes the shares of the momentum add up to one, whatever c_coef is: at 0 all of it is at the N-th push, at 1/N
each push has an equal part. All workers count to N together; who pushed does not matter, nor does a leave.
Takes any inner optimizer (the paper's is AdamW).

Laws: with N = 1 it is Nesterov's method on the updates as they come, for any c_coef; with mu 0 it is `downpour` with
its updates scaled by lr / N; a weight by lag scales g, never the momentum.
The paper's other half, dynamic local updates (DyLU: H in proportion to a worker's speed), is not a matter of the rule:
set `local_steps_by speed` on the server.
Left out: momentum per worker; a warm-up of lr.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import DTypeLike
from pydantic import Field, ValidationInfo, field_validator

from common.rules import base
from common.rules.base import Apply, Arrays, Config, Decisions, Effect, Facts, Floats, Reply, Rule, Terms, kernel


class DelayedNesterov(Config):
    """Settings of delayed Nesterov momentum; N in pushes, the others without unit."""

    N: int = Field(4, ge=1, le=65_536, description="pushes from one momentum to the next, in [1, 65536]")
    lr: float = Field(0.7, gt=0.0, le=100.0, description="outer learning rate, in (0, 100]")
    mu: float = Field(0.9, ge=0.0, lt=1.0, description="outer momentum, in [0, 1)")
    c_coef: float = Field(
        0.0, ge=0.0, le=1.0, description="share of the momentum at each push before the N-th, in [0, 1/N]"
    )

    # On the field, not on the whole: so the refusal names it, as it does for a value out of its own range.
    @field_validator("c_coef")
    @classmethod
    def _leaves_the_last_push_its_share(cls, c_coef: float, info: ValidationInfo) -> float:
        n = info.data.get("N", 1)  # missing where it was refused itself
        if c_coef > 1.0 / n:
            raise ValueError(f"{n} pushes share one momentum, so each may take {1.0 / n:.12g} at most")
        return c_coef


class State(NamedTuple):
    """m: (n,) outer momentum; sum: (n,) of the g since it was last renewed."""

    m: Floats
    sum: Floats


@kernel
def _between(c: Any, m: Any, sum_: Any, d: Any, lr: Any, momentum: Any, count: Any, weight: Any) -> None:
    """momentum: what m is multiplied with; count: N."""
    for i in range(c.size):
        g = -(weight * d[i])
        sum_[i] += g
        c[i] -= lr * (momentum * m[i] + g / count)


@kernel
def _last(c: Any, m: Any, sum_: Any, d: Any, lr: Any, momentum: Any, mu: Any, count: Any, weight: Any) -> None:
    for i in range(c.size):
        g = -(weight * d[i])
        m[i] = mu * m[i] + (sum_[i] + g) / count
        c[i] -= lr * (momentum * m[i] + g / count)
        sum_[i] = 0


def start(config: DelayedNesterov, terms: Terms) -> dict[str, int]:
    """Nothing pushed yet."""
    return {"pushes": 0}


def state(config: DelayedNesterov, overlap: bool, n: int, dtype: DTypeLike) -> State:
    """m = 0, sum = 0."""
    made: State = base.allocate(State, n, dtype)
    return made


def admit(config: DelayedNesterov, decisions: Decisions, facts: Facts) -> tuple[Decisions, list[Effect]]:
    """Apply every update as it comes; the N-th renews the momentum."""
    pushes = decisions["pushes"] + 1
    last = pushes >= config.N
    what = "renews the momentum" if last else "a plain step"
    return {"pushes": 0 if last else pushes}, [
        Apply(1.0, f"push {pushes} of {config.N}: {what}", (float(last),)),
        Reply(facts.worker, "after", "the center after this update"),
    ]


def apply(
    config: DelayedNesterov,
    c: Floats,
    state: State,
    session: Arrays,
    d: Floats,
    weight: float,
    args: tuple[float, ...],
    stats: Floats,
) -> None:
    """g = -weight D; one of the two steps of the header. args: (1 if this is the N-th push else 0,)."""
    real = c.dtype.type
    lr, mu, count = real(config.lr), real(config.mu), real(config.N)
    (last,) = args
    if last:
        momentum = real((1.0 - config.c_coef * config.N + config.c_coef) * config.mu)
        _last(c, state.m, state.sum, d, lr, momentum, mu, count, real(weight))
    else:
        _between(c, state.m, state.sum, d, lr, real(config.c_coef * config.mu), count, real(weight))


RULE = Rule(
    name="delayed_nesterov",
    summary="asynchronous local SGD whose outer Nesterov momentum is renewed at every N-th push only",
    paper="Liu et al., arXiv 2401.09135",
    Config=DelayedNesterov,
    start=start,
    state=state,
    admit=admit,
    apply=apply,
)
