"""Rounds: hold the pushes of all members until each has pushed, then bring their mean into the center.

    round_ = rounds.join(rounds.start(), "w0")
    round_ = rounds.push(round_, "w0", weight)
    round_, effects = rounds.finish(round_)             closes it where all have pushed

Laws
* A round is complete when every member it waits for has pushed, and somebody has. A member gone since its push still
  counts; one gone before it is not waited for.
* A round is under way once somebody has pushed. Who joins then is not waited for in it; if it pushes before the round
  closes, its update counts (it starts from the same center).
* Who is held is answered exactly once: when the round closes, or never, because it left or joined anew.
* The mean is sum(weight D) / sum(weight), over all updates of the round, those of members that are gone included.

A round is JSON: {"members": {name: first round it is waited for}, "held": [names, in order of arrival], "updates",
"weight", "round"}. A member may stand for a group of workers: then a round is one of groups.

Left out: who is a member, and of what; that is each rule's business.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from common.rules.base import Close, Effect, Floats, Reply, kernel

Round: TypeAlias = dict[str, Any]


def start() -> Round:
    """No members, nothing pushed."""
    return {"members": {}, "held": [], "updates": 0, "weight": 0.0, "round": 0}


def join(round_: Round, worker: str) -> Round:
    """One more member: of this round if nobody has pushed yet, else of the next. Who joins anew is no longer held."""
    others = leave(round_, worker)
    first = round_["round"] + (1 if round_["updates"] else 0)
    return {**others, "members": {**others["members"], worker: first}}


def leave(round_: Round, worker: str) -> Round:
    """One member less; what it pushed stays."""
    members = {name: first for name, first in round_["members"].items() if name != worker}
    return {**round_, "members": members, "held": [name for name in round_["held"] if name != worker]}


def push(round_: Round, worker: str, weight: float) -> Round:
    """`worker` has pushed an update of that weight; it is held."""
    members = round_["members"] if worker in round_["members"] else {**round_["members"], worker: round_["round"]}
    return {
        **round_,
        "members": members,
        "held": [*(name for name in round_["held"] if name != worker), worker],
        "updates": round_["updates"] + 1,
        "weight": round_["weight"] + weight,
    }


def missing(round_: Round) -> list[str]:
    """Members of this round that have not pushed."""
    return [
        name for name, first in round_["members"].items() if first <= round_["round"] and name not in round_["held"]
    ]


def waits(round_: Round) -> list[str]:
    """Members that somebody who is held waits for."""
    return missing(round_) if round_["held"] else []


def complete(round_: Round) -> bool:
    """Whether all have pushed, and somebody has."""
    return round_["updates"] > 0 and not missing(round_)


def close(round_: Round) -> Round:
    """The next round; all members belong to it, nobody is held."""
    after = round_["round"] + 1
    members = dict.fromkeys(round_["members"], after)
    return {**round_, "members": members, "held": [], "updates": 0, "weight": 0.0, "round": after}


def finish(round_: Round, reason: str = "all members have pushed") -> tuple[Round, list[Effect]]:
    """Where the round is complete: the next one, and the effects of `end`. Else nothing."""
    return end(round_, reason) if complete(round_) else (round_, [])


def end(round_: Round, reason: str, *args: float) -> tuple[Round, list[Effect]]:
    """The next round; Close, with `args` and the weight of all updates, and an answer to each that is held."""
    after = f"the center after round {round_['round']}"
    return close(round_), [
        Close(f"round {round_['round']} closes: {reason}", args=(*args, round_["weight"])),
        *(Reply(name, "after", after) for name in round_["held"]),
    ]


# Arithmetic of a round, in place on blocks: total: (n,) sum of weight D; c: (n,) center; v: (n,) outer momentum.


@kernel
def _mean(c: Any, total: Any, weight: Any) -> None:
    for i in range(c.size):
        c[i] += total[i] / weight
        total[i] = 0


@kernel
def _momentum(c: Any, v: Any, total: Any, weight: Any, mu: Any, lr: Any) -> None:
    for i in range(c.size):
        v[i] = mu * v[i] + total[i] / weight
        c[i] += lr * v[i]
        total[i] = 0


@kernel
def _nesterov(c: Any, v: Any, total: Any, weight: Any, mu: Any, lr: Any) -> None:
    for i in range(c.size):
        mean = total[i] / weight
        v[i] = mu * v[i] + mean
        c[i] += lr * (mean + mu * v[i])
        total[i] = 0


def add_mean(c: Floats, total: Floats, weight: float) -> None:
    """c <- c + total / weight; total <- 0."""
    _mean(c, total, c.dtype.type(weight))


def outer_step(c: Floats, v: Floats, total: Floats, weight: float, mu: float, lr: float, nesterov: bool) -> None:
    """Momentum on g = -mean = -total / weight, with v of the sign of D: v <- mu v + mean; c <- c + lr v, or, with
    Nesterov, c <- c + lr (mean + mu v); total <- 0. The arithmetic of torch.optim.SGD on g."""
    real = c.dtype.type
    (_nesterov if nesterov else _momentum)(c, v, total, real(weight), real(mu), real(lr))
