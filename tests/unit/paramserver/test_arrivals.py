"""Arrivals as bytes: what is read is what was written, wherever the file was cut, and no flipped bit goes unnoticed."""

from __future__ import annotations

import ast
import inspect
import io
import math
import textwrap
from typing import Any

import pytest

from common.errors import StateError
from common.messages import Version
from common.node import JobDone, Received, Released, Run, Send, Tick, Unsendable
from paramserver.arrivals import (
    HEAD_BYTES,
    MAGIC,
    Arrival,
    Begin,
    End,
    Record,
    Started,
    Stopped,
    Torn,
    head,
    left_of,
    pack,
    read,
)
from paramserver.core import Saved, SaveFailed, ServerCore, Stop

EVENTS = [
    Started(),
    Received(b"\x00peer", [b"header", b"\x00payload\xff" * 20]),
    Received(b"peer", [b"header"]),
    Received(b"", []),
    Received(b"peer", [b"", b"", b"third"]),
    JobDone(7, [None, None, None]),
    Released((2**40, 1)),
    Tick(),
    Unsendable(b"peer", "the peer is gone"),
    Saved(Version(2, 10), 0.1),
    SaveFailed("No room: \udcff."),
    Stop("SIGTERM"),
]
RECORDS: list[Record] = [
    Begin("paramserver 0", 3, {"rule": "gem", "rule_settings": {"kappa": 0.1}, "bind": ["a"]}, Version(2, 9), "ab"),
    *(Arrival(event, math.pi * i, ("token",) * (i % 3), 2**64 - 1 - i) for i, event in enumerate(EVENTS)),
    Arrival(Tick(), 1e300, raised="AssertionError"),
    Stopped("the disk is full."),
    End(Version(3, 12), "00ff"),
]


def written(records: list[Record]) -> bytes:
    packed = [pack(record) for record in records]
    return MAGIC + b"".join(head(one) + one[0] + b"".join(one[1]) for one in packed)


def found(data: bytes) -> list[Any]:
    return list(read(io.BytesIO(data), "arrivals-3.log"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(getattr(record, "event", record)).__name__)
def test_what_is_read_is_what_was_written(record: Record) -> None:
    assert found(written([record])) == [record]


def test_a_life_without_a_checkpoint_is_written_and_read() -> None:
    begin = Begin("paramserver 0", 1, {}, None, "")
    assert found(written([begin])) == [begin]


def test_every_event_of_the_core_has_a_form() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(ServerCore.handle)))
    cases = {
        node.cls.id for node in ast.walk(tree) if isinstance(node, ast.MatchClass) and isinstance(node.cls, ast.Name)
    }
    assert cases - {"Attached"} == {type(event).__name__ for event in EVENTS} - {"Started"}, "no memory is shared then"


def test_an_event_without_a_form_is_no_silence() -> None:
    with pytest.raises(TypeError, match="Run has no form"):
        pack(Arrival(Run(1, 1, 1, lambda *_: None), 0.0))


def test_wherever_a_file_is_cut_what_is_whole_stands() -> None:
    data = written(RECORDS)
    ends = [len(written(RECORDS[:count])) for count in range(len(RECORDS) + 1)]
    for length in range(len(data)):
        whole = sum(end <= length for end in ends) - 1
        torn = [] if length in ends else [Torn(length - max([end for end in ends if end <= length], default=0))]
        assert found(data[:length]) == [*RECORDS[: max(whole, 0)], *torn], length


def test_zeros_after_a_power_cut_are_a_torn_end() -> None:
    for zeros in (1, HEAD_BYTES, 5000):
        assert found(written(RECORDS) + bytes(zeros)) == [*RECORDS, Torn(zeros)]


def test_no_flipped_bit_goes_unnoticed() -> None:
    data = written(RECORDS)
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 1 << at % 8
        with pytest.raises(StateError, match=r"arrivals-3\.log") as error:
            found(bytes(broken))
        assert error.value.fix


def test_a_hash_that_fits_nonsense_is_told_as_well() -> None:
    for body in (b"", b"\xc1", b"\x91\xa4nope", b"\x90", b"\x92\xa3job\x01"):
        one = (body, ())
        with pytest.raises(StateError, match=f"record 1, at byte {len(MAGIC)}"):
            found(MAGIC + head(one) + body)


def test_a_file_of_something_else_is_refused() -> None:
    with pytest.raises(StateError, match="no log of arrivals that this version reads"):
        found(b"arrivals 1\n")


def test_what_left_is_headers_jobs_and_the_beginning_of_arrays() -> None:
    def left(header: bytes = b"h", payload: bytes = b"p", hold: int = 1, job: int = 1) -> int:
        return left_of([Send(b"peer", [header, payload], hold), Run(job, 2, 3, lambda *_: None)])

    assert left() == left()
    assert len({left(), left(header=b"i"), left(payload=b"q"), left(job=2)}) == 4
    assert left(payload=b"p", hold=0) == left(payload=b"q", hold=0)
    assert left_of([]) == 0
