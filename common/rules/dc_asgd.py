"""`dc_asgd`: asynchronous SGD with delay compensation. Zheng et al., arXiv 1609.08326.

A gradient taken at b meets a center that has moved on to c. Its Taylor expansion there, with the squared gradient in
place of the diagonal of the Hessian, says what it would be at c:

    g         = -D / lr                                       the gradient that the worker's one step was made of
    c        <- c - lr (g + lambda_t g g (c - b))
    b        <- c after                                       what the reply gives the worker

    | variant    | lambda_t
    | `constant` | lambda_constant                            DC-ASGD-c
    | `adaptive` | lambda_0 / sqrt(MS + 1e-7)                 DC-ASGD-a,  MS <- m MS + (1 - m) g g  before it is used

    c  center    D = x - anchor  the update    lr  the learning rate of that step, which the push carries
    b  the center as this worker last received it    MS  mean square of this worker's gradients, 0 with a new session
    lambda_constant .04    lambda_0 2    m .95

D is a gradient only where one step of plain SGD with one learning rate made it: other inner optimizers are refused,
and so are more local steps and overlap. Weight decay of that SGD is part of g. A step with lr 0 brings no gradient:
nothing but b changes.

Laws: lambda 0, or a worker that is never overtaken (c = b), is `downpour`, bit for bit; the compensation is linear in
c - b and even in g.
Left out: weight decay on the server; one backup for all workers, as some ports have it; b as a lossy codec would give
it (b is the center that was sent).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from pydantic import Field

from common.rules import base
from common.rules.base import Apply, Arrays, Config, Effect, Facts, Floats, OptimizerFacts, Reply, Rule, Terms, kernel

EPSILON = 1e-7
"""Keeps `adaptive` from dividing by zero."""


class DcAsgd(Config):
    """Settings of delay-compensated asynchronous SGD; all without unit."""

    variant: Literal["constant", "adaptive"] = Field("constant", description="one of constant, adaptive")
    lambda_constant: float = Field(0.04, ge=0.0, le=1e6, description="lambda_t of constant, in [0, 1e6]")
    lambda_0: float = Field(2.0, ge=0.0, le=1e6, description="scale of lambda_t of adaptive, in [0, 1e6]")
    m: float = Field(0.95, ge=0.0, lt=1.0, description="decay of the mean square of adaptive, in [0, 1)")


class Session(NamedTuple):
    """Per worker, `constant`. b: (n,) the center as it last received it."""

    b: Floats


class AdaptiveSession(NamedTuple):
    """As `Session`, `adaptive`; ms: (n,) mean square of its gradients."""

    b: Floats
    ms: Floats


@kernel
def _constant(c: Any, b: Any, d: Any, lr: Any, lambda_t: Any, weight: Any) -> None:
    for i in range(c.size):
        g = -d[i] / lr
        # D stands for -lr g: without compensation the center gets the update itself, with no rounding by lr.
        c[i] += weight * (d[i] - lr * (lambda_t * (g * g) * (c[i] - b[i])))
        b[i] = c[i]


@kernel
def _adaptive(
    c: Any, b: Any, ms: Any, d: Any, lr: Any, lambda_0: Any, m: Any, rest: Any, epsilon: Any, weight: Any
) -> None:
    for i in range(c.size):
        g = -d[i] / lr
        ms[i] = m * ms[i] + rest * (g * g)
        lambda_t = lambda_0 / np.sqrt(ms[i] + epsilon)
        c[i] += weight * (d[i] - lr * (lambda_t * (g * g) * (c[i] - b[i])))
        b[i] = c[i]


def accept(config: DcAsgd, optimizer: OptimizerFacts) -> str | None:
    """D must be -lr g: plain SGD, one learning rate."""
    if optimizer.name == "SGD" and optimizer.momentum == 0.0 and optimizer.groups == 1:
        return None
    momentum = f" with momentum {optimizer.momentum:g}" if optimizer.momentum else ""
    groups = f" with {optimizer.groups} parameter groups" if optimizer.groups != 1 else ""
    return (
        "Rule 'dc_asgd' takes plain SGD without momentum and with one learning rate as inner optimizer, this worker "
        f"uses {optimizer.name}{momentum}{groups}: the server divides the update by the learning rate to have the "
        "gradient. Use torch.optim.SGD(lr=...) with one parameter group."
    )


def fits(config: DcAsgd, terms: Terms) -> str | None:
    """An update must be one gradient, taken at the center the worker last received."""
    if terms.local_steps == 1 and not terms.overlap:
        return None
    wrong = f"local_steps = {terms.local_steps}" if terms.local_steps != 1 else "overlap"
    return (
        f"Rule 'dc_asgd' cannot run with {wrong}: it compensates one gradient, taken at the center that the worker "
        "last received. Set local_steps = 1 and overlap = false, or choose another rule, such as 'dynsgd'."
    )


def session(config: DcAsgd, overlap: bool, n: int, dtype: DTypeLike) -> Session | AdaptiveSession:
    """MS = 0; `anchor` sets b to the center the worker is given."""
    made: Session | AdaptiveSession = base.allocate(
        AdaptiveSession if config.variant == "adaptive" else Session, n, dtype
    )
    return made


def admit(config: DcAsgd, decisions: None, facts: Facts) -> tuple[None, list[Effect]]:
    """Apply every update as it comes; the kernel is told the learning rate."""
    reply = Reply(facts.worker, "after", "the center after this update")
    if facts.lr == 0.0:
        return None, [Apply(0.0, "a step with learning rate 0 brings no gradient", (0.0,)), reply]
    return None, [Apply(1.0, f"compensated for {facts.lag_versions} versions of delay", (facts.lr,)), reply]


def anchor(config: DcAsgd, c: Floats, session: Session | AdaptiveSession) -> None:
    """b <- c: the worker goes on from this center."""
    session.b[:] = c


def apply(
    config: DcAsgd,
    c: Floats,
    state: Arrays,
    session: Session | AdaptiveSession,
    d: Floats,
    weight: float,
    args: tuple[float, ...],
    stats: Floats,
) -> None:
    """MS <- m MS + (1 - m) g g; c <- c + weight (D - lr lambda_t g g (c - b)); b <- c. args: (lr,)."""
    real = c.dtype.type
    (lr,) = args
    if lr == 0.0:
        session.b[:] = c
    elif isinstance(session, AdaptiveSession):
        scalars = (config.lambda_0, config.m, 1.0 - config.m, EPSILON, weight)
        _adaptive(c, session.b, session.ms, d, real(lr), *map(real, scalars))
    else:
        _constant(c, session.b, d, real(lr), real(config.lambda_constant), real(weight))


RULE = Rule(
    name="dc_asgd",
    summary="asynchronous SGD that corrects each gradient for how far the center moved meanwhile",
    paper="Zheng et al., arXiv 1609.08326",
    Config=DcAsgd,
    accept=accept,
    fits=fits,
    session=session,
    admit=admit,
    anchor=anchor,
    given=anchor,
    apply=apply,
)
