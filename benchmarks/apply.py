"""Applying an update: how near the block kernels of every rule come to copying memory.

    complete update in a slot -> decode, kernels, encode the reply, block by block -> center and reply    (a round)

What a round runs is what a server runs: `Shard.push_work` on the `KernelPool`. The rule's own decisions say which
kernels that are. Two workers push in turn; pushes that run other kernels, or move other bytes, are cases of their own,
named by the number of the first of their kind: of `fedbuff` push 1 is added up and push 10 moves the center too. Sizes,
codecs and threads are those of the options, all else is a server's default, such as a reply in fp32.

Bytes that must move, whatever the kernels do:

    read the payload    read, write each vector of center, rule and session that is needed, changed    write the reply

each once, though several kernels in turn may want it: a block stays in the cache meanwhile. Which vectors these are is
tried out, not listed: what is NaN in one and shows elsewhere is needed. Figures of a block (`stats`) are not counted.

Peers: `numpy.copyto` of two vectors of the model's size, read and write counted, called once, and in as many threads as
the kernels have. `times as fast` compares bytes per second. Before the clock starts an update has been received and
checked; the reply is not sent.

Checked after the last round: center, arrays and reply repeat a short pattern bit for bit, so that no block was left
out, and on the pattern they are what `common.replay` comes to in float64.

Left out, each with a sentence: rules that refuse a server's defaults, that schedule, or that cut the vector.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from queue import Empty, SimpleQueue
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console

from benchmarks import harness
from benchmarks.harness import Benchmark, BenchmarkError, Case, Competitor, Result, Row
from common import rules
from common.buffers import zeros
from common.chunks import Plan
from common.codecs.base import BLOCK_ELEMENTS, F32
from common.config import ServerSettings
from common.errors import ConfigError
from common.layout import Layout, Tensor
from common.node import JobDone, Run
from common.replay import RuleServer
from common.rules.base import Arrays, Effect, Facts, Floats, Member, Reply, computes, reply_to
from paramserver.kernel_pool import KernelPool
from paramserver.shard import CENTER, Shard, Work

MB = 1_000_000
CODECS = ("fp32", "bf16", "int8")
COPY = "numpy.copyto"
WORKERS = ("a", "b")
KIND_PUSHES = 64
"""So many pushes are looked at for kinds of their own."""
PERIOD = 1024
"""Elements after which the update repeats: a group of int8, the largest first, so that a shorter group is no other."""
START, STEP = 0.5, 2.0**-6
"""Value of the center before the first round, and the largest of the update."""
TOLERANCE = 1e-5
"""Of the largest value of a vector: a dozen rounds in float32 against float64."""

SizeMb = Annotated[int, typer.Option("--size-mb", min=1, help="Size of the model, 10^6 bytes.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of the kernels; all cores if not given.")
]
Only = Annotated[list[str] | None, typer.Option("--only", help="Only cases with this in their name; repeat for more.")]


class Push(NamedTuple):
    """One kind of push, under one rule and one codec."""

    settings: ServerSettings
    number: int
    """Of the first of its kind."""
    effects: tuple[Effect, ...]
    needed: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def reply(self) -> Reply | None:
        """The answer to who pushed; None where the push is held."""
        return reply_to(WORKERS[0], self.effects)

    @property
    def replies(self) -> bool:
        """Whether a reply is encoded."""
        return self.reply is not None and self.reply.what != "nothing"

    def moved_bytes(self, shard: Shard) -> int:
        """Payload, vectors and reply."""
        vectors = 4 * shard.layout.elements * (len(self.needed) + len(self.changed))
        return shard.longest_update + vectors + (shard.downs[0].bytes if self.replies else 0)

    def sentence(self) -> str:
        """What it moves."""
        read, written = ("payload", *self.needed), (*self.changed, *(("reply",) if self.replies else ()))
        return f"reads {', '.join(read)}; writes {', '.join(written)}"


def run(
    size_mb: SizeMb = 100,
    threads: Threads = None,
    rounds: harness.Rounds = 9,
    only: Only = None,
    json_file: harness.JsonFile = None,
) -> None:
    """Measure, print, write."""
    console, threads = Console(), threads or os.cpu_count() or 1
    elements = size_mb * MB // 4
    found: list[Row] = []
    results: list[Result] = []
    copied: dict[str, tuple[Case, tuple[float, ...]]] = {}
    with closing(_Pool(threads)) as pool:
        for name in rules.names():
            if why := left_out(name):
                console.print(f"{name} is left out: {why}", style="dim", highlight=False)
                continue
            for cases in _turns(name, elements, pool, only, console):
                copies = _copies(elements, threads, pool)
                measured = harness.measure([*copies, *cases], rounds)
                found += harness.rows(BENCHMARK.name, measured)[len(copies) :]
                results += measured[len(copies) :]
                for copy in measured[: len(copies)]:
                    _, before = copied.get(copy.case.name, (copy.case, ()))
                    copied[copy.case.name] = (copy.case, before + copy.seconds)
    if not results:
        raise BenchmarkError(f"No case has {only} in its name.")
    copies_done = [Result(case, seconds) for case, seconds in copied.values()]
    settings = {"threads": threads, "rounds": rounds, "parameters": f"{elements:,}", "reply": "fp32"}
    found += harness.rows(BENCHMARK.name, copies_done)
    harness.report(BENCHMARK.name, [*results, *copies_done], settings, json_file, found)


# What a rule does with a push


def left_out(name: str) -> str | None:
    """None, or the sentence that says why the kernels of this rule are not measured."""
    rule = rules.load(name)
    try:
        settings = [ServerSettings(rule=name, codec=codec) for codec in CODECS]
    except ConfigError as error:
        return str(error)
    config = settings[0].rule_config()
    if rule.schedules:
        return "it says itself when somebody pushes, and copies what is pushed."
    if not rule.elementwise or rule.fragments(config) > 1:
        return "a push is not of the whole vector, block by block."
    return next((why for one in settings if (why := rule.fits(config, one.terms()))), None)


def pushes(settings: ServerSettings) -> list[Push]:
    """The kinds of pushes there are when two workers push in turn, by the number of their first."""
    rule, config = rules.load(settings.rule), settings.rule_config()
    decisions = rule.start(config, settings.terms())
    for worker in WORKERS:
        decisions, _ = rule.join(config, decisions, Member(worker), 0.0)
    found: dict[tuple[Any, ...], Push] = {}
    for number in range(1, KIND_PUSHES + 1):
        worker = WORKERS[number % 2]
        facts = Facts(worker, number, 1, 0, 0.0, 1, 0.1, float(number), 0)
        decisions, effects = rule.admit(config, decisions, facts)
        if computes(effects):
            push = _tried(settings, number, _as_first(worker, effects))
            kinds = tuple(type(effect) for effect in push.effects)
            found.setdefault((kinds, push.needed, push.changed), push)
    return list(found.values())


def _as_first(worker: str, effects: Sequence[Effect]) -> tuple[Effect, ...]:
    """Without the replies to others, which are work of their own, and as if the first of the workers had pushed."""
    own = [effect for effect in effects if not isinstance(effect, Reply) or effect.worker == worker]
    return tuple(effect._replace(worker=WORKERS[0]) if isinstance(effect, Reply) else effect for effect in own)


def _tried(settings: ServerSettings, number: int, effects: tuple[Effect, ...]) -> Push:
    """The push with the vectors it needs and changes, found on a small model."""
    push = Push(settings, number, effects, (), ())
    model = _Model(push, PERIOD)
    work, vectors = model.work(), model.vectors()

    def fill(spoiled: str) -> bool:
        """Whether the work finds all finite, where one vector holds nothing but NaN."""
        for index, (name, vector) in enumerate(vectors.items()):
            vector.fill(np.nan if name == spoiled else 1.0 + index / 128)
        return bool(work.run(0, work.parts, np.zeros(BLOCK_ELEMENTS, np.float32)))

    fill("")
    changed = tuple(name for index, name in enumerate(vectors) if (vectors[name] != 1.0 + index / 128).any())
    needed = []
    for name in vectors:
        finite = fill(name)
        shows = [other for other, vector in vectors.items() if np.isnan(vector).any()]
        if not finite or shows != [name] * (name not in changed):
            needed.append(name)
    # A vector that is changed to something finite, whatever it was, is only written.
    return push._replace(needed=tuple(needed), changed=changed)


class _Model:
    """A shard of its own with one session, one update as received, and room for the reply."""

    def __init__(self, push: Push, elements: int) -> None:
        settings = push.settings
        self.push, self.elements = push, elements
        self.shard = shard = Shard(
            Layout((Tensor("weight", (1, elements), "float32", "parameter"),)),
            rules.load(settings.rule),
            settings.rule_config(),
            settings.terms(),
            codec=settings.codec,
            reply_codec=settings.reply_codec,
            epoch=0,
        )
        self.session = shard.session_arrays().arrays
        self.up = shard.ups[0][settings.codec]
        self.update = zeros(self.up.bytes, np.uint8)
        self.reply = zeros(shard.downs[0].bytes, np.uint8)
        values = zeros(elements, np.float32)
        for first in range(0, elements, PERIOD):
            values[first : first + PERIOD] = _pattern()[: elements - first]
        self.up.encode(values, self.update)
        values.fill(START)
        data = zeros(shard.exact.bytes, np.uint8)
        shard.exact.encode(values, data)
        for work in (
            shard.load_work(data),
            shard.read_work(self.reply, CENTER, None, self.session, "anchor"),
        ):
            work.run(0, work.parts, np.zeros(BLOCK_ELEMENTS, np.float32))

    def work(self) -> Work:
        """One push."""
        push = self.push
        return self.shard.push_work(0, self.up, self.update, self.session, push.effects, push.reply, self.reply, ())

    def vectors(self) -> dict[str, F32]:
        """All that a push may change."""
        return _named(self.shard.center, self.shard.state, self.session)


def _named(center: Floats, state: Arrays, session: Arrays) -> dict[str, Floats]:
    """Center, and each row of the arrays of rule and session, by name. A row: (elements,)."""
    found = {"center": center}
    for owner, arrays in (("rule", state), ("session", session)):
        for name, array in arrays._asdict().items():
            for index, row in enumerate(array.reshape(-1, center.size)):
                found[f"{owner}.{name}" + (f"[{index}]" if array.ndim > 1 else "")] = row
    return found


def _pattern() -> F32:
    """(PERIOD,) of both signs and many sizes."""
    return np.asarray(STEP * np.cos(0.37 * np.arange(PERIOD)), np.float32)


# Competitors


class _Pool:
    """The server's threads, and a clock."""

    def __init__(self, threads: int) -> None:
        self._done: SimpleQueue[JobDone | BaseException] = SimpleQueue()
        self._pool = KernelPool(threads, self._done.put, self._done.put)

    def seconds(self, work: Work) -> float:
        """What the work takes; raises BenchmarkError where it fails, hangs or comes to NaN."""
        started = time.perf_counter()
        try:
            done = self._pool.run(Run(1, *work)) or self._done.get(timeout=harness.ROUND_LIMIT_S)
        except Empty:
            raise BenchmarkError(f"The kernels were not done within {harness.ROUND_LIMIT_S:g} s.") from None
        spent = time.perf_counter() - started
        if isinstance(done, BaseException):
            raise BenchmarkError("The kernels failed.") from done
        if not all(done.results):
            raise BenchmarkError("The kernels came to NaN or infinity.")
        return spent

    def close(self) -> None:
        """End the threads."""
        self._pool.close()


def _turns(name: str, elements: int, pool: _Pool, only: list[str] | None, console: Console) -> Iterator[list[Case]]:
    """Cases that are open together: one kind of push, in all codecs."""
    kinds = [push for codec in CODECS for push in pushes(ServerSettings(rule=name, codec=codec))]
    numbers = list(dict.fromkeys(push.number for push in kinds))
    for number in numbers:
        cases: list[Case] = []
        for push in (push for push in kinds if push.number == number):
            title = f"{name} {push.settings.codec}" + (f" push {number}" if len(numbers) > 1 else "")
            if only and not any(part in title for part in only):
                continue
            each = push.moved_bytes(_Model(push, PERIOD).shard) / PERIOD
            if not cases:
                console.print(f"{title}: {each:g} bytes an element, {push.sentence()}", style="dim", highlight=False)
            moved = round(each * elements)
            cases.append(Case(title, 4 * elements, moved, False, partial(_kernels, push, elements, pool)))
        if cases:
            yield cases


@contextmanager
def _kernels(push: Push, elements: int, pool: _Pool) -> Iterator[Competitor]:
    model = _Model(push, elements)
    done = 0

    def one_round() -> float:
        nonlocal done
        done += 1
        return pool.seconds(model.work())

    yield Competitor(lambda: None, one_round, lambda: _check(model, done), ())


def _copies(elements: int, threads: int, pool: _Pool) -> list[Case]:
    """The memory itself: by one thread, and by as many as the kernels have."""
    size_bytes = 4 * elements
    alone = Case(COPY, size_bytes, 2 * size_bytes, True, partial(_copy, elements, _clocked))
    together = partial(_copy, elements, pool.seconds)
    return [alone, *([Case(f"{COPY}, {threads} threads", size_bytes, 2 * size_bytes, True, together)] * (threads > 1))]


def _clocked(work: Work) -> float:
    started = time.perf_counter()
    work.run(0, work.parts, np.zeros(0, np.float32))
    return time.perf_counter() - started


@contextmanager
def _copy(elements: int, seconds: Callable[[Work], float]) -> Iterator[Competitor]:
    here, there = zeros(elements, np.float32), zeros(elements, np.float32)

    def copy(first: int, last: int, scratch: F32) -> bool:
        part = slice(first * BLOCK_ELEMENTS, last * BLOCK_ELEMENTS)
        np.copyto(there[part], here[part])
        return True

    def one_round() -> float:
        here[:: elements - 1] += 1.0
        return seconds(Work(-(-elements // BLOCK_ELEMENTS), elements, copy))

    def verify() -> None:
        if not np.array_equal(here, there):
            raise BenchmarkError("The copy is not what was copied.")

    yield Competitor(lambda: None, one_round, verify, ())


# Checking


def _check(model: _Model, times: int) -> None:
    """Raise BenchmarkError unless so many pushes came to what they should, everywhere."""
    expected, reply = _expected(model.push, model.up, model.update, times)
    found = model.vectors()
    if model.push.replies:
        assert reply is not None
        expected["reply"], found["reply"] = reply, zeros(model.elements, np.float32)
        model.shard.downs[0].decode(model.reply, found["reply"])
    for name, vector in found.items():
        whole = vector.size // PERIOD * PERIOD
        first, rest = vector[:PERIOD], vector[whole:]
        if (vector[:whole].reshape(-1, PERIOD) != first).any() or (rest != first[: rest.size]).any():
            raise BenchmarkError(f"Not every block of {name} came to the same.")
        wrong = float(np.abs(first - expected[name]).max() / max(np.abs(expected[name]).max(), STEP))
        if not wrong <= TOLERANCE:
            raise BenchmarkError(f"{name} is wrong by {wrong:.1e} of its largest value after {times} pushes.")


def _expected(push: Push, up: Plan, update: Any, times: int) -> tuple[dict[str, Floats], Floats | None]:
    """The vectors, by name, (PERIOD,) float64, and the last reply, after so many pushes of the decoded update."""
    block = up.blocks[0]
    d = up.values(block, update, np.zeros(BLOCK_ELEMENTS, np.float32))[:PERIOD].astype(np.float64)
    again = push.effects if push.reply else (*push.effects, Reply(WORKERS[0], "nothing", "so that it may push again"))
    rule = rules.load(push.settings.rule)._replace(admit=lambda config, decisions, facts: (decisions, list(again)))
    config, terms = push.settings.rule_config(), push.settings.terms()
    server = RuleServer.start(rule, config, np.full(PERIOD, START), overlap=terms.overlap, terms=terms)
    server.join(WORKERS[0])
    reply = None
    for _ in range(times):
        reply = server.push(WORKERS[0], d).replies.get(WORKERS[0])
    return _named(server.center, server.state, server.sessions[WORKERS[0]]), reply


BENCHMARK = Benchmark("apply", "how fast do the kernels of every rule apply an update, against numpy.copyto?", run)
