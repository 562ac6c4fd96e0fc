"""Training is over when the first limit is reached, not before, and time counts over all lives of the server."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from paramserver.budget import Budget

limits = st.none() | st.integers(1, 100)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(limits, limits, limits, st.integers(0, 120), st.integers(0, 120), st.integers(0, 120), st.integers(0, 60))
def test_first_limit_reached_ends_it(
    updates: int | None, samples: int | None, seconds: int | None, did: int, saw: int, took: int, before: int
) -> None:
    budget = Budget(updates, samples, seconds, updates=did, samples=saw, seconds=before, started=1000.0)
    now = 1000.0 + took
    used = [(updates, did), (samples, saw), (seconds, before + took)]
    over = any(limit is not None and amount >= limit for limit, amount in used)
    assert bool(budget.used_up(now)) == over
    assert (budget.share(now) == 1.0) == over
    assert 0.0 <= budget.share(now) <= 1.0
    assert budget.elapsed_s(now) == before + took
    end = budget.end()
    assert (end is None) == (seconds is None)
    if end is not None:
        only_time = Budget(None, None, seconds, seconds=before, started=1000.0)
        assert only_time.used_up(end)
        assert not only_time.used_up(end - 0.5)


def test_clock_starts_with_the_first_center() -> None:
    budget = Budget(seconds_limit=10.0, seconds=4.0)
    assert budget.end() is None
    assert budget.elapsed_s(1e9) == 4.0
    assert not budget.used_up(1e9)


def test_without_limits_it_never_ends() -> None:
    budget = Budget(updates=10**9, samples=10**12, seconds=1e9, started=0.0)
    assert budget.used_up(1e9) == ""
    assert budget.share(1e9) == 0.0


def test_reason_names_the_limit() -> None:
    assert "1,000 updates" in Budget(1000, updates=1000).used_up(0.0)
    assert "2,000 samples" in Budget(None, 2000, samples=2000).used_up(0.0)
    assert "30 s" in Budget(None, None, 30.0, seconds=30.0).used_up(0.0)
