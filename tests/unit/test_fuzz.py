"""Whatever bytes arrive: the wire raises WireError or nothing, a codec CodecError or nothing, and a server neither
falls nor changes its center. `make fuzz` gives every codec 20,000 examples instead of a few hundred.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import typing
from typing import Any, get_args, get_origin, get_type_hints

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import codecs, messages, wire
from common.codecs.base import Codec
from common.errors import Code, CodecError, WireError
from common.layout import Layout, Tensor
from common.messages import PROTOCOL, Message, Version
from common.node import JobDone, Received, Record, Released, Run, Say, Send, Tick
from paramserver.core import Exit, Save
from tests.cluster import Desk, Hand

KINDS = get_args(Message)
ACTIONS = (Send, Run, Record, Say, Save, Exit)
PROFILE = {
    "deadline": None,
    "derandomize": "FUZZ_EXAMPLES" not in os.environ,
    "suppress_health_check": list(HealthCheck),
}

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150")) // 2
"""Of each codec, half of them bytes, half vectors."""

integers = st.sampled_from([0, 1, 2, 3, 2**31, 2**53 - 1]) | st.integers(0, 2**53 - 1)
numbers = st.floats() | integers
texts = st.sampled_from(["", "w", "push", "init", "fp32", "int8", "x" * 1000, "\x01" * 1000]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=20
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
byte = st.integers(0, 255)
payloads = st.binary(max_size=64) | st.sampled_from([b"", bytes(32), bytes(40), b"\xff" * 32, bytes(1 << 20)])


def values(hint: Any, session: Any, name: str) -> st.SearchStrategy[Any]:
    """Plain values for a field of that type: of the live session where that is how they get furthest."""
    known = {"session": texts | st.just(session.session), "connection": integers | st.just(session.connection)}
    if name in known:
        return known[name] | st.just(getattr(session, name))
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (int, float, str, bool):
        return {int: integers, float: numbers, str: texts, bool: st.booleans()}[hint]
    if hint is Version:
        return st.lists(integers, min_size=2, max_size=2) | st.just([1, 1])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(values(arguments[0], session, ""), max_size=5) | st.just(["fp32"])
    if origin is dict:
        return st.dictionaries(texts, st.booleans() | integers | numbers | texts, max_size=3)
    if type(None) in arguments:
        return st.none() | values(arguments[0], session, "")
    return fields(hint, session)


def fields(cls: type[Any], session: Any) -> st.SearchStrategy[dict[str, Any]]:
    hints = {name: hint for name, hint in get_type_hints(cls, vars(messages)).items() if name != "payload"}
    return st.fixed_dictionaries({name: values(hint, session, name) for name, hint in hints.items()})


def frames(cls: type[Any], header: dict[str, Any], payload: bytes) -> list[bytes]:
    """A message of that type as it is sent, also where its values are none."""
    packed = msgpack.packb({"protocol": PROTOCOL, "type": cls.__name__.lower(), **header})
    return [packed, payload] if payload else [packed]


@st.composite
def messages_of_a_stranger(draw: st.DrawFn, session: Any) -> list[bytes]:
    """Of a type that exists, each field of its type; then perhaps one of them is not."""
    cls = draw(st.sampled_from(KINDS))
    header = draw(fields(cls, session))
    if header and draw(st.integers(0, 3)) == 0:
        header[draw(st.sampled_from(sorted(header)))] = draw(anything)
    payload = draw(payloads) if "payload" in {f.name for f in dataclasses.fields(cls)} else b""
    return frames(cls, header, payload)


# The wire


def decoded(received: list[bytes]) -> None:
    """A message, or WireError; anything else goes through."""
    with contextlib.suppress(WireError):
        assert isinstance(wire.decode(received), KINDS)


@settings(max_examples=200, **PROFILE)
@given(st.lists(st.binary(max_size=200), max_size=4))
def test_random_bytes_are_no_message_or_one(received: list[bytes]) -> None:
    decoded(received)


@settings(max_examples=200, **PROFILE)
@given(st.dictionaries(texts | st.binary(max_size=4), anything, max_size=6), st.sampled_from(KINDS), payloads)
def test_random_maps_are_no_message_or_one(header: dict[Any, Any], cls: type[Any], payload: bytes) -> None:
    packed = msgpack.packb({"protocol": PROTOCOL, "type": cls.__name__.lower()} | header)
    decoded([packed, payload])


@settings(max_examples=150, **PROFILE)
@given(st.data())
def test_mutated_bytes_of_a_valid_message(data: st.DataObject) -> None:
    cls = data.draw(st.sampled_from(KINDS))
    header, *rest = frames(cls, data.draw(fields(cls, Nobody)), b"")
    assert isinstance(wire.decode([header, *rest]), cls), "as it is, it is one"
    mutated = bytearray(header)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(mutated)))
    for attempt in (bytes(mutated), bytes(mutated[:cut]), header + bytes(mutated[cut:])):
        decoded([attempt, *rest])


class Nobody:
    """Whoever has no session."""

    session = ""
    connection = 0


# The codecs


def variants() -> list[str]:
    """Every codec as it is, and with the examples of its parameters."""
    found = []
    for name in codecs.names():
        examples = [parameter.example for parameter in codecs.load(name).parameters]
        found += [":".join([name, *examples[:shown]]) for shown in range(len(examples) + 1)]
    return found


def refusal(attempt: Any, *arguments: Any) -> Code | None:
    """The code of the CodecError that it raises; any other error goes through."""
    try:
        attempt(*arguments)
    except CodecError as error:
        return error.code
    return None


def refused_or_harmless(codec: Codec, data: Any, n: int) -> None:
    """`check` raises CodecError and nothing else; what it passes decodes to finite values, and to the same twice."""
    if code := refusal(codec.check, data, n):
        assert code in {Code.BAD_LENGTH, Code.ENCODING, Code.NON_FINITE}
        return
    x, y = np.full(n, np.nan, np.float32), np.full(n, 7.0, np.float32)
    codec.decode(data, x)
    codec.decode(data, y)
    assert np.isfinite(x).all()
    assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("name", variants())
@settings(max_examples=EXAMPLES, **PROFILE)
@given(data=st.data(), n=st.integers(1, 40) | st.sampled_from([127, 128, 129, 1025, 4095, 4097, 9001]))
def test_codecs_bear_whatever_bytes_arrive(name: str, data: st.DataObject, n: int) -> None:
    """Random bytes, of the right length and of others; and honest ones of which some were changed."""
    codec = codecs.load(name)
    length = codec.encoded_bytes(n)
    kind = data.draw(st.sampled_from(["random", "changed", "changed", "cut"]))
    if kind == "random" and length <= 256:
        received = bytearray(data.draw(st.binary(min_size=length, max_size=length)))
    else:
        random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        if kind == "random":
            received = bytearray(random.bytes(length))
        else:
            x = random.standard_normal(n, dtype=np.float32) * np.float32(2.0) ** np.float32(random.integers(-120, 20))
            out = np.zeros(length, np.uint8)
            codec.encode(x, out, int(random.integers(0, 2**63)))
            received = bytearray(out.tobytes())
    if kind == "changed":
        for _ in range(data.draw(st.integers(1, 6))):
            received[data.draw(st.integers(0, length - 1))] = data.draw(st.sampled_from([0, 1, 127, 128, 255]) | byte)
    if kind == "cut":
        received = received[: data.draw(st.integers(0, length))] + data.draw(st.binary(max_size=9))
    refused_or_harmless(codec, np.frombuffer(bytes(received), np.uint8), n)


@pytest.mark.parametrize("name", variants())
@settings(max_examples=EXAMPLES, **PROFILE)
@given(data=st.data(), seed=st.integers(0, 2**32), n=st.integers(1, 9001))
def test_codecs_bear_whatever_vectors_are_sent(name: str, data: st.DataObject, seed: int, n: int) -> None:
    """Any bit patterns: encoded within the bound, or refused for what is in them."""
    codec = codecs.load(name)
    drawn = np.array(data.draw(st.lists(st.floats(width=32), min_size=1, max_size=12)), np.float32)
    x = np.random.default_rng(seed).choice(drawn, n)
    out = np.zeros(codec.encoded_bytes(n), np.uint8)
    code = refusal(codec.encode, x, out, seed)
    if not np.isfinite(x).all() or np.abs(x).max() > codec.largest:
        assert code == (Code.ENCODING if np.isfinite(x).all() else Code.NON_FINITE)
        return
    assert code is None
    codec.check(out, n)
    y = np.full(n, np.nan, np.float32)
    codec.decode(out, y)
    error = np.abs(y.astype(np.float64) - x).astype(np.float32)
    assert (error <= codec.error_bound(x)).all()


# The server


def unharmed(desk: Desk, before: Any, received: list[bytes], peer: bytes) -> None:
    """One message from a stranger or a liar: valid actions, and the center as it was."""
    actions = desk.core.handle(Received(peer, received), desk.now)
    desk.core.validate()
    while actions:
        action = actions.pop(0)
        assert isinstance(action, ACTIONS)
        match action:
            case Send(_, sent, hold):
                wire.decode(sent)
                if hold:
                    actions += desk.core.handle(Released((hold,)), desk.now)
            case Run():
                actions += desk.core.handle(JobDone(action.job, [action.work(0, action.parts, None)]), desk.now)
        desk.core.validate()
    assert desk.state()[:2] == before[:2]


def live() -> tuple[Desk, Hand, Hand, Any]:
    """A server in training, a worker it knows, and one that has joined but was given no center to push from."""
    desk = Desk()
    hand = desk.join("good")
    hand.push(1)
    liar = Hand(desk, "liar")
    liar.hello()
    return desk, hand, liar, desk.state()


@settings(max_examples=40, **PROFILE)
@given(st.data())
def test_server_bears_whatever_is_sent_from_within_a_session(data: st.DataObject) -> None:
    """Anything but a good update from a worker that may push: its center stays, and the others go on."""
    desk, hand, liar, before = live()
    for _ in range(data.draw(st.integers(1, 8))):
        received = data.draw(messages_of_a_stranger(liar))
        unharmed(desk, before, received, data.draw(st.sampled_from([liar.peer, b"stranger"])))
    desk.event(Tick())
    assert hand.push(2).outcome == "applied"


@settings(max_examples=40, **PROFILE)
@given(st.lists(st.lists(st.binary(max_size=60), min_size=0, max_size=3), min_size=1, max_size=5))
def test_server_bears_random_frames(received: list[list[bytes]]) -> None:
    desk, hand, liar, before = live()
    for one in received:
        unharmed(desk, before, one, liar.peer)
    assert hand.push(2).outcome == "applied"


@settings(max_examples=40, **PROFILE)
@given(st.data())
def test_server_bears_a_worker_that_tells_lies_about_its_push(data: st.DataObject) -> None:
    """Anchored, and in a position to push: each header field is a lie, and what is not applied leaves no trace."""
    desk, hand, liar, _ = live()
    liar.anchor()
    before = desk.state()
    [push] = liar.pieces(1)
    header = msgpack.unpackb(bytes(wire.encode(push)[0]))
    where = header if data.draw(st.booleans()) else header["begin"]
    name = data.draw(st.sampled_from(sorted(where)))
    where[name] = data.draw(anything)
    desk.event(Received(liar.peer, frames(type(push), header, data.draw(payloads))))
    after = desk.state()
    if after[:2] != before[:2]:
        assert after[1] == (1, 2), "applied, once"
    assert after[2] == 0
    assert hand.push(2).outcome == "applied"


names = st.text(max_size=5) | st.sampled_from(["\ud800", "\x00", "x" * 1024, "x" * 1025])
rows = st.tuples(names, st.lists(st.integers(-1, 2**41), max_size=9), names, names, st.lists(names, max_size=2))
layouts = st.one_of(
    st.binary(max_size=50),
    st.lists(rows, max_size=3).map(lambda made: json.dumps(made).encode()),
    st.tuples(names, st.integers(1, 5)).map(
        lambda pair: Layout((Tensor(pair[0], (pair[1],), "float32", "parameter"),)).describe()
    ),
)


@pytest.mark.parametrize("fresh", [True, False])
@settings(max_examples=25, **PROFILE)
@given(layout=layouts, name=texts)
def test_server_bears_any_layout_in_hello(fresh: bool, layout: bytes, name: str) -> None:
    desk = Desk()
    if not fresh:
        desk.join("good")
    for _ in range(2):
        Hand(desk, name).hello(payload=layout)
    assert Desk().join("good")
