"""The choice of a codec: each has its turns, a faster one is taken if it is worth its loss, and the reason is told."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.choosing import ROUNDS, WORTH, Choice

CODECS = ("fp32", "bf16", "int8")


def decided(lasts_s: dict[str, float], noise: list[float] | None = None) -> tuple[Choice, list[str]]:
    """The choice once it is made, and the codecs of the exchanges until then."""
    choice, turns = Choice(list(lasts_s)), []
    for index in range(ROUNDS * len(lasts_s)):
        assert choice.open
        turns.append(choice.codec)
        choice.took(lasts_s[choice.codec] * (noise[index % len(noise)] if noise else 1.0))
    return choice, turns


def test_each_has_its_turns_and_then_one_stays() -> None:
    choice, turns = decided({"fp32": 0.1, "bf16": 0.06, "int8": 0.03})
    assert turns == list(CODECS) * ROUNDS
    assert (choice.codec, choice.open) == ("int8", False)
    reason = choice.reason
    for _ in range(10):
        choice.took(5.0)
    assert (choice.codec, choice.reason) == ("int8", reason), "for good"


def test_the_first_time_of_each_is_forgotten() -> None:
    choice = Choice(CODECS)
    for number in range(ROUNDS * len(CODECS)):
        choice.took(9.0 if number < len(CODECS) and choice.codec == "int8" else {"fp32": 0.1}.get(choice.codec, 0.05))
    assert choice.codec == "bf16", "as fast as int8, and loses less"


@given(st.lists(st.floats(1e-6, 10.0), min_size=len(CODECS), max_size=len(CODECS)))
def test_loss_has_to_be_earned(lasts: list[float]) -> None:
    """What is taken is the fastest, and saves a fifth; or nothing would have saved a fifth."""
    lasts_s = dict(zip(CODECS, lasts, strict=True))
    choice, turns = decided(lasts_s)
    assert Counter(turns) == dict.fromkeys(CODECS, ROUNDS)
    saves = min(lasts) <= WORTH * lasts_s["fp32"]
    assert (choice.codec != "fp32") == saves
    assert not saves or lasts_s[choice.codec] == min(lasts)


def test_an_outlier_chooses_nothing() -> None:
    choice, _ = decided(dict.fromkeys(CODECS, 0.01), noise=[1.0, 1.1, 30.0, 1.0, 0.9, 1.0, 1.1])
    assert choice.codec == "fp32"


@pytest.mark.parametrize(
    ("lasts_s", "reason"),
    [
        (
            {"fp32": 0.052, "bf16": 0.0266, "int8": 0.01342},
            "int8: an exchange takes 13.4 ms with it, 52 ms with fp32, 26.6 ms with bf16",
        ),
        (
            {"fp32": 0.0011, "int8": 0.001},
            "fp32: an exchange takes 1.1 ms with it, 1 ms with int8; a codec that loses something has to save 20%",
        ),
    ],
)
def test_the_reason_is_a_sentence_with_the_figures(lasts_s: dict[str, float], reason: str) -> None:
    choice, _ = decided(lasts_s)
    assert choice.reason == reason


def test_in_shared_memory_it_is_the_least_lossy_at_once() -> None:
    choice = Choice(CODECS)
    choice.took(5.0)
    choice.took(0.1, shared=True)
    assert (choice.codec, choice.open) == ("fp32", False)
    assert "no link" in choice.reason


def test_where_there_is_one_there_is_no_choice() -> None:
    choice = Choice(["int4"])
    choice.took(1.0)
    assert (choice.open, choice.codec, choice.reason) == (False, "int4", "")
