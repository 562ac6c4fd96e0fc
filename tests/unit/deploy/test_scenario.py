"""Words become a scenario, or a sentence about what is wrong with them."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import ConfigError
from deploy.simulation import scenario

WORDS: dict[str, Any] = {
    "workers": 10,
    "compute": "normal:100ms,10ms",
    "network": "1ms",
    "bandwidth_mb_s": 0.0,
    "server_bandwidth_mb_s": 0.0,
    "stragglers": "",
    "faults": "",
    "evaluations": 1,
    "check": False,
}


def test_words_are_what_they_say() -> None:
    words = {"stragglers": "1:4, 20%:2", "faults": "loss=0.1, cuts=30s,server_crashes=2min", "bandwidth_mb_s": 12.5}
    made = scenario.make(**WORDS | words)
    assert made.factors == (4.0, 2.0, 2.0, *[1.0] * 7)
    assert made.faults == scenario.Faults(loss=0.1, cuts=30.0, server_crashes=120.0)
    assert made.conditions.bytes_per_s == 12.5e6
    assert made.conditions.loss == 0.1
    assert made.conditions.faulty
    assert made.words["stragglers"] == "1 x 4, 2 x 2"
    assert made.words["faults"] == "loss=0.1, cuts=30, server_crashes=120"


def test_nothing_wrong_is_no_fault() -> None:
    made = scenario.make(**WORDS)
    assert made.factors == (1.0,) * 10
    assert not made.conditions.faulty
    assert made.words["faults"] == "none"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"compute": "0"}, "take no time"),
        ({"compute": "normal:0,1"}, "take no time"),
        ({"compute": "1e6"}, "the slowest step takes 1,000,000 s"),
        ({"compute": "10min", "stragglers": "1:7"}, "the slowest step takes 4,200 s"),
        ({"compute": "gauss:1,2"}, "no distribution 'gauss'"),
        ({"network": "fast"}, "--network: 'fast' is not a duration"),
        ({"stragglers": "4"}, "COUNT:FACTOR"),
        ({"stragglers": "1:0.5"}, "a factor from 1"),
        ({"stragglers": "11:2"}, "makes 11 of 10 workers slow"),
        ({"stragglers": "inf%:2"}, "COUNT:FACTOR"),
        ({"stragglers": "99999999999999%:2"}, "of 10 workers slow"),
        ({"faults": "los=0.1"}, "did you mean 'loss'"),
        ({"faults": "loss"}, "'loss' does not say how much. Such as loss=0.1."),
        ({"faults": "cuts"}, "'cuts' does not say how often. Such as cuts=60s."),
        ({"faults": "cuts=1us"}, "breaks without end: less than 0.1 s"),
        ({"faults": "worker_crashes=10ms"}, "breaks without end"),
        ({"faults": "loss=2"}, "not a share"),
        ({"faults": "cuts=0"}, "breaks without end"),
        ({"faults": "loss=0.6,duplicate=0.6"}, "shares of one whole"),
    ],
)
def test_what_cannot_be_is_refused_in_words(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        scenario.make(**WORDS | wrong)
    assert said in str(refused.value)
    assert refused.value.fix
