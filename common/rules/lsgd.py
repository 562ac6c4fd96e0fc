"""`lsgd`: Leader SGD. Teng et al., Leader Stochastic Gradient Descent for Distributed Training, arXiv 1905.10395.

Every worker keeps parameters of its own; now and then all are pulled towards the best of them, the leader.

    x <- x - lr g(x)                                          a local step, on the worker's own optimizer
    x <- x + lambda_local (x_group_leader - x)                every tau steps, where there are groups
    x <- x + lambda_global (x_leader - x)                     every tau_global steps, on the point already pulled
                                                                                                     (Algorithm 1)

    lambda_local .1, lambda_global .1: strength of the pulls, in [0, 1]; lambda >= .5 is computed as
    leader - (1 - lambda)(leader - x), so that 1 is exact. In the paper's theorems lambda is this one over lr.
    tau, tau_global: periods, optimizer steps; tau_global is a multiple of tau. groups 1, group_by (order or host).
    window 10: the leader has the lowest running mean of its last so many mini-batch losses; a worker that reported none
    is not eligible, a loss that is not finite counts as infinite, ties go to the lowest name; where all are infinite
    nobody is pulled.

`clock`
    published   a global count of ticks: exactly n tau local steps are granted between two pulls (n: live workers), one
                at a time, to whoever asks, so fast workers do more; then the leaders upload, and all others pull.
    latest      ours, without a barrier: after each tau steps of its own a worker pulls the latest leader, or, if it is
                the leader itself, uploads.

One group, or tau = tau_global: only the global leader. A leader skips its own pull, bit for bit. Only a leader uploads,
and only when it is asked; if it dies before, the next best of the living is asked. The center of the server is the last
global leader: what a joiner starts from, and what is evaluated, with the leader's own float buffers.

Left out: the average of all workers as evaluation model; the "proximal" pulls of the authors' later code; choosing by a
common probe batch (on data that differ between workers, the training loss favours the easy part).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from numpy.typing import DTypeLike
from pydantic import Field, model_validator

from common.rules.base import (
    Accumulate,
    Apply,
    Arrays,
    Close,
    Code,
    Config,
    ConfigError,
    Decided,
    Decisions,
    Effect,
    Facts,
    Floats,
    Member,
    NoArrays,
    Order,
    PeerError,
    Reply,
    Rule,
    Terms,
    allocate_rows,
    for_kernels,
    kernel,
)

LOCAL, GLOBAL = "local", "global"
"""Sources of a pull: the group's leader, the leader of all."""
HISTORY = 8
"""Leaders of so many rounds are kept for whoever looks."""


class Lsgd(Config):
    """Settings of Leader SGD."""

    lambda_local: float = Field(
        0.1, ge=0.0, le=1.0, description="strength of the pull to the group's leader, in [0, 1]"
    )
    lambda_global: float = Field(
        0.1, ge=0.0, le=1.0, description="strength of the pull to the leader of all, in [0, 1]"
    )
    tau: int = Field(4, ge=1, le=1_000_000, description="optimizer steps (per worker, on average) between local pulls")
    tau_global: int = Field(4, ge=1, le=1_000_000, description="the same between global pulls; a multiple of tau")
    groups: int = Field(1, ge=1, le=1024, description="number of groups with a leader each")
    group_by: Literal["order", "host"] = Field("order", description="order (the smallest group) or host (one each)")
    clock: Literal["published", "latest"] = Field("published", description="published (rounds) or latest (no barrier)")
    window: int = Field(10, ge=1, le=10_000, description="mini-batch losses that a worker is judged by")

    @model_validator(mode="after")
    def _periods_fit(self) -> Lsgd:
        if self.tau_global % self.tau:
            raise ValueError(
                f"tau_global {self.tau_global} is no multiple of tau {self.tau}; take one, such as {self.tau}"
            )
        return self

    @property
    def two_levels(self) -> bool:
        """Whether groups have leaders of their own."""
        return self.groups > 1 and self.tau_global != self.tau


class State(NamedTuple):
    """leader: (groups, n) the parameters each group's leader uploaded last."""

    leader: Floats


@kernel
def _pull(x: Any, leader: Any, strength: Any) -> None:
    for i in range(x.size):
        x[i] += strength * (leader[i] - x[i])


@kernel
def _pull_far(x: Any, leader: Any, rest: Any) -> None:
    for i in range(x.size):
        x[i] = leader[i] - rest * (leader[i] - x[i])


# Worker half


def update(config: Lsgd, x: Floats, anchor: Floats, out: Floats) -> None:
    """A leader uploads its parameters as they are."""
    out[:] = x


def pull(config: Lsgd, x: Floats, source: str, leader: Floats) -> None:
    """x <- x + lambda (leader - x)."""
    strength = config.lambda_local if source == LOCAL else config.lambda_global
    if strength == 0.0:  # not even the sign of a zero changes
        return
    if not for_kernels(x):
        away = leader - x
        x[:] = leader - away * (1.0 - strength) if strength >= 0.5 else x + away * strength
    elif strength >= 0.5:
        _pull_far(x, leader, x.dtype.type(1.0 - strength))
    else:
        _pull(x, leader, x.dtype.type(strength))


# Decisions. D = {"workers": {name: worker}, "granted": ticks of this round, "round", "uploads": {name: group} that are
# waited for, "leader", "leads": its group, "history", "hosts", "have": groups whose leader was uploaded}; a worker =
# {"group", "steps", "until", "losses", "known"}: it may train while steps < until, and is known once it has reported.


def start(config: Lsgd, terms: Terms) -> Decisions:
    """Nobody is here."""
    return {
        "workers": {},
        "granted": 0,
        "round": 0,
        "uploads": {},
        "leader": "",
        "leads": 0,
        "history": [],
        "hosts": [],
        "have": [],
    }


def join(config: Lsgd, d: Decisions, member: Member, at_s: float) -> Decided:
    """Into a group; it trains once it has reported where it stands. Raises ConfigError where the group does not fit."""
    hosts = list(d["hosts"])
    if member.group >= config.groups:
        raise ConfigError(
            f"Worker '{member.worker}' asks for group {member.group}, but there are {config.groups}, from 0.",
            fix="Choose another, or serve with a larger `groups`.",
        )
    group = member.group
    if group < 0 and config.group_by == "host":
        if member.host not in hosts:
            hosts.append(member.host)
        group = hosts.index(member.host)
        if group >= config.groups:
            raise ConfigError(
                f"Worker '{member.worker}' is on host '{member.host}', but {config.groups} hosts have a group each.",
                fix="Serve with a larger `groups`, or start the worker with --group.",
            )
    elif group < 0:
        sizes = [sum(w["group"] == g for w in d["workers"].values()) for g in range(config.groups)]
        group = sizes.index(min(sizes))
    worker = {"group": group, "steps": 0, "until": 0, "losses": [], "known": False}
    return {**d, "hosts": hosts, "workers": {**d["workers"], member.worker: worker}}, []


def leave(config: Lsgd, d: Decisions, worker: str, at_s: float) -> Decided:
    """Its grant goes back; if it was to upload, the next best of its group is asked."""
    gone = d["workers"].get(worker)
    if gone is None:
        return d, []
    outstanding = gone["known"] and gone["steps"] < gone["until"]
    d = {
        **d,
        "workers": {name: kept for name, kept in d["workers"].items() if name != worker},
        "granted": d["granted"] - (1 if outstanding and config.clock == "published" else 0),
    }
    if worker not in d["uploads"]:
        return _go_on(config, d)
    group, d = d["uploads"][worker], _without(d, worker)
    return (d, []) if config.clock == "latest" else _replace(config, d, worker, group)


def report(config: Lsgd, d: Decisions, worker: str, steps: int, loss: float, at_s: float) -> Decided:
    """One more loss of this worker; what it does next."""
    known = d["workers"].get(worker)
    if known is None or (known["known"] and steps <= known["steps"]):
        return d, []
    losses = [*known["losses"], loss if math.isfinite(loss) else None][-config.window :] if known["known"] else []
    now = {**known, "steps": steps, "losses": losses, "known": True}
    if not known["known"]:
        now["until"] = steps
    d = {**d, "workers": {**d["workers"], worker: now}}
    return _go_on(config, d) if config.clock == "published" else _after_own_steps(config, d, worker)


def admit(config: Lsgd, d: Decisions, facts: Facts) -> Decided:
    """The upload of a leader; raises PeerError for one that nobody asked for."""
    if facts.worker not in d["uploads"]:
        raise PeerError(Code.RULE, f"Worker '{facts.worker}' uploads, but it is not the leader.")
    group = d["uploads"][facts.worker]
    d = _without(d, facts.worker)
    answer = Reply(facts.worker, "nothing", "a leader keeps its parameters")
    if not config.two_levels:
        d, orders = _finish(config, d) if config.clock == "published" else (d, [])
        d = {**d, "have": [0]}
        return d, [Apply(1.0, f"{facts.worker} leads"), answer, *orders]
    d = {**d, "have": sorted({*d["have"], group})}
    effects: list[Effect] = [Accumulate(1.0, f"{facts.worker} leads group {group}", (float(group),)), answer]
    if config.clock == "latest":
        if facts.worker == d["leader"]:
            effects.insert(1, Close(f"{facts.worker} leads all", (float(group),)))
        return d, effects
    if not d["uploads"]:
        d, rest = _all_uploaded(config, d)
        effects += rest
    return d, effects


def waits(config: Lsgd, d: Decisions) -> Sequence[str]:
    """Leaders that are to upload; workers that train while others have used their grants up."""
    if d["uploads"]:
        return tuple(d["uploads"])
    training = [name for name, worker in d["workers"].items() if worker["steps"] < worker["until"]]
    return training if config.clock == "published" and 0 < len(training) < len(d["workers"]) else ()


def source(config: Lsgd, d: Decisions, worker: str, name: str) -> tuple[str, int]:
    """The group's leader is a row of the state, the leader of all is the center."""
    if name == LOCAL and config.two_levels and worker in d["workers"]:
        return "leader", d["workers"][worker]["group"]
    return "", 0


def figures(config: Lsgd, d: Decisions) -> dict[str, Any]:
    """Who leads, and the round."""
    return {"leader": d["leader"], "round": d["round"]} if d["leader"] else {}


# The published clock


def _go_on(config: Lsgd, d: Decisions) -> Decided:
    """Grant what is left of this round; when all of it is used, elect."""
    if d["uploads"] or config.clock != "published":
        return d, []
    orders: list[Effect] = []
    workers, granted = dict(d["workers"]), d["granted"]
    for name, worker in workers.items():
        if worker["known"] and worker["steps"] >= worker["until"] and granted < len(workers) * config.tau:
            granted += 1
            workers[name] = {**worker, "until": worker["steps"] + 1}
            orders.append(Order(name, f"tick {granted} of {len(workers) * config.tau}", until=worker["steps"] + 1))
    d = {**d, "workers": workers, "granted": granted}
    training = any(worker["steps"] < worker["until"] for worker in workers.values())
    if orders or training or not workers or not any(worker["known"] for worker in workers.values()):
        return d, orders
    return _elect(config, d)


def _elect(config: Lsgd, d: Decisions) -> Decided:
    """Ask the leaders to upload: of every group, or of all. Where nobody is eligible, the next round begins."""
    d = {**_lead(d, _best(d, list(d["workers"]))), "uploads": {}}
    leader = d["leader"]
    if config.two_levels:
        for group in range(config.groups):
            if best := _best(d, [name for name, worker in d["workers"].items() if worker["group"] == group]):
                d = {**d, "uploads": {**d["uploads"], best: group}}
    elif leader:
        d = {**d, "uploads": {leader: 0}}
    if not d["uploads"]:
        return _finish(config, d)
    return d, [Order(name, "lowest running loss", upload=True) for name in d["uploads"]]


def _replace(config: Lsgd, d: Decisions, gone: str, group: int) -> Decided:
    """A leader died before it uploaded: the next best of its group (or of all) is asked."""
    names = [name for name, worker in d["workers"].items() if not config.two_levels or worker["group"] == group]
    best = _best(d, names)
    if d["leader"] == gone:
        d = _lead(d, _best(d, list(d["workers"])))
    if best:
        d = {**d, "uploads": {**d["uploads"], best: group}}
        return d, [Order(best, f"lowest running loss, as {gone} is gone", upload=True)]
    return (d, []) if d["uploads"] else _all_uploaded(config, d)


def _all_uploaded(config: Lsgd, d: Decisions) -> Decided:
    """No upload is waited for any more: the leader of all becomes the center, and the others pull."""
    effects: list[Effect] = []
    if config.two_levels and _is_global(config, d) and d["leader"] and d["leads"] in d["have"]:
        effects.append(Close(f"{d['leader']} leads all", (float(d["leads"]),)))
    d, orders = _finish(config, d)
    return d, effects + orders


def _lead(d: Decisions, leader: str) -> Decisions:
    """This one leads all ("": nobody)."""
    return {**d, "leader": leader, "leads": d["workers"][leader]["group"] if leader else 0}


def _finish(config: Lsgd, d: Decisions) -> Decided:
    """All leaders are here: the others pull, and the next round begins with a step for each."""
    is_global, leader = _is_global(config, d), d["leader"]
    leaders = {d["workers"][leader]["group"]: leader} if leader in d["workers"] else {}
    for group in range(config.groups if config.two_levels else 0):
        if best := _best(d, [name for name, worker in d["workers"].items() if worker["group"] == group]):
            leaders[group] = best
    orders: list[Effect] = []
    workers, granted = {}, 0
    for name, worker in d["workers"].items():
        sources: tuple[str, ...] = ()
        if config.two_levels and worker["group"] in leaders and leaders[worker["group"]] != name:
            sources += (LOCAL,)
        if is_global and leader and leader != name:
            sources += (GLOBAL,)
        workers[name] = worker
        if worker["known"] and granted < len(d["workers"]) * config.tau:
            granted += 1
            workers[name] = {**worker, "until": worker["steps"] + 1}
            orders.append(Order(name, f"after round {d['round']}", until=worker["steps"] + 1, pull=sources))
    history = [*d["history"], leader][-HISTORY:]
    return {**d, "workers": workers, "granted": granted, "round": d["round"] + 1, "history": history}, orders


def _is_global(config: Lsgd, d: Decisions) -> bool:
    """Whether this round ends with a pull to the leader of all."""
    return not config.two_levels or (d["round"] + 1) % (config.tau_global // config.tau) == 0


# The latest clock


def _after_own_steps(config: Lsgd, d: Decisions, worker: str) -> Decided:
    """After every tau steps of its own: upload if it leads, else pull the latest leader."""
    me = d["workers"][worker]
    if me["steps"] < me["until"]:
        return d, []
    until = (me["steps"] // config.tau + 1) * config.tau
    d = {**d, "workers": {**d["workers"], worker: {**me, "until": until}}}
    if not me["losses"]:
        return d, [Order(worker, "to begin with", until=until)]
    leader = _best(d, list(d["workers"]))
    mates = [name for name, other in d["workers"].items() if other["group"] == me["group"]]
    group_leader = _best(d, mates) if config.two_levels else leader
    history = d["history"] if leader == d["leader"] else [*d["history"], leader][-HISTORY:]
    d = {**_lead(d, leader), "history": history, "round": d["round"] + 1}
    if worker == group_leader:
        d = {**d, "uploads": {**d["uploads"], worker: me["group"]}}
        return d, [Order(worker, "lowest running loss", until=until, upload=True)]
    sources: tuple[str, ...] = ()
    if config.two_levels and me["group"] in d["have"]:
        sources += (LOCAL,)
    if d["have"] and (not config.two_levels or me["steps"] % config.tau_global == 0):
        sources += (GLOBAL,)
    return d, [Order(worker, "the latest leader", until=until, pull=sources)]


def _best(d: Decisions, names: list[str]) -> str:
    """Of these workers, the one with the lowest running mean loss; "" where none is finite."""
    means = [(_mean(d["workers"][name]["losses"]), name) for name in names if d["workers"][name]["losses"]]
    mean, best = min(means, default=(math.inf, ""))
    return best if mean < math.inf else ""


def _mean(losses: list[float | None]) -> float:
    """None stands for a loss that was not finite: JSON has no infinity."""
    return math.inf if None in losses else sum(loss for loss in losses if loss is not None) / len(losses)


def _without(d: Decisions, worker: str) -> Decisions:
    """Its upload is no longer waited for."""
    return {**d, "uploads": {name: group for name, group in d["uploads"].items() if name != worker}}


# Kernels


def state(config: Lsgd, overlap: bool, n: int, dtype: DTypeLike) -> Arrays:
    """A row for each group's leader, where groups have leaders of their own."""
    if not config.two_levels:
        return NoArrays()
    made: State = allocate_rows(State, config.groups, n, dtype)
    return made


def apply(
    config: Lsgd,
    c: Floats,
    state: Arrays,
    session: Arrays,
    d: Floats,
    weight: float,
    args: tuple[float, ...],
    stats: Floats,
) -> None:
    """c <- the leader's parameters."""
    c[:] = d


def accumulate(
    config: Lsgd, c: Floats, state: State, session: Arrays, d: Floats, weight: float, args: tuple[float, ...]
) -> None:
    """leader[group] <- the group leader's parameters."""
    state.leader[int(args[0])][:] = d


def close(config: Lsgd, c: Floats, state: State, args: tuple[float, ...]) -> None:
    """c <- leader[group]: its leader is the leader of all."""
    c[:] = state.leader[int(args[0])]


def fits(config: Lsgd, terms: Terms) -> str | None:
    """The rule schedules by itself."""
    if terms.overlap:
        return "Rule 'lsgd' has no overlap: workers train between pulls, and a pull must not be mixed with a step."
    if terms.local_steps != 1:
        return f"Rule 'lsgd' takes its period from tau, not from local_steps {terms.local_steps}: use --set tau=..."
    if terms.max_clock_gap is not None:
        return "Rule 'lsgd' has a clock of its own: max_clock_gap does not go with it."
    if terms.workers is not None and terms.workers < config.groups:
        return f"There are {config.groups} groups for {terms.workers} workers: every group needs a member."
    return None


RULE = Rule(
    name="lsgd",
    summary="Leader SGD: workers of their own, pulled towards the one with the lowest loss",
    paper="Teng et al., arXiv 1905.10395",
    Config=Lsgd,
    elementwise=True,
    private=True,
    schedules=True,
    buffers="leader",
    update=update,
    pull=pull,
    fits=fits,
    start=start,
    join=join,
    leave=leave,
    admit=admit,
    report=report,
    waits=waits,
    source=source,
    figures=figures,
    state=state,
    apply=apply,
    accumulate=accumulate,
    close=close,
)
