"""`decoupled_diloco`: DiLoCo that does not wait for all. Decoupled DiLoCo, Douillard et al., arXiv 2604.21428.

Known from summaries only: quorum, grace window, weights and outer step are as those describe them; how the window is
learned is ours. Nothing here was checked against the paper's text or numbers.

    g  = -sum w D / sum w       a round; w = s (s / H): samples, times samples for each step
    v <- mu v + g
    c <- c - lr (g + mu v)      outer Nesterov, as in `diloco`

    c  center    D  progress of a worker since its last merge, whichever center that came from    lr .7    mu .9
    s, H  samples and local steps of an update    v  outer momentum

A round closes when all members it waits for have pushed; else, from the `quorum`-th update on, when nothing has arrived
for a grace window: `grace` times the mean gap between arrivals, a moving average with rate `gap_rate`. So it goes on
while updates arrive at their usual pace, but no longer than `max_grace_s` after the quorum, which is also the window
until a gap is known. The quorum is that of the settings or the number of live members, whichever is smaller; by default
more than half of these. A gap is the time between arrivals that started from the same center; one that comes late is
measured to the last before it: gaps of only those in time would shrink the window until each worker was a round of its
own, stale to all others, which the outer momentum does not survive.

Laws
* Who is late is in the next round with its update, and waits for that to close.
* Who joins neither moves nor closes the window; who leaves may complete the quorum or the round.

Left out: fragments, and the paper's averaging of directions and lengths apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from numpy.typing import DTypeLike
from pydantic import Field

from common.rules import base, rounds
from common.rules.base import Accumulate, Config, Effect, Facts, Floats, Member, Rule, Terms

Decisions: TypeAlias = dict[str, Any]
"""{"round", "last_s": last arrival, or None; "gap_s": moving average of gaps, or None; "quorum_s":
when the quorum was there, or None}."""


class DecoupledDiloco(Config):
    """Settings of Decoupled DiLoCo."""

    lr: float = Field(0.7, gt=0.0, le=10.0, description="outer learning rate, without unit, in (0, 10]")
    mu: float = Field(0.9, ge=0.0, lt=1.0, description="outer Nesterov momentum, without unit, in [0, 1)")
    quorum: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="K, updates from which the grace window counts; none: over half of the members",
    )
    grace: float = Field(2.0, ge=0.0, le=1000.0, description="length of the grace window, mean gaps between arrivals")
    gap_rate: float = Field(0.1, gt=0.0, le=1.0, description="weight of the newest gap in their mean, in (0, 1]")
    max_grace_s: float = Field(60.0, ge=0.0, le=86_400.0, description="longest grace window, seconds")


class State(NamedTuple):
    """total: (n,) weighted sum of the updates of the round; v: (n,) outer momentum, in the direction of D."""

    total: Floats
    v: Floats


def fits(config: DecoupledDiloco, terms: Terms) -> str | None:
    """A quorum that can be reached."""
    if terms.workers is not None and config.quorum is not None and config.quorum > terms.workers:
        return (
            f"Rule 'decoupled_diloco' has a quorum of {config.quorum}, but {terms.workers} workers are expected: it "
            f"would never be reached. Set quorum to {terms.workers} or less."
        )
    return None


def start(config: DecoupledDiloco, terms: Terms) -> Decisions:
    """Nobody yet."""
    return {"round": rounds.start(), "last_s": None, "gap_s": None, "quorum_s": None}


def join(config: DecoupledDiloco, decisions: Decisions, member: Member, at_s: float) -> tuple[Decisions, list[Effect]]:
    """One more."""
    return {**decisions, "round": rounds.join(decisions["round"], member.worker)}, []


def leave(config: DecoupledDiloco, decisions: Decisions, worker: str, at_s: float) -> tuple[Decisions, list[Effect]]:
    """One less: the quorum, or the round, may be complete without it."""
    return _advanced(config, {**decisions, "round": rounds.leave(decisions["round"], worker)}, at_s)


def admit(config: DecoupledDiloco, decisions: Decisions, facts: Facts) -> tuple[Decisions, list[Effect]]:
    """Hold the update until the round closes."""
    last_s, gap_s, at_s = decisions["last_s"], decisions["gap_s"], facts.at_s
    if last_s is not None and (decisions["round"]["updates"] or facts.lag_versions):
        newest_s = at_s - last_s
        gap_s = newest_s if gap_s is None else gap_s + config.gap_rate * (newest_s - gap_s)
    weight = weight_of(facts.samples, facts.steps)
    round_ = rounds.push(decisions["round"], facts.worker, weight)
    decisions, effects = _advanced(config, {**decisions, "round": round_, "last_s": at_s, "gap_s": gap_s}, at_s)
    why = f"{facts.worker} has pushed: {facts.samples} samples in {facts.steps} steps"
    return decisions, [Accumulate(weight, why), *effects]


def tick(config: DecoupledDiloco, decisions: Decisions, at_s: float) -> tuple[Decisions, list[Effect]]:
    """The grace window may be over. Nothing else ends it: an arrival starts it anew."""
    over_s = deadline(config, decisions)
    if over_s is None or at_s < over_s:
        return decisions, []
    return _ended(decisions, f"quorum of {_quorum(config, decisions)}, and the grace window is over")


def deadline(config: DecoupledDiloco, decisions: Decisions) -> float | None:
    """The end of the grace window: it starts anew with each arrival, and ends `max_grace_s` after the quorum."""
    if decisions["quorum_s"] is None:
        return None
    quorum_s: float = decisions["quorum_s"]
    last_s: float = decisions["last_s"]
    gap_s: float | None = decisions["gap_s"]
    latest_s = quorum_s + config.max_grace_s
    return latest_s if gap_s is None else min(latest_s, max(quorum_s, last_s) + config.grace * gap_s)


def waits(config: DecoupledDiloco, decisions: Decisions) -> list[str]:
    """Members that somebody who is held waits for."""
    return rounds.waits(decisions["round"])


def weight_of(samples: int, steps: int) -> float:
    """w = s (s / H); an update that tells neither counts as one sample in one step."""
    return max(1, samples) ** 2 / max(1, steps)


def _advanced(config: DecoupledDiloco, decisions: Decisions, at_s: float) -> tuple[Decisions, list[Effect]]:
    """Note the quorum; close the round when all are there."""
    if rounds.complete(decisions["round"]):
        return _ended(decisions, "all members have pushed")
    if decisions["quorum_s"] is None and decisions["round"]["updates"] >= _quorum(config, decisions):
        decisions = {**decisions, "quorum_s": at_s}
    return decisions, []


def _quorum(config: DecoupledDiloco, decisions: Decisions) -> int:
    """Updates that a round needs now, one at the least."""
    live = len(decisions["round"]["members"])
    return max(1, live // 2 + 1 if config.quorum is None else min(config.quorum, live))


def _ended(decisions: Decisions, reason: str) -> tuple[Decisions, list[Effect]]:
    round_, effects = rounds.end(decisions["round"], reason)
    return {**decisions, "round": round_, "quorum_s": None}, effects


# Kernels.


def state(config: DecoupledDiloco, overlap: bool, n: int, dtype: DTypeLike) -> State:
    """All zero."""
    made: State = base.allocate(State, n, dtype)
    return made


def close(config: DecoupledDiloco, c: Floats, state: State, args: tuple[float, ...]) -> None:
    """The outer step on the weighted mean."""
    (weight,) = args
    rounds.outer_step(c, state.v, state.total, weight, config.mu, config.lr, nesterov=True)


RULE = Rule(
    name="decoupled_diloco",
    summary="DiLoCo closed at a quorum and a learned grace window, weighted by samples (known from summaries only)",
    paper="Douillard et al., arXiv 2604.21428 (known from summaries only)",
    Config=DecoupledDiloco,
    rounds=True,
    fits=fits,
    start=start,
    join=join,
    leave=leave,
    tick=tick,
    admit=admit,
    deadline=deadline,
    waits=waits,
    state=state,
    total=lambda config, state, args: state.total,
    close=close,
)
