"""Random durations, as people write them: `0.1`, `normal:100ms,10ms`, `lognormal:5ms,0.5`. Pure.

    constant:A          always A seconds; a number alone means the same
    uniform:A,B         between A and B
    normal:MEAN,SD      never below a tenth of MEAN, for nothing takes no time; so on average a little more than MEAN
    lognormal:MEDIAN,S  S: standard deviation of the logarithm, a bare number
    exponential:MEAN    memoryless, as arrivals at a queue are

Laws
* Each draw takes exactly one number from its source: two that draw in turn do not disturb each other's order.
* Draws are never negative.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple, Protocol

from common.discovery import nearest
from common.errors import ConfigError

_TIME = re.compile(r"(?P<number>[0-9]*\.?[0-9]+(e[+-]?[0-9]+)?)(?P<unit>us|ms|s|min|h)?", re.IGNORECASE)
UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
LIMIT_S = 1e6
"""The longest duration that is taken: about twelve days."""
LEAST_SHARE = 0.1
"""Of its mean, the least a normal duration is."""
_EDGE = 2.0**-53
_STANDARD = NormalDist()


class Chance(Protocol):
    """A source of random numbers, such as `random.Random`."""

    def random(self) -> float:
        """From 0 up to, and without, 1."""


def expovariate(chance: Chance, mean: float) -> float:
    """A memoryless draw."""
    return -mean * math.log(1.0 - chance.random())


@dataclass(frozen=True, slots=True)
class Distribution:
    """One kind of duration. `text`: as it was written; mean_s: what it is on average, seconds."""

    text: str
    mean_s: float
    at: Callable[[float], float] = field(repr=False, compare=False)
    """at(p), 0 <= p < 1: the duration that a share p of all draws stays below, seconds."""

    def draw(self, chance: Chance) -> float:
        """One duration, seconds."""
        return self.at(chance.random())

    def __str__(self) -> str:
        return self.text


class _Family(NamedTuple):
    form: str
    bare: tuple[int, ...]
    """Positions of parameters that are plain numbers, no durations."""
    make: Callable[..., tuple[float, Callable[[float], float]]]
    """From its parameters: the mean, and the quantile function."""


def _constant(value: float) -> tuple[float, Callable[[float], float]]:
    return value, lambda p: value


def _uniform(low: float, high: float) -> tuple[float, Callable[[float], float]]:
    return (low + high) / 2, lambda p: low + (high - low) * p


def _normal(mean: float, sd: float) -> tuple[float, Callable[[float], float]]:
    least = LEAST_SHARE * mean
    z = (mean - least) / sd if sd else math.inf
    # E[max(X, least)] - E[X] = sd (phi(z) - z Phi(-z))
    cut_off = sd * (_STANDARD.pdf(z) - z * _STANDARD.cdf(-z)) if sd else 0.0
    return mean + cut_off, lambda p: max(mean + sd * _STANDARD.inv_cdf(max(p, _EDGE)), least)


def _lognormal(median: float, s: float) -> tuple[float, Callable[[float], float]]:
    return median * math.exp(s * s / 2), lambda p: median * math.exp(s * _STANDARD.inv_cdf(max(p, _EDGE)))


def _exponential(mean: float) -> tuple[float, Callable[[float], float]]:
    return mean, lambda p: -mean * math.log(1.0 - p)


FAMILIES = {
    "constant": _Family("constant:A", (), _constant),
    "uniform": _Family("uniform:A,B", (), _uniform),
    "normal": _Family("normal:MEAN,SD", (), _normal),
    "lognormal": _Family("lognormal:MEDIAN,S", (1,), _lognormal),
    "exponential": _Family("exponential:MEAN", (), _exponential),
}


def parse(text: str, what: str) -> Distribution:
    """The distribution that `text` names; raises ConfigError, which calls it `what`, where it names none."""
    name, colon, rest = text.strip().partition(":")
    if not colon:
        name, rest = "constant", name
    forms = f"Write a duration such as 0.1 or 20ms, or one of {', '.join(one.form for one in FAMILIES.values())}."
    if (family := FAMILIES.get(name)) is None:
        raise ConfigError(f"{what}: there is no distribution '{name}'{nearest(name, FAMILIES)}.", fix=forms)
    words = rest.split(",")
    if len(words) != family.form.count(",") + 1:
        raise ConfigError(f"{what}: '{text}' is not of the form {family.form}.", fix=forms)
    values = [
        _number(word, what) if position in family.bare else seconds(word, what) for position, word in enumerate(words)
    ]
    if name == "uniform" and values[0] > values[1]:
        raise ConfigError(f"{what}: '{text}' ends before it starts.", fix="Write the smaller duration first.")
    made = Distribution(text.strip(), *family.make(*values))
    if not made.mean_s <= LIMIT_S:
        raise ConfigError(f"{what}: '{text}' is {made.mean_s:g} s on average, over {LIMIT_S:g} s.", fix=forms)
    return made


def seconds(text: str, what: str) -> float:
    """A duration such as 0.1, 20ms or 2min, in seconds; raises ConfigError."""
    match = _TIME.fullmatch(text.strip())
    value = float(match["number"]) * UNITS_S[(match["unit"] or "s").lower()] if match else math.inf
    if not value <= LIMIT_S:
        raise ConfigError(
            f"{what}: '{text}' is not a duration from 0 to {LIMIT_S:g} s.", fix=f"Units: {', '.join(UNITS_S)}."
        )
    return value


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 10:
        raise ConfigError(f"{what}: '{text}' is not a number from 0 to 10.", fix="Such as 0.5.")
    return value
