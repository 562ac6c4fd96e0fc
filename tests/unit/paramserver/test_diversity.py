"""Averages of what workers measure, the sentence that follows, and H by diversity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import ServerSettings
from common.errors import ConfigError
from common.messages import Diversity, Push, Report, Scalars
from paramserver import status
from paramserver.diversity import Averages, Load, describe, in_flight, local_steps, sentence
from tests.cluster import Desk, Hand

FOUR = [Load(32, 1)] * 4


def after(*pairs: tuple[float, float], horizon: int = 50) -> Averages:
    """One measurement after the other: |G|^2 and tr(Sigma)."""
    averages = Averages()
    for gradient, noise in pairs:
        averages = averages.after(Diversity(gradient, noise, 1), 1, horizon)
    return averages


# --- averages ---


def test_numerator_and_denominator_are_averaged_separately() -> None:
    """|G|^2 that is sometimes below zero, and ratios whose mean says nothing."""
    pairs = [(3.0, 10.0), (-1.0, 10.0), (3.0, 10.0), (-1.0, 10.0)]
    found = after(*pairs, horizon=1_000_000)
    assert found.bound == pytest.approx(1 + 10.0 / 1.0, rel=1e-5)
    ratios = [1 + noise / gradient for gradient, noise in pairs]
    assert np.mean(ratios) == pytest.approx(1 - 10 / 3)


def test_one_measurement_is_its_own_average() -> None:
    assert after((2.0, 6.0)).bound == pytest.approx(4.0)
    values = describe(after((2.0, 6.0), (2.0, 6.0)), FOUR, 1.0)
    assert (values["gradient"], values["noise"]) == pytest.approx((2.0, 6.0)), "no bias to zero at the start"


measured = st.lists(st.tuples(st.floats(-10, 10), st.floats(0, 100)), min_size=1, max_size=30)


@given(pairs=measured, horizon=st.integers(1, 100))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_it_is_the_weighted_mean_that_it_says(pairs: list[tuple[float, float]], horizon: int) -> None:
    kept = 1 - 1 / horizon
    weights = np.array([kept**i for i in reversed(range(len(pairs)))])
    gradient, noise = np.average(pairs, axis=0, weights=weights)
    values = describe(after(*pairs, horizon=horizon), FOUR, 1.0)
    assert values["gradient"] == pytest.approx(gradient, rel=1e-9, abs=1e-9)
    assert values["noise"] == pytest.approx(noise, rel=1e-9, abs=1e-9)
    json.dumps(values, allow_nan=False)


def test_several_measurements_of_a_push_count_as_so_many() -> None:
    alone = after((9.0, 0.0), (1.0, 8.0), (1.0, 8.0), (1.0, 8.0), horizon=10)
    together = after((9.0, 0.0), horizon=10).after(Diversity(1.0, 8.0, 3), 500, 10)
    assert (together.gradient, together.noise) == pytest.approx((alone.gradient, alone.noise))
    assert together.measurements == 4


@pytest.mark.parametrize(
    "found",
    [
        Diversity(math.nan, 1.0, 1),
        Diversity(math.inf, 1.0, 1),
        Diversity(1.0, math.nan, 1),
        Diversity(1.0, math.inf, 1),
        Diversity(1.0, -1e-9, 1),
        Diversity(1.0, 1.0, 0),
    ],
)
def test_what_cannot_be_is_not_counted(found: Diversity) -> None:
    before = after((2.0, 6.0))
    assert before.after(found, 1, 50) is before


def test_a_push_weighs_no_more_than_its_steps() -> None:
    assert after((2.0, 6.0)).after(Diversity(1.0, 1.0, 2**52), 3, 50).measurements == 4


def test_the_raw_ratio_of_workers_is_nowhere() -> None:
    """Over n workers it saturates at n; this is far beyond."""
    values = describe(after((0.01, 10.0)), FOUR, 1.0)
    assert values["batch_bound"] == pytest.approx(1001.0)
    assert set(values) == {
        *("batch_bound", "batch_in_flight", "gradient", "noise", "measurements", "delta", "helps", "sentence")
    }


# --- the sentence ---


def test_the_sentence_flips_where_the_batch_passes_the_bound() -> None:
    averages = after((1.0, 126.0))  # B_S 127, so that 128 samples are its limit
    assert sentence(averages, FOUR, 1.0) == (
        "More workers can still help: B = 128 samples in flight (4 workers x 32 samples x 1 step) is within "
        "delta B_S + 1 = 128 (B_S 127, delta 1, 1 measurement)."
    )
    assert sentence(averages, [*FOUR, Load(32, 1)], 1.0) == (
        "More workers will hardly help: B = 160 samples in flight (5 workers x 32 samples x 1 step) is beyond "
        "delta B_S + 1 = 128 (B_S 127, delta 1, 1 measurement)."
    )
    assert sentence(averages, [*FOUR, Load(32, 1)], 2.0).startswith("More workers can still help")
    assert "4 workers x 32 samples x 8 steps" in sentence(averages, [Load(32, 8)] * 4, 1.0)
    assert [describe(averages, [Load(32, 1)] * n, 1.0)["helps"] for n in (3, 4, 5)] == [True, True, False]


def test_what_is_not_known_is_said() -> None:
    assert "not known" in sentence(Averages(), FOUR, 1.0)
    assert describe(Averages(), FOUR, 1.0)["helps"] is None
    drowned = after((-1.0, 10.0))
    assert drowned.bound == math.inf
    assert "larger than 1 measurement can tell" in sentence(drowned, FOUR, 1.0)
    values = describe(drowned, FOUR, 1.0)
    assert (values["batch_bound"], values["helps"]) == (None, True)
    assert sentence(after((1.0, 9.0)), [], 1.0) == "B_S is 10 after 1 measurement; nobody trains."
    assert describe(after((1.0, 9.0)), [], 1.0)["helps"] is None


def test_who_has_not_pushed_counts_like_the_others() -> None:
    assert in_flight([Load(32, 2), Load(16, 2), Load(0, 0)]) == 3 * 48
    assert in_flight([Load(0, 0)]) == in_flight([]) == 0


@given(workers=st.integers(1, 100), batch=st.floats(1, 512), bound=st.floats(1, 1e6), delta=st.floats(0.1, 10))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_h_keeps_the_batch_within_the_bound(workers: int, batch: float, bound: float, delta: float) -> None:
    averages = after((1.0, bound - 1))
    h = local_steps(averages, workers, batch, delta, 64)
    assert 1 <= h <= 64
    limit = delta * bound + 1
    assert h == 1 or workers * batch * h <= limit * (1 + 1e-9)
    assert h == 64 or workers * batch * (h + 1) > limit * (1 - 1e-9)


# --- in the server ---


def push(hand: Hand, number: int, found: Diversity | None, samples: int = 32, steps: int = 1, **changes: Any) -> Any:
    """A push that carries what was measured; its answer."""
    [message] = hand.pieces(number, **changes)
    assert isinstance(message, Push)
    hand.heard()
    hand.send(Push(message.begin, Scalars(0.5, samples, steps, 0.1, found), message.payload))
    return hand.heard()[-1]


def told(desk: Desk) -> dict[str, Any]:
    values: dict[str, Any] = status.describe(desk.core, desk.now)["diversity"]
    return values


def listening(desk: Desk) -> list[dict[str, Any]]:
    """The lines of the run log that tell of diversity, from here on."""
    found: list[dict[str, Any]] = []
    record = desk.core.out.record

    def listen(kind: str, **values: Any) -> None:
        record(kind, **values)
        if kind == "diversity":
            found.append(values)

    desk.core.out.record = listen  # type: ignore[method-assign]
    return found


def test_what_rides_on_a_push_is_in_status_and_run_log() -> None:
    desk = Desk()
    lines = listening(desk)
    a, b = desk.join("a"), desk.join("b")
    assert told(desk)["measurements"] == 0
    push(a, 1, Diversity(1.0, 127.0, 1))
    push(b, 1, None)
    found = told(desk)
    assert (found["batch_bound"], found["batch_in_flight"], found["measurements"]) == (pytest.approx(128.0), 64.0, 1)
    assert "2 workers x 32 samples" in found["sentence"]
    push(b, 2, Diversity(-5.0, 127.0, 1))
    assert told(desk)["batch_bound"] is None
    assert [line["measurements"] for line in lines] == [1, 2]
    assert (lines[0]["updates"], lines[0]["sentence"][:4]) == (1, "More")
    b.bye()
    assert told(desk)["batch_in_flight"] == 32.0
    assert a.welcome.settings["diversity_every_steps"] == ServerSettings().diversity_every_steps


def test_what_rides_on_a_refused_push_is_not_counted() -> None:
    desk = Desk()
    lines = listening(desk)
    hand = desk.join()
    assert push(hand, 1, Diversity(1.0, 1.0, 1), fill=np.nan).outcome == "rejected"
    assert push(hand, 2, Diversity(1.0, -1.0, 1)).outcome == "applied"
    assert push(hand, 3, Diversity(math.nan, 1.0, 1)).outcome == "applied"
    assert told(desk)["measurements"] == 0
    assert not lines


def test_a_push_that_is_held_counts_once() -> None:
    desk = Desk(rule="local_sgd")
    a, b = desk.join("a"), desk.join("b")
    assert push(a, 1, Diversity(1.0, 9.0, 1)).outcome == "held"
    assert told(desk)["measurements"] == 1
    push(b, 1, Diversity(1.0, 9.0, 1))
    assert told(desk)["measurements"] == 2


def test_where_steps_are_reported_it_rides_on_the_report_once() -> None:
    desk = Desk(rule="lsgd")
    hand = desk.join()
    for steps in (1, 1, 2):  # a report is said again with each beat
        hand.send(Report(hand.session, hand.connection, steps, 8 * steps, 0.5, 0, Diversity(1.0, 9.0, 1)))
    assert told(desk)["measurements"] == 2
    assert told(desk)["batch_in_flight"] == 8.0


def test_it_survives_a_checkpoint() -> None:
    saving = {"directory": Path("unused"), "checkpoint_interval_s": 10.0}
    desk = Desk(**saving)
    hand = desk.join()
    push(hand, 1, Diversity(1.0, 9.0, 1))
    push(hand, 2, Diversity(3.0, 9.0, 1))
    desk.wait(11.0)
    again = Desk(desk.layout, epoch=2, recovered=desk.saved(), **saving)
    assert again.core.state.diversity == desk.core.state.diversity
    recovered = desk.saved()
    del recovered.record["diversity"]  # as an older version wrote it
    assert Desk(desk.layout, epoch=2, recovered=recovered, **saving).core.state.diversity == Averages()


# --- H ---


def test_local_steps_by_diversity() -> None:
    desk = Desk(local_steps=8, local_steps_by="diversity")
    a, b = desk.join("a"), desk.join("b")
    assert a.welcome.settings["local_steps"] == 1, "nothing is known"
    assert push(a, 1, None).local_steps == 1
    assert push(b, 1, Diversity(1.0, 255.0, 1)).local_steps == 4, "2 x 32 x 4 = 256 is within 257"
    assert push(a, 2, None, samples=128, steps=4).local_steps == 4
    b.bye()
    assert push(a, 3, None, samples=128, steps=4).local_steps == 8, "as many as are set"
    assert push(a, 4, Diversity(-100.0, 255.0, 1), samples=128, steps=4).local_steps == 8, "larger than can be told"
    assert push(a, 5, Diversity(1e9, 255.0, 1), samples=128, steps=4).local_steps == 1


def test_delta_scales_it() -> None:
    desk = Desk(local_steps=100, local_steps_by="diversity", diversity_delta=2)
    assert push(desk.join(), 1, Diversity(1.0, 63.0, 1)).local_steps == 4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"local_steps_by": "diversity", "diversity_every_steps": 0}, "does not measure"),
        ({"local_steps_by": "diversity", "rule": "lsgd"}, "says itself when workers train"),
        ({"local_steps_by": "speed", "rule": "lsgd"}, "says itself when workers train"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerSettings(**given)
    assert words in caught.value.sentence
