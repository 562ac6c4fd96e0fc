"""What every update rule keeps, whatever it computes: run over every rule that is found, by its defaults.

Laws
* Kernels write to the center, the rule's state and the session of their block, and to nothing else.
* Same inputs, same outputs; blocks of any size, same bits; a replay is bit-identical.
* Arrays are what `state` and `session` declare, zero when made, and bytes are enough to go on from; so is JSON for the
  decisions.
* Decisions are pure, carry a reason, and answer only who waits for an answer.
* Both objectives are reached under delays and a straggler, with and without overlap; no step is lost or pushed twice;
  who leaves, leaves nobody hanging.
* Settings are frozen, described and bounded, and a wrong one is refused in a sentence that says what is right.

A rule that refuses overlap is not run with it. A rule that schedules its workers or cuts the vector is held to all but
what takes a push of its own accord.
No test knows a rule by name: a new file in `common/rules` is held to all of this as it is.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from common import rules
from common.errors import ConfigError
from common.replay import Result, RuleServer, part
from common.rules.base import (
    Arrays,
    Config,
    Decisions,
    Effect,
    Exchange,
    Facts,
    Floats,
    Member,
    OptimizerFacts,
    Reply,
    Rule,
    Terms,
    computes,
    perform,
)
from tests.rule_driver import Cluster, Logistic, Objective, Quadratic, Run, inner_optimizer, simulate

N = 257
"""Elements of the scripted runs: a prime, so that no block length divides it."""
LR = 0.1
WORKERS = ("w0", "w1", "w2")
TICK_S = 1.0
"""Between two pushes of a script."""
CHANGES = 2000
"""Of the center, in which both objectives are reached."""

pytestmark = pytest.mark.parametrize("rule", [pytest.param(rules.load(name), id=name) for name in rules.names()])

both_types = pytest.mark.parametrize("dtype", [np.float32, np.float64])
with_and_without_overlap = pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlap"])


def configured(rule: Rule) -> Config:
    return rules.configure(rule, {})


def terms(rule: Rule, *, overlap: bool = False, workers: int = len(WORKERS)) -> Terms:
    """What the rule runs under here; skips the test where that is overlap and the rule refuses it."""
    made = Terms(overlap=overlap, workers=workers)
    sentence = rule.fits(configured(rule), made)
    if sentence is not None and overlap:
        pytest.skip(sentence)
    assert sentence is None, "without overlap every rule runs by its defaults"
    return made


def pushes_by_itself(rule: Rule) -> None:
    """Skip the test where a worker pushes only when it is told, or only a part of its vector."""
    if rule.schedules or rule.fragments(configured(rule)) > 1:
        pytest.skip("its workers are scheduled or its vector is cut; tests/rule_driver.py does neither")


def script(dtype: Any, pushes: int = 24) -> list[tuple[str, Floats]]:
    """Updates of three workers in random order; some elements are zero, some negative zero."""
    random = np.random.default_rng(24)
    made = []
    for _ in range(pushes):
        d = random.normal(scale=0.1, size=N)
        d[random.integers(N, size=N // 8)] = 0.0
        d[random.integers(N, size=N // 8)] = -0.0
        made.append((f"w{random.integers(3)}", d.astype(dtype)))
    return made


def started(rule: Rule, dtype: Any, *, overlap: bool = False, block_elements: int | None = None) -> RuleServer:
    """A server whose workers have joined, if the rule lets it at different centers, none of them zero."""
    pushes_by_itself(rule)
    center = np.random.default_rng(3).normal(size=N).astype(dtype)
    server = RuleServer.start(
        rule,
        configured(rule),
        center,
        overlap=overlap,
        terms=terms(rule, overlap=overlap),
        block_elements=block_elements,
    )
    for worker, (_, d) in zip(WORKERS, script(dtype), strict=False):
        server.join(worker)
        server.push(worker, d, lr=LR)
    return server


def events(server: RuleServer, pushes: list[tuple[str, Floats]]) -> Iterator[Result]:
    """Push, and let time pass before each; who waits for an answer does not push."""
    for worker, d in pushes:
        yield server.tick(TICK_S)
        if worker not in server.held:
            yield server.push(worker, d, lr=LR)


def live(server: RuleServer, pushes: list[tuple[str, Floats]]) -> None:
    for _ in events(server, pushes):
        pass


def seen(result: Result) -> tuple[Any, ...]:
    """All that a result says, comparable to the bit."""
    replies = {worker: (reply.dtype, reply.tobytes()) for worker, reply in result.replies.items()}
    return result.outcome, result.weight, replies, result.orders, result.effects


def bits(server: RuleServer) -> dict[str, bytes]:
    """The center and all hidden state, as bytes by name."""
    every = {"rule": server.state, **server.sessions}
    arrays = {f"{owner}.{name}": getattr(kept, name) for owner, kept in every.items() for name in kept._fields}
    decisions = json.dumps(server.decisions).encode()
    return {name: array.tobytes() for name, array in {"center": server.center, **arrays}.items()} | {"": decisions}


def through_bytes(arrays: Arrays) -> Arrays:
    """As a checkpoint would write and read them."""
    return type(arrays)(*(np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape).copy() for a in arrays))


# Kernels.


def kernels(rule: Rule, config: Config, lived: list[list[Effect]]) -> dict[str, Callable[..., None]]:
    """By name all that a server may run on a block; those of one event together, as it came up in a run."""
    made: dict[str, Callable[..., None]] = {}

    def of_event(effects: list[Effect]) -> Callable[..., None]:
        def run(c: Floats, S: Arrays, K: Arrays, d: Floats, stats: Floats) -> None:
            perform(rule, config, effects, c, S, K, d, stats)
            for effect in effects:
                if isinstance(effect, Exchange):
                    assert rule.propose is not None
                    assert rule.settle is not None
                    out = np.full_like(c, np.nan)
                    rule.propose(config, c, S, K, d, effect.weight, effect.args, out)
                    assert np.isfinite(out).all(), "the reply is written whole"
                    known = out.copy()
                    rule.settle(config, c, S, K, out)
                    assert out.tobytes() == known.tobytes(), "settle only reads the reply"

        return run

    for effects in lived:
        made[" ".join(type(effect).__name__ for effect in effects)] = of_event(effects)
    if rule.load is not None:
        load = rule.load
        made["load"] = lambda c, S, K, d, stats: load(config, c, S)
    for name in ("anchor", "given"):
        kernel = getattr(rule, name)
        if kernel is not None:
            made[name] = lambda c, S, K, d, stats, kernel=kernel: kernel(config, c, K)
    return made


@both_types
@with_and_without_overlap
def test_kernels_write_to_their_block_and_nothing_else(rule: Rule, dtype: Any, overlap: bool) -> None:
    server = started(rule, dtype, overlap=overlap)
    lived = [result.effects for result in events(server, script(dtype, pushes=60)) if computes(result.effects)]
    assert lived, "something is computed"
    _, d = script(dtype)[-1]
    low, high = 64, 71
    for name, run in kernels(rule, server.config, lived).items():
        stats = np.full((3, rule.stats_width), -7.0)
        known_d, before = d.copy(), copy.deepcopy((server.center, server.state, server.sessions))
        run(
            server.center[low:high],
            part(server.state, low, high),
            part(server.sessions["w1"], low, high),
            d[low:high],
            stats[1],
        )
        assert d.tobytes() == known_d.tobytes(), name
        np.testing.assert_array_equal(stats[[0, 2]], -7.0, f"{name}: a block writes its own row of figures")
        center, state, sessions = before
        for mine, known in (
            (server.center, center),
            *zip(server.state, state, strict=True),
            *((a, b) for worker, kept in server.sessions.items() for a, b in zip(kept, sessions[worker], strict=True)),
        ):
            for outside in (np.s_[..., :low], np.s_[..., high:]):
                assert mine[outside].tobytes() == known[outside].tobytes(), name
        for worker in ("w0", "w2"):
            assert [a.tobytes() for a in server.sessions[worker]] == [a.tobytes() for a in sessions[worker]], name
        if name in ("load", "anchor", "given"):
            assert server.center.tobytes() == center.tobytes(), f"{name} only reads the center"


@both_types
def test_worker_half_leaves_its_inputs_alone(rule: Rule, dtype: Any) -> None:
    config, random = configured(rule), np.random.default_rng(5)
    optimizer = inner_optimizer(rule, config, LR)
    x, m, anchor, reply = (random.normal(size=N).astype(dtype) for _ in range(4))
    out = np.full(N, np.nan, dtype)

    def unchanged(run: Callable[[], None], *inputs: Floats) -> None:
        known = [array.copy() for array in inputs]
        run()
        assert [array.tobytes() for array in inputs] == [array.tobytes() for array in known]

    if rule.point is not None:
        point = rule.point
        unchanged(lambda: point(config, x, m, optimizer), m)
    unchanged(lambda: rule.update(config, x, anchor, out), x, anchor)
    assert np.isfinite(out).all(), "the update is written whole"
    unchanged(lambda: rule.merge(config, x, reply), reply)
    if rule.track is not None:
        track = rule.track
        unchanged(lambda: track(config, anchor, out, reply), out, reply)
    assert not any(np.shares_memory(kept, reply) for kept in (x, anchor))
    assert {array.dtype for array in (x, m, anchor, out)} == {np.dtype(dtype)}


@both_types
@with_and_without_overlap
def test_same_inputs_same_outputs(rule: Rule, dtype: Any, overlap: bool) -> None:
    one = started(rule, dtype, overlap=overlap)
    other = copy.deepcopy(one)
    for result, again in zip(events(one, script(dtype)), events(other, script(dtype)), strict=True):
        assert seen(result) == seen(again)
        assert one.stats.tobytes() == other.stats.tobytes()
    assert bits(one) == bits(other)
    assert one.details() == one.details() == other.details()


@both_types
@with_and_without_overlap
def test_blocks_of_any_size_give_the_same_bits(rule: Rule, dtype: Any, overlap: bool) -> None:
    whole = started(rule, dtype, overlap=overlap)
    live(whole, script(dtype))
    for block_elements in (1, 7, 64, N - 1, N + 1):
        blocked = started(rule, dtype, overlap=overlap, block_elements=block_elements)
        live(blocked, script(dtype))
        assert bits(blocked) == bits(whole), f"blocks of {block_elements}"


# State and decisions.


@both_types
@with_and_without_overlap
def test_state_is_zero_when_made_and_of_the_length_of_the_vector(rule: Rule, dtype: Any, overlap: bool) -> None:
    for make in (rule.state, rule.session):
        made = make(configured(rule), overlap, N, dtype)
        assert len(made._fields) == len(made)
        for array in made:
            assert array.shape[-1] == N
            assert array.dtype == dtype
            assert not array.any()
        assert not any(np.shares_memory(a, b) for i, a in enumerate(made) for b in made[:i])


@both_types
@with_and_without_overlap
def test_state_survives_a_checkpoint_bit_for_bit(rule: Rule, dtype: Any, overlap: bool) -> None:
    lived = started(rule, dtype, overlap=overlap)
    live(lived, script(dtype, pushes=9))
    restored = dataclasses.replace(
        lived,
        center=lived.center.copy(),
        state=through_bytes(lived.state),
        sessions={worker: through_bytes(session) for worker, session in lived.sessions.items()},
        decisions=json.loads(json.dumps(lived.decisions, allow_nan=False)),
        numbers=dict(lived.numbers),
        started_from=dict(lived.started_from),
        held=set(lived.held),
    )
    assert bits(restored) == bits(lived)
    assert restored.decisions == lived.decisions, "JSON and back is the same"
    for result, again in zip(events(lived, script(dtype)), events(restored, script(dtype)), strict=True):
        assert seen(result) == seen(again)
    assert bits(restored) == bits(lived)
    assert restored.details() == lived.details()


@both_types
def test_types_of_numbers_are_kept(rule: Rule, dtype: Any) -> None:
    server = started(rule, dtype)
    for result in events(server, script(dtype)):
        assert all(reply.dtype == dtype for reply in result.replies.values())
    assert server.center.dtype == dtype
    assert {array.dtype for kept in (server.state, *server.sessions.values()) for array in kept} <= {np.dtype(dtype)}
    assert server.stats.dtype == np.float64
    assert all(type(figure) is float and np.isfinite(figure) for figure in server.details().values())


class Decider:
    """The decisions of a rule alone, each made twice; holds them to what base.py says of them."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.config = rule, configured(rule)
        self.decisions: Decisions = rule.start(self.config, terms(rule))
        self.waiting: set[str] = set()

    def decide(self, function: Callable[..., tuple[Decisions, list[Effect]]], *what: Any) -> list[Effect]:
        known = copy.deepcopy(self.decisions)
        made = function(self.config, self.decisions, *what)
        assert self.decisions == known, "the state it was given is untouched"
        assert made == function(self.config, known, *what)
        self.decisions, effects = made
        assert json.loads(json.dumps(self.decisions, allow_nan=False)) == self.decisions
        for effect in effects:
            assert effect.reason.strip()
            if isinstance(effect, Reply):
                assert effect.worker in self.waiting, "only who waits for an answer gets one, and one only"
                self.waiting.remove(effect.worker)
        json.dumps(self.rule.figures(self.config, self.decisions), allow_nan=False)
        return effects


def test_decisions_are_pure_and_carry_a_reason(rule: Rule) -> None:
    random, decider = np.random.default_rng(7), Decider(rule)
    numbers: dict[str, int] = {}
    for event in range(120):
        at_s, worker = event * TICK_S, f"w{random.integers(4)}"
        decider.decide(rule.tick, at_s)
        if worker not in numbers:
            decider.decide(rule.join, Member(worker, host=f"h{random.integers(2)}"), at_s)
            numbers[worker] = 0
        elif random.random() < 0.1:
            decider.waiting.discard(worker)
            decider.decide(rule.leave, worker, at_s)
            del numbers[worker]
        elif rule.schedules:
            numbers[worker] += 1
            decider.decide(rule.report, worker, numbers[worker], float(random.random()), at_s)
        elif worker not in decider.waiting:
            numbers[worker] += 1
            lag, loss = int(random.integers(9)), float(random.random())
            decider.waiting.add(worker)
            decider.decide(rule.admit, Facts(worker, numbers[worker], 1, lag, loss, 32, LR, at_s))
        assert set(rule.waits(decider.config, decider.decisions)) <= set(numbers), "nobody waits for who is not there"
    while numbers:
        worker, _ = numbers.popitem()
        decider.waiting.discard(worker)
        decider.decide(rule.leave, worker, 120 * TICK_S)
    assert not decider.waiting


@pytest.mark.parametrize("pushed", [1, 2])
def test_who_waits_is_answered_when_the_others_leave(rule: Rule, pushed: int) -> None:
    """At once, or at the rule's deadline; also if the last to leave has pushed itself."""
    pushes_by_itself(rule)
    for left in range(1, len(WORKERS)):
        server = RuleServer.start(rule, configured(rule), np.ones(3), terms=terms(rule))
        for worker in WORKERS:
            server.join(worker)
        for worker in WORKERS[:pushed]:
            server.push(worker, np.full(3, 0.1), lr=LR)
        for worker in WORKERS[-left:]:
            server.leave(worker)
        for worker in sorted(set(server.sessions) - server.held):
            server.push(worker, np.full(3, 0.1), lr=LR)
        for _ in WORKERS:
            deadline_s = rule.deadline(server.config, server.decisions)
            if deadline_s is not None:
                server.now_s = max(deadline_s, server.now_s)
                server.tick(0.0)
        assert not server.held


# Runs.


@pytest.fixture(params=[Quadratic, Logistic], scope="module")
def objective(request: pytest.FixtureRequest) -> Objective:
    made: Objective = request.param()
    return made


def progress_left(objective: Objective, run: Run) -> float:
    """What is left of the way from the initial loss (1) to the least there is (0)."""
    first = objective.loss(objective.initial())
    return (objective.loss(run.server.center) - objective.best_loss) / (first - objective.best_loss)


@with_and_without_overlap
def test_converges_under_delays_and_a_straggler(rule: Rule, objective: Objective, overlap: bool) -> None:
    pushes_by_itself(rule)
    cluster = Cluster(lr=LR, overlap=overlap)
    terms(rule, overlap=overlap, workers=len(cluster.step_s))
    # Where workers keep parameters of their own, the center is a mean: it goes only as far as each of them.
    pushes = CHANGES * (len(cluster.step_s) if rule.private else 1)
    run = simulate(rule, configured(rule), objective, cluster, seed=0, pushes=pushes, changes=CHANGES)
    assert progress_left(objective, run) < 0.01
    by_worker = [sum(e.worker == f"w{i}" for e in run.exchanges) for i in range(len(cluster.step_s))]
    assert min(by_worker) > 0, "everyone took part"


@pytest.mark.parametrize("local_steps", [1, 4])
@pytest.mark.parametrize("workers", [1, 5])
@with_and_without_overlap
def test_every_step_is_pushed_exactly_once(rule: Rule, overlap: bool, workers: int, local_steps: int) -> None:
    """A message takes longer than a step, so that with overlap progress is always in flight."""
    pushes_by_itself(rule)
    if rule.fits(configured(rule), Terms(local_steps, workers=workers)) is not None:
        pytest.skip(f"it takes no {local_steps} local steps")
    terms(rule, overlap=overlap, workers=workers)
    cluster = Cluster((1.0,) * workers, delay_s=2.0, local_steps=local_steps, lr=LR / 4, overlap=overlap)
    run = simulate(rule, configured(rule), Quadratic(), cluster, seed=6, pushes=60)
    steps = sum(exchange.steps for exchange in run.exchanges)
    assert steps > len(run.exchanges) or not overlap, "steps were done in flight"
    np.testing.assert_allclose(run.pushed, run.trained, rtol=1e-12, atol=1e-13)


@both_types
def test_replay_is_bit_identical(rule: Rule, objective: Objective, dtype: Any) -> None:
    pushes_by_itself(rule)
    one, other, another = (
        simulate(rule, configured(rule), objective, Cluster(lr=LR), seed=seed, pushes=150, dtype=dtype)
        for seed in (4, 4, 5)
    )
    assert one.exchanges == other.exchanges
    assert bits(one.server) == bits(other.server)
    assert one.exchanges != another.exchanges, "the seed counts"


def test_who_leaves_leaves_nobody_hanging(rule: Rule) -> None:
    pushes_by_itself(rule)
    cluster = Cluster(lr=LR, leave_s=((0, 20.0), (4, 31.0)))
    run = simulate(rule, configured(rule), Quadratic(), cluster, seed=2, pushes=1500, changes=1500)
    assert progress_left(Quadratic(), run) < 0.01
    assert set(run.server.sessions) == {"w1", "w2", "w3"}
    assert {exchange.worker for exchange in run.exchanges[-100:]} == {"w1", "w2", "w3"}


# Settings and words.


def fields(rule: Rule) -> dict[str, list[dict[str, Any]]]:
    """Every setting with the alternatives of its JSON schema."""
    properties = rule.Config.model_json_schema().get("properties", {})
    return {name: schema.get("anyOf", [schema]) for name, schema in properties.items()}


def test_settings_are_frozen_and_described(rule: Rule) -> None:
    config = configured(rule)
    assert type(config).model_config["frozen"] is True
    for name, info in type(config).model_fields.items():
        with pytest.raises(ValidationError, match="frozen"):
            setattr(config, name, getattr(config, name))
        assert not info.is_required(), f"{name} has no default"
        assert info.description, f"{name} has no description"
        assert not re.search(r"(?<!\.\.)\.$", info.description), f"the description of {name} ends a sentence of its own"
    assert rules.configure(rule, config.model_dump()) == config


def test_unknown_setting_is_refused_with_the_nearest(rule: Rule) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"'{rule.name}' has no setting 'no_such_setting_zzz'")) as caught:
        rules.configure(rule, {"no_such_setting_zzz": 1})
    assert all(name in str(caught.value) for name in fields(rule))
    for name in fields(rule):
        with pytest.raises(ConfigError, match=re.escape(f"did you mean '{name}'?")):
            rules.configure(rule, {f"{name}s": 1})


def test_setting_out_of_range_is_refused_with_the_range(rule: Rule) -> None:
    for name, alternatives in fields(rule).items():
        for wrong, expected in wrong_values(name, alternatives):
            with pytest.raises(ConfigError) as caught:
                rules.configure(rule, {name: wrong})
            message = str(caught.value)
            assert f"'{name}'" in message
            assert all(word in message for word in expected), f"{name}={wrong!r} should name {expected}: {message}"


def wrong_values(name: str, alternatives: list[dict[str, Any]]) -> list[tuple[Any, list[str]]]:
    """Values that no alternative takes, each with what the refusal must name."""
    if any("enum" in one or "const" in one for one in alternatives):
        known = [word for one in alternatives for word in one.get("enum", [one.get("const")]) if word is not None]
        return [("no_such_choice", [str(word) for word in known])]
    numeric = [one for one in alternatives if one.get("type") in ("number", "integer")]
    wrong: list[tuple[Any, list[str]]] = []
    if not any(one.get("type") == "string" for one in alternatives):
        wrong += [("neither a number nor a truth", [])]
    for one in numeric:
        below, above = one.get("minimum", one.get("exclusiveMinimum")), one.get("maximum", one.get("exclusiveMaximum"))
        assert below is not None, f"{name} has no lower bound"
        assert above is not None, f"{name} has no upper bound"
        wrong += [(below if "exclusiveMinimum" in one else below - 1, [written(below)])]
        wrong += [(above if "exclusiveMaximum" in one else above + 1, [written(above)])]
        wrong += [(float("nan"), []), (float("inf"), [])]
    return wrong


def written(bound: float) -> str:
    """As a refusal has it."""
    return str(bound) if isinstance(bound, int) else f"{bound:.12g}"


def test_value_describes_itself(rule: Rule) -> None:
    module = importlib.import_module(f"{rules.__name__}.{rule.name}")
    assert module.RULE is rule, "the name is the file's name"
    assert module.__name__.rpartition(".")[2] == rule.name
    assert rule.lost_reply in ("reanchor", "resend")
    assert rule.stats_width >= 0
    assert rule.summary
    assert re.search(r"arXiv \d{4}\.\d{4,5}|\b(19|20)\d\d\b", rule.paper)


def test_header_cites_the_paper_and_names_every_setting(rule: Rule) -> None:
    header = importlib.import_module(f"{rules.__name__}.{rule.name}").__doc__ or ""
    assert header.startswith(f"`{rule.name}`")
    assert re.search(r"arXiv \d{4}\.\d{4,5}|\b(19|20)\d\d\b", header)
    missing = [name for name in fields(rule) if not re.search(rf"\b{name}\b", header)]
    assert not missing, f"settings the header does not mention: {', '.join(missing)}"


def test_inner_optimizers_are_taken_or_refused_in_a_sentence(rule: Rule) -> None:
    for optimizer in (
        OptimizerFacts("SGD", LR, 0.0, 1),
        OptimizerFacts("SGD", LR, 0.9, 1),
        OptimizerFacts("Adam", LR, 0.0, 1),
        OptimizerFacts("SGD", LR, 0.0, 3),
    ):
        sentence = rule.accept(configured(rule), optimizer)
        assert sentence == rule.accept(configured(rule), optimizer)
        if sentence is not None:
            assert f"'{rule.name}'" in sentence
            assert optimizer.name in sentence
            assert sentence.endswith(".")


def test_what_is_set_beside_it_is_taken_or_refused_in_a_sentence(rule: Rule) -> None:
    for local_steps in (1, 4):
        for overlap in (False, True):
            for lossless in (False, True):
                beside = Terms(local_steps, overlap, 3, lossless)
                sentence = rule.fits(configured(rule), beside)
                assert sentence == rule.fits(configured(rule), beside)
                if sentence is not None:
                    assert f"'{rule.name}'" in sentence
                    assert sentence.endswith(".")
    assert rule.fits(configured(rule), Terms()) is None, "by its defaults it runs"


def test_local_steps_are_at_least_one(rule: Rule) -> None:
    for h in (1, 4, 100):
        for done in (0, 1, 5, 10_000):
            steps = rule.local_steps(configured(rule), h, done)
            assert type(steps) is int
            assert steps >= 1
