"""`local_sgd`: Local SGD, post-local and hierarchical. Lin, Stich, Patel & Jaggi, arXiv 1808.07217.

    c <- c + (1/K) sum D        a round, after H local steps of each; then all go on from c

    c  center    D  progress of a worker since its last merge    K  updates of the round    H  local steps

Post-local SGD: H = 1 for the first `start_local_at` optimizer steps of a worker, H after them. From there on H may be
warmed up: with `h_warmup` the i-th round of local steps, i = 1 ... `warmup_period`, has

    constant  1         linear  max(1, int(i H / period))         exponential  2^int(i log2(period) / period)

steps, never more than H, then H. The published code counts i in epochs, which a worker does not know; here: rounds.
`sync_phase` first: the first round of local steps has one step, so that with `start_local_at` 0 averages fall after
steps 1, H + 1, 2H + 1, as in the published code; after: they fall after H, 2H, 3H.

Global momentum, on top of any momentum of the inner optimizer, which is local, kept, and never averaged:

    u <- global_momentum u + mean;  c <- c + u,  or, with `nesterov`, c <- c + mean + global_momentum u

Hierarchical: each worker is in one of `groups` blocks g with a center b_g of its own; `h_block` block rounds, then
an average across the blocks, to which the global momentum applies:

    b_g <- b_g + mean_g D       a block round; its members go on from b_g
    c   <- sum w_g b_g / sum w_g,  b_g <- c         w_g: updates of the last block round, or 1 (`block_weight`)

`group_by` says where a joiner belongs that asks for no block itself: order: the smallest block, the lowest of these;
host: one block for each host, in order of appearance. With `h_block` 1 or one group it is flat, and keeps no blocks.

Laws
* A block without live members is not waited for; what it has done since the last average still counts in the next.
* All replies of a round are the same bits.
* Who joins is given c, whatever its block; its progress from there is added to b_g.

Left out: sign compression and its error memory (that is a codec's business); momentum buffers are never averaged.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import DTypeLike
from pydantic import Field

from common.rules import base, rounds
from common.rules.base import (
    Accumulate,
    Arrays,
    Close,
    Config,
    ConfigError,
    Effect,
    Facts,
    Floats,
    Member,
    Reply,
    Rule,
    Terms,
    kernel,
)

Decisions: TypeAlias = dict[str, Any]
"""{"places": {worker: block}, "hosts": {host: block}}, and flat: {"round"}; hierarchical: {"blocks": [Block ...],
"across": the round whose members are the blocks, by number}. Block: {"round", "done": block rounds since the last
average, "weight": w_g, 0 where none was, "waiting": [members that wait for the other blocks]}."""

Warmup: TypeAlias = Literal["none", "constant", "linear", "exponential"]

ACROSS = -1.0
"""First argument of Close for the average across blocks, in the place of a block's number."""


class LocalSgd(Config):
    """Settings of local SGD."""

    start_local_at: int = Field(
        0, ge=0, le=1_000_000_000, description="optimizer steps of a worker before which H is 1 (post-local SGD)"
    )
    h_warmup: Warmup = Field("none", description="how H grows at first: none, constant (1), linear, exponential")
    warmup_period: int = Field(16, ge=1, le=10_000, description="length of the warm-up of H, rounds")
    sync_phase: Literal["after", "first"] = Field(
        "after", description="averages come after H, 2H, 3H local steps (after), or after 1, H + 1, 2H + 1 (first)"
    )
    global_momentum: float = Field(
        0.0, ge=0.0, lt=1.0, description="momentum of the center over rounds, without unit, in [0, 1)"
    )
    nesterov: bool = Field(False, description="true for Nesterov's form of the global momentum")
    groups: int = Field(1, ge=1, le=1024, description="number of blocks that average among themselves")
    group_by: Literal["order", "host"] = Field(
        "order", description="block of a joiner: order (the smallest) or host (one block for each)"
    )
    h_block: int = Field(1, ge=1, le=1_000_000, description="block rounds between averages across blocks")
    block_weight: Literal["members", "equal"] = Field(
        "members", description="weight of a block across blocks: members (updates of its last round) or equal"
    )


class Flat(NamedTuple):
    """total: (n,) sum of the updates of the round."""

    total: Floats


class FlatMomentum(NamedTuple):
    """As `Flat`; u: (n,) global momentum, in the direction of D."""

    total: Floats
    u: Floats


class Blocks(NamedTuple):
    """total: (groups, n) sum of the updates of each block's round; block: (groups, n) their centers b_g."""

    total: Floats
    block: Floats


class BlocksMomentum(NamedTuple):
    """As `Blocks`; u: (n,) global momentum, in the direction of D."""

    total: Floats
    block: Floats
    u: Floats


def hierarchical(config: LocalSgd) -> bool:
    """Whether blocks have centers of their own."""
    return config.groups > 1 and config.h_block > 1


# Worker half.


def local_steps(config: LocalSgd, h: int, done: int) -> int:
    """H of the round that starts, or is under way, once a worker has `done` optimizer steps behind it."""
    behind = done - config.start_local_at
    first = config.sync_phase == "first"
    if behind < (1 if first else 0):
        return 1
    if config.h_warmup == "none":
        return h
    behind -= first
    for i in range(1, config.warmup_period + 1):
        steps = warmed_up(config.h_warmup, h, config.warmup_period, i)
        if behind < steps:
            return steps
        behind -= steps
    return h


def warmed_up(warmup: Warmup, h: int, period: int, i: int) -> int:
    """H of the i-th round of local steps, i = 1, 2 ...; period: rounds."""
    if i > period or warmup == "none":
        return h
    match warmup:
        case "constant":
            return 1
        case "linear":
            return min(h, max(1, i * h // period))
        case "exponential":
            return min(h, 1 << int(i * math.log2(period) / period))


# Decisions.


def fits(config: LocalSgd, terms: Terms) -> str | None:
    """Every block needs a worker."""
    if terms.workers is not None and config.groups > terms.workers:
        return f"Rule 'local_sgd' has {config.groups} groups for {terms.workers} workers: some would stay empty."
    return None


def start(config: LocalSgd, terms: Terms) -> Decisions:
    """Nobody yet."""
    if not hierarchical(config):
        return {"places": {}, "hosts": {}, "round": rounds.start()}
    blocks = [{"round": rounds.start(), "done": 0, "weight": 0.0, "waiting": []} for _ in range(config.groups)]
    return {"places": {}, "hosts": {}, "blocks": blocks, "across": rounds.start()}


def join(config: LocalSgd, decisions: Decisions, member: Member, at_s: float) -> tuple[Decisions, list[Effect]]:
    """One more, in a block; raises ConfigError where there is none for it."""
    effects: list[Effect] = []
    if member.worker in decisions["places"]:
        decisions, effects = leave(config, decisions, member.worker, at_s)
    decisions = _placed(config, decisions, member)
    if not hierarchical(config):
        return {**decisions, "round": rounds.join(decisions["round"], member.worker)}, effects
    g = decisions["places"][member.worker]
    across, block = decisions["across"], decisions["blocks"][g]
    if str(g) not in across["members"]:
        across = rounds.join(across, str(g))
    block = {**block, "round": rounds.join(block["round"], member.worker)}
    return _with_block({**decisions, "across": across}, g, block), effects


def leave(config: LocalSgd, decisions: Decisions, worker: str, at_s: float) -> tuple[Decisions, list[Effect]]:
    """One less; that may complete a round."""
    g = decisions["places"].get(worker, 0)
    decisions = {**decisions, "places": {name: at for name, at in decisions["places"].items() if name != worker}}
    if not hierarchical(config):
        round_, effects = rounds.finish(rounds.leave(decisions["round"], worker), f"{worker} left")
        return {**decisions, "round": round_}, effects
    block = decisions["blocks"][g]
    waiting = [name for name in block["waiting"] if name != worker]
    block = {**block, "round": rounds.leave(block["round"], worker), "waiting": waiting}
    return _advanced(config, _with_block(decisions, g, block), g)


def admit(config: LocalSgd, decisions: Decisions, facts: Facts) -> tuple[Decisions, list[Effect]]:
    """Hold the update until all members of the round have pushed."""
    why = f"{facts.worker} has pushed"
    if not hierarchical(config):
        round_, effects = rounds.finish(rounds.push(decisions["round"], facts.worker, 1.0))
        return {**decisions, "round": round_}, [Accumulate(1.0, why), *effects]
    g = decisions["places"][facts.worker]
    block = decisions["blocks"][g]
    block = {**block, "round": rounds.push(block["round"], facts.worker, 1.0)}
    decisions, effects = _advanced(config, _with_block(decisions, g, block), g)
    return decisions, [Accumulate(1.0, why, args=(float(g),)), *effects]


def waits(config: LocalSgd, decisions: Decisions) -> list[str]:
    """Members that somebody who is held waits for."""
    if not hierarchical(config):
        return rounds.waits(decisions["round"])
    across = rounds.waits(decisions["across"])
    return [
        name
        for g, block in enumerate(decisions["blocks"])
        for name in (rounds.missing if str(g) in across else rounds.waits)(block["round"])
        if name not in block["waiting"]
    ]


def _placed(config: LocalSgd, decisions: Decisions, member: Member) -> Decisions:
    """With a block for the joiner."""
    places, hosts = decisions["places"], decisions["hosts"]
    if member.group >= config.groups:
        raise ConfigError(
            f"'{member.worker}' asks for group {member.group}; rule 'local_sgd' has {config.groups}, numbered from 0.",
            fix="Ask for one of these, or serve with more groups.",
        )
    members = [sum(place == g for place in places.values()) for g in range(config.groups)]
    if member.group >= 0:
        g = member.group
    elif config.group_by == "order":
        g = members.index(min(members))
    else:
        hosts, g = _by_host(config, hosts, members, member)
    return {**decisions, "places": {**places, member.worker: g}, "hosts": hosts}


def _by_host(config: LocalSgd, hosts: dict[str, int], members: list[int], member: Member) -> tuple[dict[str, int], int]:
    """The block of the member's host; a host all of whose workers are gone yields its block where none is free."""
    if member.host in hosts:
        return hosts, hosts[member.host]
    free = [g for g in range(config.groups) if g not in hosts.values()]
    free = free or [g for g in range(config.groups) if not members[g]]
    if not free:
        raise ConfigError(
            f"'{member.worker}' is on host '{member.host}', but each of the {config.groups} groups of rule 'local_sgd' "
            f"already belongs to a host: {', '.join(sorted(hosts))}.",
            fix="Serve with one group for each host, or with group_by=order.",
        )
    return {**{host: g for host, g in hosts.items() if g != free[0]}, member.host: free[0]}, free[0]


def _with_block(decisions: Decisions, g: int, block: dict[str, Any]) -> Decisions:
    blocks = decisions["blocks"]
    return {**decisions, "blocks": [*blocks[:g], block, *blocks[g + 1 :]]}


def _advanced(config: LocalSgd, decisions: Decisions, g: int) -> tuple[Decisions, list[Effect]]:
    """Close block g's round where it is complete, then average across blocks where all have done theirs."""
    block, across = decisions["blocks"][g], decisions["across"]
    effects: list[Effect] = []
    if rounds.complete(block["round"]):
        round_, done = block["round"], block["done"] + 1
        updates, held = round_["updates"], round_["held"]
        effects = [Close(f"all of block {g} have pushed", args=(float(g), float(updates)), center=False)]
        weight = float(updates) if config.block_weight == "members" else 1.0
        block = {**block, "round": rounds.close(round_), "done": done, "weight": weight}
        if done < config.h_block:
            why = f"center of block {g} after block round {done} of {config.h_block}"
            effects += [Reply(name, "block", why, row=g) for name in held]
        else:
            block = {**block, "waiting": [*block["waiting"], *held]}
            across = rounds.push(across, str(g), weight)
    if not block["round"]["members"] and str(g) in across["members"]:
        if block["weight"]:  # what it has done counts, though nobody is left to bring it
            across = rounds.push(across, str(g), block["weight"])
        across = rounds.leave(across, str(g))
    decisions = _with_block({**decisions, "across": across}, g, block)
    if not rounds.complete(across):
        return decisions, effects
    weights = [block["weight"] for block in decisions["blocks"]]
    effects.append(Close("all blocks have done their rounds", args=(ACROSS, *weights)))
    why = f"the center after average {across['round']} across blocks"
    effects += [Reply(name, "after", why) for block in decisions["blocks"] for name in block["waiting"]]
    blocks = [{**block, "done": 0, "weight": 0.0, "waiting": []} for block in decisions["blocks"]]
    return {**decisions, "blocks": blocks, "across": rounds.close(across)}, effects


# Kernels.


@kernel
def _average(c: Any, block: Any, weights: Any) -> None:
    total = weights.sum()
    for i in range(c.size):
        mean = weights[0] * block[0, i]
        for g in range(1, weights.size):
            mean += weights[g] * block[g, i]
        mean /= total
        c[i] = mean
        for g in range(weights.size):
            block[g, i] = mean


@kernel
def _average_with_momentum(c: Any, u: Any, block: Any, weights: Any, momentum: Any, nesterov: Any) -> None:
    total = weights.sum()
    for i in range(c.size):
        mean = weights[0] * block[0, i]
        for g in range(1, weights.size):
            mean += weights[g] * block[g, i]
        step = mean / total - c[i]
        u[i] = momentum * u[i] + step
        c[i] += step + momentum * u[i] if nesterov else u[i]
        for g in range(weights.size):
            block[g, i] = c[i]


def state(config: LocalSgd, overlap: bool, n: int, dtype: DTypeLike) -> Arrays:
    """Sums and block centers, and the momentum where one is set; all zero."""
    if not hierarchical(config):
        return base.allocate(FlatMomentum if config.global_momentum else Flat, n, dtype)
    rows = [array.reshape(config.groups, n) for array in base.allocate(Blocks, config.groups * n, dtype)]
    if config.global_momentum:
        return BlocksMomentum(*rows, *base.allocate(Flat, n, dtype))
    return Blocks(*rows)


def load(config: LocalSgd, c: Floats, state: Arrays) -> None:
    """b_g <- c."""
    if hierarchical(config):
        state.block[:] = c


def total(config: LocalSgd, state: Arrays, args: tuple[float, ...]) -> Floats:
    """Where there are blocks, that of the block."""
    found: Floats = state.total[int(args[0])] if hierarchical(config) else state.total
    return found


def close(config: LocalSgd, c: Floats, state: Arrays, args: tuple[float, ...]) -> None:
    """A round of all, of one block, or the average across blocks."""
    momentum = config.global_momentum
    if not hierarchical(config):
        if momentum:
            rounds.outer_step(c, state.u, state.total, args[0], momentum, 1.0, config.nesterov)
        else:
            rounds.add_mean(c, state.total, args[0])
    elif args[0] != ACROSS:
        g = int(args[0])
        rounds.add_mean(state.block[g], state.total[g], args[1])
    else:
        weights = np.array(args[1:], c.dtype)
        if momentum:
            _average_with_momentum(c, state.u, state.block, weights, c.dtype.type(momentum), config.nesterov)
        else:
            _average(c, state.block, weights)


RULE = Rule(
    name="local_sgd",
    summary="local SGD: the mean of all workers' progress, round by round; post-local and hierarchical as options",
    paper="Lin, Stich, Patel & Jaggi, arXiv 1808.07217",
    Config=LocalSgd,
    rounds=True,
    local_steps=local_steps,
    fits=fits,
    start=start,
    join=join,
    leave=leave,
    admit=admit,
    waits=waits,
    state=state,
    load=load,
    total=total,
    close=close,
)
