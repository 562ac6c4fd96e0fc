"""One encoder and one decoder, inverse to each other for every message; limits; and bytes that must never change."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, get_args, get_origin, get_type_hints

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import messages, wire
from common.errors import Code, WireError
from common.fields import INTEGER_LIMIT
from common.messages import PROTOCOL, Beat, Begin, Diversity, Hello, Message, Push, Scalars, Version, Welcome

KINDS = get_args(Message)
TEXT = 1024
"""Longest text on the wire, bytes."""
LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(0, INTEGER_LIMIT - 1),
    float: st.floats(allow_nan=False),
    str: st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    bool: st.booleans(),
}


def of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type, whatever it is in `common.messages`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in LEAVES:
        return LEAVES[hint]
    if hint is Version:
        return st.builds(Version, LEAVES[int], LEAVES[int])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(of(arguments[0]), max_size=4).map(tuple)
    if origin is dict:
        return st.dictionaries(LEAVES[str], st.one_of(*LEAVES.values()), max_size=4)
    if type(None) in arguments:
        return st.none() | of(arguments[0])
    hints = get_type_hints(hint, vars(messages))
    fields = {name: st.binary(max_size=50) if name == "payload" else of(h) for name, h in hints.items()}
    return st.builds(hint, **fields)


def example(cls: type[Any]) -> Any:
    """Any one message of that type, always the same."""
    plain = {int: 1, float: 0.5, str: "a", bool: True, Version: Version(1, 2)}

    def value(hint: Any) -> Any:
        origin, arguments = get_origin(hint), get_args(hint)
        if hint in plain:
            return plain[hint]
        if origin is typing.Literal:
            return arguments[0]
        if origin in (tuple, dict):
            return origin()
        if type(None) in arguments:
            return None
        return build(hint)

    def build(kind: Any) -> Any:
        hints = get_type_hints(kind, vars(messages))
        return kind(**{name: value(hint) for name, hint in hints.items() if name != "payload"})

    return build(cls)


every_kind = pytest.mark.parametrize("cls", KINDS, ids=[cls.__name__ for cls in KINDS])


@every_kind
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_decode_is_the_inverse_of_encode(cls: type[Any], data: st.DataObject) -> None:
    message = data.draw(of(cls))
    frames = wire.encode(message)
    assert len(frames[0]) <= wire.HEADER_BYTES
    assert wire.decode([bytes(frame) for frame in frames]) == message
    assert wire.decode([memoryview(frame) for frame in frames]) == message, "as a transport hands them on"
    payload = getattr(message, "payload", b"")
    assert frames[1:] == ([payload] if payload else [])


@every_kind
def test_every_field_must_be_there_and_no_other(cls: type[Any]) -> None:
    header = msgpack.unpackb(bytes(wire.encode(example(cls))[0]))
    for name in header:
        with pytest.raises(WireError):
            wire.decode([msgpack.packb({key: value for key, value in header.items() if key != name})])
    with pytest.raises(WireError, match="odd"):
        wire.decode([msgpack.packb(header | {"odd": 1})])


@every_kind
def test_no_field_takes_another_type(cls: type[Any]) -> None:
    header = msgpack.unpackb(bytes(wire.encode(example(cls))[0]))
    for name, value in header.items():
        for wrong in (None, True, 1.5, -1, 2**53, "x", b"", [], {}, [1, 2, 3], {"a": None}):
            if type(wrong) is type(value) or (value is None and wrong is None):
                continue
            allowed = (type(value) is float and type(wrong) is int) or (wrong in ([], {}) and value in ([], {}, ()))
            if allowed or name == "what":
                continue
            with pytest.raises(WireError):
                wire.decode([msgpack.packb(header | {name: wrong})])


@every_kind
def test_payload_only_where_there_is_one(cls: type[Any]) -> None:
    header = bytes(wire.encode(example(cls))[0])
    if any(field.name == "payload" for field in dataclasses.fields(cls)):
        big = memoryview(bytearray(wire.PAYLOAD_BYTES))
        message: Any = wire.decode([header, big])
        assert message.payload is big, "handed on as it is"
        with pytest.raises(WireError) as caught:
            wire.decode([header, bytes(wire.PAYLOAD_BYTES + 1)])
        assert caught.value.code == Code.LIMIT
    else:
        with pytest.raises(WireError, match="no payload"):
            wire.decode([header, b"x"])
    for frames in ([], [header, b"", b""]):
        with pytest.raises(WireError):
            wire.decode(frames)


def test_header_bytes_do_not_change() -> None:
    """Other versions and other languages read them: a change here is a new protocol version."""
    beat = bytes(wire.encode(Beat("s", 3, 70_000))[0])
    assert beat.hex() == (
        "85a773657373696f6ea173aa636f6e6e656374696f6e03a57374657073ce00011170a870726f746f636f6c05a474797065a462656174"
    )
    push = Push(Begin("s", 1, "push", 2, 0, "fp32", 32, Version(1, 7), 9), Scalars(0.5, 8, 1, 0.25), b"\x00\x01")
    header, payload = wire.encode(push)
    assert payload is push.payload
    assert bytes(header).hex() == (
        "84a5626567696e89a773657373696f6ea173aa636f6e6e656374696f6e01a46b696e64a470757368a66e756d62657202a8667261676d65"
        "6e7400a5636f646563a466703332a5627974657320a462617365920107a66d657267656409a77363616c61727385a46c6f7373cb3fe000"
        "0000000000a773616d706c657308a5737465707301a26c72cb3fd0000000000000a9646976657273697479c0a870726f746f636f6c05a4"
        "74797065a470757368"
    )
    measured = dataclasses.replace(push.scalars, diversity=Diversity(-0.5, 2.0, 3))
    assert bytes(wire.encode(dataclasses.replace(push, scalars=measured))[0]).hex() == (
        "84a5626567696e89a773657373696f6ea173aa636f6e6e656374696f6e01a46b696e64a470757368a66e756d62657202a8667261676d65"
        "6e7400a5636f646563a466703332a5627974657320a462617365920107a66d657267656409a77363616c61727385a46c6f7373cb3fe000"
        "0000000000a773616d706c657308a5737465707301a26c72cb3fd0000000000000a964697665727369747983a86772616469656e74cbbf"
        "e0000000000000a56e6f697365cb4000000000000000ac6d6561737572656d656e747303a870726f746f636f6c05a474797065a4707573"
        "68"
    )


@pytest.mark.parametrize("protocol", [0, PROTOCOL - 1, PROTOCOL + 1, "2", None, True, 1.0])
def test_another_protocol_is_named_before_anything_else_is_read(protocol: object) -> None:
    with pytest.raises(WireError) as caught:
        wire.decode([msgpack.packb({"protocol": protocol, "type": "from the future", "odd": 1})])
    assert caught.value.code == Code.PROTOCOL_VERSION


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        b"\x00",
        b"\x80",
        msgpack.packb([1, 2]),
        msgpack.packb({1: 2}),
        msgpack.packb({"protocol": PROTOCOL}),
        msgpack.packb({"protocol": PROTOCOL, "type": "nothing"}),
        msgpack.packb({"protocol": PROTOCOL, "type": ["beat"]}),
        msgpack.packb({"protocol": PROTOCOL, "type": "Beat"}),
        msgpack.packb({"protocol": PROTOCOL, "type": "beat"}) + b"\x00",
        msgpack.packb({"protocol": PROTOCOL, "type": "query", "what": "x" * (TEXT + 1)}),
        msgpack.packb({"protocol": PROTOCOL, "type": "query", "what": ["x"] * (wire.ARRAY_ITEMS + 1)}),
        msgpack.packb({"protocol": PROTOCOL, "type": "query", "what": {str(i): 1 for i in range(wire.MAP_ITEMS + 1)}}),
        msgpack.packb({"protocol": PROTOCOL, "type": "query", "what": b"x"}),
        msgpack.packb({"protocol": PROTOCOL, "type": "query", "what": msgpack.ExtType(1, b"x")}),
        msgpack.packb({"protocol": PROTOCOL, "type": "query", "what": msgpack.Timestamp(1)}),
        b"\x91" * 10_000,
        b"\x81\xa1x" * 10_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x81\xa2\xff\xff\x01",
        bytes(wire.HEADER_BYTES + 1),
    ],
)
def test_no_header(header: bytes) -> None:
    with pytest.raises(WireError) as caught:
        wire.decode([header])
    assert caught.value.sentence


def test_what_is_sent_can_be_read() -> None:
    """Whatever the values, a sender finds out itself that the other side could not read it."""
    welcome = example(Welcome)
    for message in (
        dataclasses.replace(welcome, worker="x" * (TEXT + 1)),
        dataclasses.replace(example(Hello), worker="ü" * TEXT),
        dataclasses.replace(example(messages.Fault), sentence="\udcff"),
    ):
        try:
            frames = wire.encode(message)
        except WireError:
            continue
        wire.decode(frames)
