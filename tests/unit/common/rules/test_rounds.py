"""Rounds: nobody hangs, nobody is answered twice, and the mean is that of all that was pushed."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.rules import base, rounds
from common.rules.base import Close, Floats, Reply


def joined(*workers: str) -> rounds.Round:
    round_ = rounds.start()
    for worker in workers:
        round_ = rounds.join(round_, worker)
    return round_


def test_a_round_is_complete_when_all_have_pushed() -> None:
    round_ = rounds.push(joined("a", "b"), "a", 1.0)
    assert rounds.waits(round_) == ["b"]
    assert rounds.finish(round_) == (round_, [])
    round_, effects = rounds.finish(rounds.push(round_, "b", 2.5))
    match effects:
        case [Close(_, (3.5,), True), Reply("a", "after"), Reply("b", "after")]:
            pass
        case _:
            pytest.fail(repr(effects))
    assert round_ == {"members": {"a": 1, "b": 1}, "held": [], "updates": 0, "weight": 0.0, "round": 1}


def test_nobody_waits_before_somebody_has_pushed() -> None:
    assert rounds.waits(joined("a", "b")) == []
    assert rounds.missing(joined("a", "b")) == ["a", "b"]
    assert not rounds.complete(joined())


def test_who_leaves_after_its_push_counts_and_is_not_answered() -> None:
    round_ = rounds.leave(rounds.push(joined("a", "b"), "a", 1.0), "a")
    round_, effects = rounds.finish(rounds.push(round_, "b", 1.0))
    assert [type(effect) for effect in effects] == [Close, Reply]
    assert effects[0] == Close(effects[0].reason, (2.0,))
    assert effects[1].worker == "b"  # type: ignore[union-attr]


def test_who_leaves_before_its_push_is_not_waited_for() -> None:
    round_ = rounds.push(joined("a", "b"), "a", 1.0)
    _, effects = rounds.finish(rounds.leave(round_, "b"), "b left")
    assert effects[0].reason == "round 0 closes: b left"
    assert [effect.worker for effect in effects if isinstance(effect, Reply)] == ["a"]


def test_what_the_last_member_pushed_is_not_lost() -> None:
    round_ = rounds.push(joined("a", "b"), "a", 1.0)
    round_ = rounds.leave(rounds.leave(round_, "a"), "b")
    _, effects = rounds.finish(round_)
    assert [type(effect) for effect in effects] == [Close]


def test_a_joiner_is_not_waited_for_in_the_round_under_way_but_in_the_next() -> None:
    round_ = rounds.join(rounds.push(joined("a", "b"), "a", 1.0), "c")
    assert rounds.missing(round_) == ["b"]
    round_, effects = rounds.finish(rounds.push(round_, "b", 1.0))
    assert len(effects) == 3
    assert rounds.missing(round_) == ["a", "b", "c"]


def test_what_a_joiner_pushes_in_time_counts() -> None:
    round_ = rounds.join(rounds.push(joined("a", "b"), "a", 1.0), "c")
    round_ = rounds.push(round_, "c", 1.0)
    _, effects = rounds.finish(rounds.push(round_, "b", 1.0))
    assert effects[0] == Close(effects[0].reason, (3.0,))
    assert [effect.worker for effect in effects if isinstance(effect, Reply)] == ["a", "c", "b"]


def test_who_joins_anew_is_no_longer_held() -> None:
    round_ = rounds.join(rounds.push(joined("a", "b"), "a", 1.0), "a")
    assert round_["held"] == []
    _, effects = rounds.finish(rounds.push(round_, "b", 1.0))
    assert [effect.worker for effect in effects if isinstance(effect, Reply)] == ["b"]


events = st.lists(st.tuples(st.sampled_from(["join", "leave", "push"]), st.sampled_from("abcd")), max_size=60)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(events)
def test_nobody_hangs_and_nobody_is_answered_twice(happened: list[tuple[str, str]]) -> None:
    """Whatever happens: whoever is held waits for somebody who is there and free, and every update counts once."""
    round_, held, live, pushed, closed = rounds.start(), set[str](), set[str](), 0.0, 0.0
    for what, worker in happened:
        if (what == "join") == (worker in live) or (what == "push" and worker in held):
            continue
        known = copy.deepcopy(round_)
        match what:
            case "join":
                after, live = rounds.join(round_, worker), live | {worker}
            case "leave":
                after, live, held = rounds.leave(round_, worker), live - {worker}, held - {worker}
            case _:
                after, held, pushed = rounds.push(round_, worker, 1.0), held | {worker}, pushed + 1
        assert round_ == known, "the state it was given is untouched"
        round_, effects = rounds.finish(after)
        assert json.loads(json.dumps(round_)) == round_
        for effect in effects:
            if isinstance(effect, Close):
                closed += effect.args[0]
            if isinstance(effect, Reply):
                assert effect.worker in held
                held -= {effect.worker}
        assert set(round_["held"]) == held
        assert set(round_["members"]) == live
        waits = rounds.waits(round_)
        assert bool(waits) == bool(held)
        assert set(waits) <= live - held
        assert closed + round_["weight"] == pushed


# Arithmetic.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("nesterov", [False, True])
def test_outer_step_is_torch_sgd_on_minus_the_mean(nesterov: bool, dtype: Any) -> None:
    random = np.random.default_rng(1)
    c = random.normal(size=33).astype(dtype)
    v, total = np.zeros_like(c), np.zeros_like(c)
    parameter = torch.nn.Parameter(torch.from_numpy(c.copy()))
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=nesterov)
    for _ in range(20):
        updates = [random.normal(size=33).astype(dtype) for _ in range(3)]
        for d in updates:
            base.add(total, d, 1.0)
        parameter.grad = torch.from_numpy(-np.asarray(sum(updates) / dtype(3)))
        optimizer.step()
        rounds.outer_step(c, v, total, 3.0, 0.9, 0.7, nesterov)
        assert not total.any()
    tolerance = 1e-5 if dtype is np.float32 else 1e-13
    np.testing.assert_allclose(c, parameter.detach().numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_scale_the_mean(dtype: Any) -> None:
    c, total = np.array([1.0, -2.0], dtype), np.zeros(2, dtype)
    for d, weight in ((4.0, 1.0), (8.0, 3.0)):
        known: Floats = np.full(2, d, dtype)
        base.add(total, known, weight)
        np.testing.assert_array_equal(known, d)
    rounds.add_mean(c, total, 4.0)
    np.testing.assert_array_equal(c, [8.0, 5.0])
    np.testing.assert_array_equal(total, 0.0)
