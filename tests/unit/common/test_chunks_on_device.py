"""A plan on tensors: the bytes of the plan on arrays, and as few calls of the codec as may be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common import chunks_on_device, codecs
from common.chunks import Plan, plan
from common.codecs.base import BLOCK_ELEMENTS, F32, U8
from common.codecs.feedback import Memory
from common.errors import Code, CodecError
from common.layout import Layout, Tensor

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
KEY = 0x0123_4567_89AB_CDEF
LAYOUT = Layout(
    (
        Tensor("body", (3 * BLOCK_ELEMENTS + 1234, 1), "float32", "parameter"),
        Tensor("dense", (BLOCK_ELEMENTS + 333,), "float32", "parameter"),
        Tensor("buffer", (77,), "float32", "buffer"),
    )
)
"""Whole blocks, and the ends of sections, whose blocks are padded."""
WAYS = (*codecs.names(), "bf16:stochastic", "int8:64", "int4:32", "topk:0.05:int8", "qsgd:7")

every_way = pytest.mark.parametrize("name", WAYS)
every_device = pytest.mark.parametrize("device", DEVICES)


def update() -> F32:
    return np.random.default_rng(1).standard_normal(LAYOUT.elements, dtype=np.float32)


def encoded(up: Plan, x: F32) -> U8:
    data = np.full(up.bytes, 0xA5, np.uint8)
    up.encode(x, data, key=KEY)
    return data


@every_device
@pytest.mark.parametrize("fragments", [1, 3])
@every_way
def test_the_bytes_and_the_values_are_those_of_arrays(name: str, fragments: int, device: str) -> None:
    x = update()
    flat = torch.from_numpy(x).to(device)
    for fragment in range(fragments):
        up = plan(LAYOUT, name, fragment, fragments)
        known = encoded(up, x)
        data = torch.full((up.bytes,), 0xA5, dtype=torch.uint8, device=device)
        for chunk in up.chunks:  # in pieces, as it is sent
            chunks_on_device.encode(up, flat, data, chunk.first, chunk.last, key=KEY)
        if all(block.codec.same_bytes for block in up.blocks) or device == "cpu":
            assert data.cpu().numpy().tobytes() == known.tobytes()
        values, found = np.zeros_like(x), torch.zeros_like(flat)
        up.decode(data.cpu().numpy(), values)
        chunks_on_device.decode(up, data, found)
        assert found.cpu().numpy().tobytes() == values.tobytes()


@every_way
def test_pieces_are_all_parameters_in_order(name: str) -> None:
    x, values = update(), np.zeros(LAYOUT.elements, np.float32)
    for fragment in range(2):
        up = plan(LAYOUT, name, fragment, 2)
        data, at = encoded(up, x), up.part.start
        up.decode(data, values)
        for part, decode, _ in chunks_on_device.pieces(up, torch.from_numpy(data)):
            assert part.start == at
            found = torch.full((part.stop - part.start,), torch.nan)
            decode(found)
            assert found.numpy().tobytes() == values[part].tobytes()
            at = part.stop
        assert at == up.part.stop


@every_way
def test_blocks_of_one_length_are_done_in_one_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    up = plan(LAYOUT, name)

    def counting(block_codec: codecs.Codec) -> codecs.Codec:
        def encode(x: torch.Tensor, key: int) -> torch.Tensor:
            calls.append(tuple(x.shape))
            return block_codec.device.encode(x, key)

        return block_codec._replace(device=block_codec.device._replace(encode=encode))

    counted = {block.codec.name: counting(block.codec) for block in up.blocks}
    spied = up._replace(blocks=tuple(block._replace(codec=counted[block.codec.name]) for block in up.blocks))
    chunks_on_device.encode(spied, torch.from_numpy(update()), torch.zeros(up.bytes, dtype=torch.uint8), key=KEY)
    body = up.blocks[0].codec
    assert body.device.together == (body.name in ("fp32", "fp16", "bf16", "int8", "int8:64", "int4", "int4:32", "e3m0"))
    whole = [shape for shape in calls if BLOCK_ELEMENTS in shape]
    assert whole[: 1 if body.device.together else 3] == (
        [(3, BLOCK_ELEMENTS)] if body.device.together else 3 * [(BLOCK_ELEMENTS,)]
    )
    monkeypatch.setattr(chunks_on_device, "TOGETHER", 2)
    calls.clear()
    chunks_on_device.encode(spied, torch.from_numpy(update()), torch.zeros(up.bytes, dtype=torch.uint8), key=KEY)
    assert all(len(shape) == 1 or shape[0] <= 2 for shape in calls), "what is needed meanwhile stays bounded"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_way
def test_nan_and_infinity_are_refused_in_every_block(name: str, bad: float) -> None:
    up = plan(LAYOUT, name)
    for block in up.blocks:
        x = torch.from_numpy(update())
        x[block.last - 1] = bad
        with pytest.raises(CodecError) as caught:
            chunks_on_device.encode(up, x, torch.zeros(up.bytes, dtype=torch.uint8), key=KEY)
        assert caught.value.code is Code.NON_FINITE


@every_device
def test_a_matrix_goes_on_from_the_update_that_was_taken(device: str) -> None:
    """As on arrays: what is decoded agrees, up to rounding, and only an update that was taken is a start."""
    layout = Layout((Tensor("body", (600, 300), "float32", "parameter"),))
    random = np.random.default_rng(2)
    x = (random.standard_normal((600, 6)) @ random.standard_normal((6, 300))).astype(np.float32).ravel()
    up = plan(layout, "powersgd")
    host, there = Memory(x.size), Memory(x.size, lambda n: torch.zeros(n, device=device))
    lost = []
    for taken in (True, False, True, True):
        p, q = x.copy(), torch.from_numpy(x).to(device)
        known, data = np.zeros(up.bytes, np.uint8), torch.zeros(up.bytes, dtype=torch.uint8, device=device)
        up.encode(p, known, key=KEY, before=host.before)
        chunks_on_device.encode(up, q, data, key=KEY, before=there.before)
        values, found = np.zeros_like(x), torch.zeros_like(q)
        up.decode(known, values)
        chunks_on_device.decode(up, data, found)
        np.testing.assert_allclose(found.cpu().numpy(), values, atol=1e-3 * np.abs(values).max())
        host.remember(p, up.pieces(known))
        there.remember(q, chunks_on_device.pieces(up, data))
        before = {first: bytes(start) for first, start in host.before.items()}
        for memory in (host, there):
            memory.settle(taken=taken)
        assert (before == {first: bytes(start) for first, start in host.before.items()}) == (not taken)
        assert host.before.keys() == there.before.keys()
        lost.append(float(np.linalg.norm(p - values)) / float(np.linalg.norm(p)))
    assert lost[-1] < lost[0]
