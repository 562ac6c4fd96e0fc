"""`fedbuff`: buffered asynchronous aggregation. Nguyen et al., arXiv 2106.06639.

The server adds up K updates, whoever they are from, before it moves the center; nobody waits for that.

    w    = (1 + lag)^-a
    sum <- sum + w D
    at the K-th                  c <- c + server_lr sum / K,  sum <- 0

    c     center    D = x - anchor  the worker's update       w  its weight
    lag   changes of the center since the one the worker started from: fewer than pushes, by a factor of K
    K 10  updates in one step of the center    a .5  exponent of the lag in w    server_lr 1  the server's learning rate

It is divided by K, not by the sum of the w: an old buffer moves the center less. The reply is the current center, at
once, which until the K-th update is the one the worker may have started from. A leave changes nothing: what was added
stays. Takes any inner optimizer.

Laws: with K = 1, server_lr 1 and lag 0 it is `downpour`, bit for bit; with a = 0 a buffer moves the center by
server_lr times the mean of its updates, in any order.
Left out: secure aggregation and differential privacy; momentum of the server; who is sampled to take part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import DTypeLike
from pydantic import Field

from common.rules import base
from common.rules.base import (
    Accumulate,
    Close,
    Config,
    Decisions,
    Effect,
    Facts,
    Floats,
    Reply,
    Rule,
    Terms,
    kernel,
)


class Fedbuff(Config):
    """Settings of buffered aggregation; K in updates, the others without unit."""

    K: int = Field(10, ge=1, le=65_536, description="updates in one step of the center, in [1, 65536]")
    a: float = Field(0.5, ge=0.0, le=10.0, description="exponent of the lag in an update's weight, in [0, 10]")
    server_lr: float = Field(1.0, gt=0.0, le=100.0, description="learning rate of the server, in (0, 100]")


class State(NamedTuple):
    """sum: (n,) weighted updates since the last step of the center."""

    sum: Floats


@kernel
def _step(c: Any, sum_: Any, share: Any) -> None:
    for i in range(c.size):
        c[i] += share * sum_[i]
        sum_[i] = 0


def start(config: Fedbuff, terms: Terms) -> dict[str, int]:
    """An empty buffer."""
    return {"buffered": 0}


def state(config: Fedbuff, overlap: bool, n: int, dtype: DTypeLike) -> State:
    """sum = 0."""
    made: State = base.allocate(State, n, dtype)
    return made


def admit(config: Fedbuff, decisions: Decisions, facts: Facts) -> tuple[Decisions, list[Effect]]:
    """Add every update to the buffer as it comes; the K-th closes it."""
    buffered, lag = decisions["buffered"] + 1, facts.lag_versions
    full = buffered >= config.K
    effects: list[Effect] = [
        Accumulate((1.0 + lag) ** -config.a, f"update {buffered} of {config.K}, {lag} versions behind")
    ]
    if full:
        effects.append(Close(f"{config.K} updates are in the buffer"))
    effects.append(Reply(facts.worker, "after", "the center as it is now"))
    return {"buffered": 0 if full else buffered}, effects


def close(config: Fedbuff, c: Floats, state: State, args: tuple[float, ...]) -> None:
    """c <- c + server_lr sum / K; sum <- 0."""
    _step(c, state.sum, c.dtype.type(config.server_lr / config.K))


RULE = Rule(
    name="fedbuff",
    summary="asynchronous: the center moves by the weighted mean of K updates, whoever they are from",
    paper="Nguyen et al., arXiv 2106.06639",
    Config=Fedbuff,
    start=start,
    state=state,
    admit=admit,
    total=lambda config, state, args: state.sum,
    close=close,
)
