"""How a flat vector travels in a codec: cut into blocks, packed into chunks.

    vector   [ body              | dense | buffers ]
    blocks   [ b0 | b1 | ... | bi | ... |  ...     ]    at most 65,536 elements, one codec each
    chunks   [ c0            | c1          | ...   ]    whole blocks, at most 1 MiB: one message each

    matrix   [ odd | rows | rows | ... | odd ]          how the body is cut where any codec in use works on matrices

Laws
* Body blocks use the codec, dense blocks what the codec names for them, buffers always fp32.
* A block's encoded bytes start at a multiple of 8 and are zero-padded to one.
* What is done block by block may be done to a run of blocks at once, where their codec sees no seam.
* Both ends compute the same plan from layout and codec names, so no offset ever crosses the wire.
* All plans of one server cut the same blocks: at rows (`rows`) if any of its codecs works on matrices, else anywhere.
  Cut at rows, a block lies within one tensor; whole rows use the codec made for that many columns, where that saves
  anything, and the odd parts (of a row that a fragment cuts, of one longer than a block) what the codec names for dense
  ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np

from common import codecs
from common.codecs import draws
from common.codecs.base import BLOCK_ELEMENTS, F32, U8, Codec
from common.codecs.feedback import Piece
from common.errors import CodecError
from common.layout import Layout

CHUNK_BYTES = 1 << 20
ALIGNMENT_BYTES = 8


class Block(NamedTuple):
    """Elements [first, last) of the vector, encoded at [offset, end) bytes; zeros fill `size` bytes up."""

    codec: Codec
    first: int
    last: int
    offset: int
    end: int
    size: int

    @property
    def padded(self) -> bool:
        """Whether there are such zeros."""
        return self.end < self.offset + self.size


class Chunk(NamedTuple):
    """Blocks [first, last) at [offset, offset + size) bytes: one message."""

    first: int
    last: int
    offset: int
    size: int
    joined: tuple[Block, ...]
    """The same blocks, those of a seamless codec that lie side by side as one: a call of a kernel costs as much as
    10 KB."""


Span: TypeAlias = tuple[int, int, int]
"""Elements [first, last) of the vector, and of how many columns the rows are that they make up; 0: of none."""


class Plan(NamedTuple):
    """All blocks and chunks of one layout in one codec."""

    codec: str
    elements: int
    """Of the whole vector, of which a fragment's plan has only some blocks."""
    travels: int
    """Elements of these blocks."""
    parameter_blocks: int
    """The first so many blocks hold parameters, the others buffers."""
    blocks: tuple[Block, ...]
    chunks: tuple[Chunk, ...]
    whole: Chunk
    """All blocks, as where they lie in shared memory."""
    bytes: int
    verbatim: bool
    """Whether the bytes are the vector's own."""

    @property
    def remembers(self) -> bool:
        """Whether the sender feeds back what encoding loses."""
        return codecs.load(self.codec).remembers

    @property
    def part(self) -> slice:
        """The parameters that travel: all of them, or those of a fragment, which may be none."""
        held = self.blocks[: self.parameter_blocks]
        return slice(held[0].first, held[-1].last) if held else slice(0, 0)

    def pieces(self, data: U8) -> Iterator[Piece]:
        """Every block of parameters, for whoever remembers what encoding lost. data: (bytes,)."""
        for block in self.blocks[: self.parameter_blocks]:
            start = None if block.codec.warm is None else data[block.offset : block.end]
            yield Piece(slice(block.first, block.last), partial(self.decode_block, block, data), start)

    def encode(
        self,
        flat: F32,
        data: U8,
        first: int = 0,
        last: int | None = None,
        *,
        key: int = 0,
        before: Mapping[int, U8] | None = None,
    ) -> None:
        """data: (bytes,) <- flat: (elements,), blocks [first, last). Raises CodecError for NaN or infinity.

        key: of this push, where a codec rounds at random (`draws.of_push`). before: what blocks that start from their
        last update were encoded to in that, by first element (`feedback.Memory.before`).
        """
        for block in self._joined(first, last):
            earlier = before.get(block.first) if before else None
            self.encode_block(block, flat[block.first : block.last], data, key, earlier)

    def check(self, data: U8, chunk: Chunk) -> None:
        """Raise CodecError unless the blocks of `chunk` can be decoded to finite values. data: (bytes,)."""
        for block in chunk.joined:
            encoded, elements = _encoded(block, data, 0)
            block.codec.check(encoded, elements)

    def span(self, first: int, last: int) -> Chunk:
        """Blocks [first, last) as one chunk."""
        return _chunk(self.blocks, first, last)

    def take(self, chunk: Chunk, payload: U8, data: U8) -> None:
        """data: (bytes,) <- payload: (chunk.size,), checked. Raises CodecError.

        Block by block, while it is in the cache. It is checked where it then lies (or as it is copied), so that nobody
        can change it between the check and the use.
        """
        for block in chunk.joined:
            start, end = block.offset, block.offset + block.size
            piece, codec = payload[start - chunk.offset : end - chunk.offset], block.codec
            if codec.open is not None and codec.view is not None:
                encoded, elements = _encoded(block, piece, start)
                codec.open(encoded, codec.view(data[start : start + encoded.size]), self.bytes)
                data[start + encoded.size : end] = 0
            else:
                data[start:end] = piece
                encoded, elements = _encoded(block, data, 0)
                codec.check(encoded, elements)

    def open(self, chunk: Chunk, payload: U8, flat: F32) -> None:
        """flat: (elements,) <- payload: (chunk.size,), each block checked first. Raises CodecError."""
        for block in chunk.joined:
            encoded, elements = _encoded(block, payload, chunk.offset)
            x = flat[block.first : block.last]
            if block.codec.open is not None:
                block.codec.open(encoded, x, 4 * self.elements)
            else:
                block.codec.check(encoded, elements)
                block.codec.decode(encoded, x)

    def in_place(self, data: U8) -> F32 | None:
        """data: (bytes,) -> the vector (elements,) that it is, where encoding changes nothing; else None."""
        return data[: 4 * self.elements].view(np.float32) if self.verbatim else None

    def decode(self, data: U8, flat: F32, first: int = 0, last: int | None = None) -> None:
        """flat: (elements,) <- checked data: (bytes,), blocks [first, last)."""
        for block in self._joined(first, last):
            self.decode_block(block, data, flat[block.first : block.last])

    def _joined(self, first: int, last: int | None) -> Iterable[Block]:
        """Blocks [first, last), joined as those of a chunk are."""
        return self.whole.joined if first == 0 and last is None else _joined(self.blocks[first:last])

    @staticmethod
    def encode_block(block: Block, x: F32, data: U8, key: int = 0, before: U8 | None = None) -> None:
        """data: (bytes,) <- x: (elements of the block,). Raises CodecError for NaN or infinity."""
        codec, out = block.codec, data[block.offset : block.end]
        own = draws.of_block(key, block.first) if codec.stochastic else 0
        if before is not None and codec.warm is not None:
            codec.warm(x, out, own, before)
        else:
            codec.encode(x, out, own)
        if block.padded:
            data[block.end : block.offset + block.size] = 0

    @staticmethod
    def decode_block(block: Block, data: U8, out: F32) -> None:
        """out: (elements of the block,) <- checked data: (bytes,)."""
        block.codec.decode(data[block.offset : block.end], out)

    def runs(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Blocks [first, last) of parameters, cut where their codec sees a seam: (first, last) each."""
        index = first
        for block in _joined(self.blocks[first:last]):
            start = index
            while index < last and self.blocks[index].last <= block.last:
                index += 1
            yield start, index

    def add(self, first: int, last: int, data: U8, c: F32, weight: np.float32, out: F32) -> bool:
        """c: (elements,) += weight x the values of blocks [first, last), a run, of checked `data`: (bytes,), and
        out: (elements,) or (0,) <- c there; whether all of c that changed is finite. Their codec can `add`."""
        run, end = self.blocks[first], self.blocks[last - 1]
        assert run.codec.add is not None
        part = slice(run.first, end.last)
        return run.codec.add(data[run.offset : end.end], c[part], weight, out[part], 4 * self.elements)

    @staticmethod
    def values(block: Block, data: U8, scratch: F32) -> F32:
        """The values of a block of checked `data`, for reading: where they lie if they lie there, else in `scratch`."""
        if block.codec.view is not None:
            return block.codec.view(data[block.offset : block.end])
        values = scratch[: block.last - block.first]
        Plan.decode_block(block, data, values)
        return values


def plan(layout: Layout, codec_name: str, fragment: int = 0, fragments: int = 1, *, rows: bool = False) -> Plan:
    """The plan of `layout` in the codec of that name; of one of so many fragments, which cut the parameters evenly.

    Buffers travel with the last fragment. rows: cut at rows (`codecs.at_rows` of the server's codecs); for a codec that
    works on matrices it is so anyway.
    """
    codec = codecs.load(codec_name)
    dense, raw = codecs.load(codec.dense), codecs.load("fp32")
    low, high = (_cut(layout.parameters, index, fragments) for index in (fragment, fragment + 1))
    body = _rows(layout, low, high) if rows or codec.of_columns else _even(low, min(layout.body, high))
    spans = [(_fitting(codec, dense, last - first, columns), first, last) for first, last, columns in body]
    spans += [(dense, first, last) for first, last, _ in _even(max(layout.body, low), high)]
    if fragment == fragments - 1:
        spans += [(raw, first, last) for first, last, _ in _even(layout.parameters, layout.elements)]
    blocks: list[Block] = []
    offset = 0
    for block_codec, first, last in spans:
        encoded = block_codec.encoded_bytes(last - first)
        blocks.append(Block(block_codec, first, last, offset, offset + encoded, _aligned(encoded)))
        offset += blocks[-1].size
    parameter_blocks = sum(block.last <= layout.parameters for block in blocks)
    verbatim = all(block.codec.view is not None and block.offset == 4 * block.first for block in blocks)
    return Plan(
        codec.name,
        layout.elements,
        sum(last - first for _, first, last in spans),
        parameter_blocks,
        tuple(blocks),
        _pack(blocks),
        _chunk(blocks, 0, len(blocks)),
        offset,
        verbatim,
    )


def _even(start: int, end: int) -> Iterator[Span]:
    """[start, end) in blocks that know of no rows."""
    for first in range(start, end, BLOCK_ELEMENTS):
        yield first, min(first + BLOCK_ELEMENTS, end), 0


def _rows(layout: Layout, low: int, high: int) -> Iterator[Span]:
    """What of [low, high) belongs to the body, in blocks of whole rows of one tensor, and the odd parts beside them."""
    start = 0
    for tensor in layout.tensors:
        if tensor.kind != "parameter" or tensor.dense:
            return
        columns = tensor.elements // tensor.shape[0]
        first, last = max(start, low), min(start + tensor.elements, high)
        whole = BLOCK_ELEMENTS // columns * columns
        top, bottom = (start + columns * row for row in (-((start - first) // columns), (last - start) // columns))
        if whole == 0 or top >= bottom:
            yield from _even(first, last)
        else:
            yield from _even(first, top)
            for at in range(top, bottom, whole):
                yield at, min(at + whole, bottom), columns
            yield from _even(bottom, last)
        start += tensor.elements


def _fitting(codec: Codec, dense: Codec, elements: int, columns: int) -> Codec:
    """The codec of a block of the body, which is whole rows of so many columns; 0: of none."""
    if codec.of_columns is None:
        return codec
    if columns == 0:
        return dense
    fitting = codec.of_columns(columns)
    return fitting if fitting.encoded_bytes(elements) < dense.encoded_bytes(elements) else dense


def _joined(blocks: Sequence[Block]) -> Iterator[Block]:
    """The blocks, those of a seamless codec that lie side by side as one."""
    first, codec, joins = 0, None, False
    for index, block in enumerate(blocks):
        if block.codec is not codec:
            codec, joins = block.codec, block.codec.seamless and not block.codec.stochastic
            if index:
                yield _one(blocks, first, index)
            first = index
        elif not joins or blocks[index - 1].padded:
            yield _one(blocks, first, index)
            first = index
    if blocks:
        yield _one(blocks, first, len(blocks))


def _one(blocks: Sequence[Block], first: int, last: int) -> Block:
    """Blocks [first, last), at least one, which lie side by side."""
    start, end = blocks[first], blocks[last - 1]
    return start._replace(last=end.last, end=end.end, size=end.offset + end.size - start.offset)


def _cut(parameters: int, index: int, fragments: int) -> int:
    """Where fragment `index` starts."""
    return parameters * index // fragments


def _encoded(block: Block, data: U8, offset: int) -> tuple[U8, int]:
    """The bytes of `block` without padding, and its elements. data: bytes from `offset` on; raises CodecError."""
    elements = block.last - block.first
    start, end = block.offset - offset, block.end - offset
    if block.padded and data[end : start + block.size].any():
        raise CodecError("The padding of a block is not zero.")
    return data[start:end], elements


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _chunk(blocks: Sequence[Block], first: int, last: int) -> Chunk:
    """Blocks [first, last) as one chunk; a model of few parameters may have fragments of none."""
    held = blocks[first:last]
    start = held[0].offset if held else 0
    return Chunk(first, last, start, sum(block.size for block in held), tuple(_joined(held)))


def _pack(blocks: list[Block]) -> tuple[Chunk, ...]:
    """As many whole blocks into each chunk as fit 1 MiB."""
    chunks: list[Chunk] = []
    first = 0
    for index in range(1, len(blocks) + 1):
        if index == len(blocks) or blocks[index].offset + blocks[index].size - blocks[first].offset > CHUNK_BYTES:
            chunks.append(_chunk(blocks, first, index))
            first = index
    return tuple(chunks)
