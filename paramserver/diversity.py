"""Whether more workers can still help: gradient diversity as the workers measured it, and the batch in flight. Pure.

    B_S = 1 + tr(Sigma) / |G|^2                 how many samples at once say something new (arXiv 1706.05699)
    B   = sum over live workers of batch x H    how many are at work from one center
    B <= delta B_S + 1                          then B samples at once serve about as well as one after the other

Laws
* Numerator and denominator are averaged separately, with the same weights; B_S is a ratio of averages, and never an
  average of ratios.
* Where the averaged |G|^2 is not positive, B_S is larger than can be measured, and that is what is said.
* What is not finite, and a tr(Sigma) below zero, is not counted; a push weighs no more than its steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from common.messages import Diversity


class Load(NamedTuple):
    """What one live worker has in flight: `batch` samples a step, `steps` (H) between two pushes."""

    batch: float
    steps: float


UNKNOWN = Load(0.0, 0.0)
"""Of a worker that has not pushed yet."""


@dataclass(frozen=True, slots=True)
class Averages:
    """Exponential moving averages over measurements, each sum with the weight it was made with."""

    gradient: float = 0.0
    """Weighted sum of |G|^2."""
    noise: float = 0.0
    """Weighted sum of tr(Sigma)."""
    weight: float = 0.0
    """Of both; grows to 1. Dividing by it takes away the bias of the start."""
    measurements: int = 0

    def after(self, found: Diversity, steps: int, horizon: int) -> Averages:
        """With what a push of so many steps brought; the same where that cannot be."""
        count = min(found.measurements, max(steps, 1))
        if count < 1 or found.noise < 0:
            return self
        kept = (1 - 1 / horizon) ** count
        made = Averages(
            kept * self.gradient + (1 - kept) * found.gradient,
            kept * self.noise + (1 - kept) * found.noise,
            kept * self.weight + (1 - kept),
            self.measurements + count,
        )
        return made if math.isfinite(made.gradient) and math.isfinite(made.noise) else self

    @property
    def bound(self) -> float | None:
        """B_S: None before the first measurement, infinite where |G|^2 drowns in its noise."""
        if not self.measurements:
            return None
        ratio = self.noise / self.gradient if self.gradient > 0 else math.inf
        return 1 + ratio

    def remember(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain values; `recall` is the inverse."""
        return asdict(self)

    @classmethod
    def recall(cls, record: dict[str, Any] | None) -> Averages:
        """The averages of a checkpoint; none of one that an older version made."""
        return cls(**record) if record else cls()


def in_flight(loads: Sequence[Load]) -> float:
    """B, samples; workers that have not pushed yet count like the mean of the others."""
    known = [load.batch * load.steps for load in loads if load.batch * load.steps > 0]
    return len(loads) * math.fsum(known) / len(known) if known else 0.0


def describe(averages: Averages, loads: Sequence[Load], delta: float) -> dict[str, Any]:
    """All of it as plain finite values, for `status`, run log and report; what is not known is None."""
    bound, batch, weight = averages.bound, in_flight(loads), averages.weight
    return {
        "batch_bound": bound if bound is not None and math.isfinite(bound) else None,
        "batch_in_flight": batch,
        "gradient": averages.gradient / weight if weight else None,
        "noise": averages.noise / weight if weight else None,
        "measurements": averages.measurements,
        "delta": delta,
        "helps": None if bound is None or not batch else batch <= delta * bound + 1,
        "sentence": sentence(averages, loads, delta),
    }


def sentence(averages: Averages, loads: Sequence[Load], delta: float) -> str:
    """Whether more workers can still help, with the numbers."""
    bound, batch = averages.bound, in_flight(loads)
    measured = f"{averages.measurements:,} measurement{'s' if averages.measurements != 1 else ''}"
    if bound is None:
        return "Whether more workers can help is not known: gradient diversity was not measured."
    if not batch:
        return f"B_S is {_number(bound)} after {measured}; nobody trains."
    flight = f"B = {_number(batch)} samples in flight ({_product(loads)})"
    if bound == math.inf:
        return (
            f"More workers can still help: {flight}, and B_S is larger than {measured} can tell, "
            "because the mean gradient drowns in its noise."
        )
    limit = f"delta B_S + 1 = {_number(delta * bound + 1)} (B_S {_number(bound)}, delta {delta:g}, {measured})"
    if batch <= delta * bound + 1:
        return f"More workers can still help: {flight} is within {limit}."
    return f"More workers will hardly help: {flight} is beyond {limit}."


def local_steps(averages: Averages, workers: int, batch: float, delta: float, most: int) -> int:
    """H at which workers x batch x H stays within delta B_S + 1: at least 1, at most `most`; 1 while B_S is unknown."""
    bound = averages.bound
    if bound is None or not batch * workers:
        return 1
    if bound == math.inf:
        return most
    return min(max(int((delta * bound + 1) / (workers * batch)), 1), most)


def _product(loads: Sequence[Load]) -> str:
    known = [load for load in loads if load.batch * load.steps > 0]
    batch = math.fsum(load.batch for load in known) / len(known)
    steps = in_flight(known) / math.fsum(load.batch for load in known)
    several = [
        f"{_number(value)} {unit}{'' if value == 1 else 's'}" for value, unit in ((batch, "sample"), (steps, "step"))
    ]
    return f"{len(loads)} worker{'' if len(loads) == 1 else 's'} x {several[0]} x {several[1]}"


def _number(value: float) -> str:
    if value == math.inf:
        return "infinite"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
