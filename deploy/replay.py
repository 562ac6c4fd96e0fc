"""A rule, checked by hand: updates, reports, leaves and time in, one line of JSON out for what each of them did.

    case = read("gem.json")                 or "-": standard input
    for line in replay(case): ...           what `paramserver replay` prints

Laws
* Everything is decided and computed by the rule itself, through `common.replay.RuleServer`, in the dtype that is asked
  for. This file computes nothing but what is said below.
* A line holds exactly what a float holds: what is printed, read back, is the same bits. One case, one trace.
* All of a case is checked before its first line; what only the run can show (a worker pushes while it is held) ends it.
* Every worker starts from the center; all have joined before the first entry, as "0", "1" ...; under a rule that
  schedules each has reported that it has done no step yet. What that led to is the line of entry 0.
* Where workers keep parameters of their own (`rule.private`), an update is these parameters, and the rule's own worker
  half makes of them what is pushed, merges replies, tracks the anchor and pulls.
* What the rule refuses (PeerError) changes nothing, but that its number is used up.

Left out: what `RuleServer` leaves out; joining later, and coming back; `overlap`; rules that cut the vector.
"""

from __future__ import annotations

import copy
import json
import math
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common import rules
from common.codecs.base import BLOCK_ELEMENTS
from common.discovery import nearest
from common.errors import ConfigError, PeerError
from common.replay import Result, RuleServer
from common.rules.base import Apply, Arrays, Config, Floats, Order, Rule, Terms

MAX_BYTES = 64 << 20
MAX_ENTRIES = 100_000
MAX_COUNT = 10**9
"""Steps, samples or seconds of one entry."""

SHOWN = "docs/replay.md shows a whole file."


class _Strict(BaseModel):
    """JSON as it must be: no unknown key, no text for a number, nothing that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Scalars(_Strict):
    """What rides on a push."""

    loss: float = Field(default=0.0, description="the mean training loss since the last push, a number")
    samples: int = Field(default=1, ge=0, le=MAX_COUNT, description="the samples trained on since the last push")
    steps: int = Field(default=1, ge=0, le=MAX_COUNT, description="H, the optimizer steps since the last push")
    lr: float = Field(default=0.01, ge=0.0, description="the learning rate of the inner optimizer")


class Push(_Strict):
    """A worker pushes."""

    worker: int = Field(ge=0, description="a worker's number, from 0")
    update: list[float] = Field(
        description="a list of as many finite numbers as the center has: D, or the worker's parameters where the rule "
        "lets it keep its own"
    )
    scalars: Scalars = Field(Scalars(), description="an object: loss, samples, steps, lr")


class Report(_Strict):
    """Under a rule that schedules: a worker has done one more step."""

    worker: int = Field(alias="report", ge=0, description="a worker's number, from 0")
    loss: float | None = Field(description="the loss of the step, a number; null where it is not finite")
    x: list[float] | None = Field(
        None, description="the worker's parameters after the step, a list of numbers; pulls act on them"
    )


class Leave(_Strict):
    """A worker is gone for good."""

    worker: int = Field(alias="leave", ge=0, description="a worker's number, from 0")


class Tick(_Strict):
    """Time passes."""

    seconds: float = Field(alias="tick", ge=0.0, le=MAX_COUNT, description="a number of seconds, in [0, 1e9]")


Entry: TypeAlias = Push | Report | Leave | Tick
ENTRIES: dict[str, type[Entry]] = {"worker": Push, "report": Report, "leave": Leave, "tick": Tick}
"""By the key that tells them apart."""


class Input(_Strict):
    """The whole file."""

    rule: str = Field(description="the name of a rule; `paramserver rules` lists them")
    config: dict[str, Any] = Field(default_factory=dict, description="an object with settings of the rule")
    dtype: Literal["float64", "float32"] = Field("float64", description="float64 or float32")
    center: list[float] = Field(min_length=1, max_length=BLOCK_ELEMENTS, description="a list of 1 to 65,536 numbers")
    workers: int = Field(ge=1, le=1024, description="a whole number, 1 to 1024")
    script: list[Any] = Field(max_length=MAX_ENTRIES, description="a list of up to 100,000 entries")


class Case(NamedTuple):
    """What a file says, checked. center: (n,) float32 or float64."""

    source: str
    rule: Rule
    config: Config
    center: Floats
    workers: int
    script: tuple[Entry, ...]


Model = TypeVar("Model", bound=BaseModel)


# Reading


def read(file: str) -> Case:
    """The case in a file, or on standard input where it is "-"; raises ConfigError."""
    source = "standard input" if file == "-" else file
    try:
        if file == "-":
            if sys.stdin is None:
                raise ValueError("it is closed")
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with open(file, "rb") as opened:
                data = opened.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: no such stream, or no such name
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{source} cannot be read: {why}.", fix="Name a JSON file, or - for stdin.") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{source} has more than {MAX_BYTES >> 20} MiB.", fix="Use fewer entries or elements.")
    return parse(data, source)


def parse(data: bytes, source: str) -> Case:
    """The case in `data`, JSON; `source` is named in every refusal. Raises ConfigError."""
    found = _validated(Input, _json(data, source), source)
    rule = rules.load(found.rule)
    config = rules.configure(rule, found.config)
    if refusal := rule.fits(config, Terms(workers=found.workers)):
        raise ConfigError(refusal, fix=f"Change 'workers' or 'config' in {source}.")
    center = _vector(found.center, found.dtype, f"'center' of {source}")
    script = tuple(
        _entry(raw, f"Script entry {number} of {source}", rule, center, found.workers)
        for number, raw in enumerate(found.script, 1)
    )
    return Case(source, rule, config, center, found.workers, script)


def _json(data: bytes, source: str) -> Any:
    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ConfigError(f"{source} has the key {twice!r} twice in one object.", fix="Remove one of them.")
        return found

    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=once)
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # a lone surrogate could not even be refused by name
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{source} is not JSON: {error.msg} at {place}.", fix=SHOWN) from None
    except UnicodeError:
        raise ConfigError(f"{source} is not JSON: it is not UTF-8 text.", fix=SHOWN) from None
    except (ValueError, RecursionError):
        raise ConfigError(
            f"{source} is not JSON that can be read: a number is too long, or the nesting too deep.", fix=SHOWN
        ) from None
    return found


def _entry(raw: Any, where: str, rule: Rule, center: Floats, workers: int) -> Entry:
    """One entry of the script, checked as far as the file alone can tell."""
    kinds = [ENTRIES[key] for key in ENTRIES if isinstance(raw, dict) and key in raw]
    if len(kinds) != 1:
        names = ", ".join(f"'{key}'" for key in ENTRIES)
        raise ConfigError(f"{where} must have exactly one of the keys {names}; it is {_short(raw)}.", fix=SHOWN)
    entry: Entry = _validated(kinds[0], raw, where)
    if not isinstance(entry, Tick) and entry.worker >= workers:
        raise ConfigError(
            f"{where} names worker {entry.worker}, but 'workers' is {workers}.",
            fix=f"Workers are numbered 0 to {workers - 1}; raise 'workers' to have more.",
        )
    if isinstance(entry, Report) and not rule.schedules:
        raise ConfigError(
            f"{where} is a report, but rule '{rule.name}' does not schedule: only under a rule that does do workers "
            "report.",
            fix="Give the loss in the 'scalars' of an update.",
        )
    for name, values in _vectors_of(entry):
        vector = _vector(values, center.dtype.name, f"'{name}' in script entry{where.removeprefix('Script entry')}")
        if vector.size != center.size:
            raise ConfigError(
                f"{where}: '{name}' has length {vector.size}, 'center' has {center.size}.",
                fix="Give one number for each element of the center.",
            )
    return entry


def _vectors_of(entry: Entry) -> Iterator[tuple[str, list[float]]]:
    if isinstance(entry, Push):
        yield "update", entry.update
    elif isinstance(entry, Report) and entry.x is not None:
        yield "x", entry.x


def _vector(values: list[float], dtype: str, where: str) -> Floats:
    """(n,) of that dtype; raises ConfigError where it cannot hold a value."""
    with np.errstate(over="ignore"):
        made: Floats = np.array(values, dtype)
    if not np.isfinite(made).all():
        i = int(np.argmin(np.isfinite(made)))
        raise ConfigError(f"{where}: element {i}, {values[i]!r}, is too large for {dtype}.", fix="Use float64.")
    return made


def _validated(model: type[Model], raw: Any, where: str) -> Model:
    """`raw` as `model`; raises ConfigError that says in one sentence what is wrong first."""
    known = {field.alias or name: field for name, field in model.model_fields.items()}
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} must be a JSON object; it is {_short(raw)}.", fix=SHOWN)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
    place, kind = first["loc"], first["type"]
    name = ".".join(part for part in place if isinstance(part, str))
    key, described = str(place[-1]), known.get(str(place[0]))
    if len(place) > 1 and place[0] == "scalars":
        known, described = dict(Scalars.model_fields), Scalars.model_fields.get(key)
    if kind == "extra_forbidden":
        keys = f"The keys are {', '.join(known)}."
        raise ConfigError(f"{where} has an unknown key '{name}'{nearest(key, known)}.", fix=keys)
    fix = f"'{name}' is {described.description}." if described is not None else SHOWN
    if kind == "missing":
        raise ConfigError(f"{where} lacks '{name}'.", fix=fix)
    element = f"element {place[-1]} of " if isinstance(place[-1], int) else ""
    message = first["msg"][0].lower() + first["msg"][1:]
    raise ConfigError(f"{where}: {element}'{name}' cannot be {_short(first['input'])}: {message}.", fix=fix)


def _short(value: Any) -> str:
    """As JSON writes it, cut where it is long."""
    return reprlib.repr(value) if isinstance(value, str | list | dict | int) else json.dumps(value)


# Replaying


@dataclass
class _Worker:
    """x, anchor, sent: (n,), followed only where workers keep parameters of their own."""

    x: Floats | None
    """None: it has trained on, and its report did not tell."""
    anchor: Floats
    sent: Floats
    steps: int = 0
    """Reported so far."""
    until: int = 0
    """Steps the last order lets it do."""
    pushed_at: int = 0
    """Entry of its last push."""
    left_at: int = 0
    """Entry of its leave; 0: it is here."""


def replay(case: Case) -> Iterator[str]:
    """One line of JSON for each entry, in order; raises ConfigError where one makes no sense when its turn comes."""
    run = _Run(case)
    if run.begun is not None:
        yield run.begun
    for number, entry in enumerate(case.script, 1):
        yield run.take(number, entry)


class _Run:
    """A server, its workers, and what becomes of one entry after the other."""

    def __init__(self, case: Case) -> None:
        self._case = case
        terms = Terms(workers=case.workers)
        self._server = server = RuleServer.start(case.rule, case.config, case.center, terms=terms)
        self._workers: dict[str, _Worker] = {}
        effects = []
        for i in range(case.workers):
            anchor = server.join(str(i))
            self._workers[str(i)] = _Worker(anchor.copy(), anchor, np.zeros_like(anchor))
            effects += server.joined.effects if server.joined is not None else []
        if case.rule.schedules:
            for name in self._workers:
                effects += server.report(name, 0, 0.0).effects
        orders = [effect for effect in effects if isinstance(effect, Order)]
        begun = Result("none", 0.0, {}, orders, effects)
        self.begun = self._line(0, "start", None, begun, {}) if effects else None
        """The line of entry 0, where joining led to anything."""

    @np.errstate(over="ignore", invalid="ignore")  # what is not finite is refused in words
    def take(self, number: int, entry: Entry) -> str:
        """Carry one entry out; its line."""
        match entry:
            case Push():
                return self._push(number, entry)
            case Report():
                return self._report(number, entry)
            case Leave(worker=i):
                worker = self._present(number, i, "leaves")
                result = self._server.leave(str(i))
                worker.left_at = number
                return self._line(number, "leave", i, result, {})
            case Tick(seconds=seconds):
                result = self._server.tick(seconds)
                return self._line(number, "tick", None, result, {"at_s": self._server.now_s})

    def _push(self, number: int, entry: Push) -> str:
        case, server, i, name = self._case, self._server, entry.worker, str(entry.worker)
        worker = self._present(number, i, "pushes")
        if name in server.held:
            waits = case.rule.waits(case.config, server.decisions)
            fix = f"It waits for {', '.join(f'worker {one}' for one in waits)}." if waits else ""
            raise ConfigError(
                f"{self._where(number)}: worker {i} pushes, but its update of entry {worker.pushed_at} is held.",
                fix=f"{fix} Let them push or leave first, or let time pass with a tick.".lstrip(),
            )
        pushed = np.array(entry.update, case.center.dtype)
        x = pushed
        if case.rule.private:
            pushed = np.empty_like(x)
            case.rule.update(case.config, x, worker.anchor, pushed)
        before, kept = server.center.copy(), copy.deepcopy(server.sessions[name])
        try:
            result = server.push(name, pushed, **entry.scalars.model_dump())
        except PeerError as error:
            refused = {"code": error.code.value, "sentence": str(error)}
            return self._line(number, "push", i, Result("rejected", 0.0, {}, [], []), refused)
        self._expect_finite(number, {"center": server.center})
        worker.x, worker.sent, worker.pushed_at = x, pushed, number
        details: dict[str, Any] = {}
        if any(isinstance(effect, Apply) for effect in result.effects):
            figures = {key: value if math.isfinite(value) else None for key, value in server.details().items()}
            rule, now = case.rule, server.sessions[name]
            found = rule.vectors(case.config, before, kept, server.center, server.state, now)
            details = {**figures, **self._listed(number, found)}
        return self._line(number, "push", i, result, {"details": details})

    def _report(self, number: int, entry: Report) -> str:
        i, loss = entry.worker, entry.loss
        worker = self._present(number, i, "reports")
        if worker.steps >= worker.until:
            raise ConfigError(
                f"{self._where(number)}: worker {i} reports step {worker.steps + 1}, but the last order lets it train "
                f"until it has done {worker.until}.",
                fix="`orders` of the lines before say who is to train, upload or pull now.",
            )
        worker.steps += 1
        worker.x = None if entry.x is None else np.array(entry.x, self._case.center.dtype)
        result = self._server.report(str(i), worker.steps, float("nan") if loss is None else loss)
        return self._line(number, "report", i, result, {})

    def _present(self, number: int, i: int, does: str) -> _Worker:
        worker = self._workers[str(i)]
        if worker.left_at:
            raise ConfigError(
                f"{self._where(number)}: worker {i} {does}, but it left with entry {worker.left_at}.",
                fix="Remove the entry; workers do not come back in a replay.",
            )
        return worker

    def _moved(self, result: Result) -> dict[str, Floats]:
        """Let workers take their replies and follow their orders; x of those whose parameters that changed."""
        rule, config = self._case.rule, self._case.config
        moved: dict[str, Floats] = {}
        for name, reply in result.replies.items():
            worker = self._workers[name]
            if not rule.private or worker.x is None:
                continue
            rule.merge(config, worker.x, reply)
            if rule.track is not None:
                rule.track(config, worker.anchor, worker.sent, reply)
            else:
                worker.anchor = reply.copy()
            moved[name] = worker.x
        for order in result.orders:
            worker = self._workers[order.worker]
            worker.until = order.until
            for source in order.pull:
                if rule.pull is not None and worker.x is not None:
                    rule.pull(config, worker.x, source, self._server.pull(order.worker, source))
                    moved[order.worker] = worker.x
        return moved

    def _line(self, number: int, event: str, i: int | None, result: Result, more: Mapping[str, Any]) -> str:
        """What every line has first, then what there is to tell."""
        case, server, name = self._case, self._server, str(i)
        center = self._listed(number, {"center": server.center})["center"]
        replies = self._listed(number, result.replies)
        weighed = event == "push" and result.outcome != "rejected"
        deadline_s = case.rule.deadline(case.config, server.decisions)
        line: dict[str, Any] = {
            "entry": number,
            "event": event,
            "worker": i,
            "version": server.version,
            "outcome": result.outcome,
            "weight": result.weight if weighed else None,
            "center": center,
            "reply": replies.pop(name, None),
        }
        told: dict[str, Any] = {
            **more,
            "replies": replies,
            "orders": [{**order._asdict(), "worker": int(order.worker)} for order in result.orders],
            "x": self._listed(number, self._moved(result)),
            "reasons": [effect.reason for effect in result.effects if not isinstance(effect, Order)],
            "figures": case.rule.figures(case.config, server.decisions),
            "waits": [int(one) for one in case.rule.waits(case.config, server.decisions)],
            "state": self._listed(number, _named(server.state)),
            "session": self._listed(number, _named(server.sessions[name])) if name in server.sessions else {},
        }
        if deadline_s is not None:
            line["deadline_s"] = deadline_s
        return json.dumps(line | {key: value for key, value in told.items() if value not in ({}, [])}, allow_nan=False)

    def _listed(self, number: int, arrays: Mapping[str, Floats]) -> dict[str, Any]:
        """Arrays as JSON; raises ConfigError where one is not finite."""
        self._expect_finite(number, arrays)
        return {name: array.tolist() for name, array in arrays.items()}

    def _expect_finite(self, number: int, arrays: Mapping[str, Floats]) -> None:
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise ConfigError(
                    f"{self._where(number)}: '{name}' is not finite after it; a server would take nothing more.",
                    fix="Use smaller numbers, or float64.",
                )

    def _where(self, number: int) -> str:
        return f"Script entry {number} of {self._case.source}"


def _named(arrays: Arrays) -> dict[str, Floats]:
    found: dict[str, Floats] = arrays._asdict()
    return found
