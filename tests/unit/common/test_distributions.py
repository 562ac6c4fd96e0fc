"""Random durations: one number a draw, never negative, the mean that is told, and refusals in words."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import distributions
from common.distributions import FAMILIES, LEAST_SHARE, LIMIT_S, expovariate, parse
from common.errors import ConfigError

SOME = (
    "0.1",
    "constant:20ms",
    "uniform:10ms,30ms",
    "normal:100ms,10ms",
    "normal:1,1",
    "normal:1s,0",
    "lognormal:5ms,0.5",
    "lognormal:5ms,0",
    "exponential:2min",
)
SHARES = st.floats(0, 1, exclude_max=True)
TIMES = st.floats(0, 1e3)


class Counted:
    """A source that counts what is taken from it."""

    def __init__(self, p: float) -> None:
        self.p, self.taken = p, 0

    def random(self) -> float:
        self.taken += 1
        return self.p


def test_all_families_are_tried() -> None:
    assert {text.partition(":")[0] for text in SOME if ":" in text} == FAMILIES.keys()


@pytest.mark.parametrize("text", SOME)
@given(p=SHARES)
def test_a_draw_takes_one_number_and_is_never_negative(text: str, p: float) -> None:
    source = Counted(p)
    assert 0 <= parse(text, "it").draw(source) < math.inf
    assert source.taken == 1


@given(name=st.sampled_from(sorted(FAMILIES)), a=TIMES, b=TIMES, s=st.floats(0, 3), p=SHARES)
def test_no_parameters_make_a_draw_negative(name: str, a: float, b: float, s: float, p: float) -> None:
    second = s if name == "lognormal" else b
    low, high = sorted((a, second)) if name == "uniform" else (a, second)
    words = f"{low:f},{high:f}" if "," in FAMILIES[name].form else f"{a:f}"
    assert 0 <= parse(f"{name}:{words}", "it").draw(Counted(p)) < math.inf


@pytest.mark.parametrize("text", SOME)
@given(p=SHARES, q=SHARES)
def test_more_is_never_less(text: str, p: float, q: float) -> None:
    """`at` is a quantile function."""
    at = parse(text, "it").at
    assert at(min(p, q)) <= at(max(p, q))


@pytest.mark.parametrize("text", SOME)
def test_the_mean_is_that_of_the_draws(text: str) -> None:
    made, n = parse(text, "it"), 100_000
    mean = math.fsum(made.at((i + 0.5) / n) for i in range(n)) / n
    assert mean == pytest.approx(made.mean_s, rel=1e-3)


def test_a_normal_duration_takes_a_tenth_of_its_mean_at_least() -> None:
    assert parse("normal:1,10", "it").draw(Counted(0.0)) == LEAST_SHARE


def test_expovariate_is_the_exponential_distribution() -> None:
    assert expovariate(random.Random(3), 2.0) == parse("exponential:2", "it").draw(random.Random(3))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0.1", 0.1),
        (".5", 0.5),
        ("1e-3", 1e-3),
        ("250us", 250e-6),
        ("20ms", 0.02),
        ("3S", 3.0),
        ("2min", 120.0),
        (" 1h ", 3600.0),
    ],
)
def test_durations_are_numbers_with_a_unit(text: str, seconds: float) -> None:
    assert distributions.seconds(text, "--it") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "fast", "-1", "nan", "inf", "20 ms", "1d", "300h", "1e400"])
def test_what_is_no_duration_is_refused_in_words(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a duration") as refused:
        distributions.seconds(text, "--it")
    assert str(refused.value).startswith(f"--it: '{text}'")
    assert "us, ms, s, min, h" in (refused.value.fix or "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gauss:1,2", "no distribution 'gauss'"),
        ("norml:1,2", "did you mean 'normal'"),
        ("normal:1", "not of the form normal:MEAN,SD"),
        ("constant:1,2", "not of the form constant:A"),
        ("uniform:2,1", "ends before it starts"),
        ("normal:1,fast", "'fast' is not a duration"),
        ("lognormal:1,5ms", "'5ms' is not a number"),
        ("lognormal:1,-1", "'-1' is not a number"),
        ("lognormal:1,10", "s on average"),
        ("", "not a duration"),
    ],
)
def test_what_is_no_distribution_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match="--it: ") as refused:
        parse(text, "--it")
    assert said in str(refused.value)
    assert refused.value.fix


def test_text_is_kept_as_it_was_written() -> None:
    assert str(parse(" uniform:1ms,2ms ", "it")) == "uniform:1ms,2ms"
    assert parse("1", "it") == parse("1", "it") != parse("1.0", "it")
    assert parse(f"{LIMIT_S:f}", "it").mean_s == LIMIT_S
