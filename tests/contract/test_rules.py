"""What every update rule keeps, whatever it computes: run over every rule that is found, by its defaults.

Laws
* Kernels write to the center, the rule's state and the session of their block, and to nothing else.
* Same inputs, same outputs; blocks of any size, same bits; a replay is bit-identical.
* State is what `state` and `session` declare, zero when made, and bytes are enough to go on from.
* Both objectives are reached under delays and a straggler, with and without overlap; who leaves, leaves nobody hanging.
* Settings are frozen, described and bounded, and a wrong one is refused in a sentence that says what is right.

No test knows a rule by name: a new file in `common/rules` is held to all of this as it is.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import re
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from common import rules
from common.errors import ConfigError
from common.rules.base import Arrays, Config, Facts, Floats, OptimizerFacts, Rule
from tests.rule_driver import Cluster, Logistic, Objective, Quadratic, Run, Server, part, simulate

N = 257
"""Elements of the scripted runs: a prime, so that no block length divides it."""
LR = 0.1
STATS_BLOCKS = 3

pytestmark = pytest.mark.parametrize("rule", [pytest.param(rules.load(name), id=name) for name in rules.names()])

both_types = pytest.mark.parametrize("dtype", [np.float32, np.float64])
with_and_without_overlap = pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlap"])


def configured(rule: Rule) -> Config:
    return rules.configure(rule, {})


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


def started(rule: Rule, dtype: Any, *, overlap: bool = False, block_elements: int | None = None) -> Server:
    """A server whose workers have joined at different centers, none of them zero."""
    center = np.random.default_rng(3).normal(size=N).astype(dtype)
    server = Server.start(rule, configured(rule), center, overlap=overlap, block_elements=block_elements)
    for worker, (_, d) in zip(("w0", "w1", "w2"), script(dtype), strict=False):
        server.join(worker)
        server.push(worker, d, lr=LR)
    return server


def bits(server: Server) -> dict[str, bytes]:
    """The center and all hidden state, as bytes by name."""
    every = {"rule": server.state, **server.sessions}
    arrays = {f"{owner}.{name}": getattr(kept, name) for owner, kept in every.items() for name in kept._fields}
    return {name: array.tobytes() for name, array in {"center": server.center, **arrays}.items()}


def through_bytes(arrays: Arrays) -> Arrays:
    """As a checkpoint would write and read them."""
    return type(arrays)(*(np.frombuffer(array.tobytes(), array.dtype).copy() for array in arrays))


# Kernels.


@both_types
@with_and_without_overlap
def test_kernels_write_to_their_block_and_nothing_else(rule: Rule, dtype: Any, overlap: bool) -> None:
    server = started(rule, dtype, overlap=overlap)
    config, session = server.config, server.sessions["w1"]
    _, d = script(dtype)[-1]
    low, high = 64, 71
    stats = np.full((STATS_BLOCKS, rule.stats_width), -7.0)
    known_d, known = d.copy(), copy.deepcopy((server.center, server.state, server.sessions))

    inside = (server.center[low:high], part(server.state, low, high), part(session, low, high))
    rule.apply(config, *inside, d[low:high], 1.0, stats[1])
    center_after_apply = server.center.copy()
    rule.anchor(config, server.center[low:high], part(session, low, high))

    np.testing.assert_array_equal(server.center, center_after_apply, "anchor only reads the center")
    np.testing.assert_array_equal(stats[[0, 2]], -7.0, "a block writes its own row of figures")
    assert d.tobytes() == known_d.tobytes()
    center, state, sessions = known
    for mine, before in (
        (server.center, center),
        *zip(server.state, state, strict=True),
        *((a, b) for name, kept in server.sessions.items() for a, b in zip(kept, sessions[name], strict=True)),
    ):
        outside = np.r_[mine[:low], mine[high:]]
        assert outside.tobytes() == np.r_[before[:low], before[high:]].tobytes()
    for name in ("w0", "w2"):
        assert [a.tobytes() for a in server.sessions[name]] == [a.tobytes() for a in sessions[name]]


@both_types
def test_worker_half_leaves_its_inputs_alone(rule: Rule, dtype: Any) -> None:
    config, random = configured(rule), np.random.default_rng(5)
    x, anchor, reply = (random.normal(size=N).astype(dtype) for _ in range(3))
    known_x, known_anchor, known_reply = x.copy(), anchor.copy(), reply.copy()
    out = np.full(N, np.nan, dtype)

    rule.update(config, x, anchor, out)
    np.testing.assert_array_equal(x, known_x)
    np.testing.assert_array_equal(anchor, known_anchor)
    assert np.isfinite(out).all(), "the update is written whole"

    rule.merge(config, x, reply)
    np.testing.assert_array_equal(reply, known_reply)
    assert not np.shares_memory(x, reply)
    assert out.dtype == x.dtype == dtype


@both_types
@with_and_without_overlap
def test_same_inputs_same_outputs(rule: Rule, dtype: Any, overlap: bool) -> None:
    one = started(rule, dtype, overlap=overlap)
    other = copy.deepcopy(one)
    for worker, d in script(dtype):
        reply, again = one.push(worker, d, lr=LR), other.push(worker, d, lr=LR)
        assert (reply is None) == (again is None)
        if reply is not None and again is not None:
            assert reply.tobytes() == again.tobytes()
        assert one.stats.tobytes() == other.stats.tobytes()
    assert bits(one) == bits(other)
    assert one.details() == one.details() == other.details()


@both_types
@with_and_without_overlap
def test_blocks_of_any_size_give_the_same_bits(rule: Rule, dtype: Any, overlap: bool) -> None:
    whole = started(rule, dtype, overlap=overlap)
    blocked = {n: started(rule, dtype, overlap=overlap, block_elements=n) for n in (1, 7, 64, N - 1, N + 1)}
    for worker, d in script(dtype):
        for server in (whole, *blocked.values()):
            server.push(worker, d, lr=LR)
    for block_elements, server in blocked.items():
        assert bits(server) == bits(whole), f"blocks of {block_elements}"


# State and decisions.


@both_types
@with_and_without_overlap
def test_state_is_zero_when_made_and_of_the_length_of_the_vector(rule: Rule, dtype: Any, overlap: bool) -> None:
    for make in (rule.state, rule.session):
        made = make(configured(rule), overlap, N, dtype)
        assert len(made._fields) == len(made)
        for array in made:
            assert array.shape == (N,)
            assert array.dtype == dtype
            assert not array.any()
        assert not any(np.shares_memory(a, b) for i, a in enumerate(made) for b in made[:i])


@both_types
@with_and_without_overlap
def test_state_survives_a_checkpoint_bit_for_bit(rule: Rule, dtype: Any, overlap: bool) -> None:
    lived = started(rule, dtype, overlap=overlap)
    for worker, d in script(dtype, pushes=9):
        lived.push(worker, d, lr=LR)
    restored = dataclasses.replace(
        lived,
        center=lived.center.copy(),
        state=through_bytes(lived.state),
        sessions={worker: through_bytes(session) for worker, session in lived.sessions.items()},
        decisions=copy.deepcopy(lived.decisions),
        numbers=dict(lived.numbers),
        started_from=dict(lived.started_from),
    )
    assert bits(restored) == bits(lived)
    for worker, d in script(dtype):
        lived.push(worker, d, lr=LR)
        restored.push(worker, d, lr=LR)
    assert bits(restored) == bits(lived)
    assert restored.details() == lived.details()


@both_types
def test_types_of_numbers_are_kept(rule: Rule, dtype: Any) -> None:
    server = started(rule, dtype)
    for worker, d in script(dtype):
        reply = server.push(worker, d, lr=LR)
        assert reply is None or reply.dtype == dtype
    assert server.center.dtype == dtype
    assert {array.dtype for kept in (server.state, *server.sessions.values()) for array in kept} <= {np.dtype(dtype)}
    assert server.stats.dtype == np.float64
    assert all(type(figure) is float and np.isfinite(figure) for figure in server.details().values())


def test_decisions_are_pure_and_carry_a_reason(rule: Rule) -> None:
    config, random, decisions = configured(rule), np.random.default_rng(7), None
    for number in range(1, 13):
        worker = f"w{random.integers(3)}"
        facts = Facts(worker, number, 1, int(random.integers(9)), float(random.random()), 32, LR)
        known = copy.deepcopy(decisions)
        admitted, effects = rule.admit(config, decisions, facts)
        assert decisions == known, "the state it was given is untouched"
        assert (admitted, effects) == rule.admit(config, known, facts)
        assert all(effect.reason.strip() for effect in effects)
        gone, effects = rule.leave(config, admitted, worker)
        assert (gone, effects) == rule.leave(config, admitted, worker)
        assert all(effect.reason.strip() for effect in effects)
        decisions = admitted


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
    cluster = Cluster(lr=LR, overlap=overlap)
    run = simulate(rule, configured(rule), objective, cluster, seed=0, pushes=2000)
    assert progress_left(objective, run) < 0.01
    by_worker = [sum(e.worker == f"w{i}" for e in run.exchanges) for i in range(len(cluster.step_s))]
    assert min(by_worker) > 0, "everyone took part"


@both_types
def test_replay_is_bit_identical(rule: Rule, objective: Objective, dtype: Any) -> None:
    one, other, another = (
        simulate(rule, configured(rule), objective, Cluster(lr=LR), seed=seed, pushes=150, dtype=dtype)
        for seed in (4, 4, 5)
    )
    assert one.exchanges == other.exchanges
    assert bits(one.server) == bits(other.server)
    assert one.exchanges != another.exchanges, "the seed counts"


def test_who_leaves_leaves_nobody_hanging(rule: Rule) -> None:
    cluster = Cluster(lr=LR, leave_s=((0, 20.0), (4, 31.0)))
    run = simulate(rule, configured(rule), Quadratic(), cluster, seed=2, pushes=1500)
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
        assert not info.description.endswith("."), f"the description of {name} ends a sentence of its own"
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
        wrong += [(below if "exclusiveMinimum" in one else below - 1, [f"{below:.12g}"])]
        wrong += [(above if "exclusiveMaximum" in one else above + 1, [f"{above:.12g}"])]
        wrong += [(float("nan"), []), (float("inf"), [])]
    return wrong


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
