"""What `RuleServer` does with a rule: toy rules, each with one thing that a rule may do, show it.

Laws
* What goes in and out is copied; nobody changes a center but by its rule.
* Kernels see the vector block by block, each block once, and the effects in their order.
* The version counts changes of the center; the lag of a push is how far the worker is behind it.
* Who gets no reply is held, may not push, and is answered by whatever event answers it; the one who pushed has been
  given the center by `apply`, any other by `given`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from common.errors import Code, PeerError, UsageError
from common.replay import RuleServer, part
from common.rules import rounds
from common.rules.base import (
    Accumulate,
    Apply,
    Arrays,
    Close,
    Config,
    Decided,
    Effect,
    Exchange,
    Facts,
    Floats,
    Member,
    Order,
    Reply,
    Rule,
    Terms,
    allocate,
)

N = 7
CONFIG = Config()


class Sum(NamedTuple):
    sum: Floats


class Given(NamedTuple):
    base: Floats


def rule(**parts: Any) -> Rule:
    return Rule(name="toy", summary="a toy", paper="none, 2020", Config=Config, **parts)


def add(
    config: Config, c: Floats, S: Arrays, K: Arrays, d: Floats, weight: float, args: tuple[float, ...], stats: Floats
) -> None:
    c += weight * d


def started(made: Rule, *workers: str, **how: Any) -> RuleServer:
    server = RuleServer.start(made, CONFIG, np.zeros(N), **how)
    for worker in workers:
        server.join(worker)
    return server


ADDS = rule(apply=add)


# A rule of rounds: hold all, add the mean, at the latest five seconds after the first.


def _ended(round_: dict[str, Any], reason: str) -> Decided:
    replies: list[Effect] = [Reply(worker, "after", reason) for worker in round_["held"]]
    return {**rounds.close(round_), "due_s": None}, [Close(reason, (1 / round_["updates"],)), *replies]


def _admit(config: Config, round_: dict[str, Any], facts: Facts) -> Decided:
    due_s = facts.at_s + 5.0 if round_["due_s"] is None else round_["due_s"]
    round_ = {**rounds.push(round_, facts.worker, 1.0), "due_s": due_s}
    kept: list[Effect] = [Accumulate(1.0, "held")]
    if not rounds.complete(round_):
        return round_, kept
    round_, closing = _ended(round_, "all have pushed")
    return round_, kept + closing


def _leave(config: Config, round_: dict[str, Any], worker: str, at_s: float) -> Decided:
    round_ = rounds.leave(round_, worker)
    return _ended(round_, "the last has left") if rounds.complete(round_) else (round_, [])


def _tick(config: Config, round_: dict[str, Any], at_s: float) -> Decided:
    due = round_["due_s"] is not None and at_s >= round_["due_s"]
    return _ended(round_, "time is up") if due else (round_, [])


def _accumulate(config: Config, c: Floats, S: Sum, K: Given, d: Floats, weight: float, args: tuple[float, ...]) -> None:
    S.sum[:] += weight * d


def _close(config: Config, c: Floats, S: Sum, args: tuple[float, ...]) -> None:
    c += args[0] * S.sum
    S.sum[:] = 0.0


def _given(config: Config, c: Floats, K: Given) -> None:
    K.base[:] = c


ROUNDS = rule(
    start=lambda config, terms: {**rounds.start(), "due_s": None},
    join=lambda config, round_, member, at_s: (rounds.join(round_, member.worker), []),
    admit=_admit,
    leave=_leave,
    tick=_tick,
    deadline=lambda config, round_: round_["due_s"],
    state=lambda config, overlap, n, dtype: allocate(Sum, n, dtype),
    session=lambda config, overlap, n, dtype: allocate(Given, n, dtype),
    accumulate=_accumulate,
    close=_close,
    given=_given,
)


# Copies and blocks.


def test_what_goes_in_and_out_is_copied() -> None:
    center, update = np.zeros(N), np.ones(N)
    server = RuleServer.start(ADDS, CONFIG, center)
    joined = server.join("w0")
    reply = server.push("w0", update).replies["w0"]
    pulled = server.pull("w0", "center")
    for array in (joined, reply, pulled):
        array[:] = 99.0
    np.testing.assert_array_equal(server.center, 1.0)
    np.testing.assert_array_equal(center, 0.0)
    np.testing.assert_array_equal(update, 1.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_everything_has_the_type_of_the_center(dtype: Any) -> None:
    server = RuleServer.start(ROUNDS, CONFIG, np.zeros(N, dtype))
    server.join("w0")
    reply = server.push("w0", np.ones(N, dtype)).replies["w0"]
    assert {array.dtype for array in (reply, server.center, *server.state, *server.sessions["w0"])} == {np.dtype(dtype)}


@pytest.mark.parametrize("block_elements", [None, 1, 3, N, N + 1])
def test_blocks_cover_the_vector_once(block_elements: int | None) -> None:
    """The row of figures is that of the block."""

    def counted(
        config: Config, c: Floats, S: Arrays, K: Arrays, d: Floats, weight: float, args: Any, stats: Floats
    ) -> None:
        c += 1.0
        stats[:] = (c.size, d[0])

    toy = rule(apply=counted, stats_width=2, details=lambda config, stats: {"elements": float(stats[:, 0].sum())})
    server = started(toy, "w0", block_elements=block_elements)
    server.push("w0", np.arange(float(N)))
    np.testing.assert_array_equal(server.center, 1.0)
    np.testing.assert_array_equal(server.stats[:, 1], [low for low, _ in server.blocks()])
    assert max(high - low for low, high in server.blocks()) == min(block_elements or N, N)
    assert server.details() == {"elements": float(N)}


def test_part_is_a_view_along_the_last_axis() -> None:
    whole = Sum(np.arange(20.0).reshape(2, 10))
    cut = part(whole, 3, 5)
    assert type(cut) is Sum
    np.testing.assert_array_equal(cut.sum, [[3.0, 4.0], [13.0, 14.0]])
    cut.sum[:] = 0.0
    assert whole.sum[1, 4] == 0.0


def test_first_weights_are_loaded_and_joining_anchors() -> None:
    toy = rule(
        apply=add,
        state=lambda config, overlap, n, dtype: allocate(Sum, n, dtype),
        session=lambda config, overlap, n, dtype: allocate(Given, n, dtype),
        load=lambda config, c, S: np.copyto(S.sum, c),
        anchor=_given,
    )
    server = RuleServer.start(toy, CONFIG, np.arange(float(N)), block_elements=2)
    np.testing.assert_array_equal(server.state.sum, np.arange(float(N)))
    server.join("w0")
    server.push("w0", np.ones(N))
    given = server.join("w1")
    np.testing.assert_array_equal(server.sessions["w0"].base, np.arange(float(N)))
    np.testing.assert_array_equal(server.sessions["w1"].base, given)


# Versions and facts.


def test_the_version_counts_changes_and_the_lag_is_the_distance_to_it() -> None:
    seen: list[Facts] = []

    def admit(config: Config, decisions: None, facts: Facts) -> Decided:
        seen.append(facts)
        what = "before" if facts.worker == "w1" else "after"
        return None, [Apply(1.0, "now"), Reply(facts.worker, what, "so")]

    server = started(rule(apply=add, admit=admit), "w0", "w1")
    server.tick(2.5)
    for worker in ("w0", "w0", "w1", "w1"):
        server.push(worker, np.ones(N), steps=3, lr=0.5, loss=0.25, samples=8)
    server.join("w1")
    reply = server.push("w1", np.ones(N)).replies["w1"]
    assert [(f.worker, f.number, f.lag_versions) for f in seen] == [
        ("w0", 1, 0),
        ("w0", 2, 0),
        ("w1", 1, 2),  # from the start
        ("w1", 2, 1),  # from the center before its own first push
        ("w1", 1, 0),  # joined again
    ]
    assert seen[0] == Facts("w0", 1, 3, 0, 0.25, 8, 0.5, 2.5)
    assert server.version == 5
    np.testing.assert_array_equal(reply, 4.0)


def test_the_rule_is_told_who_joins_and_what_is_set_beside_it() -> None:
    told: list[Any] = []

    def start(config: Config, terms: Terms) -> None:
        told.append(terms)

    def join(config: Config, decisions: None, member: Member, at_s: float) -> Decided:
        told.append((member, at_s))
        return None, []

    server = RuleServer.start(rule(start=start, join=join), CONFIG, np.zeros(N), terms=Terms(4, workers=3))
    server.tick(1.5)
    server.join("w0", host="here", group=2)
    assert told == [Terms(4, workers=3), (Member("w0", "here", 2), 1.5)]


# Rounds.


def test_who_is_held_may_not_push_and_is_answered_by_the_last() -> None:
    server = started(ROUNDS, "w0", "w1", "w2")
    for i in (1, 2):
        result = server.push(f"w{i}", np.full(N, 3.0 * i))
        assert (result.outcome, result.replies, server.version) == ("held", {}, 0)
    with pytest.raises(UsageError, match="'w1' pushes although its last update is held"):
        server.push("w1", np.ones(N))
    assert server.numbers["w1"] == 1
    result = server.push("w0", np.zeros(N))
    assert result.outcome == "applied"
    assert set(result.replies) == {"w0", "w1", "w2"}
    assert all((reply == 3.0).all() for reply in result.replies.values())
    assert (server.held, server.version) == (set(), 1)
    assert set(server.started_from.values()) == {1}


def test_a_late_reply_gives_the_center_to_all_but_the_one_who_pushed() -> None:
    server = started(ROUNDS, "w0", "w1")
    server.push("w0", np.full(N, 2.0))
    server.push("w1", np.full(N, 4.0))
    np.testing.assert_array_equal(server.sessions["w0"].base, 3.0)
    np.testing.assert_array_equal(server.sessions["w1"].base, 0.0)


@pytest.mark.parametrize("gone_has_pushed", [False, True])
def test_a_leave_releases_and_keeps_what_was_pushed(gone_has_pushed: bool) -> None:
    server = started(ROUNDS, "w0", "w1", "w2")
    server.push("w0", np.full(N, 2.0))
    if gone_has_pushed:
        server.push("w1", np.full(N, 4.0))
        assert server.leave("w1").replies == {}
        result = server.leave("w2")
    else:
        server.leave("w1")
        result = server.leave("w2")
    assert set(result.replies) == {"w0"}
    assert result.outcome == "none"
    np.testing.assert_array_equal(result.replies["w0"], 3.0 if gone_has_pushed else 2.0)
    assert (set(server.sessions), server.held) == ({"w0"}, set())


def test_a_tick_releases_at_the_deadline() -> None:
    server = started(ROUNDS, "w0", "w1")
    server.tick(1.0)
    server.push("w0", np.full(N, 2.0))
    assert ROUNDS.deadline(CONFIG, server.decisions) == 6.0
    assert server.tick(4.5).replies == {}
    np.testing.assert_array_equal(server.tick(0.5).replies["w0"], 2.0)
    assert server.now_s == 6.0


# Replies of other kinds.


def test_an_exchange_makes_the_reply_and_settles_it() -> None:
    """Elastic: half of the distance to the center goes both ways."""

    def propose(
        config: Config, c: Floats, S: Arrays, K: Given, d: Floats, weight: float, args: tuple[float, ...], out: Floats
    ) -> None:
        out[:] = weight * (d - c)

    def settle(config: Config, c: Floats, S: Arrays, K: Given, reply: Floats) -> None:
        c += reply
        K.base[:] = reply

    toy = rule(
        admit=lambda config, decisions, facts: (
            None,
            [Exchange(0.5, "elastic"), Reply(facts.worker, "made", "the difference")],
        ),
        session=lambda config, overlap, n, dtype: allocate(Given, n, dtype),
        propose=propose,
        settle=settle,
    )
    server = started(toy, "w0", block_elements=3)
    result = server.push("w0", np.full(N, 4.0))
    assert (result.outcome, result.weight, server.version) == ("applied", 0.5, 1)
    for array in (result.replies["w0"], server.center, server.sessions["w0"].base):
        np.testing.assert_array_equal(array, 2.0)


def test_a_reply_or_a_pull_may_be_a_row_of_the_state() -> None:
    toy = rule(
        admit=lambda config, decisions, facts: (None, [Reply(facts.worker, "sum", "its row", row=1)]),
        state=lambda config, overlap, n, dtype: Sum(np.arange(2.0)[:, None] + np.zeros((2, n), dtype)),
        source=lambda config, decisions, worker, name: ("sum", int(name)),
    )
    server = started(toy, "w0")
    np.testing.assert_array_equal(server.push("w0", np.ones(N)).replies["w0"], 1.0)
    np.testing.assert_array_equal(server.pull("w0", "0"), 0.0)
    assert server.version == 0, "nothing changed the center"


def test_reports_lead_to_orders() -> None:
    def report(config: Config, decisions: None, worker: str, steps: int, loss: float, at_s: float) -> Decided:
        return None, [Order(worker, f"loss {loss}", until=steps + 2, pull=("leader",))]

    result = started(rule(schedules=True, report=report), "w0").report("w0", 5, 0.5)
    assert result.orders == result.effects == [Order("w0", "loss 0.5", 7, False, ("leader",))]
    assert (result.outcome, result.replies) == ("none", {})


# What is refused.


def test_what_the_rule_refuses_changes_nothing_but_the_number() -> None:
    def admit(config: Config, decisions: Any, facts: Facts) -> Decided:
        if facts.steps > 1:
            raise PeerError(Code.RULE, f"push {facts.number} has {facts.steps} steps")
        return {"last": facts.number}, [Apply(1.0, "now"), Reply(facts.worker, "after", "so")]

    server = started(rule(apply=add, admit=admit, start=lambda config, terms: {"last": 0}), "w0")
    with pytest.raises(PeerError, match="push 1 has 2 steps"):
        server.push("w0", np.ones(N), steps=2)
    np.testing.assert_array_equal(server.center, 0.0)
    assert (server.version, server.held, server.decisions) == (0, set(), {"last": 0})
    assert server.push("w0", np.ones(N)).outcome == "applied"
    assert server.decisions == {"last": 2}


def test_who_is_not_here_can_do_nothing() -> None:
    server = started(ADDS, "w0")
    server.leave("w0")
    for does in (
        lambda: server.push("w0", np.ones(N)),
        lambda: server.leave("w0"),
        lambda: server.report("w1", 1, 0.5),
    ):
        with pytest.raises(UsageError, match="has not joined, or has left"):
            does()
    server.join("w0")
    assert server.push("w0", np.ones(N)).outcome == "applied"


def test_a_rule_that_cuts_the_vector_is_refused() -> None:
    with pytest.raises(UsageError, match="cuts the vector into 2 fragments"):
        started(rule(apply=add, fragments=lambda config: 2))
