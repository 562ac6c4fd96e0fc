"""What must hold of a push: each way of being wrong has a code, and what is right is taken as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import chunks, codecs
from common.chunks import Plan
from common.codecs.base import U8
from common.errors import Code, PeerError
from common.messages import Begin, Version
from paramserver import intake
from paramserver.session import Transfer
from tests.cluster import LARGE

NOW = Version(2, 10)
PLANS = {name: chunks.plan(LARGE, name) for name in codecs.names()}
ENCODED: dict[str, U8] = {}
for _plan in PLANS.values():
    ENCODED[_plan.codec] = np.zeros(_plan.bytes, np.uint8)
    _plan.encode(np.random.default_rng(5).normal(size=_plan.elements).astype(np.float32), ENCODED[_plan.codec])

every_codec = pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))


def begin(plan: Plan, **changes: Any) -> Begin:
    values = {"session": "s", "connection": 1, "kind": "push", "number": 1, "codec": plan.codec, "bytes": plan.bytes}
    return Begin(**(values | {"fragment": 0, "base": NOW, "merged": 0} | changes))  # type: ignore[arg-type]


def transfer(plan: Plan) -> Transfer:
    return Transfer(begin(plan), plan, 1, 0.0, received=bytearray(len(plan.chunks)))


def refused(code: Code, act: Any, *arguments: Any) -> None:
    with pytest.raises(PeerError) as caught:
        act(*arguments)
    assert caught.value.code == code
    assert caught.value.sentence


@every_codec
def test_begin(plan: Plan) -> None:
    intake.check_begin(begin(plan), ({plan.codec: plan},), NOW)
    intake.check_begin(begin(plan, base=Version(1, 99)), ({plan.codec: plan},), NOW)
    other = next(name for name in PLANS if name != plan.codec)
    assert intake.check_begin(begin(plan), ({other: PLANS[other], plan.codec: plan},), NOW) is plan
    refused(Code.BAD_CHUNK, intake.check_begin, begin(plan, fragment=1), ({plan.codec: plan},), NOW)
    refused(Code.UNKNOWN_CODEC, intake.check_begin, begin(plan, codec=other), ({plan.codec: plan},), NOW)
    for wrong in (0, plan.bytes - 1, plan.bytes + 1, 2**53 - 1):
        refused(Code.BAD_LENGTH, intake.check_begin, begin(plan, bytes=wrong), ({plan.codec: plan},), NOW)
    for future in (Version(2, 11), Version(3, 0)):
        refused(Code.BASE_VERSION, intake.check_begin, begin(plan, base=future), ({plan.codec: plan},), NOW)


@every_codec
@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False))
def test_chunks_in_any_order_are_taken_whole(plan: Plan, random: Any) -> None:
    target, under_way = np.full(plan.bytes, 0xFF, np.uint8), transfer(plan)
    order = list(range(len(plan.chunks)))
    random.shuffle(order)
    for index in order:
        refused(Code.TRUNCATED, intake.check_complete, under_way)
        chunk = plan.chunks[index]
        payload = ENCODED[plan.codec][chunk.offset : chunk.offset + chunk.size].tobytes()
        intake.take_chunk(under_way, target, index, payload)
        refused(Code.BAD_CHUNK, intake.take_chunk, under_way, target, index, payload)
    intake.check_complete(under_way)
    assert target.tobytes() == ENCODED[plan.codec].tobytes()


@every_codec
def test_wrong_chunks(plan: Plan) -> None:
    target, under_way, chunk = np.zeros(plan.bytes, np.uint8), transfer(plan), plan.chunks[0]
    good = ENCODED[plan.codec][: chunk.size].tobytes()
    for payload in (b"", good[:-1], good + b"\0"):
        refused(Code.BAD_LENGTH, intake.take_chunk, under_way, target, 0, payload)
    for index in (len(plan.chunks), 2**53 - 1):
        refused(Code.BAD_CHUNK, intake.take_chunk, under_way, target, index, good)
    refused(Code.TRUNCATED, intake.check_complete, under_way)


def test_values_that_are_not_finite() -> None:
    for name, dtype in (("fp32", np.float32), ("fp16", np.float16)):
        plan = PLANS[name]
        for value in (np.nan, np.inf, -np.inf):
            for index, chunk in enumerate(plan.chunks):
                for place in (0, -1):
                    bad = ENCODED[name][chunk.offset : chunk.offset + chunk.size].copy()
                    block = plan.blocks[chunk.first if place == 0 else chunk.last - 1]
                    size = block.codec.encoded_bytes(block.last - block.first)
                    start = block.offset - chunk.offset
                    bad[start : start + size].view(dtype if block.codec.name == name else np.float32)[place] = value
                    target = np.zeros(plan.bytes, np.uint8)
                    refused(Code.NON_FINITE, intake.take_chunk, transfer(plan), target, index, bad.tobytes())


def test_padding_must_be_zero() -> None:
    plan = PLANS["fp16"]
    padded = [b for b in plan.blocks if b.codec.encoded_bytes(b.last - b.first) < b.size]
    assert padded
    block = padded[0]
    index = next(i for i, c in enumerate(plan.chunks) if c.offset <= block.offset < c.offset + c.size)
    chunk = plan.chunks[index]
    bad = ENCODED["fp16"][chunk.offset : chunk.offset + chunk.size].copy()
    bad[block.offset + block.size - 1 - chunk.offset] = 1
    target = np.zeros(plan.bytes, np.uint8)
    refused(Code.ENCODING, intake.take_chunk, transfer(plan), target, index, bad.tobytes())
