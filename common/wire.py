"""Messages to frames and back; nothing else.

    frame 0   header: a msgpack map {"protocol": 5, "type": "push", ...fields}, at most 64 KiB
    frame 1   payload: raw bytes, only where there are any, at most one chunk and codec overhead

Laws
* One encoder, one decoder, both derived from the dataclasses in `common.messages` (`common.fields`).
* `decode` raises WireError and nothing else, whatever arrives; limits hold before anything is allocated.
* Every field must be there, of its type, within its range; a field nobody knows is refused.
* The payload is passed through untouched: `decode` hands on the buffer it was given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import msgpack

from common import messages
from common.errors import Code, WireError
from common.fields import STRING_BYTES, Reader, Writer, reader, writer
from common.messages import PROTOCOL, Buffer, Message

HEADER_BYTES = 64 * 1024
PAYLOAD_BYTES = (1 << 20) + (1 << 16)
"""One chunk of 1 MiB and what a codec or padding may add to it."""
MAY_LIE_IN_SHARED_MEMORY = (messages.Push, messages.Ack, messages.Offer)
"""Then the payload may be a whole update or reply."""
ARRAY_ITEMS = 4096
MAP_ITEMS = 256


def encode(message: Message) -> list[Buffer]:
    """Frames of `message`: the header and, where it is not empty, the payload as it was given.

    Raises WireError for what the other side could not read.
    """
    kind = _KINDS[type(message)]
    header: bytes = msgpack.packb(kind.write(message), unicode_errors="replace")
    if len(header) > HEADER_BYTES:
        raise WireError(f"A header of {len(header)} bytes cannot be sent.", code=Code.LIMIT)
    payload: Buffer = message.payload if kind.has_payload else b""  # type: ignore[union-attr]
    return [header, payload] if len(payload) else [header]


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
    name = header.pop("type", None)
    kind = _KINDS_BY_NAME.get(name) if type(name) is str else None
    if kind is None:
        raise WireError("The header names no type of message that exists.")
    message: Message
    if len(frames) == 1:
        message = kind.read(header, kind.cls.__name__)
        return message
    if not kind.has_payload:
        raise WireError(f"{kind.cls.__name__} carries no payload.")
    limit = payload_bytes if kind.cls in MAY_LIE_IN_SHARED_MEMORY else PAYLOAD_BYTES
    if len(frames[1]) > limit:
        raise WireError(f"The payload has {len(frames[1])} bytes, at most {limit} are allowed.", code=Code.LIMIT)
    message = kind.read(header, kind.cls.__name__, frames[1])
    return message


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


class _Kind(NamedTuple):
    """How messages of one type are written and read."""

    cls: type[Any]
    write: Writer
    read: Reader
    has_payload: bool

    @classmethod
    def of(cls, message: type[Any]) -> _Kind:
        has_payload = any(field.name == "payload" for field in dataclasses.fields(message))
        ends_with = {"protocol": PROTOCOL, "type": message.__name__.lower()}
        return cls(message, writer(message, ends_with), reader(message), has_payload)


_KINDS = {message: _Kind.of(message) for message in get_args(Message)}
_KINDS_BY_NAME = {message.__name__.lower(): kind for message, kind in _KINDS.items()}
