"""What an update rule is: a value made of pure functions, both halves in one file.

A worker pushes an update D (for most rules x - anchor, what it trained since its last merge); the server admits it
(scalar logic), applies it (block kernels) and replies.

Laws
* Decisions (`admit`, `leave`) are scalar, pure, and return effects that carry a reason. Kernels are element-wise,
  work in place on one block of the flat vector, and decide nothing.
* Kernels never write to the update, allocate nothing, give the same bits for any block size, and are generic in
  dtype: float32 on the server, float64 in the proofs.
* All hidden state is declared: arrays of the vector's length for the rule (`state`) and for each session
  (`session`), as named tuples, zero when made. They go into the checkpoint as they are.
* Time, randomness and I/O do not occur here.

A rule file offers one value, `RULE`. Its header gives the paper, the equations, the symbols, and what it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pydantic import BaseModel, ConfigDict

from common import buffers
from common.kernels import kernel

__all__ = [
    "Apply",
    "Arrays",
    "Config",
    "Effect",
    "Facts",
    "Floats",
    "NoArrays",
    "OptimizerFacts",
    "Reply",
    "Rule",
    "admit_at_once",
    "allocate",
    "any_optimizer",
    "delta",
    "kernel",
    "merge_reply",
    "no_anchor",
    "no_details",
    "nothing_on_leave",
]

Floats: TypeAlias = NDArray[Any]
"""A flat block or vector, float32 or float64."""

Arrays: TypeAlias = Any
"""A named tuple of `Floats`, all of the vector's length (or of the block's, inside a kernel)."""


class Config(BaseModel):
    """A rule's settings: frozen, each field with its unit, default and range. Unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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


class Apply(NamedTuple):
    """Effect: let the kernel apply the pushed update, scaled by `weight`."""

    weight: float
    reason: str


class Reply(NamedTuple):
    """Effect: answer with the center; `before` or `after` this update."""

    what: Literal["before", "after"]
    reason: str


Effect: TypeAlias = Apply | Reply


class Rule(NamedTuple):
    """One update rule. n: length of the vector; c: (n,) center; d: (n,) update; S, K: arrays of rule and session.

    Worker half (on whole vectors, in the worker)
        accept(config, optimizer)         None, or the sentence that refuses this inner optimizer
        update(config, x, anchor, out)    out: (n,) what to push, from parameters x and the anchor
        merge(config, x, reply)           x: (n,) becomes what the reply makes of it; the reply becomes the anchor
    Server half
        state(config, overlap, n, dtype) -> S       session(config, overlap, n, dtype) -> K
        admit(config, D, facts) -> D, effects       leave(config, D, worker) -> D, effects     D: scalar state
        anchor(config, c, K)                        block kernel: the worker of K is given the center as it is
        apply(config, c, S, K, d, weight, stats)    block kernel; stats: (stats_width,) float64, this block's row
        details(config, stats)                      stats: (blocks, stats_width) -> named figures for the run log
    """

    name: str
    summary: str
    paper: str
    Config: type[Config]
    elementwise: bool
    """May the kernels be sharded freely? Decisions never are."""
    lost_reply: Literal["reanchor", "resend"]
    """After a lost reply: give the center as it is now (`anchor` runs), or send the very same bytes again."""

    accept: Callable[[Any, OptimizerFacts], str | None]
    update: Callable[[Any, Floats, Floats, Floats], None]
    merge: Callable[[Any, Floats, Floats], None]

    state: Callable[[Any, bool, int, DTypeLike], Arrays]
    session: Callable[[Any, bool, int, DTypeLike], Arrays]
    admit: Callable[[Any, Any, Facts], tuple[Any, list[Effect]]]
    leave: Callable[[Any, Any, str], tuple[Any, list[Effect]]]
    anchor: Callable[[Any, Floats, Arrays], None]
    apply: Callable[[Any, Floats, Arrays, Arrays, Floats, float, Floats], None]
    stats_width: int
    details: Callable[[Any, Floats], dict[str, float]]


# Shared parts: what most rules do.


def delta(config: Config, x: Floats, anchor: Floats, out: Floats) -> None:
    """D = x - anchor: the progress since the last merge."""
    np.subtract(x, anchor, out=out)


def merge_reply(config: Config, x: Floats, reply: Floats) -> None:
    """x <- reply: go on from the center that was sent."""
    x[:] = reply


def any_optimizer(config: Config, optimizer: OptimizerFacts) -> str | None:
    """Every inner optimizer will do."""
    return None


def admit_at_once(config: Config, decisions: Any, facts: Facts) -> tuple[Any, list[Effect]]:
    """Apply every update as it comes, in full, and answer with the center after it."""
    return decisions, [Apply(1.0, "applied on arrival"), Reply("after", "the center after this update")]


def nothing_on_leave(config: Config, decisions: Any, worker: str) -> tuple[Any, list[Effect]]:
    """Nobody waits for anybody, so a departure changes nothing."""
    return decisions, []


def no_anchor(config: Config, c: Floats, session: Arrays) -> None:
    """The server keeps nothing about what a worker was given."""


def no_details(config: Config, stats: Floats) -> dict[str, float]:
    """Nothing to report beside the common figures."""
    return {}


def allocate(kind: type[Any], n: int, dtype: DTypeLike) -> Arrays:
    """A named tuple of zero vectors of length n."""
    return kind(*(buffers.zeros(n, dtype) for _ in kind._fields))
