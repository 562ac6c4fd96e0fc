"""Messages to frames and back; nothing else.

    frame 0   header: a msgpack map {"protocol": 5, "type": "push", ...fields}, at most 64 KiB
    frame 1   payload: raw bytes, only where there are any, at most one chunk and codec overhead

Laws
* One encoder, one decoder, both derived from the dataclasses in `common.messages`.
* `decode` raises WireError and nothing else, whatever arrives; limits hold before anything is allocated.
* Every field must be there, of its type, within its range; a field nobody knows is refused.
* The payload is passed through untouched: `decode` hands on the buffer it was given.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

import msgpack

from common import messages
from common.errors import Code, WireError
from common.messages import PROTOCOL, Buffer, Message, Version

HEADER_BYTES = 64 * 1024
PAYLOAD_BYTES = (1 << 20) + (1 << 16)
"""One chunk of 1 MiB and what a codec or padding may add to it."""
MAY_LIE_IN_SHARED_MEMORY = (messages.Push, messages.Ack, messages.Offer)
"""Then the payload may be a whole update or reply."""
STRING_BYTES = 1024
ARRAY_ITEMS = 4096
MAP_ITEMS = 256
INTEGER_LIMIT = 1 << 53

Checker = Callable[[object, str], Any]


def encode(message: Message) -> list[Buffer]:
    """Frames of `message`: the header and, where it is not empty, the payload as it was given.

    Raises WireError for what the other side could not read.
    """
    header = _plain(message)
    header["protocol"] = PROTOCOL
    header["type"] = type(message).__name__.lower()
    frames: list[Buffer] = [cast(bytes, msgpack.packb(header, unicode_errors="replace"))]
    if len(frames[0]) > HEADER_BYTES:
        raise WireError(f"A header of {len(frames[0])} bytes cannot be sent.", code=Code.LIMIT)
    payload: Buffer = getattr(message, "payload", b"")
    if len(payload):
        frames.append(payload)
    return frames


def decode(frames: Sequence[Buffer], *, payload_bytes: int = PAYLOAD_BYTES) -> Message:
    """The message in `frames`; raises WireError. payload_bytes: longest update or reply, where memory is shared."""
    if not 1 <= len(frames) <= 2:
        raise WireError(f"A message has one or two frames, not {len(frames)}.")
    if len(frames[0]) > HEADER_BYTES:
        raise WireError(f"The header has {len(frames[0])} bytes, at most {HEADER_BYTES} are allowed.", code=Code.LIMIT)
    header = _unpack(frames[0])
    protocol = header.pop("protocol", None)
    if type(protocol) is not int or protocol != PROTOCOL:
        theirs = f"version {protocol}" if type(protocol) is int else "no version"
        sentence = f"The peer speaks {theirs} of the protocol, this side version {PROTOCOL}."
        raise WireError(f"{sentence} Install the same paramserver on both sides.", code=Code.PROTOCOL_VERSION)
    kind = _KINDS.get(str(header.pop("type", "")))
    if kind is None:
        raise WireError("The header names no type of message that exists.")
    values = _fields(kind, header)
    if len(frames) == 2:
        if not kind.has_payload:
            raise WireError(f"{kind.cls.__name__} carries no payload.")
        limit = payload_bytes if kind.cls in MAY_LIE_IN_SHARED_MEMORY else PAYLOAD_BYTES
        if len(frames[1]) > limit:
            raise WireError(f"The payload has {len(frames[1])} bytes, at most {limit} are allowed.", code=Code.LIMIT)
        values["payload"] = frames[1]
    return cast(Message, kind.cls(**values))


def _unpack(frame: Buffer) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(
            frame,
            strict_map_key=True,
            raw=False,
            max_array_len=ARRAY_ITEMS,
            max_map_len=MAP_ITEMS,
            max_str_len=STRING_BYTES,
            max_bin_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        # msgpack's own errors and UnicodeDecodeError are ValueErrors
        raise WireError(f"The header is no msgpack map within limits: {type(error).__name__}.") from None
    if not isinstance(header, dict):
        raise WireError("The header is no map.")
    return header


class _Shape(NamedTuple):
    """How the fields of a class are written."""

    names: tuple[str, ...]
    values: Callable[[Any], tuple[Any, ...]]
    texts: tuple[str, ...]
    """Those that may be too long."""
    parts: tuple[str, ...]
    """Those that have fields of their own, where they are not None."""


def _plain(message: Any) -> dict[str, Any]:
    """A message, or a part of one, as msgpack's own types, without its payload."""
    shape = _shape(cast(Hashable, type(message)))
    header = dict(zip(shape.names, shape.values(message), strict=True))
    for name in shape.texts:
        if (text := header[name]) is not None and len(text) > STRING_BYTES // 4:
            header[name] = _clipped(text)
    for name in shape.parts:
        if (part := header[name]) is not None:
            header[name] = _plain(part)
    return header


@functools.cache
def _shape(cls: Hashable) -> _Shape:
    hints = {name: hint for name, hint in get_type_hints(cls, vars(messages)).items() if name != "payload"}
    kinds = {name: set(get_args(hint)) if get_args(hint) else {hint} for name, hint in hints.items()}
    names = tuple(hints)
    values = operator.attrgetter(*names)
    return _Shape(
        names,
        values if len(names) > 1 else lambda message: tuple(values(message) for _ in names),
        tuple(name for name in names if get_origin(hints[name]) is not tuple and str in kinds[name]),
        tuple(name for name in names if any(dataclasses.is_dataclass(kind) for kind in kinds[name])),
    )


def _clipped(text: str) -> str:
    """A long text as far as the other side takes it: a sentence may end early, a connection must not."""
    return text.encode("utf-8", "replace")[:STRING_BYTES].decode("utf-8", "ignore")


# Checkers, built once from the type of every field


class _Kind(NamedTuple):
    cls: type[Any]
    checkers: dict[str, tuple[Checker, str]]
    """Of every field, and what an error calls it."""
    has_payload: bool


def _fields(kind: _Kind, header: dict[str, Any]) -> dict[str, Any]:
    if header.keys() != kind.checkers.keys():
        odd = ", ".join(sorted(str(name) for name in header.keys() ^ kind.checkers.keys()))
        raise WireError(f"{kind.cls.__name__} lacks or does not know: {odd[:200]}.")
    return {name: check(header[name], where) for name, (check, where) in kind.checkers.items()}


def _integer(value: object, where: str) -> int:
    if type(value) is not int or not 0 <= value < INTEGER_LIMIT:
        raise WireError(f"{where} is no integer from 0 to 2^53.")
    return value


def _float(value: object, where: str) -> float:
    if type(value) not in (float, int):
        raise WireError(f"{where} is no number.")
    return float(cast(float, value))


def _string(value: object, where: str) -> str:
    if type(value) is not str:
        raise WireError(f"{where} is no string.")
    return value


def _boolean(value: object, where: str) -> bool:
    if type(value) is not bool:
        raise WireError(f"{where} is neither true nor false.")
    return value


def _version(value: object, where: str) -> Version:
    if type(value) is not list or len(value) != 2:
        raise WireError(f"{where} is no (epoch, version).")
    return Version(_integer(value[0], where), _integer(value[1], where))


def _scalar_map(value: object, where: str) -> dict[str, Any]:
    if type(value) is not dict or not all(type(v) in (bool, int, float, str) for v in value.values()):
        raise WireError(f"{where} is no map of plain values.")
    if not all(type(key) is str for key in value):
        raise WireError(f"{where} has a key that is no string.")
    return value


def _tuple_of(item: Checker) -> Checker:
    def check(value: object, where: str) -> tuple[Any, ...]:
        if type(value) is not list:
            raise WireError(f"{where} is no list.")
        return tuple(item(element, where) for element in value)

    return check


def _one_of(allowed: tuple[object, ...]) -> Checker:
    def check(value: object, where: str) -> object:
        if type(value) is not str or value not in allowed:
            raise WireError(f"{where} is none of {', '.join(map(str, allowed))}.")
        return value

    return check


def _optional(inner: Checker) -> Checker:
    return lambda value, where: None if value is None else inner(value, where)


def _nested(cls: type[Any]) -> Checker:
    kind = _kind(cls)

    def check(value: object, where: str) -> object:
        if type(value) is not dict:
            raise WireError(f"{where} is no map.")
        return cls(**_fields(kind, value))

    return check


_PLAIN: dict[object, Checker] = {int: _integer, float: _float, str: _string, bool: _boolean, Version: _version}


def _checker(hint: Any) -> Checker:
    """The checker for a field of type `hint`; an unknown type is a mistake in `common.messages`."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return _one_of(args)
    if origin is tuple:
        return _tuple_of(_checker(args[0]))
    if origin is dict:
        return _scalar_map
    if origin in (Union, types.UnionType) and args[1:] == (type(None),):
        return _optional(_checker(args[0]))
    if dataclasses.is_dataclass(hint):
        return _nested(cast(type[Any], hint))
    raise TypeError(f"no checker for {hint}")


def _kind(cls: type[Any]) -> _Kind:
    hints = get_type_hints(cls, vars(messages))
    has_payload = hints.pop("payload", None) is not None
    checkers = {name: (_checker(hint), f"{cls.__name__}.{name}") for name, hint in hints.items()}
    return _Kind(cls, checkers, has_payload)


_KINDS = {cls.__name__.lower(): _kind(cls) for cls in get_args(Message)}
