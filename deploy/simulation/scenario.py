"""What a simulated cluster is like: its speeds, its network, its faults; from words to checked values.

    compute      a distribution: the time of one optimizer step           normal:100ms,10ms
    network      a distribution: one way, for each message                lognormal:1ms,0.5
    stragglers   COUNT:FACTOR or SHARE%:FACTOR, several with commas       1:4,10%:2
    faults       NAME=VALUE, several with commas                          loss=0.1,server_crashes=60s

Laws
* What cannot be is refused in words, before anything runs.
* A scenario is plain values; who is slow is decided by the number of a worker, the first ones being the slowest.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from common import distributions
from common.discovery import nearest
from common.distributions import Distribution
from common.errors import ConfigError
from common.simulator import Conditions

SLOWEST = 1000.0
LONGEST_S = 3600.0
"""Of the slowest worker, on average: while it computes, sessions beat every second or two."""
LEAST_BETWEEN_S = 0.1
"""The least mean time between two faults: who is struck more often than it can recover never trains."""
MEGA = 1e6
RARE = 1e-3
"""Share of all steps that may take next to no time."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong. Shares are of messages; times are means between two faults, seconds; None: never."""

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    cuts: float | None = None
    """Of the connection of any worker."""
    worker_crashes: float | None = None
    """kill -9 of any worker; another takes its place."""
    server_crashes: float | None = None
    """kill -9 of the server, which comes back from its last checkpoint."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One simulated cluster."""

    compute: Distribution
    factors: tuple[float, ...]
    """Of each worker: how many times as long as the fastest it takes for a step."""
    conditions: Conditions
    server_bytes_per_s: float
    """Each way, over all connections; 0: without limit."""
    faults: Faults
    evaluations: int
    """Looks at the center, evenly over the budget."""
    check: bool
    """Whether every node checks its invariants after every event."""

    @property
    def words(self) -> dict[str, Any]:
        """For people: what was asked for."""
        faults = {field.name: getattr(self.faults, field.name) for field in fields(self.faults)}
        return {
            "compute": str(self.compute),
            "stragglers": _told(self.factors),
            "network": str(self.conditions.latency),
            "bandwidth_mb_s": self.conditions.bytes_per_s / MEGA,
            "server_bandwidth_mb_s": self.server_bytes_per_s / MEGA,
            "faults": ", ".join(f"{name}={value:g}" for name, value in faults.items() if value) or "none",
        }


def make(
    *,
    workers: int,
    compute: str,
    network: str,
    bandwidth_mb_s: float,
    server_bandwidth_mb_s: float,
    stragglers: str,
    faults: str,
    evaluations: int,
    check: bool,
) -> Scenario:
    """The scenario these words describe; raises ConfigError."""
    wrong = parse_faults(faults)
    step = distributions.parse(compute, "--compute")
    if not step.at(RARE):
        raise ConfigError(
            f"--compute: under '{step}' some steps take no time, and then no other worker has its turn.",
            fix="Such as 1ms, or normal:100ms,10ms.",
        )
    factors = parse_stragglers(stragglers, workers)
    if (slowest_s := step.mean_s * max(factors)) > LONGEST_S:
        raise ConfigError(
            f"--compute, --stragglers: the slowest step takes {slowest_s:,.0f} s on average, over {LONGEST_S:,.0f} s.",
            fix="Make a step shorter: all times of a cluster may be made shorter alike.",
        )
    conditions = Conditions(
        distributions.parse(network, "--network"),
        bandwidth_mb_s * MEGA,
        wrong.loss,
        wrong.duplicate,
        wrong.reorder,
        cuts=any(every is not None for every in (wrong.cuts, wrong.worker_crashes, wrong.server_crashes)),
    )
    return Scenario(
        step,
        factors,
        conditions,
        server_bandwidth_mb_s * MEGA,
        wrong,
        evaluations,
        check,
    )


def parse_stragglers(text: str, workers: int) -> tuple[float, ...]:
    """A factor for each worker, the stragglers first; raises ConfigError."""
    factors: list[float] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        who, _, factor = part.partition(":")
        try:
            count = round(float(who[:-1]) / 100 * workers) if who.endswith("%") else int(who)
            slow = float(factor.lower().removesuffix("x"))
        except (ValueError, OverflowError):
            count, slow = -1, 0.0
        if count < 0 or not 1 <= slow <= SLOWEST:
            raise ConfigError(
                f"--stragglers: '{part}' is not COUNT:FACTOR or SHARE%:FACTOR with a factor from 1 to {SLOWEST:g}.",
                fix="Such as 1:4 for one worker that takes four times as long, or 10%:2.",
            )
        if len(factors) + count > workers:
            raise ConfigError(
                f"--stragglers: '{text}' makes {len(factors) + count} of {workers} workers slow.",
                fix="Name fewer of them.",
            )
        factors += [slow] * count
    return (*factors, *[1.0] * (workers - len(factors)))


def parse_faults(text: str) -> Faults:
    """Faults from NAME=VALUE,NAME=VALUE; raises ConfigError."""
    names = [field.name for field in fields(Faults)]
    shares = ("loss", "duplicate", "reorder")
    values: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals and name in names:
            raise ConfigError(
                f"--faults: '{part}' does not say how {'much' if name in shares else 'often'}.",
                fix=f"Such as {name}={'0.1' if name in shares else '60s'}.",
            )
        if not equals or name not in names:
            raise ConfigError(
                f"--faults: '{part}' is not NAME=VALUE{nearest(name, names)}.", fix=f"Names: {', '.join(names)}."
            )
        values[name] = _share(value, part) if name in shares else distributions.seconds(value, f"--faults {name}")
        if name not in shares and values[name] < LEAST_BETWEEN_S:
            raise ConfigError(
                f"--faults: '{part}' breaks without end: less than {LEAST_BETWEEN_S:g} s lie between two.",
                fix=f"Such as {name}=60s, or leave it out.",
            )
    if sum(values.get(name, 0.0) for name in ("loss", "duplicate")) > 1:
        raise ConfigError("--faults: loss and duplicate are shares of one whole.", fix="Let them add up to at most 1.")
    return Faults(**values)


def _share(text: str, part: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 0.9:
        raise ConfigError(f"--faults: '{part}' is not a share from 0 to 0.9.", fix="Such as loss=0.1.")
    return value


def _told(factors: tuple[float, ...]) -> str:
    slow = [factor for factor in factors if factor > 1]
    return ", ".join(f"{slow.count(factor)} x {factor:g}" for factor in sorted(set(slow), reverse=True)) or "none"
