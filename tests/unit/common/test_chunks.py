"""Laws of the plan: blocks and chunks cover everything once, and what is cut up is put together again."""

from __future__ import annotations

import threading
import time
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import chunks, codecs
from common.chunks import ALIGNMENT_BYTES, CHUNK_BYTES, Block, Plan, plan
from common.codecs.base import BLOCK_ELEMENTS, F32, Codec
from common.errors import CodecError
from common.layout import Layout, Tensor
from common.wire import PAYLOAD_BYTES
from tests.contract.test_codecs import EVERY

CHANGING_S = 0.1
"""How long each codec is given bytes that change."""
every_codec = pytest.mark.parametrize("codec", codecs.names())


def layout_of(body: int, dense: int, buffers: int) -> Layout:
    """A layout with that many elements of each kind; bodies of two dimensions."""
    tensors = []
    if body:
        tensors.append(Tensor("body", (body, 1024), "float32", "parameter"))
    if dense:
        tensors.append(Tensor("dense", (dense,), "float32", "parameter"))
    if buffers:
        tensors.append(Tensor("buffer", (buffers,), "float32", "buffer"))
    return Layout(tuple(tensors))


layouts = st.builds(
    layout_of,
    st.sampled_from([0, 1, 63, 64, 65, 300, 2000]),
    st.sampled_from([1, 2, 3, 7, 1000, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 300_001]),
    st.sampled_from([0, 1, 5, BLOCK_ELEMENTS + 3]),
)


@every_codec
@settings(max_examples=60, deadline=None, derandomize=True)
@given(layout=layouts)
def test_blocks_cover_the_vector_and_chunks_the_bytes(codec: str, layout: Layout) -> None:
    made = plan(layout, codec)
    element = offset = 0
    for block in made.blocks:
        assert block.first == element < block.last <= element + BLOCK_ELEMENTS
        assert block.offset == offset
        assert block.offset % ALIGNMENT_BYTES == 0
        assert 0 <= block.size - block.codec.encoded_bytes(block.last - block.first) < ALIGNMENT_BYTES
        element, offset = block.last, block.offset + block.size
    assert element == made.elements == layout.elements
    assert offset == made.bytes
    index = offset = 0
    for chunk in made.chunks:
        assert chunk.first == index < chunk.last
        assert chunk.offset == offset == made.blocks[chunk.first].offset
        assert chunk.size == sum(block.size for block in made.blocks[chunk.first : chunk.last])
        assert 0 < chunk.size <= CHUNK_BYTES <= PAYLOAD_BYTES
        index, offset = chunk.last, offset + chunk.size
    assert index == len(made.blocks)
    assert offset == made.bytes
    for one, two in zip(made.chunks, made.chunks[1:], strict=False):
        assert one.size + made.blocks[two.first].size > CHUNK_BYTES, "no more chunks than needed"


@every_codec
@settings(max_examples=40, deadline=None, derandomize=True)
@given(layout=layouts)
def test_sections_have_their_codecs(codec: str, layout: Layout) -> None:
    made = plan(layout, codec)
    for index, block in enumerate(made.blocks):
        if block.last <= layout.body:
            expected = made_for(codec, layout, block).name
        elif block.last <= layout.parameters:
            expected = codecs.load(codec).dense
            assert block.first >= layout.body
        else:
            expected = "fp32"
            assert block.first >= layout.parameters
        assert block.codec.name == expected
        assert (index < made.parameter_blocks) == (block.last <= layout.parameters)


def test_plans_of_all_codecs_cut_the_same_blocks() -> None:
    """So that an update in one codec is answered in another, block by block."""
    layout = layout_of(300, 70_001, 9)
    anywhere = [codec for codec in codecs.names() if not codecs.at_rows(codec)]
    assert len({cuts(plan(layout, codec)) for codec in anywhere}) == 1
    assert len({cuts(plan(layout, codec, rows=True)) for codec in codecs.names()}) == 1
    assert plan(layout, "fp32") == plan(layout, "fp32")


# Rows.

SHAPES = [(1, 1024), (3, 1000), (700, 3), (2, 40_000), (5, 70_000), (2000, 64), (1025, 1), (40, 5, 5, 5), (300, 1024)]
matrices = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5)


def of_shapes(shapes: list[tuple[int, ...]], dense: int = 5, buffers: int = 3) -> Layout:
    body = [Tensor(f"body{i}", shape, "float32", "parameter") for i, shape in enumerate(shapes)]
    beside = [Tensor("dense", (dense,), "float32", "parameter"), Tensor("buffer", (buffers,), "float32", "buffer")]
    return Layout((*body, *beside))


def cuts(made: Plan) -> tuple[tuple[int, int], ...]:
    return tuple((block.first, block.last) for block in made.blocks)


def made_for(name: str, layout: Layout, block: Block) -> Codec:
    """What a block of the body is to be encoded in, from its place alone."""
    codec, start = codecs.load(name), 0
    if codec.of_columns is None:
        return codec
    dense = codecs.load(codec.dense)
    for tensor in layout.tensors:
        if start <= block.first < start + tensor.elements:
            columns = tensor.elements // tensor.shape[0]
            assert block.last <= start + tensor.elements, "of one tensor"
            whole = (block.first - start) % columns == 0 == (block.last - start) % columns
            fitting, n = codec.of_columns(columns), block.last - block.first
            return fitting if whole and fitting.encoded_bytes(n) < dense.encoded_bytes(n) else dense
        start += tensor.elements
    raise AssertionError("beyond the layout")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(shapes=matrices, fragments=st.integers(1, 4), name=st.sampled_from(["powersgd", "powersgd:4", "int8"]))
def test_cut_at_rows_every_element_is_in_one_block_of_what_it_is_made_for(
    shapes: list[tuple[int, ...]], fragments: int, name: str
) -> None:
    layout, end = of_shapes(shapes), 0
    for part in range(fragments):
        made = plan(layout, name, part, fragments, rows=True)
        assert cuts(made) == cuts(plan(layout, "fp32", part, fragments, rows=True))
        assert made.part == slice(*(layout.parameters * at // fragments for at in (part, part + 1)))
        for block in made.blocks:
            assert block.first == end < block.last <= end + BLOCK_ELEMENTS
            end = block.last
            if block.last <= layout.body:
                assert block.codec is made_for(name, layout, block)
    assert end == layout.elements


@pytest.mark.parametrize("rows", [False, True])
def test_of_few_parameters_some_fragments_have_none(rows: bool) -> None:
    layout = Layout((Tensor("w", (3,), "float32", "parameter"),))
    made = [plan(layout, "fp32", part, 4, rows=rows) for part in range(4)]
    assert [(p.bytes, p.travels, len(p.chunks), p.whole.size) for p in made] == [(0, 0, 0, 0), *[(8, 1, 1, 8)] * 3]
    assert [p.part for p in made] == [slice(0, 0), slice(0, 1), slice(1, 2), slice(2, 3)]


def test_what_of_a_matrix_travels_in_factors() -> None:
    """As many whole rows as fit a block; the rest, rows that no block holds, and what would not be shorter: halves."""
    matrix = codecs.load("powersgd")

    def factored(*shape: int, fragments: int = 1) -> list[tuple[int, int]]:
        layout = of_shapes([shape])
        plans = [plan(layout, "powersgd", part, fragments) for part in range(fragments)]
        return [(b.first, b.last) for each in plans for b in each.blocks if b.codec.warm is not None]

    assert matrix.of_columns is not None
    assert factored(64, 1024) == [(0, 65_536)]
    assert factored(70, 1024) == [(0, 65_536), (65_536, 71_680)]
    assert factored(66, 1024) == [(0, 65_536)], "of two rows the factors would be longer"
    assert factored(70, 1024, fragments=2) == [(0, 35 * 1024), (36 * 1024, 70 * 1024)], "row 35 is cut"
    assert factored(5, 70_000) == []
    assert factored(700, 3) == []


@pytest.mark.parametrize("up", ["fp32", "int4", "bf16"])
def test_no_plan_is_another_where_no_codec_works_on_matrices(up: str) -> None:
    """Blocks begin at multiples of the longest, whatever the tensors are."""
    layout = of_shapes(SHAPES, 70_001)
    assert not codecs.at_rows(up, "fp32")
    assert codecs.at_rows("fp32", "plain:powersgd")
    starts = [*range(0, layout.body, BLOCK_ELEMENTS), *range(layout.body, layout.parameters, BLOCK_ELEMENTS)]
    assert [block.first for block in plan(layout, up).blocks] == [*starts, layout.parameters]


# Pieces.


def values(elements: int) -> F32:
    return np.random.default_rng(elements).normal(size=elements).astype(np.float32)


@every_codec
def test_in_pieces_is_as_in_one(codec: str) -> None:
    """Any ranges, in any order: the same bytes, the same values, and buffers exact."""
    layout = layout_of(200, 70_001, 9)
    made, x = plan(layout, codec), values(layout.elements)
    whole = np.full(made.bytes, 0xAA, np.uint8)
    made.encode(x, whole)
    pieces = np.full(made.bytes, 0x55, np.uint8)
    for index in reversed(range(len(made.blocks))):
        made.encode(x, pieces, index, index + 1)
    assert pieces.tobytes() == whole.tobytes(), "padding is written too"
    for chunk in made.chunks:
        made.check(whole, chunk)
    one, two = np.full(layout.elements, np.nan, np.float32), np.full(layout.elements, np.nan, np.float32)
    made.decode(whole, one)
    for index in reversed(range(len(made.blocks))):
        made.decode(whole, two, index, index + 1)
    assert one.tobytes() == two.tobytes()
    assert one[layout.parameters :].tobytes() == x[layout.parameters :].tobytes()
    landed, opened = np.full(made.bytes, 0x55, np.uint8), np.full(layout.elements, np.nan, np.float32)
    for chunk in reversed(made.chunks):
        payload = whole[chunk.offset : chunk.offset + chunk.size]
        made.take(chunk, payload, landed)
        made.open(chunk, payload, opened)
    assert landed.tobytes() == whole.tobytes()
    assert opened.tobytes() == one.tobytes()
    if codec == "fp32":
        assert one.tobytes() == x.tobytes()


@every_codec
def test_each_block_is_checked(codec: str) -> None:
    layout = layout_of(200, 70_001, 9)
    made, x = plan(layout, codec), values(layout.elements)
    for block in made.blocks:
        bad = x.copy()
        bad[block.last - 1] = np.nan
        with pytest.raises(CodecError):
            made.encode(bad, np.zeros(made.bytes, np.uint8))
    data = np.zeros(made.bytes, np.uint8)
    made.encode(x, data)
    for index, block in enumerate(made.blocks):
        end = block.offset + block.codec.encoded_bytes(block.last - block.first)
        chunk = next(c for c in made.chunks if c.first <= index < c.last)
        for place in range(end, block.offset + block.size):
            data[place] = 1
            payload = data[chunk.offset : chunk.offset + chunk.size]
            with pytest.raises(CodecError, match="padding"):
                made.check(data, chunk)
            with pytest.raises(CodecError, match="padding"):
                made.take(chunk, payload, np.zeros(made.bytes, np.uint8))
            with pytest.raises(CodecError, match="padding"):
                made.open(chunk, payload, np.zeros(layout.elements, np.float32))
            data[place] = 0
        made.check(data, chunk)


def test_whole_blocks_to_a_megabyte() -> None:
    assert chunks.CHUNK_BYTES == 1 << 20
    made = plan(layout_of(1024, 1, 0), "fp32")
    assert [chunk.size for chunk in made.chunks] == [1 << 20] * 4 + [8]


def test_where_encoding_changes_nothing_the_vector_is_encoded_in_place() -> None:
    layout = layout_of(200, 70_000, 8)
    made, x = plan(layout, "fp32"), values(layout.elements)
    data, other = np.zeros(made.bytes, np.uint8), np.zeros(made.bytes, np.uint8)
    flat = made.in_place(data)
    assert flat is not None
    flat[:] = x
    made.encode(flat, data)
    made.encode(x, other)
    assert data.tobytes() == other.tobytes()
    flat[5] = np.inf
    with pytest.raises(CodecError):
        made.encode(flat, data)
    assert plan(layout_of(200, 70_001, 9), "int8").in_place(np.zeros(10, np.uint8)) is None


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _scribble(data: Any, good: Any, bad: Any, running: Any) -> None:
    """Bytes that pass, in turn with such as need not, a stretch at a time, until told to stop."""
    state, rounds = np.uint64(88172645463325252), 0
    while running[0]:
        state ^= state << np.uint64(13)
        state ^= state >> np.uint64(7)
        state ^= state << np.uint64(17)
        first = np.int64(state % np.uint64(data.size))
        last = min(first + 64, data.size)
        source = bad if rounds % 2 else good
        data[first:last] = source[first:last]
        if rounds % 256 == 255:
            data[:] = good
        rounds += 1


@pytest.mark.parametrize("name", EVERY)
def test_what_is_taken_is_what_was_checked_though_it_changes_meanwhile(name: str) -> None:
    """It may lie in the memory of a worker that goes on writing: looked at twice, it would be two different things."""
    layout = Layout((Tensor("w", (200, 1000), "float32", "parameter"), Tensor("b", (5,), "float32", "parameter")))
    found = plan(layout, name)
    random = np.random.default_rng(1)
    good, slot = (np.zeros(found.bytes, np.uint8) for _ in range(2))
    found.encode(random.normal(size=layout.elements).astype(np.float32), good)
    bad = random.integers(0, 256, found.bytes, np.uint8)
    payload, running = good.copy(), np.ones(1, np.int8)
    _scribble(payload, good, bad, np.zeros(1, np.int8))
    thread = threading.Thread(target=_scribble, args=(payload, good, bad, running))
    thread.start()
    flat = np.zeros(layout.elements, np.float32)
    try:
        deadline = time.monotonic() + CHANGING_S
        while time.monotonic() < deadline:
            for chunk in found.chunks:
                piece = payload[chunk.offset : chunk.offset + chunk.size]
                try:
                    found.take(chunk, piece, slot)
                except CodecError:
                    continue
                found.check(slot, chunk)
                found.decode(slot, flat, chunk.first, chunk.last)
                assert np.isfinite(flat).all()
    finally:
        running[0] = 0
        thread.join()
